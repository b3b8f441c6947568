"""Records -> packed rows on disk: tokenized on all cores, cached by fingerprint, resumable.

A cache is a folder named by the SHA-256 of everything that its rows depend on. It has a shard for each block of records
(see `data/shards.py`), `index.json`, and `MANIFEST.json`, which is written last: a cache without it is incomplete, and
the next run continues after the existing shards. If near-duplicates are removed, a folder beside it lists them.

An `Engine` writes the shards: threads of this process, or Beam's workers. The bytes are the same.
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

from jaxstages import config as recipes
from jaxstages.config import DataConfig
from jaxstages.data import dedup
from jaxstages.data.clean import REMOVAL_REASONS, fingerprint_parts, is_cleaned, memory_bytes
from jaxstages.data.prefetch import prefetch
from jaxstages.data.shards import (
    MAX_REPORTED,
    RowSpec,
    ShardLimits,
    assign_shards,
    counts_file,
    cuts_texts,
    documents_of,
    items_of,
    load_array,
    open_rows,
    save_array,
    shard_file,
    where_file,
    write_dropped,
    write_examples,
    write_shard,
)
from jaxstages.data.sources import Item, Source
from jaxstages.data.tasks import Example, Question, make_task
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.runtime import bucket, manifest
from jaxstages.runtime.bucket import is_bucket, local_copy
from jaxstages.runtime.console import Progress, say
from jaxstages.runtime.files import acquire_lock, make_folder, read_json, write_json, write_text

VERSION = 5
"""Incremented when the same inputs give other rows."""

BLOCK_BYTES, BLOCK_RECORDS = 16_000_000, 50_000
"""Limits of a shard, see `ShardLimits`."""

MAX_WORKERS = 8
"""Shards written in parallel: more threads would wait for Python's lock, and each has a block in memory."""

SUMMED_COUNTS = ("records", "bad", "examples", "rows", "tokens", "scored", "cut_examples", "cut_tokens")
"""Entries of the index that are sums over shards."""

HASH_MAX_BYTES = 2**20
"""Files of a cache up to this size are hashed whenever it is opened. Larger ones are rows: they have checksums of their
own, and their sizes are compared."""

T = TypeVar("T")


