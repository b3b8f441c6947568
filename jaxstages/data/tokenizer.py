"""Text <-> token ids: encode, decode, and load any `tokenizer.json` with the config and chat template beside it.

`train_tokenizer.py` makes new tokenizers, `control_tokens.py` keeps text that users write from becoming control tokens.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from jaxstages.data.chat_template import make_render
from jaxstages.data.sentencepiece import ONE_BYTE, keep_apart
from jaxstages.runtime.files import read_json


class Specials(NamedTuple):
    """Ids of the control tokens. Encoding text never produces them: they are inserted as ids between encoded texts.

    An external tokenizer has its own end-of-text token and, with a chat template, its own end of turn. Tokens that no
    task of the recipe needs are not added to it; their id is -1.
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
"""Stands for characters that the training text did not have. Only character tokenizers have it."""

ENCODE_CHARACTERS = 2**20
"""Characters encoded per call: the library takes more than 100 bytes of memory for each."""


_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_OTHER_BYTES = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHER_BYTES)}
"""The byte that each character of a byte-level vocabulary stands for."""


class Tokenizer(NamedTuple):
    """The tokenizer of a run.

    backend: the tokenizer of the `tokenizers` library.
    sha256: digest of the files that it was read from.
    begin: ids at the beginning of a document or a prompt.
    template: Jinja chat template; "" means the built-in one.
    bos, eos: begin- and end-of-text tokens, as the template sees them.
    tool_template: chat template for conversations with tools; "" means `template`.
    stops: ids that end a generated answer.
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
        """Names of the control tokens, which encoding never produces and decoding leaves out."""
        return frozenset(special_tokens(self.backend))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Encode texts on all cores, int32 ids each. Control tokens spelled in a text are encoded as plain text."""
        ids_of_pieces = [[np.zeros(0, np.int32)] for _ in texts]

        for batch in group_pieces(split_texts(texts, ENCODE_CHARACTERS)):
            with errors_as_value_error("this tokenizer can't encode the data; take another"):
                encodings = self.backend.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (text, _), encoding in zip(batch, encodings, strict=True):
                ids_of_pieces[text].append(np.asarray(encoding.ids, np.int32))

        return [np.concatenate(pieces) for pieces in ids_of_pieces]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode ids to text without control tokens."""
        with errors_as_value_error("this tokenizer can't decode; take another"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def show(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode ids for display, with control tokens by name. Decode them together: a character may be several
        tokens."""
        with errors_as_value_error("this tokenizer can't decode; take another"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """Count the UTF-8 bytes of text that each token stands for, float32 [V]; 0 for control tokens."""
        return np.asarray([len(text) for text in self.token_texts()], np.float32)

    def token_texts(self) -> list[bytes]:
        """Return the UTF-8 bytes that each token stands for, in order of ids; none for control tokens."""
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])
        texts = [b""] * self.vocab_size
        control = {*special_tokens(self.backend), UNKNOWN}

        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if token in control:
                continue
            if is_byte_level:
                texts[i] = _byte_level_text(token)
            elif ONE_BYTE.fullmatch(token):
                texts[i] = bytes([int(token[1:-1], 16)])
            else:  # SentencePiece marks spaces by U+2581
                texts[i] = token.replace("\u2581", " ").encode()
        return texts


def _byte_level_text(token: str) -> bytes:
    """Undo GPT-2's spelling of bytes (Radford et al. 2019): printable Latin-1 characters stand for themselves, the
    other bytes for U+0100, U+0101, ... in order. Tokens that were added later are plain text."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


@contextmanager
def errors_as_value_error(summary: str) -> Iterator[None]:
    """Raise errors of the `tokenizers` library as ValueError.

    The library has no error type but Exception, and panics of its Rust code are not even that.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{summary}: {' '.join(str(error).split())}") from error


def split_texts(texts: Iterable[str], limit: int) -> Iterator[tuple[int, str]]:
    """Split texts into pieces of at most `limit` characters, and yield each with the index of its text.

    Splits before a space or new line where there is one: built-in tokenizers begin a word there anyway.
    """
    before_space = re.compile(r"(?s).*\S(?=[ \n])")
    for index, text in enumerate(texts):
        start = 0
        while len(text) - start > limit:
            match = before_space.match(text, start, start + limit + 1)
            end = match.end() if match else start + limit
            yield index, text[start:end]
            start = end
        yield index, text[start:]


