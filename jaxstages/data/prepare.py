"""Records -> packed rows on disk, once: tokenized in batches over all cores, cached by fingerprint, restartable.

A cache is a folder named by the SHA-256 of all that its rows depend on. It holds a shard a block of records
(`rows-00000.array_record`, `where-00000.txt` with the records of each row, `shard-00000.json`), `index.json`, and
`MANIFEST.json`, which is written last: without it the cache is not whole, and the next run goes on after the shards
that are there.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from jaxstages import manifest
from jaxstages.config import DataConfig
from jaxstages.console import Progress, say
from jaxstages.data.packing import pack
from jaxstages.data.prefetch import prefetch
from jaxstages.data.sources import Item, Record, Source
from jaxstages.data.tasks import Question, Task, asks, is_held_out, make_task
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.disk import hold, make_folder, put, read_json, write_json, write_text

VERSION = 3
"""Counts up when the same inputs give other rows."""

BLOCK_BYTES, BLOCK_RECORDS = 16_000_000, 50_000
"""A shard is closed when its records take this much memory (or one that takes more), or when it has this many."""

MOST_WORKERS = 8
"""Shards that are made at once: more would only wait for Python, and each holds a block in memory."""

MOST_BYTES = 2**25
"""A record that takes more is malformed."""

SUMMED = ("records", "bad", "examples", "rows", "tokens", "scored", "cut_examples", "cut_tokens")

MOST_NAMED, MOST_SAID = 5, 300
"""Malformed records that are named, each with so many letters of its fault; all of them are counted."""

HASH_UP_TO = 2**20
"""Bytes up to which the files of a cache are hashed whenever it is opened. Larger are the rows, which have checksums of
their own, and whose sizes are compared."""

T = TypeVar("T")


def evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """`most` of the items, evenly spread; all of them if it is 0, or there are no more."""
    return items if not most or len(items) <= most else [items[i * len(items) // most] for i in range(most)]


@dataclass(frozen=True)
class Prepared:
    """A whole cache. index: what `index.json` says of it, counts and shares."""

    folder: Path
    index: dict[str, Any]

    @property
    def shards(self) -> list[Path]:
        return [_rows_file(self.folder, n) for n in range(self.index["shards"])]

    def questions(self) -> list[Question]:
        """Held-out questions in the order of their records."""
        lines = (self.folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        return [Question(*json.loads(line)) for line in lines]

    def where(self, row: int) -> list[str]:
        """The records, `file:line`, whose examples row `row` holds."""
        for shard, rows in enumerate(self.index["rows_of_shards"]):
            if row < rows:
                lines = _where_file(self.folder, shard).read_text(encoding="utf-8").split("\n")
                return lines[row].split("\t")
            row -= rows
        raise IndexError(row)

    def most_segments(self) -> int:
        """Examples in the row that has the most."""
        files = (_where_file(self.folder, shard) for shard in range(self.index["shards"]))
        return max(line.count("\t") + 1 for file in files for line in file.read_text(encoding="utf-8").split("\n"))

    def target_counts(self) -> np.ndarray:
        """float64 [V]: loss weight of each token as a target, for the unigram baseline."""
        return _load_array(self.folder / "target_counts.npy")


def prepare(source: Source, part: str, config: DataConfig, tokenizer: Tokenizer, context: int, cache: Path) -> Prepared:
    """The packed rows of one source, from the cache if they are there.

    Args:
        part: "train" or "validation"; with `config.holdout` each gets its side of the source, else all of it.
        context: slots in a row.

    Raises:
        ValueError: more malformed records than `config.max_bad_share`, or nothing left to train on.
    """
    parts = [VERSION, source.fingerprint, tokenizer.sha256, context, config.task]
    parts += [config.holdout, part] if config.holdout else [""]
    parts += [config.text] if config.task == "lm" else [config.prompt, config.target]
    folder = cache / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
    with hold(folder.with_suffix(".lock"), wait=True):  # another run may be making the same rows
        if not (folder / manifest.MANIFEST).exists():
            make_folder(folder)
            shards = _write_shards(folder, source, part, config, tokenizer, context)
            write_json(folder / "index.json", _summarise(folder, shards, source.name, part, context))
            manifest.seal(folder)
    try:
        manifest.check(folder, HASH_UP_TO)
    except manifest.Damaged as error:
        raise ValueError(f"{error}; remove {folder}, and it is made again from {source.name}") from error
    return _usable(Prepared(folder, read_json(folder / "index.json")), config)


def _rows_file(folder: Path, shard: int) -> Path:
    return folder / f"rows-{shard:05}.array_record"


def _where_file(folder: Path, shard: int) -> Path:
    return folder / f"where-{shard:05}.txt"


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05}.json"


def items_of(source: Source, part: str, config: DataConfig) -> Iterator[Item]:
    """The items of one part ("train" or "validation"): with `config.holdout` its side of the source, else all."""
    for item in source.read():
        sided = _side(item, source.whole_text, part, config)
        if sided is not None:
            yield sided


def _blocks(source: Source, part: str, config: DataConfig) -> Iterator[list[Item]]:
    """The items of one part, some thousands at a time."""
    block: list[Item] = []
    size = 0
    for item in items_of(source, part, config):
        taken = _size(item.record)
        if taken > MOST_BYTES:
            item, taken = Item(item.where, None, f"it takes {taken:,} bytes, more than {MOST_BYTES:,}"), 0
        block.append(item)
        size += taken
        if size >= BLOCK_BYTES or len(block) >= BLOCK_RECORDS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _size(record: Record | None) -> int:
    """About how much memory a record takes: UTF-8 bytes of all its text, and 64 for each value, however deep."""
    total, waiting = 0, [record] if record else []
    while waiting:
        value: Any = waiting.pop()
        total += 64
        if isinstance(value, str):
            total += len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
    return total


def _side(item: Item, whole_text: bool, part: str, config: DataConfig) -> Item | None:
    """The item as it stands in `part`, or None if it belongs to the other one. Malformed ones count as training's."""
    if not config.holdout:
        return item
    if item.record is None:
        return item if part == "train" else None
    if whole_text:
        text = item.record["text"]
        cut = len(text) - round(len(text) * config.holdout)
        return item._replace(record={"text": text[:cut] if part == "train" else text[cut:]})
    try:
        held_out = is_held_out(asks(item.record, config), config.holdout)
    except ValueError as error:
        return Item(item.where, None, str(error)) if part == "train" else None
    return item if held_out == (part == "validation") else None


