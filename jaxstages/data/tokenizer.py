"""Text <-> token ids: train a byte-level BPE or a character tokenizer, or load any `tokenizer.json`."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxstages.config import TokenizerConfig
from jaxstages.disk import write_text


class Specials(NamedTuple):
    """Ids of the control tokens. Text never yields one of them: they are put between encoded texts, as ids."""

    end_of_text: int
    separator: int
    system: int
    user: int
    assistant: int
    end_of_turn: int


SPECIAL_TOKENS = ("<|endoftext|>", "<|sep|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
UNKNOWN = "<|unknown|>"
"""Only in a character tokenizer: a character that its training text did not have."""

PIECE = 2**20
"""Characters that are encoded at once: the library takes more than 100 bytes for each."""

LONGEST_WORD, MOST_UNBROKEN = 2**10, 2**23
"""Characters of a word that BPE learns from, and of all such words together: its time grows with the square of the one,
its memory a hundredfold with the other, where text has no spaces (DNA, base64)."""


class Tokenizer(NamedTuple):
    """backend: of the `tokenizers` library. sha256: of the `tokenizer.json` that it was read from."""

    backend: tokenizers.Tokenizer
    specials: Specials
    sha256: str

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

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

    def show(self, ids: Sequence[int]) -> str:
        """Ids for people: control tokens by name. Ids are shown together, for a letter may be several tokens."""
        with _refused("this tokenizer can't decode; take another"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """float32 [V]: UTF-8 bytes of text that each token stands for; 0 for control tokens."""
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])
        sizes = np.zeros(self.vocab_size, np.float32)
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i in self.specials or token == UNKNOWN:
                continue
            # A byte-level vocabulary spells each byte as one character; a SentencePiece one marks spaces by U+2581.
            one_byte = re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token)
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


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` that has our control tokens.

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
    found = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
    ids = [i for i in found if i is not None]
    if len(ids) < len(found):
        missing = [token for token, i in zip(SPECIAL_TOKENS, found, strict=True) if i is None]
        raise ValueError(f"{path} lacks the control tokens {', '.join(missing)}; let `jaxstages prepare` make it")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: control tokens share an id: {dict(zip(SPECIAL_TOKENS, ids, strict=True))}")
    backend.encode_special_tokens = True  # a user's "<|end|>" is text, never control
    backend.no_padding()
    backend.no_truncation()
    return Tokenizer(backend, Specials(*ids), hashlib.sha256(content).hexdigest())


def make_tokenizer(config: TokenizerConfig, texts: Iterator[str], path: Path) -> Tokenizer:
    """Train on `texts`, or take the file that the recipe names, and write it to `path`.

    To a tokenizer from elsewhere our control tokens are added at the end of its vocabulary where it lacks them.
    """
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
            backend = _parse(source.read_bytes(), source)
            backend.add_special_tokens([t for t in SPECIAL_TOKENS if backend.token_to_id(t) is None])
        case _:
            raise ValueError(f"tokenizer.kind={config.kind!r}; known: bpe, characters, file")
    content = backend.to_str(pretty=True)
    # Before it is kept: one that can't be used must not stay in the workdir.
    tokenizer = _open(content.encode(), Path(config.path or path))
    write_text(path, content)
    return tokenizer
