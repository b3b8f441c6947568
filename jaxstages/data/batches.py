"""Batches by step: `batch(k)` is a pure function of the recipe and k, on any number of hosts.

No position is stored: a run that resumes at step k reads batch k. Legend: B batch, L length.
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
    """Functions of the step k.

    batch: `batch(k)`, this host's rows of batch k.
    digest: `digest(k)`, SHA-256 of all rows of batch k, the same on any host.
    where: `where(k)`, the records, `file:line`, in its rows.
    """

    batch: Callable[[int], Batch]
    digest: Callable[[int], str]
    where: Callable[[int], list[str]]


class _Rows:
    """Random access to the packed rows of one cache, each int32 [5, L], for several threads."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self._lock = prepared, threading.Lock()
        self._reader = functools.cache(prepared.open_shard)

    def __len__(self) -> int:
        return self._prepared.index["rows"]

    def __getitem__(self, row: int) -> np.ndarray:
        shard, index = self._prepared.locate(row)
        try:
            with self._lock:
                reader = self._reader(shard)
                reader.seek(index)
                return np.frombuffer(reader.read(), np.int32).reshape(FIELDS, self._prepared.index["context"])
        except Exception as error:  # array_record has no type of its own for a wrong checksum
            folder = self._prepared.folder
            raise ValueError(
                f"{folder} is damaged at row {row}: {error}; remove it, and it is prepared again"
            ) from error


def to_batch(rows: Sequence[np.ndarray]) -> Batch:
    """Stack rows int32 [5, L] to a Batch of numpy arrays [B, L]."""
    tokens, targets, weights, segments, positions = np.stack(rows, axis=1)
    return Batch(tokens, targets, weights.view(np.float32), segments, positions)


class WeightChange(NamedTuple):
    """New mixing weights, which take effect at row `row` of the stream."""

    row: int
    weights: Sequence[float]


Position = tuple[int, int]
"""The number of a source, and the number of its rows that came before."""


def interleave(weights: Sequence[float], late: WeightChange | None = None) -> Callable[[int], Position]:
    """Interleave endless sources by weight: `position(i)` is the source of row i of the stream, and the row in it.

    Among the first n rows, source j has `n * weights[j] / sum(weights)`, to within as many rows as there are sources.
    The order is Grain's. When the weights change, each source continues where it was:

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

    # The rows of each source before the change: what the next early row of that source would be.
    after: Any = mix(late.weights)
    rows_before = {number: 0 for number, share in enumerate(late.weights) if share and not weights[number]}
    row = late.row
    while any(share and number not in rows_before for number, share in enumerate(weights)):
        number, n = early[row]
        rows_before.setdefault(number, n)
        row += 1

    def position(i: int) -> Position:
        if i < late.row:
            return early[i]
        number, n = after[i - late.row]
        return number, rows_before[number] + n

    return position


def batches_by_step(
    sources: Sequence[Prepared],
    *,
    batch_size: int,
    seed: int,
    weights: Sequence[float] = (),
    late: WeightChange | None = None,
    local_rows: range | None = None,
) -> Batches:
    """Batches k = 0, 1, ... of the training rows.

    Each source is shuffled by seed, anew in each pass, and sources are mixed by weight. Row i of batch k is row
    k * batch_size + i of that endless stream.

    Args:
        weights: weights of the sources; by default their numbers of rows.
        late: other weights from a row of the stream on.
        local_rows: rows of each batch that this host reads; by default all.
    """
    rows = [_Rows(source) for source in sources]
    # Any, because an element of a Grain data set may also be None, where a filter dropped it. Nothing is filtered.
    order: list[Any] = [
        grain.MapDataset.range(len(source)).shuffle(seed=seed + number).repeat() for number, source in enumerate(rows)
    ]
    position = interleave(weights or [source.index["rows"] for source in sources], late)
    local = local_rows or range(batch_size)

    @functools.lru_cache(2**12)  # of a small source, Grain takes milliseconds for a row, and a digest asks again
    def shuffled(number: int, n: int) -> int:
        return int(order[number][n])

    def rows_of_batch(k: int) -> list[Position]:
        positions = [position(k * batch_size + i) for i in range(batch_size)]
        return [(number, shuffled(number, n)) for number, n in positions]

    def batch(k: int) -> Batch:
        return to_batch([rows[number][i] for number, i in rows_of_batch(k)[local.start : local.stop]])

    def digest(k: int) -> str:
        return hashlib.sha256(b"".join(rows[number][i].tobytes() for number, i in rows_of_batch(k))).hexdigest()

    def where(k: int) -> list[str]:
        return [record for number, i in rows_of_batch(k) for record in sources[number].where(i)]

    return Batches(batch, digest, where)


def batches_once(
    source: Prepared, rows: Sequence[int] | None = None, *, batch_size: int, local_rows: range | None = None
) -> Iterator[Batch]:
    """Read held-out rows once, in order. The last batch is filled with empty rows, whose weights are 0, so that all
    batches have one shape and no row counts twice.

    Args:
        rows: which rows to read; by default all.
        local_rows: rows of each batch that this host reads; by default all.
    """
    reader, local = _Rows(source), local_rows or range(batch_size)
    selected = range(len(reader)) if rows is None else rows
    empty = np.zeros((FIELDS, source.index["context"]), np.int32)
    for start in range(0, len(selected), batch_size):
        batch = selected[start : start + batch_size]
        yield to_batch([reader[batch[i]] if i < len(batch) else empty for i in local])
