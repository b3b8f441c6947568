"""Digests of arrays: two checkpoints, meshes or runs are the same when these are, bit for bit."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstages.runtime import multihost
from jaxstages.types import Params


def named_leaves(tree: Any) -> dict[str, Any]:
    """Path (`layers/attention/query/kernel`) -> leaf, in sorted order of the paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return dict(sorted((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves))


def tree_of(leaves: dict[str, Any]) -> Params:
    """The nested dict of which `named_leaves` gave these."""
    found: Params = {}
    for path, value in leaves.items():
        *folders, leaf = path.split("/")
        place = found
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return found


def kind_of(leaf: Any) -> str:
    """dtype and shape, such as "float32[16, 32]"."""
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def params_sha256(params: Params) -> str:
    """SHA-256 over the parameters' bytes, in sorted order of their paths."""
    digest = hashlib.sha256()
    for path, leaf in named_leaves(params).items():
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(multihost.gather_to_host(leaf)).reshape(-1).view(np.uint8).data)  # no copy
    return digest.hexdigest()


@jax.jit
def _leaf_print(x: jax.Array) -> jax.Array:
    """Two 32-bit sums over a leaf's bits and places, and how many of its values are not finite, in one pass. Integer
    sums do not depend on their order, so they are the same on any mesh, and nothing is gathered."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for dim in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    odd = bits * (jnp.uint32(2) * place + jnp.uint32(1))
    mixed = place * jnp.uint32(0x85EBCA6B) | jnp.uint32(1)
    both = (bits + place * jnp.uint32(0x9E3779B1)) * mixed
    bad = (~jnp.isfinite(x)).astype(jnp.uint32)
    # One reduction of three: as three sums it took 20 times as long on CPU, where XLA does not fuse them.
    zero, everywhere = jnp.uint32(0), tuple(range(x.ndim))
    return jnp.stack(jax.lax.reduce((odd, both, bad), (zero,) * 3, lambda a, b: tuple(map(jnp.add, a, b)), everywhere))


UNDER_WAY = 16
"""Leaves at once on CPU: with 32 programs under way, of several devices some wait to begin the next one and others, in
the one before, wait for them, for ever (jaxlib 0.10.2)."""


class Fingerprint(NamedTuple):
    """digests: path of each leaf -> its values, dtype and shape in short, the same on any mesh. not_finite: paths of
    leaves that have a NaN or an infinity in them; those that are no device arrays are not looked at."""

    digests: dict[str, str]
    not_finite: list[str]


def fingerprint(tree: Any) -> Fingerprint:
    return begin_fingerprint(tree)()


def begin_fingerprint(tree: Any) -> Callable[[], Fingerprint]:
    """The same in two parts: the devices begin now, and nobody waits for them before what this returns is called."""
    leaves = named_leaves(tree)
    begun: dict[str, Any] = {}
    for number, (path, x) in enumerate(leaves.items(), start=1):
        begun[path] = _leaf_print(x) if isinstance(x, jax.Array) else x
        if number % UNDER_WAY == 0 and jax.default_backend() == "cpu":
            jax.block_until_ready(begun[path])
    kinds = {path: kind_of(x) for path, x in leaves.items()}  # a leaf may be donated before they are wanted

    def fetch() -> Fingerprint:
        digests, bad = {}, []
        for path, words in jax.device_get(begun).items():
            words = np.asarray(words)
            if isinstance(begun[path], jax.Array):
                words, count = words[:2], int(words[2])
                bad += [path] * (count > 0)
            digests[path] = f"{words.tobytes().hex()} {kinds[path]}"
        return Fingerprint(digests, bad)

    return fetch
