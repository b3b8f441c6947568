"""Attention behind one function, and what it may see.

Legend: B batch, L query length, S key length or cache slots, H query heads, G key/value heads, K head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def packed_mask(segments_BL: Int[Array, "B L"]) -> Bool[Array, "B 1 L L"]:
    """True where a query (third dim) may see a key (fourth dim): not later, and of the same segment.

    | row of segments 1 1 2 | sees                |
    | query 0 (segment 1)   | key 0               |
    | query 1 (segment 1)   | keys 0, 1           |
    | query 2 (segment 2)   | key 2, not 0 and 1  |

    Padding (segment 0) sees padding before it, so that no softmax is over nothing.
    """
    length = segments_BL.shape[1]
    causal_LL = jnp.tril(jnp.ones((length, length), bool))
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    return (same_BLL & causal_LL[None])[:, None]


def cache_mask(positions_BL: Int[Array, "B L"], slots: int) -> Bool[Array, "B 1 L S"]:
    """While decoding, keys lie in the slot of their position: a query sees the slots up to its own position."""
    return (jnp.arange(slots)[None, None, :] <= positions_BL[:, :, None])[:, None]


def attend(
    query_BLHK: Float[Array, "B L H K"],
    key_BSGK: Float[Array, "B S G K"],
    value_BSGK: Float[Array, "B S G K"],
    mask_B1LS: Bool[Array, "B 1 L S"],
) -> Float[Array, "B L H K"]:
    """Scaled dot-product attention; each group of H/G query heads shares a key/value head (Ainslie et al. 2023)."""
    with jax.numpy_dtype_promotion("standard"):  # inside, jax takes bfloat16 up to float32 for the softmax
        return jax.nn.dot_product_attention(query_BLHK, key_BSGK, value_BSGK, mask=mask_B1LS)


def rotate(x_BLHK: Float[Array, "B L H K"], positions_BL: Int[Array, "B L"], theta: float) -> Float[Array, "B L H K"]:
    """Rotary position embedding (Su et al. 2021): pairs are the first and second half of the head dim."""
    half = x_BLHK.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHK.dtype)
