"""Sampling flags, in a module without jax, so that flags are parsed before it is imported."""

from collections.abc import Sequence
from typing import NamedTuple


class SamplingFlags(NamedTuple):
    """Sampling parameters, one field for each flag. max_new_tokens: None means the recipe's. stop: texts, or JSON lists
    of texts."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0
