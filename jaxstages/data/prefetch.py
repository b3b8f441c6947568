"""Results in their order, made by threads before they are asked for."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetch(
    make: Callable[[T], U], items: Iterable[T], ahead: int = 2, workers: int = 1, init: Callable[[], None] | None = None
) -> Iterator[U]:
    """make(item) of each item, in order; while one is used, `workers` threads make the next `ahead`. Each thread calls
    `init` first."""
    begun: collections.deque[concurrent.futures.Future[U]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers, initializer=init) as pool:
        for item in items:
            begun.append(pool.submit(make, item))
            if len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
