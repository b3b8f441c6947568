"""Text <-> token ids: train a byte-level BPE or a character tokenizer, or load any `tokenizer.json`."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
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
        found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in found]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; control tokens are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def show(self, ids: Sequence[int]) -> str:
        """Ids for people: control tokens by name. Ids are shown together, for a letter may be several tokens."""
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


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` that has our control tokens.

    Raises:
        ValueError: no such file, not a tokenizer, or control tokens are missing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer; check config.tokenizer.path, or run `jaxstages prepare` first")
    content = path.read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library's only type
        raise ValueError(f"{path} can't be read as a tokenizer.json: {error}") from error
    found = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
    ids = [i for i in found if i is not None]
    if len(ids) < len(found):
        missing = [token for token, i in zip(SPECIAL_TOKENS, found, strict=True) if i is None]
        raise ValueError(f"{path} lacks the control tokens {', '.join(missing)}; let `jaxstages prepare` make it")
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
            backend.train_from_iterator(texts, trainer)
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
            try:
                backend = tokenizers.Tokenizer.from_file(str(source))
            except Exception as error:  # the library's only type
                raise ValueError(f"{source} can't be read as a tokenizer.json: {error}") from error
            backend.add_special_tokens([t for t in SPECIAL_TOKENS if backend.token_to_id(t) is None])
        case _:
            raise ValueError(f"tokenizer.kind={config.kind!r}; known: bpe, characters, file")
    write_text(path, backend.to_str(pretty=True))
    return load_tokenizer(path)
