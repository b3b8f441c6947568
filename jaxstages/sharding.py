"""Which device holds what: a mesh with axes data, fsdp and tensor, and one table from logical axes to mesh axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxstages.config import MeshConfig
from jaxstages.types import Batch, Params

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ff": "tensor",
    "layers": None,
    "position": None,
    "norm": None,
    "expert": None,
    "rank": None,
    "one": None,
}
"""Logical axis of a parameter's dim -> axis of the mesh that splits it; None keeps it whole on every device."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or those given).

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(len(devices) // known, 1)
    if math.prod(sizes.values()) != len(devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"mesh {asked} does not fit {len(devices)} devices; make the product {len(devices)}")
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)


def param_shardings(params: Params, axes: Params, mesh: Mesh) -> Params:
    """A NamedSharding a parameter. `params` may hold shapes (`jax.eval_shape`) or arrays; `axes` is `Model.axes`.

    Raises:
        ValueError: a dim can't be split evenly over its axis of the mesh.
    """

    def one(path: Any, leaf: Any, names: tuple[str, ...]) -> NamedSharding:
        for size, name in zip(leaf.shape, names, strict=True):
            axis = RULES[name]
            if axis is not None and size % mesh.shape[axis]:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"{where}: its dim {name}={size} can't be split over mesh.{axis}={mesh.shape[axis]}; "
                    f"choose a mesh.{axis} that divides it"
                )
        return NamedSharding(mesh, PartitionSpec(*(RULES[name] for name in names)))

    return jax.tree_util.tree_map_with_path(one, params, axes)


def like_params(tree: Any, params: Params, shardings: Params, mesh: Mesh) -> Any:
    """Shardings for a tree, such as an optimizer's state, that holds copies of `params`: a leaf whose path ends in a
    parameter's path, and has its shape, is split as that parameter; every other leaf is whole on every device."""

    def keys(path: Any) -> tuple[str, ...]:
        return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

    by_path = {
        keys(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }
    whole = NamedSharding(mesh, PartitionSpec())

    def one(path: Any, leaf: Any) -> NamedSharding:
        names = keys(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, whole))
            if shape == leaf.shape:
                return sharding
        return whole

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over data and fsdp; the tokens of a row stay together."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch_size(name: str, batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises ValueError unless each accumulated part can be split evenly over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if batch_size % parts:
        raise ValueError(
            f"{name}={batch_size} must be divisible by {parts} (mesh data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']} x accumulate={accumulate}); set it to a multiple of {parts}"
        )


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Rows of this host (numpy) -> one global array a field. With one host these are all the rows."""
    sharding = batch_sharding(mesh)
    return Batch(*(jax.make_array_from_process_local_data(sharding, np.asarray(field)) for field in batch))