def subsample_evenly(items: Sequence[T], limit: int) -> Sequence[T]:
    """Return `limit` evenly spaced items; all of them if `limit` is 0 or there are no more."""
    return items if not limit or len(items) <= limit else [items[i * len(items) // limit] for i in range(limit)]


@dataclass(frozen=True)
class Prepared:
    """A complete cache. index: the counts of `index.json`."""

    folder: Path
    index: dict[str, Any]

    def questions(self) -> list[Question]:
        """Read the held-out questions, in the order of their records."""
        lines = (self.folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        return [Question(*json.loads(line)) for line in lines]

    def locate(self, row: int) -> tuple[int, int]:
        """Return the shard of a row, and the row's index in it."""
        shard = bisect.bisect(self._starts, row) - 1
        return shard, row - self._starts[shard]

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.index["rows_of_shards"])]

    def open_shard(self, shard: int) -> Any:
        """Open a reader of a shard's rows."""
        return open_rows(self.folder, shard)

    def where(self, row: int) -> list[str]:
        """List the records, `file:line`, whose examples are in a row."""
        shard, index = self.locate(row)
        return where_file(self.folder, shard).read_text(encoding="utf-8").split("\n")[index].split("\t")

    def max_segments(self) -> int:
        """Return the largest number of examples in a row."""
        files = (where_file(self.folder, shard) for shard in range(self.index["shards"]))
        return max(line.count("\t") + 1 for file in files for line in file.read_text(encoding="utf-8").split("\n"))

    def target_counts(self) -> np.ndarray:
        """float64 [V]: loss weight of each token as a target, for the unigram baseline."""
        return load_array(self.folder / "target_counts.npy")


class Engine(NamedTuple):
    """How near-duplicates and shards are computed. All engines write the same bytes.

    Folders are in the cache, and so perhaps in a bucket. At the end, `local_copy` of the folder has its files.

    find_near_duplicates: `(source, config, folder)`: writes which documents have an earlier near-duplicate.
    write_shards: `(source, dropped, spec, folder)`: writes the shards that do not exist yet, without the documents
        listed in the folder `dropped`, and returns the number of all shards.
    """

    find_near_duplicates: Callable[[Source, DataConfig, Path], None]
    write_shards: Callable[[Source, Path | None, RowSpec, Path], int]


def prepare(
    source: Source,
    part: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    context: int,
    cache: Path,
    engine: Engine | None = None,
) -> Prepared:
    """Return the packed rows of one source, from the cache if they are there.

    Args:
        part: "train" or "validation"; with `config.holdout` each gets its side of the source, else all of it.
        context: slots in a row.
        engine: by default this process.

    Raises:
        ValueError: more malformed records than `config.max_bad_share`, or nothing left to train on.
    """

    folder = rows_folder(source, part, config, tokenizer, context, cache)

    def write(local: Path) -> None:
        dropped = find_near_duplicates(source, config, cache, engine)
        spec = RowSpec(part, config, tokenizer, context)
        shards = (engine or LOCAL).write_shards(source, dropped, spec, folder)
        write_json(local / "index.json", _summarize(local, shards, source.name, spec))

    local = _complete(folder, write)
    _check_cache(local, source)
    prepared = Prepared(local, read_json(local / "index.json"))
    _check_usable(prepared.index, config)
    return prepared


def rows_folder(source: Source, part: str, config: DataConfig, tokenizer: Tokenizer, context: int, cache: Path) -> Path:
    """Return the folder of `prepare`'s rows, whether it exists or not. Its name depends on everything that the rows
    depend on, and on no path."""
    parts = [VERSION, source.fingerprint, tokenizer.sha256, context, _task_key(config)]
    parts += [config.holdout, part] if config.holdout else [""]
    parts += ["whole files"] if config.holdout and source.texts and not cuts_texts(source, config) else []
    return _cache_folder(cache, [*parts, *_text_fingerprint_parts(config)])


def generated_folder(cache: Path, key: list[Any]) -> Path:
    """Return the folder of rows that a model generates."""
    return _cache_folder(cache, [VERSION, "generated", *key])


def write_generated(
    folder: Path, name: str, examples: list[Example], tokenizer: Tokenizer, context: int, max_examples: int
) -> None:
    """Pack generated examples into a cache of one shard, at most `max_examples` into a row."""
    spec = RowSpec("train", DataConfig(task="lm"), tokenizer, context)
    statistics = {"bad": 0, "bad_named": [], "cut_examples": 0, "cut_tokens": 0, "questions": [], "unread": {}}
    statistics |= {"records": len(examples)}
    origins = [f"{name}:{number}" for number in range(1, len(examples) + 1)]

    def write(folder: Path) -> None:
        write_examples(folder, 0, examples, origins, spec, statistics, max_examples)
        write_json(folder / "index.json", _summarize(folder, 1, name, spec))

    _complete(folder, write)


def open_prepared(folder: Path) -> Prepared | None:
    """Open the cache in a folder; None if it is incomplete. Raises ValueError if it is damaged."""
    if not _is_complete(folder) and not _is_complete(local_copy(folder)):
        return None
    folder = _complete(folder, lambda _: None)
    _check_cache(folder)
    return Prepared(folder, read_json(folder / "index.json"))


def _is_complete(folder: Path) -> bool:
    return (folder / manifest.MANIFEST).exists()


def _complete(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return the local folder of a complete cache. Write its files first, if it is incomplete.

    A cache in a bucket is written on the local disk and uploaded, or, if it is complete there, downloaded. The manifest
    is the last object in both directions. An object of the right size is not sent again: the name of the cache
    determines its content.

    Args:
        write: writes all files but the manifest into the given local folder.
    """
    local = local_copy(folder)
    # Complete caches may be read-only: write nothing there, not even a lock.
    if not _is_complete(local):
        with acquire_lock(local.with_suffix(".lock"), wait=True):  # another run may be writing the same rows
            if is_bucket(folder) and not _is_complete(local) and _is_complete(folder):
                bucket.download(folder, local, manifest.MANIFEST)
            elif not _is_complete(local):
                make_folder(local)
                write(local)
                manifest.write_manifest(local)
    if is_bucket(folder) and not _is_complete(folder):
        bucket.upload(local, folder, manifest.MANIFEST, skip_same_size=True)
    return local


def find_near_duplicates(source: Source, config: DataConfig, cache: Path, engine: Engine | None = None) -> Path | None:
    """Return the folder in the cache that lists the records with an earlier near-duplicate; None if they stay.

    The whole source is searched before any of it is held out, so held-out records have no near-duplicate among the
    training records.
    """
    if not config.duplicates.threshold:
        return None
    # "gone" is part of the fingerprint of existing caches.
    folder = _cache_folder(
        cache, [VERSION, "gone", source.fingerprint, _task_key(config), *_text_fingerprint_parts(config)]
    )

    def write(local: Path) -> None:
        (engine or LOCAL).find_near_duplicates(source, config, folder)
        count = sum(len(load_array(file)) for file in local.glob("gone-*.npy"))
        write_json(local / "index.json", {"source": source.name, "near_duplicates": count})

    _check_cache(_complete(folder, write), source)
    return folder


def _cache_folder(cache: Path, key: list[Any]) -> Path:
    return cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]


def _task_key(config: DataConfig) -> Any:
    """Return the name of the task; of an own one its fields and the SHA-256 of its source."""
    return config.task if config.own is None else recipes.to_dict(config.own)


def _text_fingerprint_parts(config: DataConfig) -> list[str]:
    fields = {"lm": [config.text], "chat": [config.answers], "own": []}.get(config.task, [config.prompt, config.target])
    return [*fields, *fingerprint_parts(config)]


def _check_cache(folder: Path, source: Source | None = None) -> None:
    try:
        manifest.check(folder, HASH_MAX_BYTES)
    except manifest.Damaged as error:
        origin = f" from {source.name}" if source else ""
        raise ValueError(f"{error}; remove {folder} to prepare it again{origin}") from error


def _find_near_duplicates_locally(source: Source, config: DataConfig, folder: Path) -> None:
    """Compute signatures in threads, which wait for Python half of the time, and store them in files."""
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
        workers = min(os.cpu_count() or 1, MAX_WORKERS)
        for batch in prefetch(sign, dedup.batches(documents()), workers=workers):
            progress.update(done)
            yield batch
        progress.end(done)

    folder = local_copy(folder)
    scratch = folder.with_suffix(".scratch")
    shutil.rmtree(scratch, ignore_errors=True)  # a killed run leaves one
    scratch.mkdir()
    write_dropped(folder, dedup.find_near_duplicates(signed(), config.duplicates, scratch))
    shutil.rmtree(scratch)


def _blocks(source: Source, dropped: Path | None, spec: RowSpec) -> Iterator[tuple[int, list[Item]]]:
    """Yield number and items of each shard."""
    items, measured = itertools.tee(items_of(source, spec.part, spec.config, dropped))
    sizes = (memory_bytes(item.record) for item in measured)
    shards = assign_shards(sizes, ShardLimits(BLOCK_BYTES, BLOCK_RECORDS))
    for shard, group in itertools.groupby(zip(shards, items, strict=True), key=lambda pair: pair[0]):
        yield shard, [item for _, item in group]


def _write_shards_locally(source: Source, dropped: Path | None, spec: RowSpec, folder: Path) -> int:
    """Write a shard for each block, unless it exists, a few in parallel.

    Threads are enough: the tokenizer, which takes most of the time, releases Python's lock.
    """
    folder = local_copy(folder)
    task = make_task(spec.config, spec.tokenizer, spec.context)

    def write(block: tuple[int, list[Item]]) -> int:
        shard, items = block
        if not shard_file(folder, shard).exists():
            write_shard(folder, shard, items, task, spec)
        return len(items)

    progress = Progress(f"prepare {source.name} ({spec.part}): records", source.records)
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    shards, records = 0, 0
    for size in prefetch(write, _blocks(source, dropped, spec), workers=workers):
        shards, records = shards + 1, records + size
        progress.update(records)
    progress.end(records)
    return shards


LOCAL = Engine(_find_near_duplicates_locally, _write_shards_locally)
"""Threads of this process."""


def _summarize(folder: Path, shards: int, source: str, spec: RowSpec) -> dict[str, Any]:
    """Add up the shards: return the index, and write the questions and the counts of targets beside it."""
    index: dict[str, Any] = {"source": source, "part": spec.part, "context": spec.context, "shards": shards}
    index |= dict.fromkeys((*SUMMED_COUNTS, "bad_named"), 0) | {"bad_named": [], "rows_of_shards": [], "unread": {}}
    if is_cleaned(spec.config):
        index["removed"] = dict.fromkeys(REMOVAL_REASONS, 0)

    counts, questions = np.zeros(0), []
    for shard in range(shards):
        statistics = read_json(shard_file(folder, shard))
        index |= {name: index[name] + statistics[name] for name in SUMMED_COUNTS}
        index["bad_named"] = (index["bad_named"] + statistics["bad_named"])[:MAX_REPORTED]
        index["rows_of_shards"].append(statistics["rows"])
        for key, count in statistics["unread"].items():
            index["unread"][key] = index["unread"].get(key, 0) + count
        if is_cleaned(spec.config):
            removed = statistics["removed"]
            index["removed"] = {reason: index["removed"][reason] + removed[reason] for reason in REMOVAL_REASONS}
        questions += [json.dumps(question) + "\n" for question in statistics["questions"]]
        shard_counts = load_array(counts_file(folder, shard))
        counts = shard_counts if not shard else counts + shard_counts

    write_text(folder / "questions.jsonl", "".join(questions))
    save_array(folder / "target_counts.npy", counts)
    return index


def _check_usable(index: dict[str, Any], config: DataConfig) -> None:
    """Raises ValueError for data that must not be trained on, whether the rows are new or come from the cache."""
    name, faults = f"{index['source']} ({index['part']})", "; ".join(index["bad_named"])
    if index["bad"] > config.max_bad_share * index["records"]:
        raise ValueError(
            f"{index['source']}: {index['bad']} of {index['records']} records are malformed, more than "
            f"max_bad_share={config.max_bad_share}; mend them or raise it. The first: {faults}"
        )

    if index["bad"]:
        say(f"{index['source']}: skipped {index['bad']} malformed of {index['records']} records: {faults}", "yellow")
    if index["unread"]:
        keys = ", ".join(f"{key!r} in {count}" for key, count in sorted(index["unread"].items()))
        say(f"{name}: messages of its records have keys that nothing reads, of {index['records']}: {keys}", "yellow")
    if is_cleaned(config) and (removed := {reason: count for reason, count in index["removed"].items() if count}):
        reasons = ", ".join(f"{count} {REMOVAL_REASONS[reason]}" for reason, count in removed.items())
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
