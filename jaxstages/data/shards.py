"""Records -> the files of one shard, by pure steps that this machine and Beam's workers both take.

A source's items are cleaned, those of the other side and those that are removed are set apart, and what stays is cut
into blocks by size, in its order. Each block is tokenized and packed by itself into a shard: `rows-00000.array_record`,
`where-00000.txt` with the records of each row, `counts-00000.npy`, and `shard-00000.json`, which is written last.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jaxstages.config import DataConfig
from jaxstages.data.clean import MOST_BYTES, REMOVED, clean_item, cleans, compared, size_of
from jaxstages.data.packing import pack
from jaxstages.data.sources import Item, Part, Source
from jaxstages.data.tasks import Example, Task, asks, is_held_out
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.runtime.files import put, write_json, write_text

MOST_NAMED, MOST_SAID = 5, 300
"""Malformed records that are named, each with so many letters of its fault; all of them are counted."""

FEW = 5
"""Text files that the held-out share must make for whole ones to be taken: of fewer, a hash would often take none."""

PART_BITS = 40
"""A document's place in the order of its source is the number of its part, and in these bits its number there."""


class Form(NamedTuple):
    """How records become rows, and which of them: those of "train" or of "validation"."""

    part: str
    config: DataConfig
    tokenizer: Tokenizer
    context: int


class Block(NamedTuple):
    """A shard is closed when its records take so much memory (or one that takes more), or when it has so many."""

    bytes: int
    records: int


def rows_file(folder: Path, shard: int) -> Path:
    return folder / f"rows-{shard:05}.array_record"


def where_file(folder: Path, shard: int) -> Path:
    return folder / f"where-{shard:05}.txt"


def counts_file(folder: Path, shard: int) -> Path:
    return folder / f"counts-{shard:05}.npy"


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05}.json"


def dropped_file(folder: Path, number: int) -> Path:
    """The near-duplicates of one part of a source; a part without any has no file."""
    return folder / f"gone-{number:05}.npy"


def files_of(folder: Path, shard: int) -> list[Path]:
    """In the order in which they have to appear."""
    return [make(folder, shard) for make in (rows_file, where_file, counts_file, shard_file)]


def documents_of(read: Part, number: int, config: DataConfig) -> Iterator[tuple[int, str]]:
    """The documents of a source's part that are compared for near-duplicates, each with its place in the order."""
    for place, item in enumerate(read()):
        text = compared(clean_item(item, config), config)
        if text is not None:
            yield (number << PART_BITS) + place, text


def write_dropped(folder: Path, orders: Iterable[int]) -> None:
    """Keep which documents have an earlier near-duplicate, by their part."""
    by_part: dict[int, list[int]] = {}
    for order in orders:
        by_part.setdefault(order >> PART_BITS, []).append(order & (1 << PART_BITS) - 1)
    for number, places in by_part.items():
        save_array(dropped_file(folder, number), np.asarray(sorted(places), np.int64))


def read_dropped(folder: Path | None, number: int) -> Container[int]:
    """The places in a part that `write_dropped` kept."""
    if folder is None or not dropped_file(folder, number).exists():
        return frozenset()
    return frozenset(load_array(dropped_file(folder, number)).tolist())


def cuts_texts(source: Source, config: DataConfig) -> bool:
    """Is the end of each text held out, and no whole record?"""
    return 0 < source.texts * config.holdout < FEW


def items_of(source: Source, part: str, config: DataConfig, gone: Path | None) -> Iterator[Item]:
    """The items of one part ("train" or "validation"): with `config.holdout` its side of the source, else all.

    Args:
        gone: the folder that `write_dropped` wrote to, or None if all documents stay.
    """
    for number, read in enumerate(source.parts):
        yield from items_of_part(read, read_dropped(gone, number), cuts_texts(source, config), part, config)


def items_of_part(read: Part, gone: Container[int], cut: bool, part: str, config: DataConfig) -> Iterator[Item]:
    """The same, of one of a source's parts. Of a removed one only the reason stays."""
    for place, item in enumerate(read()):
        cleaned = clean_item(item, config)
        if place in gone:
            cleaned = cleaned._replace(removed="near_duplicate")
        sided = _side(cleaned, cut, part, config)
        if sided is None:
            continue
        if sided.removed:
            sided = sided._replace(record=None)
        elif size_of(sided.record) > MOST_BYTES:
            sided = Item(sided.where, None, f"it takes {size_of(sided.record):,} bytes, more than {MOST_BYTES:,}")
        yield sided