def _write_shards(
    folder: Path, source: Source, part: str, config: DataConfig, tokenizer: Tokenizer, context: int
) -> int:
    """A shard for each block, where it is not there yet, a few at a time; how many there are.

    Threads are enough: the tokenizer, which takes most of the time, holds no lock of Python's.
    """

    task = make_task(config, tokenizer, context)

    def make(numbered: tuple[int, list[Item]]) -> int:
        shard, block = numbered
        if not _shard_file(folder, shard).exists():
            _write_shard(folder, shard, block, task, tokenizer.vocab_size, context)
        return len(block)

    progress = Progress(f"prepare {source.name} ({part}): records", source.records)
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    shards, records = 0, 0
    for size in prefetch(make, enumerate(_blocks(source, part, config)), ahead=workers, workers=workers):
        shards, records = shards + 1, records + size
        progress.update(records)
    return shards


def _write_shard(folder: Path, shard: int, block: list[Item], task: Task, vocab_size: int, context: int) -> None:
    """Encode and pack a block; the shard's JSON comes last and makes it count."""
    kept, bad = [], []
    for item in block:
        try:
            if item.record is None:
                raise ValueError(item.fault)
            kept.append((item.where, task.draft(item.record)))
        except ValueError as error:
            bad.append(f"{item.where}: {str(error)[:MOST_SAID]}")
    encoded = task.finish([draft for _, draft in kept])
    examples = [example for one in encoded for example in one.examples]
    places = [where for (where, _), one in zip(kept, encoded, strict=True) for _ in one.examples]
    rows, groups = pack(examples, context)
    fresh = _rows_file(folder, shard).with_suffix(".tmp")
    writer = ArrayRecordWriter(str(fresh), "group_size:1")  # one record a group: read at random places
    for row in rows:
        writer.write(row.tobytes())
    writer.close()
    put(fresh, _rows_file(folder, shard))
    write_text(_where_file(folder, shard), "".join("\t".join(places[i] for i in group) + "\n" for group in groups))
    targets = np.concatenate([np.zeros(0, np.int32), *(example.ids[1:] for example in examples)])
    weights = np.concatenate([np.zeros(0), *(example.weights[1:] for example in examples)])
    counts = np.bincount(targets, weights, minlength=vocab_size)
    _save_array(folder / f"counts-{shard:05}.npy", counts)
    statistics = {
        "records": len(block),
        "bad": len(bad),
        "bad_named": bad[:MOST_NAMED],
        "examples": len(examples),
        "rows": len(rows),
        "tokens": sum(len(example.ids) - 1 for example in examples),
        "scored": float(counts.sum()),
        "cut_examples": sum(one.lost > 0 for one in encoded),
        "cut_tokens": sum(one.lost for one in encoded),
        "questions": [one.question for one in encoded if one.question is not None],
    }
    write_json(_shard_file(folder, shard), statistics)


