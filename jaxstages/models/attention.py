"""Attention: what it may see, the formula, and the way of CPUs. `kernels.py` has those of accelerators.

Legend: B batch, L query length, S key length or cache slots, H query heads, G key/value heads, R = H / G query heads
that share a key/value head, K head dim, T queries of a block.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxstages.models.primitives import row_sum
from jaxstages.models.spread import ROWS
from jaxstages.types import ALONE, Placement

BLOCK = 128
"""Queries of a block on CPU: keys after its last query are left out."""

TILE = 2**18
"""Scores that are looked at together on CPU: 1 MiB of float32, what a core's own cache holds."""

AT_ONCE = 256
"""Queries whose scores exist at once where a row's tokens lie on several devices."""

LANES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Parts of the batch that one device attends to side by side on CPU: the cores of this process."""

HIDDEN = -1e30
"""The score of a key that may not be seen. Finite, for inf - inf is NaN."""


class Reach(NamedTuple):
    """What queries see beside causality and segments. window: so many keys back, itself among them; 0 is no limit.
    softcap: scores are `softcap * tanh(score / softcap)`, 0 leaves them (Gemma 2, 2024)."""

    window: int = 0
    softcap: float = 0.0


def packed_mask(segments_BL: Int[Array, "B L"], window: int = 0) -> Bool[Array, "B 1 L L"]:
    """True where a query (third dim) may see a key (fourth dim): not later, and of the same segment.

    | row of segments 1 1 2 | sees                |
    | query 0 (segment 1)   | key 0               |
    | query 1 (segment 1)   | keys 0, 1           |
    | query 2 (segment 2)   | key 2, not 0 and 1  |

    Padding (segment 0) sees padding before it, so that no softmax is over nothing.
    """
    row = slice(0, segments_BL.shape[1])
    return _seen(segments_BL, row, row, window)[:, None]


def _seen(segments_BL: Array, queries: slice, keys: slice, window: int) -> Bool[Array, "B T S"]:
    back_TS = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None, :]
    near_TS = (back_TS >= 0) & (back_TS < window) if window else back_TS >= 0
    return (segments_BL[:, queries, None] == segments_BL[:, None, keys]) & near_TS[None]


def chunk_mask(
    segments_BL: Int[Array, "B L"], all_segments_BS: Int[Array, "B S"], first: Any, window: int = 0
) -> Bool[Array, "B 1 L S"]:
    """`packed_mask` of the queries first, first + 1, ... of a row alone."""
    back_LS = first + jnp.arange(segments_BL.shape[1])[:, None] - jnp.arange(all_segments_BS.shape[1])[None, :]
    near_LS = (back_LS >= 0) & (back_LS < window) if window else back_LS >= 0
    return ((segments_BL[:, :, None] == all_segments_BS[:, None, :]) & near_LS[None])[:, None]


def cache_mask(positions_BL: Int[Array, "B L"], slots: int, window: int = 0) -> Bool[Array, "B 1 L S"]:
    """While decoding, keys lie in the slot of their position: a query sees the slots up to its own position."""
    back_BLS = positions_BL[:, :, None] - jnp.arange(slots)[None, None, :]
    return ((back_BLS >= 0) & (back_BLS < window) if window else back_BLS >= 0)[:, None]


Attend = Callable[[Array, Array, Array, Array, Reach], Array]
"""`attend(query_BLHK, key_BLGK, value_BLGK, segments_BL, reach) -> [B, L, H, K]`: causal scaled dot-product attention
within segments; each group of H/G query heads shares a key/value head (Ainslie et al. 2023)."""


def attend_packed(query_BLHK: Array, key_BLGK: Array, value_BLGK: Array, segments_BL: Array, reach: Reach) -> Array:
    """`Attend` by the formula, on any platform."""
    return attend_masked(query_BLHK, key_BLGK, value_BLGK, packed_mask(segments_BL, reach.window), reach.softcap)


def attend_masked(
    query_BLHK: Float[Array, "B L H K"],
    key_BSGK: Float[Array, "B S G K"],
    value_BSGK: Float[Array, "B S G K"],
    mask_B1LS: Bool[Array, "B 1 L S"],
    softcap: float = 0.0,
) -> Float[Array, "B L H K"]:
    """The formula as it stands, with all scores at once: what the faster ways are tested against."""
    return attend_cached(query_BLHK, key_BSGK.swapaxes(1, 2), value_BSGK.swapaxes(1, 2), mask_B1LS, softcap)


def attend_cached(
    query_BLHK: Float[Array, "B L H K"],
    key_BGSK: Float[Array, "B G S K"],
    value_BGSK: Float[Array, "B G S K"],
    mask_B1LS: Bool[Array, "B 1 L S"],
    softcap: float = 0.0,
) -> Float[Array, "B L H K"]:
    """The same over a cache, in which the slots of a head lie side by side."""
    query_BGRLK = _split_heads(query_BLHK, key_BGSK.shape[1])
    scores = jnp.einsum("BGRLK,BGSK->BGRLS", query_BGRLK, key_BGSK, preferred_element_type=jnp.float32)
    scores, _ = _cap(scores * query_BLHK.shape[-1] ** -0.5, softcap)
    shares = jax.nn.softmax(jnp.where(mask_B1LS[:, :, None], scores, HIDDEN), axis=-1).astype(value_BGSK.dtype)
    return _join_heads(jnp.einsum("BGRLS,BGSK->BGRLK", shares, value_BGSK)).astype(query_BLHK.dtype)


def _split_heads(x_BLHK: Array, groups: int) -> Float[Array, "B G R L K"]:
    batch, length, heads, head_dim = x_BLHK.shape
    return x_BLHK.reshape(batch, length, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)


def _join_heads(x_BGRLK: Array) -> Float[Array, "B L H K"]:
    batch, groups, shared, length, head_dim = x_BGRLK.shape
    return x_BGRLK.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * shared, head_dim)


def _cap(scores: Array, softcap: float) -> tuple[Array, Array | None]:
    """Capped scores, and their derivative (None is 1)."""
    if not softcap:
        return scores, None
    tanh = jnp.tanh(scores / softcap)
    return softcap * tanh, 1.0 - jnp.square(tanh)


# Over a mesh.


def attend_over(attend: Attend, place: Placement, length: int) -> Attend:
    """Each device attends with its own rows and heads. Where a row's tokens are split too, it has its own queries, and
    gathers the keys and values of the whole row; they are attended to by the formula, some queries at a time.

    A row of another length takes the plain formula: to learn the parameters' shapes, two tokens are enough.
    """
    if place == ALONE:
        return attend
    context = place.axes("length")

    def local(query: Array, key: Array, value: Array, segments: Array, *, reach: Reach) -> Array:
        if not context:
            return attend(query, key, value, segments, reach)
        first = jax.lax.axis_index(context) * segments.shape[1]
        key, value, all_segments = (jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (key, value, segments))
        return attend_chunk(query, key, value, segments, all_segments, first, reach)

    heads, kv_heads = ((*ROWS, name, "") for name in ("heads", "kv_heads"))

    def over(query: Array, key: Array, value: Array, segments: Array, reach: Reach) -> Array:
        if query.shape[1] != length:
            return attend_packed(query, key, value, segments, reach)
        spread = place.local(functools.partial(local, reach=reach), (heads, kv_heads, kv_heads, ROWS), heads)
        return spread(query, key, value, segments)

    return over


def attend_chunk(
    query_BLHK: Array,
    key_BSGK: Array,
    value_BSGK: Array,
    segments_BL: Array,
    all_segments_BS: Array,
    first: Any,
    reach: Reach,
) -> Array:
    """Queries first, first + 1, ... of a row to all of its keys."""
    length = query_BLHK.shape[1]
    size = max(n for n in range(1, min(AT_ONCE, length) + 1) if length % n == 0)

    @jax.checkpoint
    def block(start: Int[Array, ""]) -> Array:
        query, segments = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (query_BLHK, segments_BL))
        mask = chunk_mask(segments, all_segments_BS, first + start, reach.window)
        return attend_masked(query, key_BSGK, value_BSGK, mask, reach.softcap)

    blocks = jax.lax.map(block, jnp.arange(0, length, size))
    return blocks.swapaxes(0, 1).reshape(query_BLHK.shape)


# On CPU, as in FlashAttention (Dao et al. 2022), but in plain operations: tile by tile, with what lies in the masked
# half left out; kept is one number a query, from which the backward pass makes the shares again.


def attend_in_tiles(query_BLHK: Array, key_BLGK: Array, value_BLGK: Array, segments_BL: Array, reach: Reach) -> Array:
    """`Attend` on CPU."""
    out: Any = _in_tiles(query_BLHK, key_BLGK, value_BLGK, segments_BL, reach)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_tiles(query: Array, key: Array, value: Array, segments: Array, reach: Reach) -> Array:
    return _tiles_forward(query, key, value, segments, reach)[0]


def _tiles_forward(query: Array, key: Array, value: Array, segments: Array, reach: Reach) -> tuple[Array, Any]:
    forward = functools.partial(_rows_forward, reach=reach)
    out, lse = _rows_by_rows(forward, query.shape, (query, key, value, segments))
    return out, (query, key, value, segments, out, lse)


def _tiles_backward(reach: Reach, saved: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    backward = functools.partial(_rows_backward, reach=reach)
    return *_rows_by_rows(backward, saved[0].shape, (*saved, d_out)), None


_in_tiles.defvjp(_tiles_forward, _tiles_backward)


def _rows_by_rows(rows: Callable[..., Any], shape: tuple[int, ...], arrays: tuple[Array, ...]) -> Any:
    """`rows(*arrays)`, in as many lanes as there are cores, each for as many rows of the batch at once as have no more
    than a tile of scores. XLA:CPU runs what does not depend on each other side by side, but a batch of small products
    in one thread."""
    batch, length, heads, _ = shape
    lanes = _lanes(batch)
    at_once = max(TILE // (heads * min(BLOCK, length) * length), 1)
    lane = batch // lanes
    parts = next(n for n in range(1, lane + 1) if lane % n == 0 and lane // n <= at_once)

    def one(arrays: list[Array]) -> Any:
        if parts == 1:
            return rows(*arrays)
        split = [array.reshape(parts, lane // parts, *array.shape[1:]) for array in arrays]
        found = jax.lax.map(lambda part: rows(*part), split)
        return jax.tree.map(lambda array: array.reshape(lane, *array.shape[2:]), found)

    found = [one([array[start : start + lane] for array in arrays]) for start in range(0, batch, lane)]
    return jax.tree.map(lambda *lanes: jnp.concatenate(lanes), *found)


def _lanes(batch: int) -> int:
    """Several devices, or processes, have their own rows already: lanes would send them to each other."""
    return math.gcd(batch, LANES) if jax.device_count() == 1 else 1


def _blocks(length: int, window: int) -> list[tuple[slice, slice]]:
    """Queries of each block, and the keys that any of them may see."""
    found = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        found.append((slice(start, stop), slice(max(start - window + 1, 0) if window else 0, stop)))
    return found


def _scores(
    query_BGRTK: Array, key_BGSK: Array, segments_BL: Array, queries: slice, keys: slice, reach: Reach
) -> tuple[Array, Array | None]:
    raw = jnp.einsum("BGRTK,BGSK->BGRTS", query_BGRTK, key_BGSK, preferred_element_type=jnp.float32)
    capped, slope = _cap(raw * query_BGRTK.shape[-1] ** -0.5, reach.softcap)
    return jnp.where(_seen(segments_BL, queries, keys, reach.window)[:, None, None], capped, HIDDEN), slope


def _rows_forward(query: Array, key: Array, value: Array, segments: Array, *, reach: Reach) -> tuple[Array, Array]:
    """Outputs, and the log of the sum of the exponentials of each query's scores."""
    query, key, value = _split_heads(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)
    outs, lses = [], []
    for queries, keys in _blocks(segments.shape[1], reach.window):
        scores, _ = _scores(query[..., queries, :], key[..., keys, :], segments, queries, keys, reach)
        most = jnp.max(scores, axis=-1, keepdims=True)
        powers = jnp.exp(scores - most)
        total = row_sum(powers, "cpu")
        mixed = jnp.einsum(
            "BGRTS,BGSK->BGRTK", powers.astype(value.dtype), value[..., keys, :], preferred_element_type=jnp.float32
        )
        outs.append(mixed / total)
        lses.append(most + jnp.log(total))
    return _join_heads(jnp.concatenate(outs, axis=3)).astype(query.dtype), jnp.concatenate(lses, axis=3)