def _side(item: Item, cut: bool, part: str, config: DataConfig) -> Item | None:
    """The item as it stands in `part`, or None if it belongs to the other one. Malformed ones count as training's."""
    if not config.holdout:
        return item
    if item.record is None:
        return item if part == "train" else None
    if cut:
        text = item.record["text"]
        end = len(text) - round(len(text) * config.holdout)
        text = text[:end] if part == "train" else text[end:]
        return item._replace(record={"text": text}) if text else None
    try:
        held_out = is_held_out(asks(item.record, config), config.holdout)
    except ValueError as error:
        return Item(item.where, None, str(error)) if part == "train" else None
    return item if held_out == (part == "validation") else None


def shards_of(sizes: Iterable[int], block: Block) -> Iterator[int]:
    """For each item, by its size, the shard that it goes to."""
    shard = total = count = 0
    for size in sizes:
        yield shard
        total, count = total + size, count + 1
        if total >= block.bytes or count >= block.records:
            shard, total, count = shard + 1, 0, 0


def open_rows(folder: Path, shard: int) -> Any:
    """A reader to `seek` a row and `read` it, and nothing ahead. It would also take rows by number, at a cost by the
    number of rows in its file: with 16,000, 37 us a row for 7."""
    return ArrayRecordReader(str(rows_file(folder, shard)), "readahead_buffer_size:0,max_parallelism:0")


def write_shard(folder: Path, shard: int, items: list[Item], task: Task, form: Form) -> None:
    """Encode and pack a block; the shard's JSON comes last and makes it count."""
    kept, bad = [], []
    for item in items:
        if item.removed:
            continue
        try:
            if item.record is None:
                raise ValueError(item.fault)
            kept.append((item.where, task.draft(item.record)))
        except ValueError as error:
            bad.append(f"{item.where}: {str(error)[:MOST_SAID]}")
    encoded = task.finish([draft for _, draft in kept])
    examples = [example for one in encoded for example in one.examples]
    places = [where for (where, _), one in zip(kept, encoded, strict=True) for _ in one.examples]
    statistics: dict[str, Any] = {
        "records": len(items),
        "bad": len(bad),
        "bad_named": bad[:MOST_NAMED],
        "cut_examples": sum(one.lost > 0 for one in encoded),
        "cut_tokens": sum(one.lost for one in encoded),
        "questions": [one.question for one in encoded if one.question is not None],
        "unread": Counter(key for one in encoded for key in one.unread),
    }
    if cleans(form.config):
        statistics["removed"] = {reason: sum(item.removed == reason for item in items) for reason in REMOVED}
    write_examples(folder, shard, examples, places, form, statistics)


def write_examples(
    folder: Path, shard: int, examples: list[Example], places: list[str], form: Form, statistics: dict[str, Any]
) -> None:
    """Pack examples into the rows of a shard.

    Args:
        places: where each example comes from.
        statistics: what the shard's JSON says beside the counts of examples, rows and tokens.
    """
    rows, groups = pack(examples, form.context)
    fresh = rows_file(folder, shard).with_suffix(".tmp")
    writer = ArrayRecordWriter(str(fresh), "group_size:1")  # one record a group: read at random places
    for row in rows:
        writer.write(row.tobytes())
    writer.close()
    put(fresh, rows_file(folder, shard))
    write_text(where_file(folder, shard), "".join("\t".join(places[i] for i in group) + "\n" for group in groups))
    targets = np.concatenate([np.zeros(0, np.int32), *(example.ids[1:] for example in examples)])
    weights = np.concatenate([np.zeros(0), *(example.weights[1:] for example in examples)])
    counts = np.bincount(targets, weights, minlength=form.tokenizer.vocab_size)
    save_array(counts_file(folder, shard), counts)
    tokens = sum(len(example.ids) - 1 for example in examples)
    sizes = {"examples": len(examples), "rows": len(rows), "tokens": tokens, "scored": float(counts.sum())}
    write_json(shard_file(folder, shard), statistics | sizes)


def save_array(path: Path, array: np.ndarray) -> None:
    fresh = path.with_suffix(".tmp.npy")
    np.save(fresh, array)
    put(fresh, path)


def load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove {path.parent}, and it is made again") from error
