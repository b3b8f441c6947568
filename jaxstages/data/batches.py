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
from jaxstages.data.prepare import Prepared
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


class Late(NamedTuple):
    """Other weights of the sources from a row of the stream on."""

    row: int
    weights: Sequence[float]


Position = tuple[int, int]
"""The number of a source, and how many rows of it came before."""


def interleave(weights: Sequence[float], late: Late | None = None) -> Callable[[int], Position]:
    """`position(i)`: which source gives row i of an endless stream, and its how-manieth row that is.

    Among the first n rows, source j has `n * weights[j] / sum(weights)`, to within as many rows as there are sources.
    The order is Grain's. A source goes on where it was when the weights change:

    | row                              | 0     1     2     3     4     5     6     7     8     |
    | weights (1, 2), all from 0 later | (0,0) (1,0) (1,1) (0,1) (1,2) (1,3) (0,2) (0,3) (0,4) |
    """

    def endless(number: int) -> Any:
        return grain.MapDataset.range(2**62).map(lambda n: (number, int(n)))

    def mix(shares: Sequence[float]) -> Any:
        used = [number for number, share in enumerate(shares) if share]
        streams = [endless(number) for number in used]
        return grain.MapDataset.mix(streams, weights=[float(shares[number]) for number in used])

    early: Any = mix(weights)
    if late is None:
        return early.__getitem__
    after: Any = mix(late.weights)
    taken = {number: 0 for number, share in enumerate(late.weights) if share and not weights[number]}
    row = late.row
    while any(share and number not in taken for number, share in enumerate(weights)):
        number, n = early[row]
        taken.setdefault(number, n)
        row += 1

    def position(i: int) -> Position:
        if i < late.row:
            return early[i]
        number, n = after[i - late.row]
        return number, taken[number] + n

    return position


def batches_by_step(
    sources: Sequence[Prepared],
    *,
    batch_size: int,
    seed: int,
    weights: Sequence[float] = (),
    late: Late | None = None,
    here: range | None = None,
) -> Batches:
    """Batches k = 0, 1, ... of the training rows; of each, the rows `here`, by default all.

    Each source is shuffled by seed, anew in each pass; sources are mixed by weight (default: by their rows). Row i of
    batch k is row k * batch_size + i of that endless stream.

    Args:
        late: other weights from a row of the stream on.
    """
    rows = [_Rows(source) for source in sources]
    # Any: to Grain an element may also be None, what a filter left out; nothing filters here.
    order: list[Any] = [
        grain.MapDataset.range(len(source)).shuffle(seed=seed + number).repeat() for number, source in enumerate(rows)
    ]
    position = interleave(weights or [source.index["rows"] for source in sources], late)
    mine = here or range(batch_size)

    def places_of(k: int) -> list[Position]:
        positions = [position(k * batch_size + i) for i in range(batch_size)]
        return [(number, int(order[number][n])) for number, n in positions]

    def batch(k: int) -> Batch:
        return to_batch([rows[number][i] for number, i in places_of(k)[mine.start : mine.stop]])

    def digest(k: int) -> str:
        return hashlib.sha256(b"".join(rows[number][i].tobytes() for number, i in places_of(k))).hexdigest()

    def where(k: int) -> list[str]:
        return [record for number, i in places_of(k) for record in sources[number].where(i)]

    return Batches(batch, digest, where)


def batches_once(
    source: Prepared, rows: Sequence[int] | None = None, *, batch_size: int, here: range | None = None
) -> Iterator[Batch]:
    """Held-out rows once, in order; the last batch is filled with empty rows, whose weights are 0, so that every shape
    is the same and no row counts twice.

    Args:
        rows: which of them; by default all.
        here: the rows of each batch that this host makes, by default all.
    """
    reader, mine = _Rows(source), here or range(batch_size)
    chosen = range(len(reader)) if rows is None else rows
    empty = np.zeros((FIELDS, source.index["context"]), np.int32)
    for start in range(0, len(chosen), batch_size):
        batch = chosen[start : start + batch_size]
        yield to_batch([reader[batch[i]] if i < len(batch) else empty for i in mine])
