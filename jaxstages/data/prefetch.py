"""Results in their order, made by threads before they are asked for."""

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
    """make(item) of each item, in order; while one is used, `workers` threads make the next ones. Whenever these are
    two, or one a thread, `group` more are begun. Each thread calls `init` first."""
    begun: collections.deque[concurrent.futures.Future[U]] = collections.deque()
    rest, ahead = iter(items), max(workers, 2)
    with concurrent.futures.ThreadPoolExecutor(workers, initializer=init) as pool:
        while fresh := [pool.submit(make, item) for item in itertools.islice(rest, group)]:
            begun.extend(fresh)
            while len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
