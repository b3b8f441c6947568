"""How to answer: the flags of sampling. Nothing here needs jax, so that flags are read without it."""

from typing import NamedTuple


class Manner(NamedTuple):
    """How to answer, a field a flag. max_new_tokens: None means the recipe's. stop: texts, or JSON lists of texts."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: list[str]
    seed: int
