"""Make the tokenizer of a run: train a byte-level BPE or a character tokenizer, or adopt a file."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxstages.config import TokenizerConfig
from jaxstages.data.sentencepiece import read_sentencepiece
from jaxstages.data.tokenizer import (
    SPECIAL_TOKENS,
    UNKNOWN,
    Tokenizer,
    TokenizerSettings,
    errors_as_value_error,
    needed_tokens,
    parse_backend,
    parse_tokenizer,
    read_settings,
    settings_file,
    split_texts,
)
from jaxstages.runtime.console import say
from jaxstages.runtime.files import read_json, write_json, write_text

MAX_WORD_CHARACTERS = 2**10
"""BPE learns from words up to this length: its time grows with the square of it where text has no spaces (DNA,
base64)."""

MAX_UNBROKEN_CHARACTERS = 2**23
"""Characters of all such words together: BPE's memory is a hundred times as large."""

CONTROL = re.compile(r"<.+>|\[.+\]", re.DOTALL)
"""What control tokens look like: "<|im_end|>", "[INST]"."""


def make_tokenizer(
    config: TokenizerConfig, texts: Iterator[str], path: Path, tasks: Iterable[str] = ("chat",)
) -> Tokenizer:
    """Train on `texts`, or adopt the file that the recipe names, and write the tokenizer to `path`.

    An adopted tokenizer gets the control tokens that the tasks need and that it lacks (`needed_tokens`), at the end of
    its vocabulary.

    Args:
        tasks: tasks of all data sets of the recipe.
    """
    settings = None
    match config.kind:
        case "bpe":
            backend = _train_bpe(texts, config.vocab_size)
        case "characters":
            backend = _train_characters(texts)
        case "file":
            backend, settings = _adopt(config.path, tasks)
        case _:
            raise ValueError(f"tokenizer.kind={config.kind!r}; known: bpe, characters, file")

    if settings is None:
        settings_file(path).unlink(missing_ok=True)
    content = backend.to_str(pretty=True)
    # Parse before writing: a tokenizer that can't be used must not stay in the workdir.
    tokenizer = parse_tokenizer(content.encode(), Path(config.path or path))

    if settings is not None:  # before the tokenizer.json, whose presence promises that its settings are there
        names = ("bos_token", "eos_token", "add_bos_token", "chat_template", "tool_template", "stop_tokens")
        write_json(settings_file(path), dict(zip(names, settings, strict=True)))
    write_text(path, content)
    return tokenizer


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()

    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"config.tokenizer.vocab_size={vocab_size}: it needs {smallest} or more")

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_learnable_pieces(texts), trainer)
    return backend


def _learnable_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Split texts for BPE training, and leave out unbroken text beyond `MAX_UNBROKEN_CHARACTERS`."""
    unbroken = 0
    for _, piece in split_texts(texts, MAX_WORD_CHARACTERS):
        if len(piece) == MAX_WORD_CHARACTERS and not re.search(r"\s", piece):
            unbroken += len(piece)
            if unbroken > MAX_UNBROKEN_CHARACTERS:
                continue
        yield piece


def _train_characters(texts: Iterable[str]) -> tokenizers.Tokenizer:
    characters = sorted(set().union(*map(set, texts)))
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, UNKNOWN, *characters])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return backend


def _add_tokens(source: Path, backend: tokenizers.Tokenizer) -> None:
    """Add the tokens that a SentencePiece file does not have: those of `added_tokens_decoder` in tokenizer_config.json,
    or else of added_tokens.json, as in transformers.

    Raises:
        ValueError: their ids do not follow those of the file.
    """
    files = (settings_file(source), source.with_name("added_tokens.json"))
    settings, by_name = (read_json(file) if file.is_file() else {} for file in files)
    if not isinstance(settings, dict) or not isinstance(by_name, dict):
        raise ValueError(f"{files[isinstance(settings, dict)]} is no JSON object")
    with errors_as_value_error(f"the added tokens beside {source} can't be read"):
        added = {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
        # The other file does not say which are control tokens: those that look like one.
        added = added or {int(i): {"content": t, "special": bool(CONTROL.fullmatch(t))} for t, i in by_name.items()}
    for i, token in sorted(added.items()):
        if i < backend.get_vocab_size():
            continue
        flags = {name: token[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in token}
        new = tokenizers.AddedToken(token["content"], special=bool(token.get("special")), **flags)
        (backend.add_special_tokens if new.special else backend.add_tokens)([new])
        if backend.token_to_id(token["content"]) != i:
            raise ValueError(
                f"{source}: its added token {token['content']!r} should have id {i}, not "
                f"{backend.token_to_id(token['content'])}; make a tokenizer.json: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), of transformers"
            )


def _adopt(path: str, tasks: Iterable[str]) -> tuple[tokenizers.Tokenizer, TokenizerSettings | None]:
    """Read an external tokenizer with its settings, and add the control tokens that it lacks."""
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"config.tokenizer.path={path!r}: no such file")
    content = source.read_bytes()
    if source.suffix == ".model":
        with errors_as_value_error(f"{source} can't be read as a model of SentencePiece"):
            content = read_sentencepiece(content).to_str().encode()

    backend = parse_backend(content, source)
    if source.suffix == ".model":
        _add_tokens(source, backend)
    settings = read_settings(source, backend)
    bos_id = backend.token_to_id(settings.bos) if settings and settings.add_bos else None
    if settings and bos_id is not None and backend.post_processor is None:
        backend.post_processor = processors.TemplateProcessing([settings.bos, "$A"], None, [(settings.bos, bos_id)])

    has_template = bool(settings and settings.template)
    has_eos = settings is not None and backend.token_to_id(settings.eos) is not None
    needed = needed_tokens(tasks, template=has_template)
    needed = needed if has_eos or has_template else [SPECIAL_TOKENS[0], *needed]
    if added := [token for token in needed if backend.token_to_id(token) is None]:
        backend.add_special_tokens(added)
        say(f"tokenizer: {source} gets {', '.join(added)}, which the stages need and it lacks", "yellow")
    return backend, settings
