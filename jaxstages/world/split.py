"""Which combinations belong to validation: a stable hash of the combination's own words, and nothing else.

A record's split follows from what it says, not from where it stood in a shuffled list. So a combination that is held
out is held out in every data set, in every process, whatever the seed and the number of records.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SPLITS = ("train", "validation")

T = TypeVar("T")


@functools.cache  # Draws ask for the same few thousand combinations again and again.
def held_out(one_in: int, *parts: str) -> bool:
    """Whether the combination `parts` is kept for validation; about one combination in `one_in` is."""
    digest = hashlib.blake2b("|".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % one_in == 0


def belongs(split: str, combinations: Iterable[tuple[str, ...]], one_in: int) -> bool:
    """Whether a record made of `combinations` belongs to `split`.

    Training takes a record none of whose combinations is held out; validation one where at least one is.
    Raises ValueError for a split that is not in SPLITS.
    """
    check_split(split)
    return any(held_out(one_in, *combination) for combination in combinations) == (split == "validation")


def check_split(split: str) -> None:
    """Raises ValueError, one line, for a split that is not in SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: known are {', '.join(SPLITS)}")


def unique(draws: Iterator[T], count: int, key: Callable[[T], str], patience: int = 2000) -> Iterator[T]:
    """The first `count` draws whose `key` did not come before.

    Raises RuntimeError when `patience` draws in a row bring nothing new: the source is too small for `count`.
    """
    seen: set[str] = set()
    misses = 0
    while len(seen) < count:
        draw = next(draws)
        text = key(draw)
        if text in seen:
            misses += 1
            if misses > patience:
                raise RuntimeError(f"only {len(seen)} of {count} different records could be drawn")
            continue
        misses = 0
        seen.add(text)
        yield draw
