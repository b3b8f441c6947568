"""The operations over a mesh: parts that each device computes itself, with explicit collectives.

The compiler partitions everything else, guided by sharding annotations (`ShardingHooks`). Here it would send more than
is needed, or keep it in memory.

| operation                   | communication per device                                                             |
| --------------------------- | ------------------------------------------------------------------------------------ |
| gradient of a kernel        | reduced over the devices with other rows; each keeps the shard that it stores        |
| embedding lookup            | tokens, and embeddings from the devices that store other parts of the table          |
| attention over split rows   | keys and values of the whole row                                                     |
| mixture of experts          | tokens to the devices that share the experts, and results back; kernels as above     |

Legend: B batch, L length, D width, V vocab, I inputs, O outputs, H query heads, G key/value heads, K head dim,
E experts, F feed-forward, P shards of the rows, T positions of a tile.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxstages.models.attention import Attend, AttentionSpec, attend_masked, attend_packed, chunk_mask
from jaxstages.models.custom_vjp import with_backward
from jaxstages.models.fused_cross_entropy import Form, make_loss_head
from jaxstages.models.ops import Ops
from jaxstages.types import SINGLE_DEVICE, Names, ShardingHooks

ROWS = ("rows", "length")
"""Logical axes of an activation's leading dims."""

GATHERED = "embed"
"""Logical axis that only the storage of parameters is sharded by. They are gathered along it before use."""

QUERY_BLOCK = 256
"""Queries whose scores are in memory at the same time if the tokens of a row are split over devices."""


def sharded(ops: Ops, hooks: ShardingHooks, context: int | None = None) -> Ops:
    """Return `ops` for arrays that are sharded over a mesh.

    Args:
        context: length of the rows that `ops.attention` is made for; None is any length.
    """
    return ops._replace(
        linear=functools.partial(fsdp_linear, hooks=hooks),
        attention=sharded_attention(ops.attention, hooks, context),
        embed=functools.partial(sharded_embedding_lookup, hooks=hooks),
        loss_head=make_loss_head(
            Form(
                num_shards=hooks.num_shards("rows"),
                sharded_head_gradient=functools.partial(sharded_head_gradient, hooks=hooks),
            )
        ),
    )


# Linear maps. A kernel is gathered for the product, and again in the backward pass: kept, it would be whole in memory.


def fsdp_linear(x: Array, kernel_IO: Array, names: Names = ("", ""), *, hooks: ShardingHooks) -> Array:
    """`x @ kernel`, with the kernel gathered for the product."""
    return _fsdp_linear(x, kernel_IO, hooks, names)


def _linear(x: Array, kernel_IO: Array, hooks: ShardingHooks, names: Names) -> Array:
    return x @ hooks.gather_param(kernel_IO, names)


def _linear_forward(
    x: Array, kernel_IO: Array, hooks: ShardingHooks, names: Names
) -> tuple[Array, tuple[Array, Array]]:
    kernel_IO = hooks.shard_param(kernel_IO, names)  # the residual
    return x @ hooks.gather_param(kernel_IO, names), (x, kernel_IO)


def _linear_backward(
    hooks: ShardingHooks, names: Names, residuals: tuple[Array, Array], d_out: Array
) -> tuple[Array, Array]:
    x, kernel_IO = residuals
    # Without the barrier, unrolled layers would share the gathered kernel of the forward pass.
    kernel_IO, d_out = jax.lax.optimization_barrier((kernel_IO, d_out))
    return d_out @ hooks.gather_param(kernel_IO, names).T, sharded_kernel_grad(x, d_out, hooks, names)


_fsdp_linear = with_backward(_linear, _linear_forward, _linear_backward, static=(2, 3))


def sharded_kernel_grad(x_BLI: Array, d_out_BLO: Array, hooks: ShardingHooks, names: Names) -> Array:
    """The gradient of a kernel, `x.T @ d_out` over the rows of all devices, sharded like the stored kernel."""
    row_axes, storage_axes = _row_axes(hooks), hooks.mesh_axes(GATHERED)
    if x_BLI.ndim != 3 or not set(storage_axes) <= set(row_axes):
        rows = tuple(range(x_BLI.ndim - 1))
        return hooks.shard_param(jax.lax.dot_general(x_BLI, d_out_BLO, ((rows, rows), ((), ()))), names)

    def local(x: Array, d_out: Array) -> Array:
        d_kernel = jax.lax.dot_general(x, d_out, (((0, 1), (0, 1)), ((), ())))
        to_reduce = row_axes
        if storage_axes and GATHERED in names:
            dim = names.index(GATHERED)
            d_kernel = jax.lax.psum_scatter(d_kernel, storage_axes, scatter_dimension=dim, tiled=True)
            to_reduce = tuple(axis for axis in row_axes if axis not in storage_axes)
        return jax.lax.psum(d_kernel, to_reduce) if to_reduce else d_kernel

    sides = tuple((*ROWS, "" if name == GATHERED else name) for name in names)
    return hooks.shard_map(local, sides, names)(x_BLI, d_out_BLO)


