"""Read a SentencePiece `.model`, BPE or unigram, as a tokenizer of the `tokenizers` library.

The file is one protocol buffer, `ModelProto` of sentencepiece_model.proto (github.com/google/sentencepiece): pieces
with a score and a type, the trainer's options, and the rules of normalization.
"""

import json
import re
import struct
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

UNIGRAM, BPE = 1, 2
"""`TrainerSpec.ModelType`; the remaining types are words and characters."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""`SentencePiece.Type`; the remaining type is a single byte."""

VARINT, BYTES = 0, 2
FLOAT_FORMATS = {1: "<d", 5: "<f"}
"""Wire types of protocol buffers; those of floats with their `struct` format."""

SPACE = "\u2581"
ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A piece that stands for one byte (byte fallback)."""


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def read_sentencepiece(content: bytes) -> tokenizers.Tokenizer:
    """Convert a model. Ids and decoded text equal SentencePiece's, with two exceptions: a text of thousands of tokens
    with two segmentations of nearly the same score (it sums scores in float32), and accents on ligatures.

    Args:
        content: bytes of the file.

    Raises:
        ValueError, or an error of the Rust library: the file is damaged, no such model, or one of words or characters.
    """
    model = _fields(content)
    pieces = [_piece(_fields(piece)) for piece in model.get(1, [])]
    trainer, normalization = (_fields(model.get(number, [b""])[-1]) for number in (2, 3))
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)
    if unknown is None:
        raise ValueError(f"none of its {len(pieces)} pieces is for what it doesn't know")
    backend = tokenizers.Tokenizer(_model(pieces, unknown, trainer))

    user_defined = sorted((piece.text for piece in pieces if piece.kind == USER_DEFINED), key=len, reverse=True)
    if user_defined:
        pattern = tokenizers.Regex("|".join(map(re.escape, user_defined)))
        backend.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
        unused = [piece.text for piece in pieces if piece.kind == UNUSED and len(piece.text) > 1]
        cuts = [rf"(?<=\A{re.escape(text[0])})(?={re.escape(text[1:])}\z)" for text in unused]
        if cuts and isinstance(backend.model, models.BPE):  # it would encode text that equals an unused piece as that
            split_unused = pre_tokenizers.Split(tokenizers.Regex("|".join(cuts)), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([backend.pre_tokenizer, split_unused])

    backend.normalizer = normalizers.Sequence(_normalizers(normalization))
    unknown_surface = trainer.get(44, [b" \xe2\x81\x87 "])[-1].decode()
    steps = [decoders.Replace(pieces[unknown].text, unknown_surface), decoders.Replace(SPACE, " ")]
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if _flag(normalization, 3) else []
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([piece.text for piece in pieces if piece.kind == CONTROL])
    return backend


def keep_apart(backend: tokenizers.Tokenizer, control: list[str]) -> None:
    """Make text that spells a control token, a byte piece or the unknown token be encoded as text.

    Such text is split after its first character. SentencePiece never matches these pieces in text, but the library's
    unigram and whole-word models do, since they have no types of pieces. A BPE would have to merge its way there.
    """
    vocab = backend.get_vocab(with_added_tokens=True)
    names = [*control, *filter(ONE_BYTE.fullmatch, vocab)]
    model = json.loads(backend.to_str())["model"]
    if isinstance(backend.model, models.Unigram):
        names += [name for name, i in vocab.items() if i == model["unk_id"]]
    elif model.get("ignore_merges") and model.get("unk_token") in vocab:
        names += [model["unk_token"]]  # the text between two user-defined pieces may equal it
    else:
        names = [name for name in names if vocab[name] in backend.encode(name, add_special_tokens=False).ids]
    cuts = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names if len(name) > 1]
    if cuts:
        split = pre_tokenizers.Split(tokenizers.Regex("|".join(cuts)), "isolated")
        first = backend.pre_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, split]) if first else split


def _piece(fields: dict[int, list[Any]]) -> Piece:
    text, score, kind = (fields.get(number, [default])[-1] for number, default in ((1, b""), (2, 0.0), (3, NORMAL)))
    return Piece(text.decode(), score, kind)


def _model(pieces: list[Piece], unknown: int, trainer: dict[int, list[Any]]) -> models.Model:
    """Build the model. It must encode text that equals a piece as that piece, which is how user-defined pieces reach
    it."""
    kind, byte_fallback = trainer.get(3, [UNIGRAM])[-1], bool(trainer.get(35, [0])[-1])
    if kind == UNIGRAM:
        scores = [(piece.text, 0.0 if piece.kind == USER_DEFINED else piece.score) for piece in pieces]
        return models.Unigram(scores, unk_id=unknown, byte_fallback=byte_fallback)
    if kind == BPE:
        ids = {piece.text: i for i, piece in enumerate(pieces)}
        name = pieces[unknown].text
        model = models.BPE(ids, _merges(pieces), unk_token=name, fuse_unk=True, byte_fallback=byte_fallback)
        model.ignore_merges = any(piece.kind == USER_DEFINED for piece in pieces)
        return model
    raise ValueError(f"its type is {kind}, of words or characters; take one of unigram (1) or BPE (2)")


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """List every pair of pieces that concatenate to a piece, the best piece first."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)}
    merges = []
    for text in sorted(scores, key=lambda text: -scores[text]):
        cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
        merges += [(left, right) for left, right in cuts if left in scores and right in scores]
    return merges


def _normalizers(normalization: dict[int, list[Any]]) -> list[normalizers.Normalizer]:
    """Map characters by the model's table, collapse and strip spaces, put one in front, and escape spaces as U+2581."""
    steps: list[normalizers.Normalizer] = [
        normalizers.Precompiled(table) for table in normalization.get(2, []) if table
    ]
    if b"nfkc" in normalization.get(1, [b""])[-1]:  # NFKC first: with the table alone, the library loses some accents
        steps.insert(0, normalizers.NFKC())
    if _flag(normalization, 4):
        steps += [normalizers.Replace(tokenizers.Regex(many), to) for many, to in (("^ +| +$", ""), (" {2,}", " "))]
    if _flag(normalization, 3):
        steps.append(normalizers.Prepend(" "))
    if _flag(normalization, 5):
        steps.append(normalizers.Replace(" ", SPACE))
    return steps


def _flag(message: dict[int, list[Any]], number: int) -> bool:
    return bool(message.get(number, [1])[-1])


def _fields(content: bytes) -> dict[int, list[Any]]:
    """Parse a message: field number -> values, which are integers, floats or bytes (protobuf.dev, "Encoding")."""
    fields: dict[int, list[Any]] = {}
    offset = 0

    def varint() -> int:
        nonlocal offset
        value = 0
        for shift in range(0, 70, 7):
            byte = content[offset]
            offset += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError(f"no number ends at byte {offset}")

    while offset < len(content):
        number, wire_type = divmod(varint(), 8)
        if wire_type == VARINT:
            value: Any = varint()
        elif wire_type in FLOAT_FORMATS:
            (value,) = struct.unpack_from(FLOAT_FORMATS[wire_type], content, offset)
            offset += struct.calcsize(FLOAT_FORMATS[wire_type])
        elif wire_type == BYTES:
            size = varint()
            value = content[offset : offset + size]
            offset += size
        else:
            raise ValueError(f"no field begins at byte {offset}")
        if offset > len(content):
            raise ValueError(f"it ends within field {number}")
        fields.setdefault(number, []).append(value)
    return fields
