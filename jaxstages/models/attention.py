"""Attention: what it may see, the formula, and the way of CPUs. `kernels.py` has those of accelerators.

Legend: B batch, L query length, S key length or cache slots, H query heads, G key/value heads, R = H / G query heads
that share a key/value head, K head dim, T queries of a block.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxstages.models.spmd import ROWS
from jaxstages.types import SINGLE_DEVICE, ShardingHooks

BLOCK = 128
"""Queries of a block on CPU: keys after its last query are left out."""

TILE = 2**18
"""Scores that are looked at together on CPU: 1 MiB of float32, for the cores' own caches to hold."""

AT_ONCE = 256
"""Queries whose scores exist at once where a row's tokens lie on several devices."""

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
    return chunk_mask(segments_BL, segments_BL, 0, window)


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


def attend_over(attend: Attend, place: ShardingHooks, length: int) -> Attend:
    """Each device attends with its own rows and heads. Where a row's tokens are split too, it has its own queries, and
    gathers the keys and values of the whole row; they are attended to by the formula, some queries at a time.

    A row of another length takes the plain formula: to learn the parameters' shapes, two tokens are enough.
    """
    if place == SINGLE_DEVICE:
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
#
# Scores lie keys by queries, [N, S, R, T] with N = B * G: a maximum or a sum over keys then takes row by row, where
# along a row XLA:CPU takes number by number. And no product turns an operand, for XLA:CPU then takes a form of half the
# speed: each is there as rows and as columns, made from what was given, for a product takes a turn before it back.


def attend_in_tiles(query_BLHK: Array, key_BLGK: Array, value_BLGK: Array, segments_BL: Array, reach: Reach) -> Array:
    """`Attend` on CPU."""
    out: Any = _in_tiles(query_BLHK, key_BLGK, value_BLGK, segments_BL, reach)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_tiles(query: Array, key: Array, value: Array, segments: Array, reach: Reach) -> Array:
    return _tiles_forward(query, key, value, segments, reach)[0]


def _tiles_forward(query: Array, key: Array, value: Array, segments: Array, reach: Reach) -> tuple[Array, Any]:
    seen = _seen(query, key, value, segments)
    out_NKRL, lse = _tile_by_tile(functools.partial(_tile_forward, reach=reach), seen)
    out = _from_rows(out_NKRL.transpose(0, 2, 3, 1), query)
    return out, (query, key, value, segments, out, lse)


def _tiles_backward(reach: Reach, saved: Any, d_out: Array) -> tuple[Array | None, ...]:
    query, key, value, segments, out, lse = saved
    more = (*(_both(x, key.shape[2]) for x in (out, d_out)), lse)
    found = _tile_by_tile(functools.partial(_tile_backward, reach=reach), _seen(query, key, value, segments), *more)
    return *(_from_rows(d_NRLK, out) for d_NRLK in found), None


_in_tiles.defvjp(_tiles_forward, _tiles_backward)


class _Both(NamedTuple):
    """One array both ways."""

    rows: Float[Array, "N R L K"]
    columns: Float[Array, "N K R L"]


class _Seen(NamedTuple):
    """What tiles are made of. Segments are there twice, for queries and for keys: XLA:CPU makes no vectors of what
    reads one slice of a loop both along rows and along columns (exp took seven times as long)."""

    query: _Both
    key: _Both
    value: _Both
    segments_NL: Array
    key_segments_NS: Array


def _seen(query: Array, key: Array, value: Array, segments: Array) -> _Seen:
    both = functools.partial(_both, groups=key.shape[2])
    segments_NL = jnp.repeat(segments, key.shape[2], axis=0)
    return _Seen(both(query), both(key), both(value), segments_NL, segments_NL)


def _both(x_BLHK: Array, groups: int) -> _Both:
    rows = jax.lax.collapse(_split_heads(x_BLHK, groups), 0, 2)
    return _Both(rows, rows.transpose(0, 3, 1, 2))


def _from_rows(x_NRLK: Array, like: Array) -> Float[Array, "B L H K"]:
    return _join_heads(x_NRLK.reshape(like.shape[0], -1, *x_NRLK.shape[1:])).astype(like.dtype)


