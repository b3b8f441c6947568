"""Records -> packed rows on disk, once: tokenized in batches over all cores, cached by fingerprint, restartable.

A cache is a folder named by the SHA-256 of all that its rows depend on. It holds a shard a block of records (see
`data/shards.py`), `index.json`, and `MANIFEST.json`, which is written last: without it the cache is not whole, and the
next run goes on after the shards that are there. Beside it is a folder for the near-duplicates of a source, if they are
removed. Who makes the shards is an `Engine`: threads of this process, or Beam's workers; the bytes are the same.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxstages.config import DataConfig
from jaxstages.data import dedup
from jaxstages.data.clean import REMOVED, cleans, key_of, size_of
from jaxstages.data.prefetch import prefetch
from jaxstages.data.shards import (
    MOST_NAMED,
    Block,
    Form,
    counts_file,
    cuts_texts,
    documents_of,
    items_of,
    load_array,
    open_rows,
    save_array,
    shard_file,
    shards_of,
    where_file,
    write_dropped,
    write_examples,
    write_shard,
)
from jaxstages.data.sources import Item, Source
from jaxstages.data.tasks import Example, Question, make_task
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.runtime import manifest
from jaxstages.runtime.console import Progress, say
from jaxstages.runtime.files import hold, make_folder, read_json, write_json, write_text

VERSION = 5
"""Counts up when the same inputs give other rows."""

BLOCK_BYTES, BLOCK_RECORDS = 16_000_000, 50_000
"""A shard is closed when its records take this much memory (or one that takes more), or when it has this many."""

MOST_WORKERS = 8
"""Shards that are made at once: more would only wait for Python, and each holds a block in memory."""

SUMMED = ("records", "bad", "examples", "rows", "tokens", "scored", "cut_examples", "cut_tokens")

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

    def questions(self) -> list[Question]:
        """Held-out questions in the order of their records."""
        lines = (self.folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        return [Question(*json.loads(line)) for line in lines]

    def find(self, row: int) -> tuple[int, int]:
        """The shard that holds row `row`, and which of its rows it is."""
        shard = bisect.bisect(self._starts, row) - 1
        return shard, row - self._starts[shard]

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.index["rows_of_shards"])]

    def open(self, shard: int) -> Any:
        """A reader of a shard's rows."""
        return open_rows(self.folder, shard)

    def where(self, row: int) -> list[str]:
        """The records, `file:line`, whose examples row `row` holds."""
        shard, place = self.find(row)
        return where_file(self.folder, shard).read_text(encoding="utf-8").split("\n")[place].split("\t")

    def most_segments(self) -> int:
        """Examples in the row that has the most."""
        files = (where_file(self.folder, shard) for shard in range(self.index["shards"]))
        return max(line.count("\t") + 1 for file in files for line in file.read_text(encoding="utf-8").split("\n"))

    def target_counts(self) -> np.ndarray:
        """float64 [V]: loss weight of each token as a target, for the unigram baseline."""
        return load_array(self.folder / "target_counts.npy")


class Engine(NamedTuple):
    """Who does the work. Both leave the same bytes, whoever it is.

    find_near_duplicates: `(source, config, folder)`: writes there which documents have an earlier near-duplicate.
    write_shards: `(source, gone, form, folder)`: writes all shards that are not there yet, without what is named in the
    folder `gone`, if there is one; how many there are.
    """

    find_near_duplicates: Callable[[Source, DataConfig, Path], None]
    write_shards: Callable[[Source, Path | None, Form, Path], int]


def prepare(
    source: Source,
    part: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    context: int,
    cache: Path,
    engine: Engine | None = None,
) -> Prepared:
    """The packed rows of one source, from the cache if they are there.

    Args:
        part: "train" or "validation"; with `config.holdout` each gets its side of the source, else all of it.
        context: slots in a row.
        engine: by default this process.

    Raises:
        ValueError: more malformed records than `config.max_bad_share`, or nothing left to train on.
    """
    engine = engine or HERE
    folder = rows_folder(source, part, config, tokenizer, context, cache)
    if not (folder / manifest.MANIFEST).exists():  # else nothing is written, not even a lock: a cache may be read-only
        with hold(folder.with_suffix(".lock"), wait=True):  # another run may be making the same rows
            if not (folder / manifest.MANIFEST).exists():
                make_folder(folder)
                gone = find_near_duplicates(source, config, cache, engine)
                form = Form(part, config, tokenizer, context)
                shards = engine.write_shards(source, gone, form, folder)
                write_json(folder / "index.json", _summarise(folder, shards, source.name, form))
                manifest.seal(folder)
    _check(folder, source)
    return _usable(Prepared(folder, read_json(folder / "index.json")), config)


