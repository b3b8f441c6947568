"""Examples -> rows of fixed length: best-fit packing without cropping. Legend: L length of a row."""

from collections.abc import Sequence

import numpy as np

from jaxstages.data.tasks import Example

FIELDS = 5
"""A row on disk is int32 [5, L]: the fields of `Batch` in their order, weights as the bits of float32."""


def best_fit(lengths: Sequence[int], space: int, max_examples: int = 0) -> list[list[int]]:
    """Assign examples to rows: longest first, each to the row where it leaves the least space (best-fit decreasing).

    | lengths 5 3 2 2, space 7 | rows [0, 2], [1, 3] |
    |                          | 5+2=7 and 3+2=5     |

    Args:
        max_examples: the largest number of examples in a row; 0 is no limit.

    Takes O(n log n) for the sort, then constant time per example: `by_space[s]` lists the rows with s slots left, and
    bit s of `free` is set if there are any.

    Raises:
        ValueError: an example is longer than a row, or empty.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(space + 1)]
    free = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = lengths[i]
        if not 0 < need <= space:
            raise ValueError(f"an example takes {need} slots; rows have {space}")
        enough = free >> need
        if enough:
            left = need + (enough & -enough).bit_length() - 1
            row = by_space[left].pop()
            if not by_space[left]:
                free &= ~(1 << left)
        else:
            left, row = space, len(rows)
            rows.append([])
        rows[row].append(i)
        if len(rows[row]) == max_examples:  # not offered again
            continue
        by_space[left - need].append(row)
        free |= 1 << (left - need)
    return rows


def lay_out(examples: Sequence[Example], length: int) -> np.ndarray:
    """Lay out examples in one row, int32 [5, L]. n ids take n - 1 slots, since each token predicts the next.

    | ids a b c, weights 0 0 1; ids x y, weights 0 1; L 4 |
    | tokens    |  a  b  x  0 |
    | targets   |  b  c  y  0 |
    | weights   |  0  1  1  0 |
    | segments  |  1  1  2  0 |
    | positions |  0  1  0  0 |
    """
    row = np.zeros((FIELDS, length), np.int32)
    start = 0
    for segment, example in enumerate(examples, start=1):
        end = start + len(example.ids) - 1
        row[0, start:end] = example.ids[:-1]
        row[1, start:end] = example.ids[1:]
        row[2, start:end] = example.weights[1:].astype(np.float32).view(np.int32)
        row[3, start:end] = segment
        row[4, start:end] = np.arange(end - start)
        start = end
    return row


def pack(examples: Sequence[Example], length: int, max_examples: int = 0) -> tuple[list[np.ndarray], list[list[int]]]:
    """Pack examples into rows of `length` slots. Returns the rows, and the indices of the examples in each.

    Args:
        max_examples: see `best_fit`.
    """
    groups = best_fit([len(example.ids) - 1 for example in examples], length, max_examples)
    return [lay_out([examples[i] for i in group], length) for group in groups], groups
