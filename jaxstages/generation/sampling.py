"""Sampling: choose the next token from logits, greedily or at random, with penalties and filters. Pure functions; the
token of a row depends on its own logits and key only.

The order is that of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p, draw. A filter sets
removed logits to -inf. Filters that are off cost nothing.

Legend: B batch, V vocab, M new tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Sampling(NamedTuple):
    """Sampling parameters; the defaults are greedy.

    max_new_tokens: longest answer.
    temperature: divides the logits; 0 takes the likeliest token.
    stop: ids that end an answer.
    top_k: draw from the k likeliest tokens; 0 is off.
    top_p: draw from the smallest set of likeliest tokens with this total probability; 1 is off.
    min_p: draw from tokens at least this many times as probable as the likeliest; 0 is off.
    repetition_penalty: penalty of tokens that occur in the prompt or the answer; 1 is off.
    """

    max_new_tokens: int
    temperature: float = 0.0
    stop: tuple[int, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for a value out of range, or one that has no effect."""
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
    unused = [name for name in ("top_k", "top_p", "min_p") if getattr(sampling, name) != _DEFAULTS[name]]
    if unused and not sampling.temperature:
        raise ValueError(f"{unused[0]} needs a temperature above 0: without one the likeliest token is taken")


_DEFAULTS = Sampling._field_defaults


def penalize(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty: float | Float[Array, "B 1"]
) -> Float[Array, "B V"]:
    """Divide positive logits of seen tokens by the penalty, and multiply negative ones by it (CTRL, Keskar et al.
    2019)."""
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def keep_top_k(logits_BV: Float[Array, "B V"], k: int | Int[Array, "B 1"]) -> Float[Array, "B V"]:
    """Keep the k largest logits, and those equal to the smallest of them (Fan et al. 2018).

    Finds the k-th largest bit by bit, in 32 sums: k may differ from row to row, and sorting takes many times as long.
    """
    bits_BV = jax.lax.bitcast_convert_type(jnp.where(logits_BV == 0, 0.0, logits_BV), jnp.uint32)  # -0.0 equals 0.0
    is_negative_BV = bits_BV >> 31 == 1
    order_BV = jnp.where(is_negative_BV, ~bits_BV, bits_BV | jnp.uint32(1 << 31))  # ordered like the floats

    def try_bit(i: Array, threshold_B1: Array) -> Array:
        higher_B1 = threshold_B1 | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        is_enough_B1 = jnp.sum(order_BV >= higher_B1, axis=-1, keepdims=True) >= k
        return jnp.where(is_enough_B1, higher_B1, threshold_B1)

    threshold_B1 = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros((len(logits_BV), 1), jnp.uint32))
    return jnp.where(order_BV >= threshold_B1, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: Float[Array, "B V"], p: float | Float[Array, "B 1"]) -> Float[Array, "B V"]:
    """Keep the nucleus: tokens for which all likelier tokens together have a probability below p, and at least one
    (Holtzman et al. 2020). Equally likely tokens stay together.

    The threshold is the smallest probability t such that the probabilities above t sum to less than p. Floats from 0 to
    1 are ordered like their bits, so a binary search over bits finds it exactly with 30 sums; sorting the vocabulary
    takes many times as long.
    """
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)

    def halve(_: Array, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B1, high_B1 = interval  # low < bits of the threshold <= high
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        mass_above_B1 = _mass_above(probs_BV, jax.lax.bitcast_convert_type(middle_B1, jnp.float32))
        is_enough = (mass_above_B1 < p) & (middle_B1 >= 0)  # negative bits are no probability
        return jnp.where(is_enough, low_B1, middle_B1), jnp.where(is_enough, middle_B1, high_B1)

    ones = jnp.ones((len(probs_BV), 1), jnp.int32)
    largest_B1 = jax.lax.bitcast_convert_type(jnp.max(probs_BV, axis=-1, keepdims=True), jnp.int32)
    _, bits_B1 = jax.lax.fori_loop(0, 30, halve, (-ones, largest_B1))
    return jnp.where(probs_BV >= jax.lax.bitcast_convert_type(bits_B1, jnp.float32), logits_BV, -jnp.inf)


def _mass_above(probs_BV: Array, threshold_B1: Array) -> Array:
    return jnp.sum(jnp.where(probs_BV > threshold_B1, probs_BV, 0.0), axis=-1, keepdims=True)


def keep_min_p(logits_BV: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keep tokens at least p times as probable as the likeliest (Nguyen et al. 2024)."""
    return keep_from(logits_BV, jnp.max(logits_BV, axis=-1, keepdims=True) + math.log(p))


def keep_from(logits_BV: Float[Array, "B V"], threshold_B1: Float[Array, "B 1"]) -> Float[Array, "B V"]:
    """Keep the logits that are at least the threshold."""
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def filter_logits(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Apply temperature and filters, for a temperature above 0."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return keep_min_p(logits_BV, sampling.min_p) if sampling.min_p else logits_BV


Choose = Callable[[Array, Array, Array, Array | None], Array]
"""`choose(logits_BV, keys_B, i, seen_BV) -> tokens_B`: the i-th new token of each row."""


def make_choose(sampling: Sampling) -> Choose:
    """Make the function that chooses tokens: the likeliest, or a draw with the key `fold_in(keys_B[b], i)` for row b.

    Its argument `seen_BV` is None without a repetition penalty.
    """

    def choose(logits_BV: Array, keys_B: Array, i: Int[Array, ""], seen_BV: Array | None) -> Int[Array, " B"]:
        if seen_BV is not None:
            logits_BV = penalize(logits_BV, seen_BV, sampling.repetition_penalty)
        if not sampling.temperature:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        draw = jax.vmap(lambda key, logits: jax.random.categorical(jax.random.fold_in(key, i), logits))
        return draw(keys_B, filter_logits(logits_BV, sampling)).astype(jnp.int32)

    return choose