def rows_folder(source: Source, part: str, config: DataConfig, tokenizer: Tokenizer, context: int, cache: Path) -> Path:
    """Where the rows of `prepare` lie, or will lie; its name depends on all that they depend on, and on no path."""
    parts = [VERSION, source.fingerprint, tokenizer.sha256, context, config.task]
    parts += [config.holdout, part] if config.holdout else [""]
    parts += ["whole files"] if config.holdout and source.texts and not cuts_texts(source, config) else []
    return _folder(cache, [*parts, *_texts_key(config)])


def generated_folder(cache: Path, key: list[Any]) -> Path:
    """Where rows lie that no source gives, but a model."""
    return _folder(cache, [VERSION, "generated", *key])


def write_generated(folder: Path, name: str, examples: list[Example], tokenizer: Tokenizer, context: int) -> None:
    """Pack what a model has generated into a cache, in one shard."""
    form = Form("train", DataConfig(task="lm"), tokenizer, context)
    empty = {"bad": 0, "bad_named": [], "cut_examples": 0, "cut_tokens": 0, "questions": [], "unread": {}}
    places = [f"{name}:{number}" for number in range(1, len(examples) + 1)]
    with hold(folder.with_suffix(".lock"), wait=True):
        make_folder(folder)
        write_examples(folder, 0, examples, places, form, empty | {"records": len(examples)})
        write_json(folder / "index.json", _summarise(folder, 1, name, form))
        manifest.seal(folder)


def open_prepared(folder: Path) -> Prepared | None:
    """The cache in a folder, or None if it is not whole. Raises ValueError where it is damaged."""
    if not (folder / manifest.MANIFEST).exists():
        return None
    _check(folder)
    return Prepared(folder, read_json(folder / "index.json"))


def find_near_duplicates(source: Source, config: DataConfig, cache: Path, engine: Engine | None = None) -> Path | None:
    """The folder that says which records of a source have an earlier near-duplicate; None where they all stay.

    They are looked for in the whole source, before any of it is held out: what is held out has no near-duplicate among
    what is trained on.
    """
    if not config.duplicates.threshold:
        return None
    folder = _folder(cache, [VERSION, "gone", source.fingerprint, config.task, *_texts_key(config)])
    if not (folder / manifest.MANIFEST).exists():
        with hold(folder.with_suffix(".lock"), wait=True):
            if not (folder / manifest.MANIFEST).exists():
                make_folder(folder)
                (engine or HERE).find_near_duplicates(source, config, folder)
                found = sum(len(load_array(file)) for file in folder.glob("gone-*.npy"))
                write_json(folder / "index.json", {"source": source.name, "near_duplicates": found})
                manifest.seal(folder)
    _check(folder, source)
    return folder


def _folder(cache: Path, key: list[Any]) -> Path:
    return cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]


def _texts_key(config: DataConfig) -> list[str]:
    fields = {"lm": [config.text], "chat": [config.answers]}.get(config.task, [config.prompt, config.target])
    return [*fields, *key_of(config)]


def _check(folder: Path, source: Source | None = None) -> None:
    try:
        manifest.check(folder, HASH_UP_TO)
    except manifest.Damaged as error:
        origin = f" from {source.name}" if source else ""
        raise ValueError(f"{error}; remove {folder}, and it is made again{origin}") from error


def _find_gone(source: Source, config: DataConfig, folder: Path) -> None:
    """With signatures made by threads, which wait for Python half of the time, and kept in files."""
    progress = Progress(f"near-duplicates of {source.name}: records", source.records)
    done = 0

    def documents() -> Iterator[tuple[int, str]]:
        nonlocal done
        for number, read in enumerate(source.parts):
            for document in documents_of(read, number, config):
                done += 1
                yield document

    def sign(batch: tuple[list[int], list[str]]) -> tuple[list[int], np.ndarray]:
        return batch[0], dedup.signatures(batch[1], config.duplicates)

    def signed() -> Iterator[tuple[list[int], np.ndarray]]:
        workers = min(os.cpu_count() or 1, MOST_WORKERS)
        for batch in prefetch(sign, dedup.batches(documents()), workers=workers):
            progress.update(done)
            yield batch
        progress.end(done)

    scratch = folder.with_suffix(".scratch")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    write_dropped(folder, dedup.find(signed(), config.duplicates, scratch))
    shutil.rmtree(scratch)


