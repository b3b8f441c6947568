"""Near-duplicates by MinHash: find the documents that share most of their shingles with an earlier one.

A document is the set of its shingles: runs of `shingle_size` words or characters. The Jaccard similarity of two
documents, s = |A & B| / |A | B|, is the probability that their smallest shingles under a random permutation are equal
(Broder 1997, "On the resemblance and containment of documents"). The smallest shingles under P permutations are a
document's signature [P]; the share of positions in which two signatures agree estimates s.

Not all pairs are compared (locality-sensitive hashing, Indyk and Motwani 1998): a signature is divided into b bands of
r = P / b numbers, and only documents that agree in a whole band are compared. Pairs with similarity s do so with
probability 1 - (1 - s^r)^b.

A document is a near-duplicate if, in one of its bands, an earlier document is at least `threshold` similar by the whole
signature. It does not matter whether the earlier one is dropped itself, so the answer does not depend on how the work
is split, and the first document of a cluster always stays. Of documents that agree in a band, each is compared with the
`MAX_COMPARED` earliest only: a text that a million pages repeat costs a million comparisons, not their square.

Legend: n documents, P permutations.
"""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxstages.config.data import DuplicatesConfig

MAX_COMPARED = 32
"""Earlier documents of a band that a document is compared with."""

BATCH_CHARACTERS = 2**20
"""Characters of the documents whose signatures are computed together."""

PAIR_BLOCK = 2**15
"""Pairs of signatures compared per block."""

_BASE = 0x9E3779B97F4A7C15
"""Base of the rolling hash; odd, so that it has an inverse modulo 2^64."""


def batches(documents: Iterable[tuple[int, str]]) -> Iterator[tuple[list[int], list[str]]]:
    """Group (order, text) pairs into batches of about `BATCH_CHARACTERS` characters."""
    orders: list[int] = []
    texts: list[str] = []
    size = 0
    for order, text in documents:
        orders.append(order)
        texts.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield orders, texts
            orders, texts, size = [], [], 0
    if orders:
        yield orders, texts


def mix(numbers: np.ndarray) -> np.ndarray:
    """Hash uint64 one to one, so that each bit of the input changes about half of the output's bits (SplitMix64, Steele
    et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


def shingles(texts: list[str], config: DuplicatesConfig) -> tuple[np.ndarray, np.ndarray]:
    """Hash all shingles: uint64, text after text, and the index of each text's first shingle, int64 [n].

    Case and the amount of white space are ignored. A text shorter than a shingle is one shingle. The hash is the
    polynomial of Karp and Rabin (1987), computed as a difference of two prefix sums: no loop over shingles is needed.
    """
    joined = "\n".join(" ".join(text.casefold().split()) or "\0" for text in texts)
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    breaks = codes == ord("\n")

    # Units are words or characters: positions of their first character, and of their last + 1.
    if config.shingle == "words":
        separators = breaks | (codes == ord(" "))
        first = np.flatnonzero(~separators & np.concatenate([[True], separators[:-1]]))
        last = np.flatnonzero(~separators & np.concatenate([separators[1:], [True]])) + 1
    else:
        first = np.flatnonzero(~breaks)
        last = first + 1

    # Shingles begin at each unit of a text but the last `shingle_size - 1`.
    text_of_unit = np.cumsum(breaks)[first]
    unit_counts = np.bincount(text_of_unit, minlength=len(texts))
    first_units = np.cumsum(unit_counts) - unit_counts
    shingle_counts = np.maximum(unit_counts - config.shingle_size + 1, 1)
    units = np.arange(len(first))
    start = units[units - first_units[text_of_unit] < shingle_counts[text_of_unit]]
    text_of_shingle = text_of_unit[start]
    end = np.minimum(start + config.shingle_size, first_units[text_of_shingle] + unit_counts[text_of_shingle]) - 1

    prefix_sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * _powers(_BASE, len(codes)), out=prefix_sums[1:])
    left = first[start]
    inverse = _powers(pow(_BASE, -1, 2**64), len(codes))
    hashes = mix((prefix_sums[last[end]] - prefix_sums[left]) * inverse[left])
    return hashes, np.cumsum(shingle_counts) - shingle_counts


@functools.cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors and summands, uint64 [P]; always the same ones."""
    numbers = mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(_BASE))
    return numbers[:count] | np.uint64(1), numbers[count:]


