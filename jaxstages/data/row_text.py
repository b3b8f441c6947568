"""A packed row as text: spans of tokens that are trained on, and spans that are only context."""

import itertools
from typing import NamedTuple

from jaxstages.data.tokenizer import Tokenizer
from jaxstages.types import Batch


class Span(NamedTuple):
    """Neighbouring tokens of a row with the same loss weight, 0 or not.

    trained: whether the model is trained to produce them.
    begins: whether the first token is the first of an example.
    tokens: their number.
    """

    text: str
    trained: bool
    begins: bool
    tokens: int


def spans_of(batch: Batch, row: int, tokenizer: Tokenizer) -> list[Span]:
    """Divide a row of a batch into spans, without the padding at its end.

    Each slot stands for its target, so that every id appears once, with its own weight. Nothing predicts the first
    token of an example: it is added, as context.
    """
    slots: list[tuple[int, bool, bool]] = []  # id, whether it is trained on, whether it begins an example
    for slot in range(batch.tokens_BL.shape[1]):
        if not batch.segments_BL[row, slot]:
            break
        if batch.positions_BL[row, slot] == 0:
            slots.append((int(batch.tokens_BL[row, slot]), False, True))
        slots.append((int(batch.targets_BL[row, slot]), bool(batch.weights_BL[row, slot] > 0), False))

    spans = []
    for (trained, begins), group in itertools.groupby(slots, key=lambda entry: entry[1:]):
        ids = [token for token, _, _ in group]
        spans.append(Span(tokenizer.show(ids), trained, begins, len(ids)))
    return spans