def _blocks(source: Source, gone: Path | None, form: Form) -> Iterator[tuple[int, list[Item]]]:
    """The items of one part, some thousands at a time, each with the number of its shard."""
    one, other = itertools.tee(items_of(source, form.part, form.config, gone))
    shards = shards_of((size_of(item.record) for item in one), Block(BLOCK_BYTES, BLOCK_RECORDS))
    for shard, group in itertools.groupby(zip(shards, other, strict=True), key=lambda pair: pair[0]):
        yield shard, [item for _, item in group]


def _write_shards(source: Source, gone: Path | None, form: Form, folder: Path) -> int:
    """A shard for each block, where it is not there yet, a few at a time.

    Threads are enough: the tokenizer, which takes most of the time, holds no lock of Python's.
    """
    task = make_task(form.config, form.tokenizer, form.context)

    def make(numbered: tuple[int, list[Item]]) -> int:
        shard, items = numbered
        if not shard_file(folder, shard).exists():
            write_shard(folder, shard, items, task, form)
        return len(items)

    progress = Progress(f"prepare {source.name} ({form.part}): records", source.records)
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    shards, records = 0, 0
    for size in prefetch(make, _blocks(source, gone, form), workers=workers):
        shards, records = shards + 1, records + size
        progress.update(records)
    progress.end(records)
    return shards


HERE = Engine(_find_gone, _write_shards)
"""Threads of this process."""


def _summarise(folder: Path, shards: int, source: str, form: Form) -> dict[str, Any]:
    """Add up the shards: the index, and beside it the questions and the counts of targets."""
    index: dict[str, Any] = {"source": source, "part": form.part, "context": form.context, "shards": shards}
    index |= dict.fromkeys((*SUMMED, "bad_named"), 0) | {"bad_named": [], "rows_of_shards": [], "unread": {}}
    if cleans(form.config):
        index["removed"] = dict.fromkeys(REMOVED, 0)
    counts, questions = np.zeros(0), []
    for shard in range(shards):
        found = read_json(shard_file(folder, shard))
        index |= {name: index[name] + found[name] for name in SUMMED}
        index["bad_named"] = (index["bad_named"] + found["bad_named"])[:MOST_NAMED]
        index["rows_of_shards"].append(found["rows"])
        for key, count in found["unread"].items():
            index["unread"][key] = index["unread"].get(key, 0) + count
        if cleans(form.config):
            index["removed"] = {reason: index["removed"][reason] + found["removed"][reason] for reason in REMOVED}
        questions += [json.dumps(question) + "\n" for question in found["questions"]]
        shard_counts = load_array(counts_file(folder, shard))
        counts = shard_counts if not shard else counts + shard_counts
    write_text(folder / "questions.jsonl", "".join(questions))
    save_array(folder / "target_counts.npy", counts)
    return index


def _usable(prepared: Prepared, config: DataConfig) -> Prepared:
    """Raises ValueError for data that must not be trained on, whether it was made now or lay in the cache."""
    index = prepared.index
    name, named = f"{index['source']} ({index['part']})", "; ".join(index["bad_named"])
    if index["bad"] > config.max_bad_share * index["records"]:
        raise ValueError(
            f"{index['source']}: {index['bad']} of {index['records']} records are malformed, more than "
            f"max_bad_share={config.max_bad_share}; mend them or raise it. The first: {named}"
        )
    if index["bad"]:
        say(f"{index['source']}: skipped {index['bad']} malformed of {index['records']} records: {named}", "yellow")
    if index["unread"]:
        keys = ", ".join(f"{key!r} in {count}" for key, count in sorted(index["unread"].items()))
        say(f"{name}: messages of its records have keys that nothing reads, of {index['records']}: {keys}", "yellow")
    if cleans(config) and (removed := {reason: count for reason, count in index["removed"].items() if count}):
        reasons = ", ".join(f"{count} {REMOVED[reason]}" for reason, count in removed.items())
        say(f"{name}: removed {sum(removed.values())} of {index['records']} records: {reasons}", "yellow")
    if not index["rows"]:
        tip = f"; change data.holdout={config.holdout}, or name data.validation instead" if config.holdout else ""
        if index["cut_examples"]:
            tip = (
                f"; {index['cut_examples']} do not fit config.model.context={index['context']}, which cuts "
                f"{index['cut_tokens']:,} tokens of them: raise it, or shorten the prompts"
            )
        raise ValueError(f"{name}: no example is left of {index['records']} records{tip}")
    if not index["scored"]:
        raise ValueError(
            f"{name}: every token is masked, nothing is trained on; check the task and the fields of its records with "
            "`jaxstages inspect`"
        )
    if config.task != "lm" and index["scored"] == index["tokens"]:
        raise ValueError(
            f"{name}: no token is masked, the prompts would be trained on; look at its records with `jaxstages inspect`"
        )
    return prepared