def group_pieces(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Group pieces into batches of up to `ENCODE_CHARACTERS` characters."""
    batch: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece[1]) > ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece[1])
    if batch:
        yield batch


def special_tokens(backend: tokenizers.Tokenizer) -> list[str]:
    """List control tokens by name, longest first."""
    names = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    return sorted(names, key=len, reverse=True)


class TokenizerSettings(NamedTuple):
    """Settings stored beside a `tokenizer.json`. See `Tokenizer` for the fields.

    add_bos: whether encoding begins with `bos`.
    stop_tokens: names of further tokens that end a text.
    """

    bos: str
    eos: str
    add_bos: bool
    template: str
    tool_template: str
    stop_tokens: list[str]


def settings_file(path: Path) -> Path:
    return path.with_name("tokenizer_config.json")


def read_settings(path: Path, backend: tokenizers.Tokenizer) -> TokenizerSettings | None:
    """Read the files beside a `tokenizer.json`; None if there are none.

    Tokens that the files call special become special in `backend`.
    """
    content: dict[str, Any] = {}
    for file in (path.with_name("special_tokens_map.json"), settings_file(path)):
        if file.is_file():
            part = read_json(file)
            if not isinstance(part, dict):
                raise ValueError(f"{file} is no JSON object")
            content |= {name: value for name, value in part.items() if value is not None}

    templates = _read_templates(path, content.get("chat_template"))
    if templates:
        content["chat_template"] = templates
    if not content:
        return None

    def text_of(name: str, part: str) -> str:
        value = content.get(name, "")
        value = value.get(part) if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise ValueError(f"{name} in {settings_file(path)} is no text: {str(value)[:50]}")
        return value

    bos, eos = text_of("bos_token", "content"), text_of("eos_token", "content")
    added = {int(i): token for i, token in content.get("added_tokens_decoder", {}).items()}
    control = [token["content"] for token in added.values() if token.get("special")]
    in_vocab = {token for token in (bos, eos, *control) if token and backend.token_to_id(token) is not None}
    backend.add_special_tokens(sorted(in_vocab - {*special_tokens(backend)}))

    # A tokenizer.json decides by its post-processor: transformers ignores add_bos_token beside one.
    with errors_as_value_error(f"{path} can't encode; take another"):
        add_bos = backend.encode("").ids[:1] == [backend.token_to_id(bos)]
    if path.suffix == ".model":  # it has no such setting; these classes of transformers add bos by default
        default = text_of("tokenizer_class", "").startswith(("Llama", "CodeLlama", "Gemma"))
        add_bos = bool(content.get("add_bos_token", default))

    tool_template = templates.get("tool_use", "") or content.get("tool_template", "")
    stop_tokens = content.get("stop_tokens") or _read_stop_tokens(path, backend)
    return TokenizerSettings(bos, eos, add_bos, templates.get("default", ""), tool_template, stop_tokens)


def _read_templates(path: Path, chat_template: Any) -> dict[str, str]:
    """Collect chat templates by name, from the config, `chat_template.jinja` and `additional_chat_templates/`.

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
            raise ValueError(f"{settings_file(path)}: the chat template {name!r} is no text: {str(template)[:50]}")
    if templates and "default" not in templates:
        raise ValueError(
            f"{settings_file(path)} has the chat templates {', '.join(templates)}, and none that is the default; "
            "put the one you want into chat_template.jinja beside it"
        )
    return templates


def _read_stop_tokens(path: Path, backend: tokenizers.Tokenizer) -> list[str]:
    """List the end tokens that the model's own configs name beside the tokenizer's eos_token."""
    ids: list[int] = []
    for file in (path.with_name("config.json"), path.with_name("generation_config.json")):
        content = read_json(file) if file.is_file() else {}
        eos_ids = content.get("eos_token_id") if isinstance(content, dict) else None
        ids += [eos_ids] if isinstance(eos_ids, int) else eos_ids or []
    tokens = [backend.id_to_token(i) for i in dict.fromkeys(ids)]
    return [token for token in tokens if token is not None]


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json` that has the built-in control tokens, or a chat template of its own beside it.

    Raises:
        ValueError: the file is missing, is not a tokenizer, or lacks control tokens.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer; check config.tokenizer.path, or run `jaxstages prepare` first")
    return parse_tokenizer(path.read_bytes(), path)


def parse_backend(content: bytes, path: Path) -> tokenizers.Tokenizer:
    with errors_as_value_error(f"{path} can't be read as a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_buffer(content)
    ids, size = backend.get_vocab(with_added_tokens=True).values(), backend.get_vocab_size(with_added_tokens=True)
    if max(ids, default=0) >= max(size, 1):
        raise ValueError(f"{path}: the ids of its {size} tokens reach {max(ids)}; they must be 0 to {size - 1}")
    return backend


def parse_tokenizer(content: bytes, path: Path) -> Tokenizer:
    """Build a tokenizer from the bytes of a `tokenizer.json` and the settings beside `path`."""
    backend = parse_backend(content, path)
    settings = read_settings(path, backend)
    digest = hashlib.sha256(content + (json.dumps(settings).encode() if settings else b"")).hexdigest()
    bos, eos, _, template, tool_template, stop_tokens = settings or TokenizerSettings("", "", False, "", "", [])

    if settings and template:
        specials = _template_specials(backend, settings, path)
    else:
        specials = _builtin_specials(backend, path, eos)

    begin = () if template else (specials.end_of_text,)
    if settings is not None and settings.add_bos:
        bos_id = backend.token_to_id(bos)
        if bos_id is None:
            raise ValueError(f"{settings_file(path)}: bos_token {bos!r} is no token of {path.name}")
        begin = (bos_id,)

    backend.encode_special_tokens = True  # "<|end|>" in a user's text is text, never control
    with errors_as_value_error(f"{path} can't encode the data; take another"):
        keep_apart(backend, special_tokens(backend))
    backend.no_padding()
    backend.no_truncation()

    stops = [specials.end_of_text, specials.end_of_turn, *(backend.token_to_id(token) for token in stop_tokens)]
    stops = tuple(dict.fromkeys(i for i in stops if i is not None and i >= 0))
    return Tokenizer(backend, specials, digest, begin, template, bos, eos, tool_template, stops)


def _template_specials(backend: tokenizers.Tokenizer, settings: TokenizerSettings, path: Path) -> Specials:
    """Find the control tokens of a tokenizer with a chat template.

    A text ends with eos; a turn ends with the control token that the template writes after an answer, or with eos if
    it writes none.
    """
    eos, answer = backend.token_to_id(settings.eos), "a test of where an answer ends"
    if eos is None:
        raise ValueError(f"{settings_file(path)}: eos_token {settings.eos!r} is no token of {path.name}")

    question, next_question = ({"role": "user", "content": text} for text in ("a test", "what follows"))
    messages = [question, {"role": "assistant", "content": answer}]
    render = make_render(settings.template, settings.bos, settings.eos)
    special = re.compile("|".join(map(re.escape, special_tokens(backend))))

    def tokens_after_answer(messages: list[dict[str, Any]]) -> list[str]:
        text = render(messages, None, False).text
        if answer not in text and messages[-1] is not next_question:
            raise ValueError(f"the chat template of {path} does not write an answer as it is")
        return special.findall(text.rpartition(answer)[2].partition(next_question["content"])[0])

    at_end, before_question = tokens_after_answer(messages), tokens_after_answer([*messages, next_question])
    # Some templates write two tokens, the second of which stops; others write eos once, at the end of everything.
    stopping = [
        token for token in at_end if token in (settings.eos, *settings.stop_tokens) and token in before_question
    ]
    end_of_turn = backend.token_to_id((stopping or at_end or [settings.eos])[0])
    separator = backend.token_to_id(SEPARATOR)
    assert end_of_turn is not None, at_end
    return Specials(eos, -1 if separator is None else separator, -1, -1, -1, end_of_turn)


def _builtin_specials(backend: tokenizers.Tokenizer, path: Path, eos: str) -> Specials:
    """Look up the built-in control tokens, as far as the vocabulary has them. A text ends with the tokenizer's own eos
    if it has one."""
    eos_id = backend.token_to_id(eos) if eos else None
    ids = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
    ids[0] = ids[0] if eos_id is None else eos_id
    if ids[0] is None:
        raise ValueError(f"{path} lacks the control token {SPECIAL_TOKENS[0]}; let `jaxstages prepare` make it")

    distinct = [i for i in ids[1:] if i is not None]  # without end_of_text: a turn may end as a text does
    if len(set(distinct)) < len(distinct):
        raise ValueError(f"{path}: control tokens share an id: {dict(zip(SPECIAL_TOKENS, ids, strict=True))}")
    return Specials(*(-1 if i is None else i for i in ids))


def needed_tokens(tasks: Iterable[str], template: bool) -> list[str]:
    """List the control tokens that a recipe's tasks need beside the end of a text.

    Args:
        template: whether the tokenizer has a chat template of its own.
    """
    tasks = set(tasks)
    pairs, chats = tasks & {"seq2seq", "classify"}, "chat" in tasks and not template
    return [*(SPECIAL_TOKENS[1:2] if pairs else ()), *(SPECIAL_TOKENS[2:] if chats else ())]
