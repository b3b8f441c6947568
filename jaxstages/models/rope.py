"""Rotary position embedding (Su et al. 2021): the frequencies of each kind of layer, and the turn by them.

Legend: B batch, L length, H heads, K head dim, P pairs of dims that are turned.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxstages.config import AttentionConfig, RopeScalingConfig


def rotate(
    x_BLHK: Float[Array, "B L H K"],
    positions_BL: Int[Array, "B L"],
    frequencies: Float[Array, " P"],
    amplitude: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B L H K"]:
    """Turn pairs, which are the first and second half of the first 2 * P dims, by position times frequency, and
    multiply them by `amplitude`. A frequency of 0 and an amplitude of 1 leave a pair as it is, to the bit."""
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)
    turned = 2 * frequencies.shape[0]
    first, second = jnp.split(x_BLHK[..., :turned].astype(jnp.float32), 2, axis=-1)
    pair = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHK.dtype)
    return pair if turned == x_BLHK.shape[-1] else jnp.concatenate([pair, x_BLHK[..., turned:]], axis=-1)


def frequencies_of(part: AttentionConfig, kind: str) -> Float[np.ndarray, " P"]:
    """Radians a position of each pair, in a layer of kind "global", "local" or "nope" (which has none)."""
    half = (part.rope_dims or part.head_dim) // 2
    if kind == "nope" or part.position != "rope":
        return np.zeros(half, np.float32)
    own = kind == "local" and part.local_rope_theta > 0
    theta = np.float32(part.local_rope_theta if own else part.rope_theta)
    # Rounded as the field's models were trained; NumPy's own float32 power is up to two bits off: 2e-4 at position 1000
    powers = np.power(theta, np.arange(half, dtype=np.float32) / np.float32(half), dtype=np.float64).astype(np.float32)
    return np.float32(1.0) / powers if own else _scaled(powers, part)


def amplitude_of(part: AttentionConfig, kind: str) -> np.float32:
    """What queries and keys are multiplied by as they are turned: 1, but where a scaling of rope makes up for the
    spread of the scores (Peng et al. 2023, section 3.4; Ding et al. 2024)."""
    scaling = part.rope_scaling
    if kind == "nope" or (kind == "local" and part.local_rope_theta > 0) or scaling.kind not in ("yarn", "longrope"):
        return np.float32(1.0)
    if scaling.attention_factor or scaling.factor <= 1.0:
        return np.float32(scaling.attention_factor or 1.0)
    if scaling.kind == "yarn":
        return np.float32(0.1 * math.log(scaling.factor) + 1.0)
    return np.float32(math.sqrt(1.0 + math.log(scaling.factor) / math.log(scaling.trained_context)))


def _scaled(powers: np.ndarray, part: AttentionConfig) -> np.ndarray:
    """1 / powers, as it is scaled."""
    scaling, plain = part.rope_scaling, np.float32(1.0) / powers
    match scaling.kind:
        case "none" | "dynamic":  # dynamic: up to `trained_context`
            return plain
        case "linear":
            return (plain / scaling.factor).astype(np.float32)
        case "llama3":
            turns = scaling.trained_context / (np.float32(2.0 * np.pi) / plain)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1 is as it was, 0 is scaled
            return ((1.0 - kept) * plain / scaling.factor + kept * plain).astype(np.float32)
        case "yarn":
            low, high = _bounds(part.rope_theta, 2 * len(powers), scaling)
            kept = 1.0 - np.clip((np.arange(len(powers), dtype=np.float32) - low) / max(high - low, 0.001), 0.0, 1.0)
            near = np.float32(1.0) / (np.float32(scaling.factor) * powers)
            return (near * (1.0 - kept) + plain * kept).astype(np.float32)
        case "longrope":
            return np.float32(1.0) / (np.asarray(scaling.short_factors, np.float32) * powers)
        case _:
            raise ValueError(
                f"rope_scaling.kind={scaling.kind!r}; known: none, linear, llama3, yarn, longrope, dynamic"
            )


def _bounds(theta: float, dims: int, scaling: RopeScalingConfig) -> tuple[float, float]:
    """yarn: the pairs that turn `beta_fast` and `beta_slow` times within `trained_context`."""

    def pair_of(turns: float) -> float:
        return dims * math.log(scaling.trained_context / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    return max(low, 0.0), min(high, dims - 1.0)
