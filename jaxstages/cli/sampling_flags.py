"""Sampling flags, in a module without jax, so that flags are parsed before it is imported."""

from typing import NamedTuple


class SamplingFlags(NamedTuple):
    """Sampling parameters, one field for each flag. max_new_tokens: None means the recipe's. stop: texts, or JSON lists
    of texts."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: list[str]
    seed: int
