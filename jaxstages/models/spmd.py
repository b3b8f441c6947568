"""What of the model is computed by each device for itself, over a mesh, and what it asks of the others.

The rest is left to the compiler, which is told where activations and parameters lie (`ShardingHooks`). Here it would send
more than is needed, or keep it.

| what                         | is sent, per device                                                                |
| gradient of a kernel         | summed over the devices that have other rows; each keeps the part that it stores   |
| lookup of tokens             | tokens, and their embeddings, from those that store other parts of the embedding   |
| attention, where rows are split | keys and values of the whole row                                                |
| a mixture of experts         | tokens to all that share the experts, and back what those give; kernels, as above  |

Legend: B batch, L length, D width, V vocab, I inputs, O outputs, H query heads, G key/value heads, K head dim,
E experts, F feed-forward.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from jaxstages.types import SINGLE_DEVICE, Names, ShardingHooks

ROWS = ("rows", "length")
"""Logical axes of an activation's leading dims."""

GATHERED = "embed"
"""That of parameters which are only stored split: while they are computed with they are whole along it."""


def outer_over(x_BLI: Array, d_out_BLO: Array, place: ShardingHooks, names: Names) -> Array:
    """The gradient of a kernel of these axes: `x.T @ d_out` over the rows of all devices, split as it is stored."""
    summed, stored = _summed(place), place.axes(GATHERED)
    if x_BLI.ndim != 3 or not set(stored) <= set(summed):
        rows = tuple(range(x_BLI.ndim - 1))
        return place.split(jax.lax.dot_general(x_BLI, d_out_BLO, ((rows, rows), ((), ()))), names)

    def local(x: Array, d_out: Array) -> Array:
        d_kernel = jax.lax.dot_general(x, d_out, (((0, 1), (0, 1)), ((), ())))
        left = summed
        if stored and GATHERED in names:
            d_kernel = jax.lax.psum_scatter(d_kernel, stored, scatter_dimension=names.index(GATHERED), tiled=True)
            left = tuple(axis for axis in summed if axis not in stored)
        return jax.lax.psum(d_kernel, left) if left else d_kernel

    sides = ((*ROWS, "" if name == GATHERED else name) for name in names)
    return place.local(local, tuple(sides), names)(x_BLI, d_out_BLO)


def _summed(place: ShardingHooks) -> tuple[str, ...]:
    """Axes of the mesh along which devices have other rows, or other tokens of them."""
    return (*place.axes("rows"), *place.axes("length"))


def lookup_over(table_VD: Array, tokens_BL: Array, place: ShardingHooks) -> Array:
    """`table[tokens]`, [B, L, D]. Devices that store other columns of the table exchange rows for columns."""
    if place == SINGLE_DEVICE or not set(place.axes(GATHERED)) <= set(place.axes("rows")):
        return place.activation(table_VD[tokens_BL], (*ROWS, ""))
    out: Any = _lookup(table_VD, tokens_BL, place)
    return out