def _save_array(path: Path, array: np.ndarray) -> None:
    fresh = path.with_suffix(".tmp.npy")
    np.save(fresh, array)
    put(fresh, path)


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove {path.parent}, and it is made again") from error


def _summarise(folder: Path, shards: int, source: str, part: str, context: int) -> dict[str, Any]:
    """Add up the shards: the index, and beside it the questions and the counts of targets."""
    index: dict[str, Any] = {"source": source, "part": part, "context": context, "shards": shards}
    index |= dict.fromkeys((*SUMMED, "bad_named"), 0) | {"bad_named": [], "rows_of_shards": []}
    counts, questions = np.zeros(0), []
    for shard in range(shards):
        found = read_json(_shard_file(folder, shard))
        index |= {name: index[name] + found[name] for name in SUMMED}
        index["bad_named"] = (index["bad_named"] + found["bad_named"])[:MOST_NAMED]
        index["rows_of_shards"].append(found["rows"])
        questions += [json.dumps(question) + "\n" for question in found["questions"]]
        shard_counts = _load_array(folder / f"counts-{shard:05}.npy")
        counts = shard_counts if not shard else counts + shard_counts
    write_text(folder / "questions.jsonl", "".join(questions))
    _save_array(folder / "target_counts.npy", counts)
    return index


def _usable(prepared: Prepared, config: DataConfig) -> Prepared:
    """Raises ValueError for data that must not be trained on, whether it was made now or lay in the cache."""
    index = prepared.index
    named = "; ".join(index["bad_named"])
    if index["bad"] > config.max_bad_share * index["records"]:
        raise ValueError(
            f"{index['source']}: {index['bad']} of {index['records']} records are malformed, more than "
            f"max_bad_share={config.max_bad_share}; mend them or raise it. The first: {named}"
        )
    if index["bad"]:
        say(f"{index['source']}: skipped {index['bad']} malformed of {index['records']} records: {named}", "yellow")
    if not index["rows"]:
        raise ValueError(f"{index['source']} ({index['part']}): no example is left of {index['records']} records")
    if not index["scored"]:
        raise ValueError(
            f"{index['source']} ({index['part']}): every token is masked, nothing is trained on; "
            "check the task and the fields of its records with `jaxstages inspect`"
        )
    if config.task != "lm" and index["scored"] == index["tokens"]:
        raise ValueError(
            f"{index['source']} ({index['part']}): no token is masked, the prompts would be trained on; look at its "
            "records with `jaxstages inspect`"
        )
    return prepared
