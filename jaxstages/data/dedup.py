"""Near-duplicates by MinHash: which documents share most of their shingles with an earlier one.

A document is the set of its shingles: the runs of `shingle_size` words, or characters. The Jaccard similarity of two,
s = |A & B| / |A | B|, is the probability that the least of their shingles under a random permutation is the same
(Broder 1997, "On the resemblance and containment of documents"). The least ones under P permutations are a document's
signature [P]; the share of places in which two signatures agree estimates s.

Not all pairs are compared: a signature falls into b bands of r = P / b numbers, and only documents that agree in a
whole band are, which pairs that share s of their shingles do with probability 1 - (1 - s^r)^b (Indyk and Motwani 1998).

A document goes if, in one of its bands, an earlier one is at least `threshold` similar by the whole signature. Whether
that one goes too does not matter, and so the answer is the same however the work is split; the first document of a
cluster always stays. Of documents that agree in a band, each is compared with the `MOST_COMPARED` earliest only: a
text that a million pages repeat costs a million comparisons, not their square.

Legend: n documents, P permutations.
"""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxstages.config.data import DuplicatesConfig

MOST_COMPARED = 32
"""Earlier documents of a band that one is compared with."""

BATCH = 2**20
"""Characters whose signatures are made at once."""

PAIRS = 2**15
"""That are compared at once."""

_BASE = 0x9E3779B97F4A7C15
"""Of the polynomial that shingles are hashed by; odd, so that it has an inverse modulo 2^64."""


def batches(documents: Iterable[tuple[int, str]]) -> Iterator[tuple[list[int], list[str]]]:
    """Documents, each with its place in the order, as many at a time as have `BATCH` characters."""
    orders: list[int] = []
    texts: list[str] = []
    size = 0
    for order, text in documents:
        orders.append(order)
        texts.append(text)
        size += len(text)
        if size >= BATCH:
            yield orders, texts
            orders, texts, size = [], [], 0
    if orders:
        yield orders, texts