_TABLE = ("vocab", GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table_VD: Array, tokens_BL: Array, place: ShardingHooks) -> Array:
    columns, words = place.axes(GATHERED), place.axes("vocab")

    def local(table: Array, tokens: Array) -> Array:
        slots, here = _slots(table, tokens, place)
        found = jnp.where(here[..., None], table[slots], 0)
        if columns:
            found = jax.lax.all_to_all(found, columns, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(found, words) if words else found

    return place.local(local, (_TABLE, ROWS), (*ROWS, ""))(table_VD, tokens_BL)


def _slots(table: Array, tokens: Array, place: ShardingHooks) -> tuple[Array, Array]:
    """Of the rows of all that store other columns of the table: each token's place in this device's words, and whether
    it is one of them."""
    columns, words = place.axes(GATHERED), place.axes("vocab")
    if columns:
        tokens = jax.lax.all_gather(tokens, columns, axis=0, tiled=True)
    slots = tokens - (_part(words) * len(table) if words else 0)
    here = (slots >= 0) & (slots < len(table))
    return jnp.where(here, slots, 0), here


def _lookup_forward(table_VD: Array, tokens_BL: Array, place: ShardingHooks) -> tuple[Array, Any]:
    return _lookup(table_VD, tokens_BL, place), (table_VD, tokens_BL)


def _lookup_backward(place: ShardingHooks, saved: Any, d_out_BLD: Array) -> tuple[Array, None]:
    columns = place.axes(GATHERED)
    left = tuple(axis for axis in _summed(place) if axis not in columns)

    def local(table: Array, tokens: Array, d_out: Array) -> Array:
        slots, here = _slots(table, tokens, place)
        if columns:
            d_out = jax.lax.all_to_all(d_out, columns, split_axis=2, concat_axis=0, tiled=True)
        d_table = jnp.zeros(table.shape, d_out.dtype).at[slots].add(jnp.where(here[..., None], d_out, 0))
        return jax.lax.psum(d_table, left) if left else d_table

    return place.local(local, (_TABLE, ROWS, (*ROWS, "")), _TABLE)(*saved, d_out_BLD), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _part(axes: tuple[str, ...]) -> Array:
    """Which part of an array split by these axes is this device's."""
    return jax.lax.axis_index(axes)


def mix_over(mix: Callable[..., Array], place: ShardingHooks) -> Callable[..., Array]:
    """`mix(x_BLD, router_DE, gate_EDF, up_EDF, down_EFD) -> [B, L, D]` with experts on several devices: each has the
    tokens of all that share the experts, and adds what its own give; nothing is dropped. Kernels are gathered twice."""
    if place == SINGLE_DEVICE:
        return lambda x, router, *kernels: mix(x.reshape(-1, x.shape[-1]), router, kernels, first=0).reshape(x.shape)
    experts, shares = place.axes("expert"), place.axes("ff")
    meet = tuple(axis for axis in experts if axis in place.axes("rows"))
    apart = tuple(axis for axis in (*shares, *experts) if axis not in meet)

    def whole(kernel: Array, names: Names, *split: str) -> Array:
        for name in filter(place.axes, split):
            kernel = jax.lax.all_gather(kernel, place.axes(name), axis=names.index(name), tiled=True)
        return kernel

    @functools.partial(jax.checkpoint, policy=lambda primitive, *_, **__: primitive.name != "all_gather")
    def local(x_BLD: Array, router_DE: Array, gate: Array, up: Array, down: Array) -> Array:
        router_DE = whole(router_DE, _ROUTER, GATHERED, "expert")
        kernels = (whole(gate, _IN, GATHERED), whole(up, _IN, GATHERED), whole(down, _OUT, GATHERED))
        if meet:
            x_BLD = checkpoint_name(jax.lax.all_gather(x_BLD, meet, axis=0, tiled=True), "tokens")  # which are kept
        first = _part(experts) * len(gate) if experts else 0
        out = mix(x_BLD.reshape(-1, x_BLD.shape[-1]), router_DE, kernels, first=first).reshape(x_BLD.shape)
        if meet:
            out = jax.lax.psum_scatter(out, meet, scatter_dimension=0, tiled=True)
        return _sum_over(out, apart) if apart else out

    return place.local(local, ((*ROWS, ""), _ROUTER, _IN, _IN, _OUT), (*ROWS, ""))


_ROUTER, _IN, _OUT = (GATHERED, "expert"), ("expert", GATHERED, "ff"), ("expert", "ff", GATHERED)


_sum_over = jax.custom_vjp(lambda x, axes: jax.lax.psum(x, axes), nondiff_argnums=(1,))
"""Of what several devices have, each of which gets the sum. Its gradient comes to each as its share of one in `size`
(`jax.shard_map` sees that they have the same), and is whole again without asking the others."""
_sum_over.defvjp(
    lambda x, axes: (jax.lax.psum(x, axes), None), lambda axes, _, d_out: (d_out * jax.lax.axis_size(axes),)
)
