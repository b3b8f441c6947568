"""Which token comes next: penalties and filters over the logits, then the likeliest or a draw. Pure, and a row's token
depends on its own logits and key only.

In this order, as in transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p, draw. A filter sets
what it takes out to -inf; one that is not asked for costs nothing.

Legend: B batch, V vocab, M new tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Sampling(NamedTuple):
    """How an answer is made; the defaults are greedy.

    max_new_tokens: at most. temperature: 0 takes the likeliest token. stop: ids that end an answer.
    top_k: draws among so many likeliest tokens, 0 among all. top_p: among the fewest likeliest that have this
    probability together, 1 among all. min_p: among those at least so many times as probable as the likeliest, 0 among
    all. repetition_penalty: of tokens that the prompt or the answer has already; 1 is none.
    """

    max_new_tokens: int
    temperature: float = 0.0
    stop: tuple[int, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError, in one line, for a value that means nothing, or one that is not used."""
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={sampling.max_new_tokens} must be at least 1")
    if sampling.temperature and not 1e-3 <= sampling.temperature <= 1e3:
        raise ValueError(f"temperature={sampling.temperature} must not be negative: 0, or from 0.001 to 1000")
    if sampling.top_k < 0:
        raise ValueError(f"top_k={sampling.top_k} must be at least 1, or 0 for all tokens")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p={sampling.top_p} must be larger than 0, and at most 1 for all tokens")
    if not 0 <= sampling.min_p < 1:
        raise ValueError(f"min_p={sampling.min_p} must be at least 0, and less than 1")
    if not 0 < sampling.repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty={sampling.repetition_penalty} must be larger than 0; 1 is none")
    unused = [name for name in ("top_k", "top_p", "min_p") if getattr(sampling, name) != _OFF[name]]
    if unused and not sampling.temperature:
        raise ValueError(f"{unused[0]} needs a temperature above 0: without one the likeliest token is taken")


_OFF = Sampling._field_defaults


def penalize(logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Logits of tokens that were seen are divided by the penalty where they are positive, else multiplied by it (CTRL,
    Keskar et al. 2019)."""
    lower = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, lower, logits_BV)


def keep_top_k(logits_BV: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """The k largest, and what equals the least of them (Fan et al. 2018)."""
    least_B1 = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[1]))[0][:, -1:]
    return _keep(logits_BV, least_B1)


def keep_top_p(logits_BV: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """The nucleus: tokens before which, from the likeliest down, there is less than p; at least one (Holtzman et al.
    2020). Equals stay together.

    The bound is the least share t so that the shares above t sum to less than p. The bits of floats from 0 to 1 are
    ordered as they are, so that 30 sums find it exactly; a sort of the vocabulary takes many times as long.
    """
    shares_BV = jax.nn.softmax(logits_BV, axis=-1)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B1, high_B1 = ends  # the bound's bits are above low, at most high
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        above_B1 = _sum_above(shares_BV, jax.lax.bitcast_convert_type(middle_B1, jnp.float32))
        enough = (above_B1 < p) & (middle_B1 >= 0)  # below 0 no bits are a share's
        return jnp.where(enough, low_B1, middle_B1), jnp.where(enough, middle_B1, high_B1)

    ones = jnp.ones((len(shares_BV), 1), jnp.int32)
    most_B1 = jax.lax.bitcast_convert_type(jnp.max(shares_BV, axis=-1, keepdims=True), jnp.int32)
    _, bits_B1 = jax.lax.fori_loop(0, 30, halve, (-ones, most_B1))
    return jnp.where(shares_BV >= jax.lax.bitcast_convert_type(bits_B1, jnp.float32), logits_BV, -jnp.inf)


def _sum_above(shares_BV: Array, bound_B1: Array) -> Array:
    return jnp.sum(jnp.where(shares_BV > bound_B1, shares_BV, 0.0), axis=-1, keepdims=True)


def keep_min_p(logits_BV: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Tokens at least p times as probable as the likeliest (Nguyen et al. 2024)."""
    return _keep(logits_BV, jnp.max(logits_BV, axis=-1, keepdims=True) + math.log(p))


def _keep(logits_BV: Array, least_B1: Array) -> Array:
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def filter_logits(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits to draw from, for a temperature above 0."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return keep_min_p(logits_BV, sampling.min_p) if sampling.min_p else logits_BV


Choose = Callable[[Array, Array, Array, Array | None], Array]
"""`choose(logits_BV, keys_B, i, seen_BV) -> tokens_B`: the i-th new token of each row."""


def make_choose(sampling: Sampling) -> Choose:
    """Greedy draws nothing; else row b's i-th token is drawn by `fold_in(keys_B[b], i)`. `seen_BV` is None where there
    is no penalty."""

    def choose(logits_BV: Array, keys_B: Array, i: Int[Array, ""], seen_BV: Array | None) -> Int[Array, " B"]:
        if seen_BV is not None:
            logits_BV = penalize(logits_BV, seen_BV, sampling.repetition_penalty)
        if not sampling.temperature:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        draw = jax.vmap(lambda key, logits: jax.random.categorical(jax.random.fold_in(key, i), logits))
        return draw(keys_B, filter_logits(logits_BV, sampling)).astype(jnp.int32)

    return choose
