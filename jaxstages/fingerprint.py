"""Digests of arrays: two checkpoints, meshes or runs are the same when these are, bit for bit."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstages.types import Params


def named_leaves(tree: Any) -> dict[str, Any]:
    """Path (`layers/attention/query/kernel`) -> leaf, in sorted order of the paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return dict(sorted((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves))


def params_sha256(params: Params) -> str:
    """SHA-256 over the parameters' bytes, in sorted order of their paths."""
    digest = hashlib.sha256()
    for path, leaf in named_leaves(params).items():
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


@jax.jit
def _leaf_print(x: jax.Array) -> jax.Array:
    """Two 32-bit sums over a leaf's bits and places. Integer sums do not depend on their order, so the value is the
    same on any mesh, and nothing is gathered."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for dim in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    odd = jnp.sum(bits * (jnp.uint32(2) * place + jnp.uint32(1)), dtype=jnp.uint32)
    mixed = place * jnp.uint32(0x85EBCA6B) | jnp.uint32(1)
    return jnp.stack([odd, jnp.sum((bits + place * jnp.uint32(0x9E3779B1)) * mixed, dtype=jnp.uint32)])


def fingerprint(tree: Any) -> dict[str, str]:
    """Path of each leaf -> digest of its values, dtype and shape, the same on any mesh."""
    leaves = named_leaves(tree)
    prints = jax.device_get({path: _leaf_print(x) if isinstance(x, jax.Array) else x for path, x in leaves.items()})
    return {
        path: f"{np.asarray(prints[path]).tobytes().hex()} {np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in leaves.items()
    }


@jax.jit
def _finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def not_finite(params: Params) -> list[str]:
    """Paths of parameters that have a NaN or an infinity in them."""
    leaves = named_leaves(params)
    return [path for path, fine in zip(leaves, np.asarray(_finite(list(leaves.values()))), strict=True) if not fine]