def signatures(texts: list[str], config: DuplicatesConfig) -> np.ndarray:
    """uint32 [n, P]: the smallest shingle of each text under each permutation.

    A permutation is h(x) = (a x + b mod 2^64) >> 32 of a shingle's 32 bits (Dietzfelbinger 1996).
    """
    hashes, begins = shingles(texts, config)
    hashes >>= np.uint64(32)
    smallest_Pn = np.empty((config.permutations, len(texts)), np.uint32)
    images = np.empty_like(hashes)
    for row, factor, summand in zip(smallest_Pn, *_permutations(config.permutations), strict=True):
        np.multiply(hashes, factor, out=images)
        np.add(images, summand, out=images)
        row[:] = np.minimum.reduceat(images, begins) >> np.uint64(32)
    return np.ascontiguousarray(smallest_Pn.T)


def keys(signatures_nP: np.ndarray, bands: int) -> np.ndarray:
    """Hash the whole signature and each of its bands: uint64 [n, 1 + bands]."""

    def key(numbers: np.ndarray) -> np.ndarray:
        total = np.zeros(len(numbers), np.uint64)
        for column in numbers.T:
            total = mix(total * np.uint64(_BASE) + column.astype(np.uint64))
        return total

    return np.stack([key(signatures_nP), *map(key, np.split(signatures_nP, bands, axis=1))], axis=1)


def candidates(keys_n: np.ndarray, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs to compare, as indices of later and of earlier documents.

    Documents with the same key are paired, each with the `limit` earliest of them.
    """
    by_key = np.argsort(keys_n, kind="stable")
    sorted_keys = keys_n[by_key]
    is_first = np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]]) if len(sorted_keys) else np.zeros(0, bool)
    begins = np.maximum.accumulate(np.where(is_first, np.arange(len(sorted_keys)), 0))
    rank = np.arange(len(sorted_keys)) - begins
    for earlier in range(min(limit, int(rank.max(initial=0)))):
        later = np.flatnonzero(rank > earlier)
        yield by_key[later], by_key[begins[later] + earlier]


def similar(a_nP: np.ndarray, b_nP: np.ndarray, threshold: float) -> np.ndarray:
    """bool [n]: whether the signatures of each pair agree in a share of at least `threshold` of their positions."""
    return (a_nP == b_nP).mean(axis=1) >= threshold


def find_near_duplicates(
    signed: Iterable[tuple[list[int], np.ndarray]], config: DuplicatesConfig, scratch: Path
) -> list[int]:
    """Return the orders of the documents that have an earlier near-duplicate.

    Args:
        signed: batches of orders, which increase, with signatures [n, P].
        scratch: an empty folder, for (4 P + 8 bands) bytes a document. In memory are about 40 bytes a document.
    """
    key_files = [scratch / f"keys-{band:02}" for band in range(1 + config.bands)]
    signature_file = scratch / "signatures"

    order_parts = [np.zeros(0, np.int64)]
    open_files = [path.open("wb") for path in (signature_file, *key_files)]
    for batch_orders, signatures_nP in signed:
        order_parts.append(np.asarray(batch_orders, np.int64))
        columns = (signatures_nP, *keys(signatures_nP, config.bands).T)
        for file, column in zip(open_files, columns, strict=True):
            file.write(np.ascontiguousarray(column).data)
    for file in open_files:
        file.close()

    orders = np.concatenate(order_parts)
    if not len(orders):
        return []
    all_signatures = np.memmap(signature_file, np.uint32, "r", shape=(len(orders), config.permutations))
    dropped = np.zeros(len(orders), bool)

    def compare(documents: np.ndarray, keys_n: np.ndarray, limit: int) -> None:
        for later, earlier in candidates(keys_n, limit):
            later, earlier = documents[later], documents[earlier]
            open_pairs = np.flatnonzero(~dropped[later])
            for block in np.split(open_pairs, range(PAIR_BLOCK, len(open_pairs), PAIR_BLOCK)):
                dropped[later[block]] |= similar(
                    all_signatures[later[block]], all_signatures[earlier[block]], config.threshold
                )

    # First equal signatures, each compared with the first of them; then bands, without the dropped ones.
    compare(np.arange(len(orders)), np.fromfile(key_files[0], np.uint64), 1)
    remaining = np.flatnonzero(~dropped)
    for path in key_files[1:]:
        compare(remaining, np.fromfile(path, np.uint64)[remaining], MAX_COMPARED)
    return orders[dropped].tolist()
