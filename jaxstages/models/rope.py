"""Rotary position embedding (RoPE, Su et al. 2021): frequencies for each kind of layer, and the rotation.

Legend: B batch, L length, H heads, K head dim, P pairs of dims that are rotated.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxstages.config.model import AttentionConfig, RopeScalingConfig


def rotate(
    x_BLHK: Float[Array, "B L H K"],
    positions_BL: Int[Array, "B L"],
    frequencies: Float[Array, " P"],
    amplitude: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B L H K"]:
    """Rotate pairs of dims by position times frequency, and multiply them by `amplitude`.

    A pair consists of one dim in the first and one in the second half of the first 2 * P dims. With a frequency of 0
    and an amplitude of 1 a pair keeps its bits.
    """
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)

    rotated_dims = 2 * frequencies.shape[0]
    first, second = jnp.split(x_BLHK[..., :rotated_dims].astype(jnp.float32), 2, axis=-1)
    pairs = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHK.dtype)
    if rotated_dims == x_BLHK.shape[-1]:
        return pairs
    return jnp.concatenate([pairs, x_BLHK[..., rotated_dims:]], axis=-1)


def rope_frequencies(config: AttentionConfig, kind: str) -> Float[np.ndarray, " P"]:
    """Radians per position of each pair, for a layer of kind "global", "local" or "nope" (no rotation)."""
    pairs = (config.rope_dims or config.head_dim) // 2
    if kind == "nope" or config.position != "rope":
        return np.zeros(pairs, np.float32)

    has_local_theta = kind == "local" and config.local_rope_theta > 0
    theta = np.float32(config.local_rope_theta if has_local_theta else config.rope_theta)
    # Rounded the way published models were trained. NumPy's float32 power is off by up to two bits: 2e-4 radians at
    # position 1000.
    exponents = np.arange(pairs, dtype=np.float32) / np.float32(pairs)
    powers = np.power(theta, exponents, dtype=np.float64).astype(np.float32)
    return np.float32(1.0) / powers if has_local_theta else _scaled_frequencies(powers, config)


def rope_amplitude(config: AttentionConfig, kind: str) -> np.float32:
    """Factor of rotated queries and keys. It differs from 1 only for scalings that compensate for the spread of the
    scores (Peng et al. 2023, section 3.4; Ding et al. 2024)."""
    scaling = config.rope_scaling
    has_local_theta = kind == "local" and config.local_rope_theta > 0
    if kind == "nope" or has_local_theta or scaling.kind not in ("yarn", "longrope"):
        return np.float32(1.0)
    if scaling.attention_factor or scaling.factor <= 1.0:
        return np.float32(scaling.attention_factor or 1.0)
    if scaling.kind == "yarn":
        return np.float32(0.1 * math.log(scaling.factor) + 1.0)
    return np.float32(math.sqrt(1.0 + math.log(scaling.factor) / math.log(scaling.trained_context)))


def _scaled_frequencies(powers: np.ndarray, config: AttentionConfig) -> np.ndarray:
    """1 / powers, with the scaling of the recipe."""
    scaling, plain = config.rope_scaling, np.float32(1.0) / powers
    match scaling.kind:
        case "none" | "dynamic":  # dynamic scales only beyond `trained_context`
            return plain
        case "linear":
            return (plain / scaling.factor).astype(np.float32)
        case "llama3":
            turns = scaling.trained_context / (np.float32(2.0 * np.pi) / plain)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            unscaled = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return ((1.0 - unscaled) * plain / scaling.factor + unscaled * plain).astype(np.float32)
        case "yarn":
            low, high = _yarn_bounds(config.rope_theta, 2 * len(powers), scaling)
            ramp = np.clip((np.arange(len(powers), dtype=np.float32) - low) / max(high - low, 0.001), 0.0, 1.0)
            unscaled = 1.0 - ramp
            scaled = np.float32(1.0) / (np.float32(scaling.factor) * powers)
            return (scaled * (1.0 - unscaled) + plain * unscaled).astype(np.float32)
        case "longrope":
            return np.float32(1.0) / (np.asarray(scaling.short_factors, np.float32) * powers)
        case _:
            raise ValueError(
                f"rope_scaling.kind={scaling.kind!r}; known: none, linear, llama3, yarn, longrope, dynamic"
            )


def _yarn_bounds(theta: float, dims: int, scaling: RopeScalingConfig) -> tuple[float, float]:
    """Indices of the pairs that rotate `beta_fast` and `beta_slow` times within `trained_context`."""

    def pair_index(turns: float) -> float:
        return dims * math.log(scaling.trained_context / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low, high = pair_index(scaling.beta_fast), pair_index(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    return max(low, 0.0), min(high, dims - 1.0)
