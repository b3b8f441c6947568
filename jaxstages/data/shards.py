"""Records -> the files of one shard, by pure steps that this process and Beam's workers share.

The items of a source are cleaned, filtered, and divided into blocks by size, in their order. Each block is tokenized
and packed by itself into a shard: `rows-00000.array_record`, `where-00000.txt` with the records of each row,
`counts-00000.npy`, and `shard-00000.json`, which is written last.
"""

import io
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jaxstages.config import DataConfig
from jaxstages.data.clean import (
    MAX_RECORD_BYTES,
    REMOVAL_REASONS,
    clean_item,
    dedup_text,
    is_cleaned,
    memory_bytes,
)
from jaxstages.data.packing import pack
from jaxstages.data.sources import Item, Part, Source
from jaxstages.data.tasks import Example, Task, holdout_key, is_held_out
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.runtime.files import rename_durably, write_json, write_text

MAX_REPORTED = 5
"""Malformed records that are reported with their fault; all of them are counted."""

MAX_FAULT_CHARACTERS = 300
"""Characters of a fault in the report."""

MIN_HELD_OUT_TEXTS = 5
"""Whole text files are held out if the held-out share makes at least this many; of fewer, a hash would often choose
none."""

PART_BITS = 40
"""The order of a document in its source is (number of its part << PART_BITS) + index in the part."""


class RowSpec(NamedTuple):
    """How records become rows, and which of them do.

    part: "train" or "validation".
    context: slots in a row.
    """

    part: str
    config: DataConfig
    tokenizer: Tokenizer
    context: int


class ShardLimits(NamedTuple):
    """A shard is closed when its records reach this memory or this number."""

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
    """File with the near-duplicates of one part of a source. Parts without near-duplicates have none."""
    return folder / f"gone-{number:05}.npy"


def files_of(folder: Path, shard: int) -> list[Path]:
    """Files of a shard, in the order in which they have to appear."""
    return [file(folder, shard) for file in (rows_file, where_file, counts_file, shard_file)]


def documents_of(read: Part, number: int, config: DataConfig) -> Iterator[tuple[int, str]]:
    """Yield order and text of the documents of a part that are compared for near-duplicates."""
    for index, item in enumerate(read()):
        text = dedup_text(clean_item(item, config), config)
        if text is not None:
            yield (number << PART_BITS) + index, text


def write_dropped(folder: Path, orders: Iterable[int]) -> None:
    """Write which documents have an earlier near-duplicate: for each part of the source the sorted 0-based indices of
    its records, in `gone-PART.npy`. `docs/data.md` shows how to list the records."""
    by_part: dict[int, list[int]] = {}
    for order in orders:
        by_part.setdefault(order >> PART_BITS, []).append(order & (1 << PART_BITS) - 1)
    for number, indices in by_part.items():
        save_array(dropped_file(folder, number), np.asarray(sorted(indices), np.int64))


def read_dropped(folder: Path | None, number: int) -> Container[int]:
    """Read the indices in a part that `write_dropped` wrote."""
    if folder is None or not dropped_file(folder, number).exists():
        return frozenset()
    return frozenset(load_array(dropped_file(folder, number)).tolist())


def cuts_texts(source: Source, config: DataConfig) -> bool:
    """Return whether the end of each text is held out, rather than whole records."""
    return 0 < source.texts * config.holdout < MIN_HELD_OUT_TEXTS


def items_of(source: Source, part: str, config: DataConfig, dropped: Path | None) -> Iterator[Item]:
    """Yield the items of "train" or "validation": with `config.holdout` that side of the source, else all.

    Args:
        dropped: folder that `write_dropped` wrote to, or None if all documents stay.
    """
    for number, read in enumerate(source.parts):
        yield from items_of_part(read, read_dropped(dropped, number), cuts_texts(source, config), part, config)


def items_of_part(read: Part, dropped: Container[int], cut: bool, part: str, config: DataConfig) -> Iterator[Item]:
    """Yield the items of one of a source's parts. Removed items have a reason and no record."""
    for index, raw in enumerate(read()):
        item = clean_item(raw, config)
        if index in dropped:
            item = item._replace(removed="near_duplicate")

        item = _select_side(item, cut, part, config)
        if item is None:
            continue

        if item.removed:
            item = item._replace(record=None)
        elif (size := memory_bytes(item.record)) > MAX_RECORD_BYTES:
            item = Item(item.where, None, f"it takes {size:,} bytes, more than {MAX_RECORD_BYTES:,}")
        yield item


