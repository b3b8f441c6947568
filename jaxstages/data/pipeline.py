"""Batches by step: `batch(k)` is a pure function of the recipe and k, on any number of hosts.

Nothing about the position is stored: a run that resumes at step k asks for batch k. Legend: B batch, L length.
"""

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxstages.data.packing import FIELDS
from jaxstages.data.prepare import Prepared, evenly
from jaxstages.types import Batch


class Batches(NamedTuple):
    """batch: `batch(k)`, this host's rows of batch k. digest: `digest(k)`, SHA-256 of all of its rows, the same on any
    host. where: `where(k)`, the records, `file:line`, that its rows hold."""

    batch: Callable[[int], Batch]
    digest: Callable[[int], str]
    where: Callable[[int], list[str]]


class _Rows:
    """Random access to the packed rows of one cache, each int32 [5, L], for several threads."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self._lock = prepared, threading.Lock()
        self._reader = functools.cache(prepared.open)

    def __len__(self) -> int:
        return self._prepared.index["rows"]

    def __getitem__(self, index: int) -> np.ndarray:
        shard, place = self._prepared.find(index)
        try:
            with self._lock:
                (reader := self._reader(shard)).seek(place)
                return np.frombuffer(reader.read(), np.int32).reshape(FIELDS, self._prepared.index["context"])
        except Exception as error:  # of whatever type array_record has for a broken checksum
            folder = self._prepared.folder
            raise ValueError(f"{folder} is damaged at row {index}: {error}; remove it, and it is made again") from error


def to_batch(rows: Sequence[np.ndarray]) -> Batch:
    """Rows int32 [5, L] -> a Batch of numpy arrays [B, L]."""
    tokens, targets, weights, segments, positions = np.stack(rows, axis=1)
    return Batch(tokens, targets, weights.view(np.float32), segments, positions)


def batches_by_step(
    sources: Sequence[Prepared], *, batch_size: int, seed: int, weights: Sequence[float] = (), here: range | None = None
) -> Batches:
    """Batches k = 0, 1, ... of the training rows; of each, the rows `here`, by default all.

    Each source is shuffled by seed, anew in each pass; sources are mixed by weight (default: by their rows). Row i of
    batch k is row k * batch_size + i of that endless stream.
    """
    rows = [_Rows(source) for source in sources]
    streams, shares = [], []
    for number, weight in enumerate(weights or [one.index["rows"] for one in sources]):
        if weight:
            places = grain.MapDataset.range(len(rows[number])).map(lambda row, number=number: (number, int(row)))
            streams.append(places.shuffle(seed=seed + number).repeat())
            shares.append(float(weight))
    # Any: to Grain a row may also be None, what a filter left out; nothing filters here.
    stream: Any = grain.MapDataset.mix(streams, weights=shares) if len(streams) > 1 else streams[0]
    mine = here or range(batch_size)

    def places_of(k: int) -> list[tuple[int, int]]:
        return [stream[k * batch_size + i] for i in range(batch_size)]

    def batch(k: int) -> Batch:
        return to_batch([rows[number][i] for number, i in places_of(k)[mine.start : mine.stop]])

    def digest(k: int) -> str:
        return hashlib.sha256(b"".join(rows[number][i].tobytes() for number, i in places_of(k))).hexdigest()

    def where(k: int) -> list[str]:
        return [record for number, i in places_of(k) for record in sources[number].where(i)]

    return Batches(batch, digest, where)


def batches_once(
    sources: Sequence[Prepared], *, batch_size: int, most: int = 0, here: range | None = None
) -> Iterator[Batch]:
    """All held-out rows once, in order (`most` evenly spread ones if not 0); the last batch is filled with empty rows,
    whose weights are 0, so that every shape is the same and no row counts twice."""
    rows = evenly([(source, i) for source in map(_Rows, sources) for i in range(len(source))], most)
    mine = here or range(batch_size)
    length = sources[0].index["context"]
    empty = np.zeros((FIELDS, length), np.int32)
    for start in range(0, len(rows), batch_size):
        chosen = [rows[start + i] if start + i < len(rows) else None for i in mine]
        yield to_batch([entry[0][entry[1]] if entry else empty for entry in chosen])