def mix(numbers: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, one to one, each bit of a number changing about half of those of its image (SplitMix64, Steele
    et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


def shingles(texts: list[str], config: DuplicatesConfig) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all shingles, uint64, those of a text one after the other; and where each text's begin, int64 [n].

    Letters are compared without case, and any white space is as good as another. A text that is shorter than a shingle
    is one. The hash of a stretch of letters is Karp's and Rabin's (1987) polynomial, as a difference of two sums from
    the beginning: no loop over shingles is needed.
    """
    joined = "\n".join(" ".join(text.casefold().split()) or "\0" for text in texts)
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    breaks = codes == ord("\n")
    if config.shingle == "words":
        between = breaks | (codes == ord(" "))
        first = np.flatnonzero(~between & np.concatenate([[True], between[:-1]]))
        last = np.flatnonzero(~between & np.concatenate([between[1:], [True]])) + 1
    else:
        first = np.flatnonzero(~breaks)
        last = first + 1
    # Words, or letters, by the text that they are of.
    text_of = np.cumsum(breaks)[first]
    counts = np.bincount(text_of, minlength=len(texts))
    begins = np.cumsum(counts) - counts
    each = np.maximum(counts - config.shingle_size + 1, 1)
    place = np.arange(len(first))
    start = place[place - begins[text_of] < each[text_of]]
    of = text_of[start]
    end = np.minimum(start + config.shingle_size, begins[of] + counts[of]) - 1
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * _powers(_BASE, len(codes)), out=sums[1:])
    left = first[start]
    inverse = _powers(pow(_BASE, -1, 2**64), len(codes))
    return mix((sums[last[end]] - sums[left]) * inverse[left]), np.cumsum(each) - each


@functools.cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors and summands: uint64 [P], always the same."""
    numbers = mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(_BASE))
    return numbers[:count] | np.uint64(1), numbers[count:]


def signatures(texts: list[str], config: DuplicatesConfig) -> np.ndarray:
    """uint32 [n, P]: of each text, the least of its shingles under each permutation.

    A permutation is h(x) = (a x + b mod 2^64) >> 32 of a shingle's 32 bits (Dietzfelbinger 1996).
    """
    hashes, begins = shingles(texts, config)
    hashes >>= np.uint64(32)
    found = np.empty((config.permutations, len(texts)), np.uint32)
    images = np.empty_like(hashes)
    for row, factor, summand in zip(found, *_permutations(config.permutations), strict=True):
        np.multiply(hashes, factor, out=images)
        np.add(images, summand, out=images)
        row[:] = np.minimum.reduceat(images, begins) >> np.uint64(32)
    return np.ascontiguousarray(found.T)


def keys(signatures_nP: np.ndarray, bands: int) -> np.ndarray:
    """uint64 [n, 1 + bands]: a number for the whole signature, and for each of its bands; equal where they are."""

    def key(numbers: np.ndarray) -> np.ndarray:
        total = np.zeros(len(numbers), np.uint64)
        for column in numbers.T:
            total = mix(total * np.uint64(_BASE) + column.astype(np.uint64))
        return total

    return np.stack([key(signatures_nP), *map(key, np.split(signatures_nP, bands, axis=1))], axis=1)


def candidates(keys_n: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs to compare among documents in their order: of those that have the same key, each with the `most` earliest.
    Yields places of the later, and of the earlier ones."""
    by_key = np.argsort(keys_n, kind="stable")
    ranked = keys_n[by_key]
    new = np.concatenate([[True], ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, bool)
    begins = np.maximum.accumulate(np.where(new, np.arange(len(ranked)), 0))
    rank = np.arange(len(ranked)) - begins
    for earlier in range(min(most, int(rank.max(initial=0)))):
        later = np.flatnonzero(rank > earlier)
        yield by_key[later], by_key[begins[later] + earlier]


def similar(one_nP: np.ndarray, other_nP: np.ndarray, threshold: float) -> np.ndarray:
    """bool [n]: whether each pair is at least so similar, by the share of places in which the signatures agree."""
    return (one_nP == other_nP).mean(axis=1) >= threshold


def find(batches_of: Iterable[tuple[list[int], np.ndarray]], config: DuplicatesConfig, scratch: Path) -> list[int]:
    """Places in the order of the documents that have an earlier near-duplicate.

    Args:
        batches_of: places in the order, which goes up, and signatures [n, P].
        scratch: a folder of its own, for (4 P + 8 bands) bytes a document. In memory are about 40 a document.
    """
    files = [scratch / f"keys-{band:02}" for band in range(1 + config.bands)]
    orders, everything = [np.zeros(0, np.int64)], scratch / "signatures"
    opened = [path.open("wb") for path in (everything, *files)]
    for some, signatures_nP in batches_of:
        orders.append(np.asarray(some, np.int64))
        parts = (signatures_nP, *keys(signatures_nP, config.bands).T)
        for file, part in zip(opened, parts, strict=True):
            file.write(np.ascontiguousarray(part).data)
    for file in opened:
        file.close()
    order = np.concatenate(orders)
    if not len(order):
        return []
    every = np.memmap(everything, np.uint32, "r", shape=(len(order), config.permutations))
    gone = np.zeros(len(order), bool)

    def compare(places: np.ndarray, keys_n: np.ndarray, most: int) -> None:
        for later, earlier in candidates(keys_n, most):
            later, earlier = places[later], places[earlier]
            asked = np.flatnonzero(~gone[later])  # what goes already need not be asked again
            for some in np.split(asked, range(PAIRS, len(asked), PAIRS)):
                gone[later[some]] |= similar(every[later[some]], every[earlier[some]], config.threshold)

    compare(np.arange(len(order)), np.fromfile(files[0], np.uint64), 1)
    firsts = np.flatnonzero(~gone)
    for path in files[1:]:
        compare(firsts, np.fromfile(path, np.uint64)[firsts], MOST_COMPARED)
    return order[gone].tolist()