def _tile_by_tile(tile: Callable[..., Any], seen: _Seen, *more: Any) -> Any:
    """`tile(seen, *more)` in float32, for as many of N at once as have no more than a tile of scores."""
    every, shared, length, _ = seen.query.rows.shape
    most = max(TILE // (shared * min(BLOCK, length) * length), 1)
    at_once = next(n for n in range(min(most, every), 0, -1) if every % n == 0)

    def wide(arrays: tuple[Any, ...]) -> Any:
        return tile(*jax.tree.map(lambda x: x.astype(jnp.float32), arrays))

    if at_once == every:
        return wide((seen, *more))
    tiles = jax.tree.map(lambda x: x.reshape(every // at_once, at_once, *x.shape[1:]), (seen, *more))
    return jax.tree.map(lambda x: jax.lax.collapse(x, 0, 2), jax.lax.map(wide, tiles))


def _blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Queries of each block, and the keys that any of them may see."""
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        yield slice(start, stop), slice(max(start - window + 1, 0) if window else 0, stop)


def _scores(seen: _Seen, queries: slice, keys: slice, reach: Reach) -> tuple[Float[Array, "N S R T"], Array | None]:
    raw = jnp.einsum("NSK,NKRT->NSRT", seen.key.rows[:, 0, keys], seen.query.columns[..., queries])
    capped, slope = _cap(raw * seen.key.rows.shape[3] ** -0.5, reach.softcap)
    back_ST = jnp.arange(queries.start, queries.stop)[None, :] - jnp.arange(keys.start, keys.stop)[:, None]
    near_ST = (back_ST >= 0) & (back_ST < reach.window) if reach.window else back_ST >= 0
    same_NST = seen.key_segments_NS[:, keys, None] == seen.segments_NL[:, None, queries]
    return jnp.where((same_NST & near_ST[None])[:, :, None], capped, HIDDEN), slope


def _tile_forward(seen: _Seen, *, reach: Reach) -> tuple[Float[Array, "N K R L"], Float[Array, "N 1 R L"]]:
    """Outputs, and the log of the sum of the exponentials of each query's scores."""
    outs, lses = [], []
    for queries, keys in _blocks(seen.query.rows.shape[2], reach.window):
        scores, _ = _scores(seen, queries, keys, reach)
        most = jnp.max(scores, axis=1, keepdims=True)
        powers = jnp.exp(scores - most)
        total = jnp.sum(powers, axis=1, keepdims=True)
        outs.append(jnp.einsum("NKS,NSRT->NKRT", seen.value.columns[:, :, 0, keys], powers) / total)
        lses.append(most + jnp.log(total))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _tile_backward(seen: _Seen, out: _Both, d_out: _Both, lse: Array, *, reach: Reach) -> tuple[Array, ...]:
    """Gradients of queries, keys and values, each [N, _, L, K]."""
    scale = seen.key.rows.shape[3] ** -0.5
    along = jnp.sum(out.columns * d_out.columns, axis=1, keepdims=True)
    d_queries = []
    d_key, d_value = (jnp.zeros_like(x.rows[:, 0]) for x in (seen.key, seen.value))
    for queries, keys in _blocks(lse.shape[3], reach.window):
        scores, slope = _scores(seen, queries, keys, reach)
        shares = jnp.exp(scores - lse[..., queries])
        d_shares = jnp.einsum("NSK,NKRT->NSRT", seen.value.rows[:, 0, keys], d_out.columns[..., queries])
        d_scores = shares * (d_shares - along[..., queries]) * (scale if slope is None else scale * slope)
        d_queries.append(jnp.einsum("NKS,NSRT->NKRT", seen.key.columns[:, :, 0, keys], d_scores))
        d_key = d_key.at[:, keys].add(jnp.einsum("NSRT,NRTK->NSK", d_scores, seen.query.rows[:, :, queries]))
        d_value = d_value.at[:, keys].add(jnp.einsum("NSRT,NRTK->NSK", shares, d_out.rows[:, :, queries]))
    return jnp.concatenate(d_queries, axis=3).transpose(0, 2, 3, 1), d_key[:, None], d_value[:, None]
