"""Digests of arrays: equal digests mean equal bits, whatever the mesh."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstages.runtime import multihost
from jaxstages.runtime.cpu import limit_programs_in_flight
from jaxstages.types import Params


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return path (`layers/attention/query/kernel`) -> leaf, sorted by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return dict(sorted((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves))


def tree_of(leaves: dict[str, Any]) -> Params:
    """Return the nested dict of these leaves: the inverse of `named_leaves`."""
    tree: Params = {}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        subtree = tree
        for parent in parents:
            subtree = subtree.setdefault(parent, {})
        subtree[name] = value
    return tree


def kind_of(leaf: Any) -> str:
    """Describe dtype and shape, such as "float32[16, 32]"."""
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def params_sha256(params: Params) -> str:
    """Compute the SHA-256 of the parameters' paths and bytes, sorted by path."""
    digest = hashlib.sha256()
    for path, leaf in named_leaves(params).items():
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(multihost.gather_to_host(leaf)).reshape(-1).view(np.uint8).data)  # no copy
    return digest.hexdigest()


@jax.jit
def _checksums(x: jax.Array) -> jax.Array:
    """Compute two 32-bit sums over a leaf's bits and indices, and count its non-finite values, in one pass.

    Integer sums do not depend on their order, so they are the same on any mesh, and nothing is gathered.
    """
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)

    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for dim in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]

    first = bits * (jnp.uint32(2) * index + jnp.uint32(1))
    odd_hash = index * jnp.uint32(0x85EBCA6B) | jnp.uint32(1)
    second = (bits + index * jnp.uint32(0x9E3779B1)) * odd_hash
    not_finite = (~jnp.isfinite(x)).astype(jnp.uint32)

    # One reduction with three operands: three sums are not fused everywhere, and took 20 times as long.
    def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(map(jnp.add, a, b))

    zeros, dims = (jnp.uint32(0),) * 3, tuple(range(x.ndim))
    return jnp.stack(jax.lax.reduce((first, second, not_finite), zeros, add, dims))


class Fingerprint(NamedTuple):
    """Digests of a tree.

    digests: path of each leaf -> checksum of its values, dtype and shape, the same on any mesh.
    not_finite: paths of device arrays with a NaN or an infinity.
    """

    digests: dict[str, str]
    not_finite: list[str]


def fingerprint(tree: Any) -> Fingerprint:
    return begin_fingerprint(tree)()


def begin_fingerprint(tree: Any) -> Callable[[], Fingerprint]:
    """Start the computation of a fingerprint on the devices, and return a function that waits for the result."""
    leaves = named_leaves(tree)
    pending: dict[str, Any] = {}
    for number, (path, x) in enumerate(leaves.items(), start=1):
        pending[path] = _checksums(x) if isinstance(x, jax.Array) else x
        limit_programs_in_flight(number, pending[path])
    kinds = {path: kind_of(x) for path, x in leaves.items()}  # now: leaves may be donated before `fetch`

    def fetch() -> Fingerprint:
        digests, not_finite = {}, []
        for path, words in jax.device_get(pending).items():
            words = np.asarray(words)
            if isinstance(pending[path], jax.Array):
                words, count = words[:2], int(words[2])
                not_finite += [path] * (count > 0)
            digests[path] = f"{words.tobytes().hex()} {kinds[path]}"
        return Fingerprint(digests, not_finite)

    return fetch
