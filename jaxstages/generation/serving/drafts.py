"""Drafts of the next tokens by prompt lookup (Saxena 2023): what followed the same tokens earlier in the text."""

from collections.abc import Sequence

import numpy as np

LONGEST_MATCH = 4
"""Last tokens that are compared."""

SHORTEST_MATCH = 2
"""A match of fewer tokens is no draft: verifying it would cost more than it gains."""


def look_up_draft(text: Sequence[int], num_tokens: int) -> list[int] | None:
    """Return the tokens after the longest, and then latest, match of the text's end; None if there is no match."""
    tokens = np.asarray(text, np.int32)
    # lengths[i]: how many tokens up to i, and including it, equal those at the end of the text.
    lengths = np.zeros(len(tokens) - 1, np.int32)
    matches = np.ones(len(tokens) - 1, bool)
    for back in range(min(LONGEST_MATCH, len(tokens) - 1)):
        shifted = np.zeros_like(matches)
        shifted[back:] = tokens[: len(matches) - back] == tokens[-1 - back]
        matches &= shifted
        lengths += matches

    if not len(lengths) or lengths.max() < SHORTEST_MATCH:
        return None
    end = len(lengths) - 1 - int(np.argmax(lengths[::-1]))
    draft = tokens[end + 1 : end + 1 + num_tokens].tolist()
    return draft + [0] * (num_tokens - len(draft))
