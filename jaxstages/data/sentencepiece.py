"""SentencePiece's `.model`, BPE or unigram -> a tokenizer of the `tokenizers` library.

The file is one protocol buffer, `ModelProto` of sentencepiece_model.proto (github.com/google/sentencepiece): pieces,
each with a score and a type, what the trainer was told, and how text is normalized.
"""

import json
import re
import struct
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

UNIGRAM, BPE = 1, 2
"""`TrainerSpec.ModelType`; the others are of words and of characters."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""`SentencePiece.Type`; the other is of single bytes."""

VARINT, BYTES, WIDTHS = 0, 2, {1: "<d", 5: "<f"}
"""How a field's value is written."""

SPACE = "\u2581"
ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A piece that stands for one byte, where no other piece does."""


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def read_sentencepiece(content: bytes) -> tokenizers.Tokenizer:
    """What gives the ids and the text that SentencePiece gives, but where a text of thousands of tokens can be cut in
    two ways of nearly the same score (it sums them in float32), or a ligature bears an accent.

    Args:
        content: of the file.

    Raises:
        ValueError, or what Rust raises: it is damaged or no such model, or one of words or characters.
    """
    model = _fields(content)
    pieces = [_piece(_fields(one)) for one in model.get(1, [])]
    trainer, normal = (_fields(model.get(number, [b""])[-1]) for number in (2, 3))
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)
    if unknown is None:
        raise ValueError(f"none of its {len(pieces)} pieces is for what it doesn't know")
    backend = tokenizers.Tokenizer(_model(pieces, unknown, trainer))
    whole = sorted((piece.text for piece in pieces if piece.kind == USER_DEFINED), key=len, reverse=True)
    if whole:
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("|".join(map(re.escape, whole))), "isolated")
        unused = [piece.text for piece in pieces if piece.kind == UNUSED and len(piece.text) > 1]
        cuts = [rf"(?<=\A{re.escape(text[0])})(?={re.escape(text[1:])}\z)" for text in unused]
        if cuts and isinstance(backend.model, models.BPE):  # text that is the whole of one would be taken for it
            apart = pre_tokenizers.Split(tokenizers.Regex("|".join(cuts)), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([backend.pre_tokenizer, apart])
    backend.normalizer = normalizers.Sequence(_normalizers(normal))
    surface = trainer.get(44, [b" \xe2\x81\x87 "])[-1].decode()
    shown = [decoders.Replace(pieces[unknown].text, surface), decoders.Replace(SPACE, " ")]
    shown += [decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*shown, *([decoders.Strip(" ", 1, 0)] if _flag(normal, 3) else [])])
    backend.add_special_tokens([piece.text for piece in pieces if piece.kind == CONTROL])
    return backend


def keep_apart(backend: tokenizers.Tokenizer, control: list[str]) -> None:
    """Cut text within what is spelled as a control token, a byte or the unknown, after its first letter, where the
    model would take it for that. SentencePiece never looks for these in text; a unigram model of the library does, for
    it knows no types, and so does one of whole words. A BPE would have to merge its way there."""
    vocab = backend.get_vocab(with_added_tokens=True)
    names = [*control, *filter(ONE_BYTE.fullmatch, vocab)]
    model = json.loads(backend.to_str())["model"]
    if isinstance(backend.model, models.Unigram):
        names += [name for name, i in vocab.items() if i == model["unk_id"]]
    elif model.get("ignore_merges") and model.get("unk_token") in vocab:
        names += [model["unk_token"]]  # any text between two of a user's own pieces may be the whole of one of these
    else:
        names = [name for name in names if vocab[name] in backend.encode(name, add_special_tokens=False).ids]
    cuts = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names if len(name) > 1]
    if cuts:
        apart = pre_tokenizers.Split(tokenizers.Regex("|".join(cuts)), "isolated")
        before = backend.pre_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([before, apart]) if before else apart


def _piece(fields: dict[int, list[Any]]) -> Piece:
    text, score, kind = (fields.get(number, [default])[-1] for number, default in ((1, b""), (2, 0.0), (3, NORMAL)))
    return Piece(text.decode(), score, kind)


def _model(pieces: list[Piece], unknown: int, trainer: dict[int, list[Any]]) -> models.Model:
    """One that takes text which is the whole of a piece for that piece: a user's own pieces come to it so."""
    kind, bytes_too = trainer.get(3, [UNIGRAM])[-1], bool(trainer.get(35, [0])[-1])
    if kind == UNIGRAM:
        scores = [(piece.text, 0.0 if piece.kind == USER_DEFINED else piece.score) for piece in pieces]
        return models.Unigram(scores, unk_id=unknown, byte_fallback=bytes_too)
    if kind == BPE:
        ids = {piece.text: i for i, piece in enumerate(pieces)}
        name = pieces[unknown].text
        model = models.BPE(ids, _merges(pieces), unk_token=name, fuse_unk=True, byte_fallback=bytes_too)
        model.ignore_merges = any(piece.kind == USER_DEFINED for piece in pieces)
        return model
    raise ValueError(f"its type is {kind}, of words or characters; take one of unigram (1) or BPE (2)")


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, the best piece first."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)}
    found = []
    for text in sorted(scores, key=lambda text: -scores[text]):
        cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
        found += [(left, right) for left, right in cuts if left in scores and right in scores]
    return found


def _normalizers(normal: dict[int, list[Any]]) -> list[normalizers.Normalizer]:
    """The model's own map of characters; one space for several, none at the ends; one in front; each as U+2581."""
    found: list[normalizers.Normalizer] = [normalizers.Precompiled(table) for table in normal.get(2, []) if table]
    if b"nfkc" in normal.get(1, [b""])[-1]:  # first: by the map alone, the library loses accents of what it maps
        found.insert(0, normalizers.NFKC())
    if _flag(normal, 4):
        found += [normalizers.Replace(tokenizers.Regex(many), to) for many, to in (("^ +| +$", ""), (" {2,}", " "))]
    if _flag(normal, 3):
        found.append(normalizers.Prepend(" "))
    return [*found, *([normalizers.Replace(" ", SPACE)] if _flag(normal, 5) else [])]


def _flag(message: dict[int, list[Any]], number: int) -> bool:
    return bool(message.get(number, [1])[-1])


def _fields(content: bytes) -> dict[int, list[Any]]:
    """Number -> values of a message's fields: whole numbers, floats or bytes (protobuf.dev, "Encoding")."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError(f"no number ends at byte {at}")

    while at < len(content):
        number, wire = divmod(varint(), 8)
        if wire == VARINT:
            value: Any = varint()
        elif wire in WIDTHS:
            (value,) = struct.unpack_from(WIDTHS[wire], content, at)
            at += struct.calcsize(WIDTHS[wire])
        elif wire == BYTES:
            size = varint()
            value = content[at : at + size]
            at += size
        else:
            raise ValueError(f"no field begins at byte {at}")
        if at > len(content):
            raise ValueError(f"it ends within field {number}")
        found.setdefault(number, []).append(value)
    return found