def _row_axes(hooks: ShardingHooks) -> tuple[str, ...]:
    """Mesh axes along which devices have different rows, or different tokens of them."""
    return (*hooks.mesh_axes("rows"), *hooks.mesh_axes("length"))


# Embedding lookup.


def sharded_embedding_lookup(table_VD: Array, tokens_BL: Array, dtype: Any, hooks: ShardingHooks) -> Array:
    """`table[tokens]` in a dtype, [B, L, D]. Devices that store other columns of the table exchange rows for columns.

    Devices exchange rows in that dtype; gradients are added up in the dtype of the table.
    """
    if not set(hooks.mesh_axes(GATHERED)) <= set(hooks.mesh_axes("rows")):
        return hooks.constrain(table_VD[tokens_BL].astype(dtype), (*ROWS, ""))
    return _lookup(table_VD, tokens_BL, dtype, hooks)


_TABLE = ("vocab", GATHERED)


def _lookup_embeddings(table_VD: Array, tokens_BL: Array, dtype: Any, hooks: ShardingHooks) -> Array:
    column_axes, vocab_axes = hooks.mesh_axes(GATHERED), hooks.mesh_axes("vocab")

    def local(table: Array, tokens: Array) -> Array:
        slots, is_local = _local_slots(table, tokens, hooks)
        embeddings = jnp.where(is_local[..., None], table[slots].astype(dtype), 0)
        if column_axes:
            embeddings = jax.lax.all_to_all(embeddings, column_axes, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(embeddings, vocab_axes) if vocab_axes else embeddings

    return hooks.shard_map(local, (_TABLE, ROWS), (*ROWS, ""))(table_VD, tokens_BL)


def _local_slots(table: Array, tokens: Array, hooks: ShardingHooks) -> tuple[Array, Array]:
    """Index of each token in this device's part of the vocabulary, and whether it is in that part. The tokens are those
    of all devices that store other columns of the table."""
    column_axes, vocab_axes = hooks.mesh_axes(GATHERED), hooks.mesh_axes("vocab")
    if column_axes:
        tokens = jax.lax.all_gather(tokens, column_axes, axis=0, tiled=True)
    slots = tokens - (jax.lax.axis_index(vocab_axes) * len(table) if vocab_axes else 0)
    is_local = (slots >= 0) & (slots < len(table))
    return jnp.where(is_local, slots, 0), is_local


def _lookup_forward(table_VD: Array, tokens_BL: Array, dtype: Any, hooks: ShardingHooks) -> tuple[Array, Any]:
    return _lookup_embeddings(table_VD, tokens_BL, dtype, hooks), (table_VD, tokens_BL)


def _lookup_backward(dtype: Any, hooks: ShardingHooks, residuals: Any, d_out_BLD: Array) -> tuple[Array, None]:
    column_axes = hooks.mesh_axes(GATHERED)
    to_reduce = tuple(axis for axis in _row_axes(hooks) if axis not in column_axes)

    def local(table: Array, tokens: Array, d_out: Array) -> Array:
        slots, is_local = _local_slots(table, tokens, hooks)
        if column_axes:
            d_out = jax.lax.all_to_all(d_out, column_axes, split_axis=2, concat_axis=0, tiled=True)
        d_rows = jnp.where(is_local[..., None], d_out, 0).astype(table.dtype)
        d_table = jnp.zeros_like(table).at[slots].add(d_rows)
        return jax.lax.psum(d_table, to_reduce) if to_reduce else d_table

    return hooks.shard_map(local, (_TABLE, ROWS, (*ROWS, "")), _TABLE)(*residuals, d_out_BLD), None


_lookup = with_backward(_lookup_embeddings, _lookup_forward, _lookup_backward, static=(2, 3))


# Attention.


def sharded_attention(attend: Attend, hooks: ShardingHooks, length: int | None = None) -> Attend:
    """Return an attention in which each device computes its own rows and heads.

    If the tokens of a row are split too, a device has its own queries, gathers keys and values of the whole row, and
    applies the formula to a block of queries at a time. A row of another length takes the plain formula.
    """
    context_axes = hooks.mesh_axes("length")

    def local(query: Array, key: Array, value: Array, segments: Array, *, spec: AttentionSpec) -> Array:
        if not context_axes:
            return attend(query, key, value, segments, spec)
        first = jax.lax.axis_index(context_axes) * segments.shape[1]
        key, value, all_segments = (
            jax.lax.all_gather(x, context_axes, axis=1, tiled=True) for x in (key, value, segments)
        )
        return attend_chunk(query, key, value, segments, all_segments, first, spec)

    heads, kv_heads = ((*ROWS, name, "") for name in ("heads", "kv_heads"))

    def attend_sharded(query: Array, key: Array, value: Array, segments: Array, spec: AttentionSpec) -> Array:
        if length is not None and query.shape[1] != length:
            return attend_packed(query, key, value, segments, spec)
        on_shards = hooks.shard_map(functools.partial(local, spec=spec), (heads, kv_heads, kv_heads, ROWS), heads)
        return on_shards(query, key, value, segments)

    return attend_sharded


def attend_chunk(
    query_BLHK: Array,
    key_BSGK: Array,
    value_BSGK: Array,
    segments_BL: Array,
    all_segments_BS: Array,
    first: Any,
    spec: AttentionSpec,
) -> Array:
    """Attention of queries first, first + 1, ... of a row to all of its keys, a block of queries at a time."""
    length = query_BLHK.shape[1]
    size = max(n for n in range(1, min(QUERY_BLOCK, length) + 1) if length % n == 0)

    @jax.checkpoint
    def block(start: Int[Array, ""]) -> Array:
        query, segments = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (query_BLHK, segments_BL))
        mask = chunk_mask(segments, all_segments_BS, first + start, spec.window)
        return attend_masked(query, key_BSGK, value_BSGK, mask, spec.softcap)

    blocks = jax.lax.map(block, jnp.arange(0, length, size))
    return blocks.swapaxes(0, 1).reshape(query_BLHK.shape)