def _rows_backward(
    query: Array, key: Array, value: Array, segments: Array, out: Array, lse: Array, d_out: Array, *, reach: Reach
) -> tuple[Array, Array, Array]:
    groups, dtype, scale = key.shape[2], query.dtype, query.shape[-1] ** -0.5
    along = row_sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), "cpu")
    along, d_out, query = (_split_heads(x, groups) for x in (along, d_out, query))
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    d_queries = []
    d_key, d_value = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for queries, keys in _blocks(segments.shape[1], reach.window):
        scores, slope = _scores(query[..., queries, :], key[..., keys, :], segments, queries, keys, reach)
        shares = jnp.exp(scores - lse[..., queries, :])
        d_shares = product("BGRTK,BGSK->BGRTS", d_out[..., queries, :], value[..., keys, :])
        d_scores = shares * (d_shares - along[..., queries, :]) * scale
        d_scores = (d_scores if slope is None else d_scores * slope).astype(dtype)
        d_queries.append(product("BGRTS,BGSK->BGRTK", d_scores, key[..., keys, :]))
        d_key = d_key.at[..., keys, :].add(product("BGRTS,BGRTK->BGSK", d_scores, query[..., queries, :]))
        d_value = d_value.at[..., keys, :].add(
            product("BGRTS,BGRTK->BGSK", shares.astype(dtype), d_out[..., queries, :])
        )
    d_query = _join_heads(jnp.concatenate(d_queries, axis=3))
    return d_query.astype(dtype), d_key.swapaxes(1, 2).astype(dtype), d_value.swapaxes(1, 2).astype(dtype)