def _select_side(item: Item, cut: bool, part: str, config: DataConfig) -> Item | None:
    """Return the share of an item that belongs to `part`, or None. Malformed items belong to "train".

    Args:
        cut: whether texts are divided, rather than whole records.
    """
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
        held_out = is_held_out(holdout_key(item.record, config), config.holdout)
    except ValueError as error:
        return Item(item.where, None, str(error)) if part == "train" else None
    return item if held_out == (part == "validation") else None


def assign_shards(sizes: Iterable[int], limits: ShardLimits) -> Iterator[int]:
    """Yield the number of each item's shard, given the items' sizes in bytes."""
    shard = total = count = 0
    for size in sizes:
        yield shard
        total, count = total + size, count + 1
        if total >= limits.bytes or count >= limits.records:
            shard, total, count = shard + 1, 0, 0


def open_rows(folder: Path, shard: int) -> Any:
    """Open a reader that seeks a row and reads it, without reading ahead.

    Reading by index instead takes time that grows with the number of rows in the file: with 16,000 rows 37 us a row
    instead of 7.
    """
    return ArrayRecordReader(str(rows_file(folder, shard)), "readahead_buffer_size:0,max_parallelism:0")


def write_shard(folder: Path, shard: int, items: list[Item], task: Task, spec: RowSpec) -> None:
    """Encode and pack a block of items. The shard's JSON is written last and marks it as complete."""
    drafts, bad = [], []
    for item in items:
        if item.removed:
            continue
        try:
            if item.record is None:
                raise ValueError(item.fault)
            drafts.append((item.where, task.draft(item.record)))
        except ValueError as error:
            bad.append(f"{item.where}: {str(error)[:MAX_FAULT_CHARACTERS]}")

    encoded = task.finish([draft for _, draft in drafts])
    examples = [example for each in encoded for example in each.examples]
    origins = [where for (where, _), each in zip(drafts, encoded, strict=True) for _ in each.examples]

    statistics: dict[str, Any] = {
        "records": len(items),
        "bad": len(bad),
        "bad_named": bad[:MAX_REPORTED],
        "cut_examples": sum(each.lost_tokens > 0 for each in encoded),
        "cut_tokens": sum(each.lost_tokens for each in encoded),
        "questions": [each.question for each in encoded if each.question is not None],
        "unread": Counter(key for each in encoded for key in each.unread_keys),
    }
    if is_cleaned(spec.config):
        statistics["removed"] = {reason: sum(item.removed == reason for item in items) for reason in REMOVAL_REASONS}
    write_examples(folder, shard, examples, origins, spec, statistics)


def write_examples(
    folder: Path,
    shard: int,
    examples: list[Example],
    origins: list[str],
    spec: RowSpec,
    statistics: dict[str, Any],
    max_examples: int = 0,
) -> None:
    """Pack examples into the rows of a shard.

    Args:
        origins: record, `file:line`, of each example.
        max_examples: the largest number of examples in a row; 0 is no limit.
        statistics: further entries of the shard's JSON, beside the counts of examples, rows and tokens.
    """
    rows, groups = pack(examples, spec.context, max_examples)
    temporary = rows_file(folder, shard).with_suffix(".tmp")
    writer = ArrayRecordWriter(str(temporary), "group_size:1")  # one record a group, for random access
    for row in rows:
        writer.write(row.tobytes())
    writer.close()
    rename_durably(temporary, rows_file(folder, shard))
    write_text(where_file(folder, shard), "".join("\t".join(origins[i] for i in group) + "\n" for group in groups))

    targets = np.concatenate([np.zeros(0, np.int32), *(example.ids[1:] for example in examples)])
    weights = np.concatenate([np.zeros(0), *(example.weights[1:] for example in examples)])
    counts = np.bincount(targets, weights, minlength=spec.tokenizer.vocab_size)
    save_array(counts_file(folder, shard), counts)

    tokens = sum(len(example.ids) - 1 for example in examples)
    sizes = {"examples": len(examples), "rows": len(rows), "tokens": tokens, "scored": float(counts.sum())}
    write_json(shard_file(folder, shard), statistics | sizes)


def save_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, array)
    rename_durably(temporary, path)


def load_array(path: Path) -> np.ndarray:
    try:
        return np.load(io.BytesIO(path.read_bytes()))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove {path.parent} to prepare it again") from error
