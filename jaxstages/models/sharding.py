"""The device mesh, and shardings from the recipe's table of logical axes to mesh axes.

Legend: B batch, L length.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxstages.config.mesh import MeshConfig, RulesConfig
from jaxstages.models.custom_vjp import with_backward
from jaxstages.models.spmd import GATHERED
from jaxstages.types import SINGLE_DEVICE, Batch, Names, Params, ShardingHooks

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, from the one that may cross slow networks to the one that communicates most."""

RULES = RulesConfig()
"""The default rules."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh over all devices, or over `devices`, arranged by the network between them.

    Raises:
        ValueError: the axes do not multiply to the number of devices, or `data` does not cross the slices evenly.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(len(devices) // known, 1)
    if math.prod(sizes.values()) != len(devices):
        shape = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1 or axis == "data")
        raise ValueError(f"mesh {shape} does not fit {len(devices)} devices; make the product {len(devices)}")
    return Mesh(_arranged(tuple(sizes.values()), devices), AXES)


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ValueError(f"mesh.data={shape[0]} must be a multiple of the {slices} slices, which it alone crosses")
        within = (shape[0] // slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(within, (slices, *[1] * (len(shape) - 1)), devices)
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


def spec_of(names: Sequence[str], rules: RulesConfig, gathered: bool = False) -> PartitionSpec:
    """Return the partition of an array whose dims have these logical axes. A name without a rule is not split.

    Args:
        gathered: the partition of a parameter during computation instead of in storage.
    """
    axes = (() if gathered and name == GATHERED else getattr(rules, name, ()) for name in names)
    return PartitionSpec(*(part or None for part in axes))


def param_shardings(params: Params, axes: Params, mesh: Mesh, rules: RulesConfig = RULES) -> Params:
    """Return a NamedSharding for each parameter. `params` are arrays or shapes; `axes` is `Model.axes`.

    Raises:
        ValueError: a dim can't be split evenly over its axes of the mesh.
    """

    def one(path: Any, leaf: Any, names: tuple[str, ...]) -> NamedSharding:
        for size, name in zip(leaf.shape, names, strict=True):
            over = getattr(rules, name, ())
            if size % _product(mesh, over):
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                axes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in over)
                raise ValueError(
                    f"{where}: its dim {name}={size} can't be split over {axes}; choose one that divides it"
                )
        return NamedSharding(mesh, spec_of(names, rules))

    return jax.tree_util.tree_map_with_path(one, params, axes)


def make_sharding_hooks(mesh: Mesh, rules: RulesConfig = RULES) -> ShardingHooks:
    """Return the model's sharding annotations under this mesh; identities on one device."""
    if mesh.size == 1:
        return SINGLE_DEVICE

    def constrain(x: Array, names: Names) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(names, rules)))

    def gather(x: Array, names: Names) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(names, rules, gathered=True)))

    # The transpose of a constraint is the same constraint: without this the gradient would be whole on every device.
    gather_param = with_backward(
        gather,
        lambda x, names: (gather(x, names), None),
        lambda names, _, d_x: (constrain(d_x, names),),
        static=(1,),
    )

    def shard_map(function: Callable[..., Array], ins: tuple[Names, ...], out: Names) -> Callable[..., Array]:
        in_specs = tuple(spec_of(names, rules) for names in ins)
        # Kernels do not declare how their outputs vary over the mesh.
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=spec_of(out, rules), check_vma=False)

    return ShardingHooks(
        constrain=constrain,
        gather_param=gather_param,
        shard_param=constrain,
        shard_map=shard_map,
        mesh_axes=lambda name: tuple(axis for axis in getattr(rules, name, ()) if mesh.shape[axis] > 1),
        num_shards=lambda name: _product(mesh, getattr(rules, name, ())),
    )


def like_params(tree: Any, params: Params, shardings: Params, mesh: Mesh) -> Any:
    """Return shardings for a tree that contains copies of `params`, such as an optimizer's state.

    A leaf whose path ends in a parameter's path, and that has its shape, is sharded like that parameter. Every other
    leaf is replicated.
    """

    def keys(path: Any) -> tuple[str, ...]:
        return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    by_path = {keys(path): (leaf.shape, sharding) for (path, leaf), sharding in leaves}
    whole = NamedSharding(mesh, PartitionSpec())

    def one(path: Any, leaf: Any) -> NamedSharding:
        names = keys(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, whole))
            if shape == leaf.shape:
                return sharding
        return whole

    return jax.tree_util.tree_map_with_path(one, tree)


def shardings_of(tree: Any) -> Any:
    """Return the sharding of each leaf, an array or a shape."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def batch_sharding(mesh: Mesh, rules: RulesConfig = RULES) -> NamedSharding:
    """Return the sharding of a batch's fields, [B, L]."""
    return NamedSharding(mesh, spec_of(("rows", "length"), rules))


def check_batch(name: str, batch_size: int, accumulate: int, mesh: Mesh, rules: RulesConfig = RULES) -> None:
    """Raises ValueError unless each accumulated part can be split evenly over the mesh."""
    parts = _product(mesh, rules.rows) * accumulate
    if batch_size % parts:
        over = " x ".join(f"mesh {axis}={mesh.shape[axis]}" for axis in rules.rows if mesh.shape[axis] > 1)
        raise ValueError(
            f"{name}={batch_size} must be divisible by {parts} ({over or 'one device'} x accumulate={accumulate}); "
            f"set it to a multiple of {parts}"
        )


def check_context(context: int, mesh: Mesh, rules: RulesConfig = RULES) -> None:
    """Raises ValueError unless a row's tokens can be split evenly over the mesh."""
    if context % _product(mesh, rules.length):
        raise ValueError(f"model.context={context} can't be split over mesh.context={mesh.shape['context']}")


def local_row_range(batch_size: int, sharding: NamedSharding) -> range:
    """Return the rows of a batch that this process's devices hold. Other processes may hold other parts of them."""
    indices = sharding.addressable_devices_indices_map((batch_size, sharding.mesh.size)).values()
    spans = [index[0].indices(batch_size) for index in indices if index is not None]
    return range(min(start for start, *_ in spans), max(stop for _, stop, _ in spans))


def place_batch(batch: Batch, batch_size: int, sharding: NamedSharding) -> Batch:
    """Turn the rows of `local_row_range` (numpy) into one global array per field."""
    first = local_row_range(batch_size, sharding).start

    def one(field: Any) -> Array:
        rows = np.asarray(field)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return rows[start - first : stop - first, *index[1:]]

        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, part)

    return Batch(*map(one, batch))


def _product(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
