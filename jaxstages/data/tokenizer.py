"""Text <-> token ids: train a byte-level BPE or a character tokenizer, or load any `tokenizer.json` or `.model`."""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxstages.config import TokenizerConfig
from jaxstages.data.chat_template import make_render
from jaxstages.data.sentencepiece import ONE_BYTE, keep_apart, read_sentencepiece
from jaxstages.runtime.files import read_json, write_json, write_text


class Specials(NamedTuple):
    """Ids of the control tokens. Text never yields one of them: they are put between encoded texts, as ids.

    A tokenizer from elsewhere names its own end of a text, and with a chat template its own end of a turn. What no task
    of the recipe needs is not added to it: -1.
    """

    end_of_text: int
    separator: int
    system: int
    user: int
    assistant: int
    end_of_turn: int


SPECIAL_TOKENS = ("<|endoftext|>", "<|sep|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SEPARATOR = SPECIAL_TOKENS[1]
UNKNOWN = "<|unknown|>"
"""Only in a character tokenizer: a character that its training text did not have."""

PIECE = 2**20
"""Characters that are encoded at once: the library takes more than 100 bytes for each."""

LONGEST_WORD, MOST_UNBROKEN = 2**10, 2**23
"""Characters of a word that BPE learns from, and of all such words together: its time grows with the square of the one,
its memory a hundredfold with the other, where text has no spaces (DNA, base64)."""


class Tokenizer(NamedTuple):
    """A tokenizer of a run.

    backend: of the `tokenizers` library.
    sha256: of the files that it was read from.
    begin: ids that a document, or a prompt, begins with.
    template: Jinja that chats are written by; "" is ours.
    bos, eos: as the template is told.
    tool_template: the one for chats with tools; "" is `template` too.
    stops: ids that end what the model says.
    """

    backend: tokenizers.Tokenizer
    specials: Specials
    sha256: str
    begin: tuple[int, ...]
    template: str
    bos: str
    eos: str
    tool_template: str
    stops: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def control(self) -> frozenset[str]:
        """Control tokens, which no text yields and no decoding shows."""
        return frozenset(_special_tokens(self.backend))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids of each text, over all cores. Control tokens that stand in a text are encoded as plain text."""
        parts = [[np.zeros(0, np.int32)] for _ in texts]
        for batch in _batches(_pieces(texts, PIECE)):
            with _refused("this tokenizer can't encode the data; take another"):
                found = self.backend.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (text, _), encoding in zip(batch, found, strict=True):
                parts[text].append(np.asarray(encoding.ids, np.int32))
        return [np.concatenate(ids) for ids in parts]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; control tokens are left out."""
        with _refused("this tokenizer can't decode; take another"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def show(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids for people: control tokens by name. Ids are shown together, for a letter may be several tokens."""
        with _refused("this tokenizer can't decode; take another"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """float32 [V]: UTF-8 bytes of text that each token stands for; 0 for control tokens."""
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])
        sizes = np.zeros(self.vocab_size, np.float32)
        control = {*_special_tokens(self.backend), UNKNOWN}
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if token in control:
                continue
            # A byte-level vocabulary spells each byte as one character; a SentencePiece one marks spaces by U+2581.
            one_byte = ONE_BYTE.fullmatch(token)
            sizes[i] = len(token) if byte_level else 1 if one_byte else len(token.replace("\u2581", " ").encode())
        return sizes


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """All that the library raises as ValueError: its only type is Exception, and a panic of its Rust code is none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error


def _pieces(texts: Iterable[str], most: int) -> Iterator[tuple[int, str]]:
    """Texts in pieces of at most `most` characters, each with the number of its text. Cut is before a space or new line
    where there is one, for there our own tokenizers begin a word anyway."""
    before_space = re.compile(r"(?s).*\S(?=[ \n])")
    for number, text in enumerate(texts):
        start = 0
        while len(text) - start > most:
            found = before_space.match(text, start, start + most + 1)
            end = found.end() if found else start + most
            yield number, text[start:end]
            start = end
        yield number, text[start:]


def _words(texts: Iterable[str]) -> Iterator[str]:
    """Pieces to learn from, without what would take too long or too much memory."""
    unbroken = 0
    for _, piece in _pieces(texts, LONGEST_WORD):
        if len(piece) == LONGEST_WORD and not re.search(r"\s", piece):
            unbroken += len(piece)
            if unbroken > MOST_UNBROKEN:
                continue
        yield piece


def _batches(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """As many pieces at a time as have `PIECE` characters."""
    batch: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece[1]) > PIECE:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece[1])
    if batch:
        yield batch


class Sealed(NamedTuple):
    """A tokenizer's second face, for text that a template wrote: there its control tokens go by secret names, so that
    nothing else in the text can be one.

    names: secret name of each control token. special: those that no text of anybody's may yield; the others (Qwen's
    <think>) are an assistant's words too. cut: a name that no token crosses, and that yields no id itself. seamless:
    whether a cut leaves what follows as it is; SentencePiece's would put a space there.
    """

    names: dict[str, str]
    special: frozenset[str]
    cut: str
    seamless: bool
    backend: tokenizers.Tokenizer

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """int32 [3, n] of each text: ids, and the letters, first and last + 1, that they stand for."""
        cut, found = self.backend.token_to_id(self.cut), []
        for batch in _batches(enumerate(texts)):
            with _refused("this tokenizer can't encode the data; take another"):
                encodings = self.backend.encode_batch([text for _, text in batch], add_special_tokens=False)
            for one in encodings:
                table = np.concatenate([[one.ids], np.reshape(one.offsets, (-1, 2)).T]).astype(np.int32)
                found.append(table[:, table[0] != cut])
        return found


def seal(tokenizer: Tokenizer) -> Sealed:
    """Control are the special tokens, and those of the other added ones that the tokenizer's template writes."""
    secret = secrets.token_hex(16)
    special = frozenset(_special_tokens(tokenizer.backend))
    added = tokenizer.backend.get_added_tokens_decoder()
    templates = tokenizer.template + tokenizer.tool_template
    names = {
        token.content: f"<|{secret}-{i}|>"
        for i, token in added.items()
        if token.content in special or (token.content.strip() and token.content in templates)
    }
    content = json.loads(tokenizer.backend.to_str())
    model, cut = content["model"], f"<|{secret}-cut|>"
    match model["vocab"]:
        case dict() as vocab:
            model["vocab"] = {names.get(token, token): i for token, i in vocab.items()}
        case pieces:
            model["vocab"] = [[names.get(token, token), score] for token, score in pieces]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    content["post_processor"] = None  # it would take spaces off the offsets
    with _refused("this tokenizer's control tokens can't be told from its text; take another"):
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        moved = [t for t, name in names.items() if backend.token_to_id(name) != tokenizer.backend.token_to_id(t)]
        if moved:
            raise ValueError(f"{moved[0]!r} has another id without its name")
    backend.add_special_tokens([cut])
    seamless = not any("\u2581" in token for token in backend.encode(f"{cut}a", add_special_tokens=False).tokens)
    return Sealed(names, special, cut, seamless, backend)


def _special_tokens(backend: tokenizers.Tokenizer) -> list[str]:
    """Control tokens by name, longest first."""
    found = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    return sorted(found, key=len, reverse=True)


class _Dialect(NamedTuple):
    """What stands of a tokenizer beside its `tokenizer.json`."""

    bos: str
    eos: str
    add_bos: bool
    template: str
    tool_template: str
    stops: list[str]


def _config_file(path: Path) -> Path:
    return path.with_name("tokenizer_config.json")


def _read_dialect(path: Path, backend: tokenizers.Tokenizer) -> _Dialect | None:
    """From the files beside a `tokenizer.json`; None if there is none. What they call control tokens becomes so."""
    found: dict[str, Any] = {}
    for file in (path.with_name("special_tokens_map.json"), _config_file(path)):
        if file.is_file():
            content = read_json(file)
            if not isinstance(content, dict):
                raise ValueError(f"{file} is no JSON object")
            found |= {name: value for name, value in content.items() if value is not None}
    templates = _read_templates(path, found.get("chat_template"))
    if templates:
        found["chat_template"] = templates
    if not found:
        return None

    def text_of(name: str, part: str) -> str:
        value = found.get(name, "")
        value = value.get(part) if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise ValueError(f"{name} in {_config_file(path)} is no text: {str(value)[:50]}")
        return value

    bos, eos = text_of("bos_token", "content"), text_of("eos_token", "content")
    listed = {int(i): token for i, token in found.get("added_tokens_decoder", {}).items()}
    control = [token["content"] for i, token in listed.items() if token.get("special")]
    known = {token for token in (bos, eos, *control) if token and backend.token_to_id(token) is not None}
    backend.add_special_tokens(sorted(known - {*_special_tokens(backend)}))
    with _refused(f"{path} can't encode; take another"):
        puts_bos = backend.encode("").ids[:1] == [backend.token_to_id(bos)]
    if path.suffix == ".model":  # it can't say; these classes of transformers do by default
        default = text_of("tokenizer_class", "").startswith(("Llama", "CodeLlama", "Gemma"))
        puts_bos = bool(found.get("add_bos_token", default))
    tool_template = templates.get("tool_use", "") or found.get("tool_template", "")
    stops = found.get("stop_tokens") or _read_stops(path, backend)
    # Of a tokenizer.json, the post-processor counts: transformers reads no add_bos_token beside one.
    return _Dialect(bos, eos, puts_bos, templates.get("default", ""), tool_template, stops)


def _read_templates(path: Path, chat_template: Any) -> dict[str, str]:
    """Chat templates by name: of the config, of chat_template.jinja, and of the folder additional_chat_templates.

    Raises:
        ValueError: none of them is the default.
    """
    match chat_template:
        case None | "":
            templates = {}
        case str():
            templates = {"default": chat_template}
        case list():
            templates = {entry["name"]: entry["template"] for entry in chat_template}
        case _:
            templates = dict(chat_template)
    files = {file.stem: file for file in sorted(path.with_name("additional_chat_templates").glob("*.jinja"))}
    if path.with_name("chat_template.jinja").is_file():
        files["default"] = path.with_name("chat_template.jinja")
    templates |= {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    for name, template in templates.items():
        if not isinstance(template, str):
            raise ValueError(f"{_config_file(path)}: the chat template {name!r} is no text: {str(template)[:50]}")
    if templates and "default" not in templates:
        raise ValueError(
            f"{_config_file(path)} has the chat templates {', '.join(templates)}, and none that is the default; "
            "put the one you want into chat_template.jinja beside it"
        )
    return templates


def _read_stops(path: Path, backend: tokenizers.Tokenizer) -> list[str]:
    """The tokens that the model's own configs end a text with, beside its eos_token."""
    ids: list[int] = []
    for file in (path.with_name("config.json"), path.with_name("generation_config.json")):
        content = read_json(file) if file.is_file() else {}
        named = content.get("eos_token_id") if isinstance(content, dict) else None
        ids += [named] if isinstance(named, int) else named or []
    tokens = [backend.id_to_token(i) for i in dict.fromkeys(ids)]
    return [token for token in tokens if token is not None]


def _foreign_specials(backend: tokenizers.Tokenizer, dialect: _Dialect, path: Path) -> Specials:
    """The end of a text is its eos; that of a turn, the control token that its template writes after an answer, or eos
    where it writes none."""
    eos, answer = backend.token_to_id(dialect.eos), "a test of where an answer ends"
    if eos is None:
        raise ValueError(f"{_config_file(path)}: eos_token {dialect.eos!r} is no token of {path.name}")
    question, following = ({"role": "user", "content": text} for text in ("a test", "what follows"))
    messages = [question, {"role": "assistant", "content": answer}]
    render = make_render(dialect.template, dialect.bos, dialect.eos)
    special = re.compile("|".join(map(re.escape, _special_tokens(backend))))

    def after_answer(messages: list[dict[str, Any]]) -> list[str]:
        text = render(messages, None, False).text
        if answer not in text and messages[-1] is not following:
            raise ValueError(f"the chat template of {path} does not write an answer as it is")
        return special.findall(text.rpartition(answer)[2].partition(following["content"])[0])

    ends, between = after_answer(messages), after_answer([*messages, following])
    # Some write two tokens, of which the second stops; others eos once, at the end of the whole conversation.
    stopping = [token for token in ends if token in (dialect.eos, *dialect.stops) and token in between]
    chosen = (stopping or ends or [dialect.eos])[0]
    end, separator = backend.token_to_id(chosen), backend.token_to_id(SEPARATOR)
    assert end is not None, ends
    return Specials(eos, -1 if separator is None else separator, -1, -1, -1, end)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` that has our control tokens, or a chat template of its own in the config beside it.

    Raises:
        ValueError: no such file, not a tokenizer, or control tokens are missing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer; check config.tokenizer.path, or run `jaxstages prepare` first")
    return _open(path.read_bytes(), path)


def _parse(content: bytes, path: Path) -> tokenizers.Tokenizer:
    with _refused(f"{path} can't be read as a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_buffer(content)
    ids, size = backend.get_vocab(with_added_tokens=True).values(), backend.get_vocab_size(with_added_tokens=True)
    if max(ids, default=0) >= max(size, 1):
        raise ValueError(f"{path}: the ids of its {size} tokens reach {max(ids)}; they must be 0 to {size - 1}")
    return backend


def _open(content: bytes, path: Path) -> Tokenizer:
    backend = _parse(content, path)
    dialect = _read_dialect(path, backend)
    digest = hashlib.sha256(content + (json.dumps(dialect).encode() if dialect else b"")).hexdigest()
    bos, eos, _, template, tool_template, named = dialect or _Dialect("", "", False, "", "", [])
    specials = _foreign_specials(backend, dialect, path) if dialect and template else _our_specials(backend, path, eos)
    begin = () if template else (specials.end_of_text,)
    stops = [specials.end_of_text, specials.end_of_turn, *(backend.token_to_id(token) for token in named)]
    if dialect is not None and dialect.add_bos:
        found = backend.token_to_id(bos)
        if found is None:
            raise ValueError(f"{_config_file(path)}: bos_token {bos!r} is no token of {path.name}")
        begin = (found,)
    backend.encode_special_tokens = True  # a user's "<|end|>" is text, never control
    with _refused(f"{path} can't encode the data; take another"):
        keep_apart(backend, _special_tokens(backend))
    backend.no_padding()
    backend.no_truncation()
    ends = tuple(dict.fromkeys(i for i in stops if i is not None and i >= 0))
    return Tokenizer(backend, specials, digest, begin, template, bos, eos, tool_template, ends)


def _our_specials(backend: tokenizers.Tokenizer, path: Path, eos: str) -> Specials:
    """Our control tokens as far as they are in the vocabulary; a text ends with its own eos, where it has one."""
    end = backend.token_to_id(eos) if eos else None
    ids = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
    ids[0] = ids[0] if end is None else end
    if ids[0] is None:
        raise ValueError(f"{path} lacks the control token {SPECIAL_TOKENS[0]}; let `jaxstages prepare` make it")
    known = [i for i in ids[1:] if i is not None]  # a turn may end as a text does
    if len(set(known)) < len(known):
        raise ValueError(f"{path}: control tokens share an id: {dict(zip(SPECIAL_TOKENS, ids, strict=True))}")
    return Specials(*(-1 if i is None else i for i in ids))


def needed_tokens(tasks: Iterable[str], template: bool) -> list[str]:
    """The control tokens that a recipe's tasks need beside the end of a text.

    Args:
        template: whether the tokenizer has a chat template of its own.
    """
    tasks = set(tasks)
    pairs, chats = tasks & {"seq2seq", "classify"}, "chat" in tasks and not template
    return [*(SPECIAL_TOKENS[1:2] if pairs else ()), *(SPECIAL_TOKENS[2:] if chats else ())]


def make_tokenizer(
    config: TokenizerConfig, texts: Iterator[str], path: Path, tasks: Iterable[str] = ("chat",)
) -> Tokenizer:
    """Train on `texts`, or take the file that the recipe names, and write it to `path`.

    To a tokenizer from elsewhere those control tokens are added, at the end of its vocabulary, that it lacks and that
    the tasks need (see `needed_tokens`).

    Args:
        tasks: of all data sets of the recipe.
    """
    dialect = None
    match config.kind:
        case "bpe":
            backend = tokenizers.Tokenizer(models.BPE())
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
            smallest = len(SPECIAL_TOKENS) + 256
            if config.vocab_size < smallest:
                raise ValueError(f"config.tokenizer.vocab_size={config.vocab_size}: it needs {smallest} or more")
            trainer = trainers.BpeTrainer(
                vocab_size=config.vocab_size,
                special_tokens=list(SPECIAL_TOKENS),
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            backend.train_from_iterator(_words(texts), trainer)
        case "characters":
            letters = sorted(set().union(*map(set, texts)))
            vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, UNKNOWN, *letters])}
            backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
            backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
            backend.decoder = decoders.Fuse()
            backend.add_special_tokens(list(SPECIAL_TOKENS))
        case "file":
            source = Path(config.path)
            if not source.is_file():
                raise ValueError(f"config.tokenizer.path={config.path!r}: no such file")
            content = source.read_bytes()
            if source.suffix == ".model":
                with _refused(f"{source} can't be read as a model of SentencePiece"):
                    content = read_sentencepiece(content).to_str().encode()
            backend = _parse(content, source)
            dialect = _read_dialect(source, backend)
            begin = backend.token_to_id(dialect.bos) if dialect and dialect.add_bos else None
            if dialect and begin is not None and backend.post_processor is None:
                backend.post_processor = processors.TemplateProcessing(
                    [dialect.bos, "$A"], None, [(dialect.bos, begin)]
                )
            ended = dialect is not None and backend.token_to_id(dialect.eos) is not None
            ours = needed_tokens(tasks, template=bool(dialect and dialect.template))
            ours = ours if ended or (dialect and dialect.template) else [SPECIAL_TOKENS[0], *ours]
            backend.add_special_tokens([token for token in ours if backend.token_to_id(token) is None])
        case _:
            raise ValueError(f"tokenizer.kind={config.kind!r}; known: bpe, characters, file")
    if dialect is None:
        _config_file(path).unlink(missing_ok=True)
    content = backend.to_str(pretty=True)
    # Before it is kept: one that can't be used must not stay in the workdir.
    tokenizer = _open(content.encode(), Path(config.path or path))
    if dialect is not None:  # first: where there is a tokenizer.json, it has its config
        names = ("bos_token", "eos_token", "add_bos_token", "chat_template", "tool_template", "stop_tokens")
        write_json(_config_file(path), dict(zip(names, dialect, strict=True)))
    write_text(path, content)
    return tokenizer
