"""Attention: its masks and the formula. `cpu.py` and `kernels.py` have faster implementations.

Legend: B batch, L query length, S key length or cache slots, H query heads, G key/value heads, R = H / G query heads
that share a key/value head, K head dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -1e30
"""Score of a masked key. It is finite because inf - inf is NaN."""


class AttentionSpec(NamedTuple):
    """What limits attention besides causality and segments.

    window: number of keys that a query sees, its own among them; 0 means no limit.
    softcap: scores are `softcap * tanh(score / softcap)`; 0 leaves them unchanged (Gemma 2, 2024).
    """

    window: int = 0
    softcap: float = 0.0


Attend = Callable[[Array, Array, Array, Array, AttentionSpec], Array]
"""`attend(query_BLHK, key_BLGK, value_BLGK, segments_BL, spec) -> [B, L, H, K]`: causal scaled dot-product attention
within segments. Each group of H/G query heads shares a key/value head (Ainslie et al. 2023)."""


def packed_mask(segments_BL: Int[Array, "B L"], window: int = 0) -> Bool[Array, "B 1 L L"]:
    """True where a query (third dim) may see a key (fourth dim): not later, and in the same segment.

    | row of segments 1 1 2 | sees                |
    | query 0 (segment 1)   | key 0               |
    | query 1 (segment 1)   | keys 0, 1           |
    | query 2 (segment 2)   | key 2, not 0 and 1  |

    Padding (segment 0) sees the padding before it, so that no softmax is over an empty set.
    """
    return chunk_mask(segments_BL, segments_BL, 0, window)


def chunk_mask(
    segments_BL: Int[Array, "B L"], all_segments_BS: Int[Array, "B S"], first: Any, window: int = 0
) -> Bool[Array, "B 1 L S"]:
    """The rows of `packed_mask` for queries first, first + 1, ..."""
    distance_LS = first + jnp.arange(segments_BL.shape[1])[:, None] - jnp.arange(all_segments_BS.shape[1])[None, :]
    same_BLS = segments_BL[:, :, None] == all_segments_BS[:, None, :]
    return (same_BLS & within_window(distance_LS, window)[None])[:, None]


def cache_mask(positions_BL: Int[Array, "B L"], slots: int, window: int = 0) -> Bool[Array, "B 1 L S"]:
    """Mask for decoding, where keys are in the slot of their position: a query sees the slots up to its own."""
    distance_BLS = positions_BL[:, :, None] - jnp.arange(slots)[None, None, :]
    return within_window(distance_BLS, window)[:, None]


def within_window(distance: Array, window: int) -> Array:
    """True where a key is not after its query, `distance` positions later, and within the window if there is one."""
    return (distance >= 0) & (distance < window) if window else distance >= 0


def attend_packed(
    query_BLHK: Array, key_BLGK: Array, value_BLGK: Array, segments_BL: Array, spec: AttentionSpec
) -> Array:
    """The formula as an `Attend`, on any platform."""
    return attend_masked(query_BLHK, key_BLGK, value_BLGK, packed_mask(segments_BL, spec.window), spec.softcap)


def attend_masked(
    query_BLHK: Float[Array, "B L H K"],
    key_BSGK: Float[Array, "B S G K"],
    value_BSGK: Float[Array, "B S G K"],
    mask_B1LS: Bool[Array, "B 1 L S"],
    softcap: float = 0.0,
) -> Float[Array, "B L H K"]:
    """The formula with all scores in memory. Faster implementations are tested against it."""
    return attend_cached(query_BLHK, key_BSGK.swapaxes(1, 2), value_BSGK.swapaxes(1, 2), mask_B1LS, softcap)


def attend_cached(
    query_BLHK: Float[Array, "B L H K"],
    key_BGSK: Float[Array, "B G S K"],
    value_BGSK: Float[Array, "B G S K"],
    mask_B1LS: Bool[Array, "B 1 L S"],
    softcap: float = 0.0,
) -> Float[Array, "B L H K"]:
    """The same over a cache, which stores the slots of a head next to each other."""
    query_BGRLK = split_heads(query_BLHK, key_BGSK.shape[1])
    scores = jnp.einsum("BGRLK,BGSK->BGRLS", query_BGRLK, key_BGSK, preferred_element_type=jnp.float32)
    scores, _ = soft_cap(scores * query_BLHK.shape[-1] ** -0.5, softcap)

    probabilities = jax.nn.softmax(jnp.where(mask_B1LS[:, :, None], scores, HIDDEN), axis=-1).astype(value_BGSK.dtype)
    return merge_heads(jnp.einsum("BGRLS,BGSK->BGRLK", probabilities, value_BGSK)).astype(query_BLHK.dtype)


def split_heads(x_BLHK: Array, groups: int) -> Float[Array, "B G R L K"]:
    """Group the query heads by the key/value head that they share."""
    batch, length, heads, head_dim = x_BLHK.shape
    return x_BLHK.reshape(batch, length, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)


def merge_heads(x_BGRLK: Array) -> Float[Array, "B L H K"]:
    """The inverse of `split_heads`."""
    batch, groups, shared, length, head_dim = x_BGRLK.shape
    return x_BGRLK.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * shared, head_dim)


def soft_cap(scores: Array, softcap: float) -> tuple[Array, Array | None]:
    """Return capped scores and their derivative, None if it is 1."""
    if not softcap:
        return scores, None
    tanh = jnp.tanh(scores / softcap)
    return softcap * tanh, 1.0 - jnp.square(tanh)