# Loss head.


def sharded_head_gradient(d_logits_BTV: Array, hidden_BTD: Array, hooks: ShardingHooks) -> Float[Array, "P V D"]:
    """Gradient of the head in each shard of the rows, summed over its tokens in float32."""
    by_shard = (x.reshape(hooks.num_shards("rows"), -1, *x.shape[1:]) for x in (d_logits_BTV, hidden_BTD))
    d_head_PVD = jnp.einsum("PBTV,PBTD->PVD", *by_shard, preferred_element_type=jnp.float32)
    return hooks.constrain(d_head_PVD, ("rows", "vocab", ""))


# Mixture of experts.


def expert_parallel_moe(mix: Callable[..., Array], hooks: ShardingHooks) -> Callable[..., Array]:
    """Return `mix(x_BLD, router_DE, gate_EDF, up_EDF, down_EFD) -> [B, L, D]` with experts on several devices.

    A device gathers the tokens of all devices that share the experts, and adds what its own experts return; no token is
    dropped. Kernels are gathered twice, in the forward and in the backward pass.
    """
    if hooks == SINGLE_DEVICE:
        return lambda x, router, *kernels: mix(x.reshape(-1, x.shape[-1]), router, kernels, first=0).reshape(x.shape)

    expert_axes, ff_axes = hooks.mesh_axes("expert"), hooks.mesh_axes("ff")
    token_axes = tuple(axis for axis in expert_axes if axis in hooks.mesh_axes("rows"))
    sum_axes = tuple(axis for axis in (*ff_axes, *expert_axes) if axis not in token_axes)

    def gather(kernel: Array, names: Names, *split: str) -> Array:
        for name in filter(hooks.mesh_axes, split):
            kernel = jax.lax.all_gather(kernel, hooks.mesh_axes(name), axis=names.index(name), tiled=True)
        return kernel

    @functools.partial(jax.checkpoint, policy=lambda primitive, *_, **__: primitive.name != "all_gather")
    def local(x_BLD: Array, router_DE: Array, gate: Array, up: Array, down: Array) -> Array:
        router_DE = gather(router_DE, _ROUTER, GATHERED, "expert")
        kernels = (gather(gate, _IN, GATHERED), gather(up, _IN, GATHERED), gather(down, _OUT, GATHERED))
        if token_axes:
            # The name exempts gathered tokens from the policy: they are kept for the backward pass.
            x_BLD = checkpoint_name(jax.lax.all_gather(x_BLD, token_axes, axis=0, tiled=True), "tokens")

        first = jax.lax.axis_index(expert_axes) * len(gate) if expert_axes else 0
        out = mix(x_BLD.reshape(-1, x_BLD.shape[-1]), router_DE, kernels, first=first).reshape(x_BLD.shape)

        if token_axes:
            out = jax.lax.psum_scatter(out, token_axes, scatter_dimension=0, tiled=True)
        return _sum_over(out, sum_axes) if sum_axes else out

    return hooks.shard_map(local, ((*ROWS, ""), _ROUTER, _IN, _IN, _OUT), (*ROWS, ""))


_ROUTER, _IN, _OUT = (GATHERED, "expert"), ("expert", GATHERED, "ff"), ("expert", "ff", GATHERED)


def _psum(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes)


# Each device receives its share, 1 / size, of the output's gradient, since `jax.shard_map` sees the same output on all.
# A product restores the whole without communication.
_sum_over = with_backward(
    _psum,
    lambda x, axes: (jax.lax.psum(x, axes), None),
    lambda axes, _, d_out: (d_out * jax.lax.axis_size(axes),),
    static=(1,),
)
