"""Rotary position embedding (Su et al. 2021): the frequencies of each kind of layer, and the turn by them.

Legend: B batch, L length, H heads, K head dim, P = K / 2 pairs.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxstages.config import AttentionConfig, RopeScalingConfig


def rotate(
    x_BLHK: Float[Array, "B L H K"], positions_BL: Int[Array, "B L"], frequencies: Float[Array, " P"]
) -> Float[Array, "B L H K"]:
    """Turn pairs, which are the first and second half of the head dim, by position times frequency. A frequency of 0
    leaves its pair as it is, to the bit."""
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHK.dtype)


def frequencies_of(part: AttentionConfig, kind: str) -> Float[np.ndarray, " P"]:
    """Radians a position of each pair, in a layer of kind "global", "local" or "nope" (which has none)."""
    half = part.head_dim // 2
    if kind == "nope" or part.position != "rope":
        return np.zeros(half, np.float32)
    own = kind == "local" and part.local_rope_theta > 0
    theta = np.float32(part.local_rope_theta if own else part.rope_theta)
    # Rounded as the field's models were trained; NumPy's own float32 power is up to two bits off: 2e-4 at position 1000
    powers = np.power(theta, np.arange(half, dtype=np.float32) / np.float32(half), dtype=np.float64)
    plain = np.float32(1.0) / powers.astype(np.float32)
    return plain if own else _scaled(plain, part.rope_scaling)


def _scaled(plain: np.ndarray, scaling: RopeScalingConfig) -> np.ndarray:
    match scaling.kind:
        case "none":
            return plain
        case "linear":
            return (plain / scaling.factor).astype(np.float32)
        case "llama3":
            turns = scaling.trained_context / (np.float32(2.0 * np.pi) / plain)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1 is as it was, 0 is scaled
            return ((1.0 - kept) * plain / scaling.factor + kept * plain).astype(np.float32)
        case _:
            raise ValueError(f"rope_scaling.kind={scaling.kind!r}; known: none, linear, llama3")
