"""Compute results ahead in threads, and yield them in order."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetch(
    make: Callable[[T], U], items: Iterable[T], workers: int = 1, group: int = 1, init: Callable[[], None] | None = None
) -> Iterator[U]:
    """Yield make(item) of each item in order, while threads compute the next ones.

    Args:
        workers: number of threads.
        group: calls that are submitted together, whenever no more than `workers` (or two) are pending.
        init: called first by each thread.
    """
    pending: collections.deque[concurrent.futures.Future[U]] = collections.deque()
    iterator, max_pending = iter(items), max(workers, 2)
    with concurrent.futures.ThreadPoolExecutor(workers, initializer=init) as pool:
        while submitted := [pool.submit(make, item) for item in itertools.islice(iterator, group)]:
            pending.extend(submitted)
            while len(pending) > max_pending:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
