"""Low-rank adapters (LoRA, Hu et al. 2022) as functions of trees, on any matrices among the parameters.

An adapter lies where its matrix is: that of `query/kernel` beside the kernel, `query/lora_a` and `query/lora_b`, which
the layer applies to activations; that of another matrix, such as `embedding`, below its name, and `join` adds its
product to it.

| dims of the matrix                 | lora_a           | lora_b        |
| embed, heads, head_dim (query)     | [D, R]           | [R, H * K]    |
| layers, heads, head_dim, embed     | [N, H * K, R]    | [N, R, D]     |
| vocab, embed (embedding)           | [V, R]           | [R, D]        |

Legend: M rows, I inputs, O outputs, R rank; N layers, D width, H heads, K head dim, V vocab.
"""

import difflib
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from jaxstages.config import LoraConfig
from jaxstages.models.primitives import last_dim, linear
from jaxstages.types import SINGLE_DEVICE, Names, Params, ShardingHooks

KERNEL, SCALE = "kernel", "kernel_scale"
DOWN, UP, MAGNITUDE = "lora_a", "lora_b", "lora_magnitude"
ADAPTER = (DOWN, UP, MAGNITUDE)
"""Names of an adapter's parameters: [I, R], [R, O] and, with DoRA, [O]."""


def adapt(
    out: Float[Array, "*B O"],
    x: Float[Array, "*B I"],
    kernel_IO: Array,
    adapter: dict[str, Array],
    platform: str,
    place: ShardingHooks = SINGLE_DEVICE,
    names: Names = ("", ""),
) -> Float[Array, "*B O"]:
    """`out + x @ a @ b`, out being `x @ kernel`; with a magnitude, its columns are scaled to that length (DoRA, Liu et
    al. 2024: the length that they are divided by counts as constant)."""
    down_IR, up_RO = (adapter[name].astype(x.dtype) for name in (DOWN, UP))
    low = linear(x, down_IR, platform, place, (names[0], "rank"))
    out = out + linear(low, up_RO, platform, place, ("rank", names[1]))
    if MAGNITUDE not in adapter:
        return out
    length_O = _length(kernel_IO.astype(jnp.float32) + adapter[DOWN] @ adapter[UP])
    return out * last_dim((adapter[MAGNITUDE] / length_O).astype(out.dtype), out.ndim)


def _length(matrix: Float[Array, "*B I O"]) -> Float[Array, "*B O"]:
    return jax.lax.stop_gradient(jnp.linalg.norm(matrix, axis=-2))


def scale_of(config: LoraConfig) -> float:
    """What the product of an adapter is multiplied by: `alpha / rank`, or `alpha / sqrt(rank)` (Kalajdzievski 2023)."""
    return config.alpha / (config.rank**0.5 if config.rank_stabilized else config.rank)


def _flat(tree: Params) -> dict[tuple[str, ...], Any]:
    found: Any = flatten_dict(tree)  # Flax's own type says more than a tree of arrays has
    return found


def _matrices(axes: Params) -> dict[tuple[str, ...], tuple[int, int]]:
    """Path of each parameter that is a matrix, or a stack of them -> its leading dims, and those of the inputs."""
    found = {}
    for path, names in _flat(axes).items():
        lead = len([*itertools.takewhile(lambda name: name in ("layers", "expert"), names)])
        if "embed" in names[lead:] and len(names) - lead > 1:
            found[path] = (lead, len(names) - lead - 1 if names[-1] == "embed" else 1)
    return found


def _chosen(axes: Params, targets: tuple[str, ...]) -> dict[tuple[str, ...], tuple[int, int]]:
    """Those of the matrices whose path has one of the targets, which are regular expressions, in it.

    Raises:
        ValueError: a target has none; it names the nearest paths.
    """
    paths = {"/".join(path): path for path in _matrices(axes)}
    for target in targets:
        if not any(re.search(target, text) for text in paths):
            near = difflib.get_close_matches(target, paths, n=3, cutoff=0.3) or paths
            raise ValueError(f"lora.targets: {target!r} matches no matrix; near it are {', '.join(near)}")
    return {p: _matrices(axes)[p] for t, p in paths.items() if any(re.search(target, t) for target in targets)}


def _place(path: tuple[str, ...]) -> tuple[str, ...]:
    return path[:-1] if path[-1] == KERNEL else path


def adapter_axes(axes: Params, config: LoraConfig) -> Params:
    """The adapters' logical axes, as `Model.axes` has those of the parameters: each side is split as its matrix is."""
    made, flat = {}, _flat(axes)
    for path, (lead, inputs) in _chosen(axes, config.targets).items():
        before, one, other = flat[path][:lead], flat[path][lead], flat[path][lead + inputs]
        made |= {(*_place(path), DOWN): (*before, one, "rank"), (*_place(path), UP): (*before, "rank", other)}
        if config.dora:
            made[*_place(path), MAGNITUDE] = (*before, other)
    return unflatten_dict(made)


def init(key: PRNGKeyArray, base: Params, axes: Params, config: LoraConfig) -> Params:
    """Adapters that change nothing yet: `lora_a` uniform within `1 / sqrt(I)` (He et al. 2015, as PEFT has it),
    `lora_b` 0, and the magnitudes the lengths of the base's columns.

    Args:
        base: the parameters that are adapted, as they are held; only magnitudes need their values.
        axes: `Model.axes`.

    Raises:
        ValueError: a target matches no matrix.
    """
    made, flat = {}, _flat(release(base) if config.dora else base)
    for path, (lead, inputs) in _chosen(axes, config.targets).items():
        shape, place = flat[path].shape, _place(path)
        stack, sides = shape[:lead], (math.prod(shape[lead : lead + inputs]), math.prod(shape[lead + inputs :]))
        draw, bound = jax.random.fold_in(key, sorted(_flat(axes)).index(path)), sides[0] ** -0.5
        made[*place, DOWN] = jax.random.uniform(draw, (*stack, sides[0], config.rank), jnp.float32, -bound, bound)
        made[*place, UP] = jnp.zeros((*stack, config.rank, sides[1]))
        if config.dora:
            made[*place, MAGNITUDE] = _length(flat[path].reshape(*stack, *sides))
    return unflatten_dict(made)


def join(base: Params, adapters: Params, config: LoraConfig) -> Params:
    """The parameters that the model computes with: adapters beside their kernels, their scale in `lora_b`; nothing is
    multiplied out but for matrices that are no kernels. The base may be held in any form."""
    return _join(base, adapters, scale_of(config), False)


def merge(base: Params, adapters: Params, config: LoraConfig) -> Params:
    """The plain parameters, float32, which do the same: the product of each adapter is added to its matrix."""
    return _join(release(base), adapters, scale_of(config), True)


def _join(base: Params, adapters: Params, scale: float, multiply: bool) -> Params:
    joined = dict(base)
    if UP in adapters:
        adapter = adapters | {UP: adapters[UP] * scale}
        joined |= {KERNEL: _whole(base[KERNEL], adapter)} if multiply else adapter
        return joined
    for name, part in adapters.items():
        if isinstance(base[name], dict):
            joined[name] = _join(base[name], part, scale, multiply)
        else:
            joined[name] = _whole(base[name], part | {UP: part[UP] * scale})
    return joined


@jax.jit  # one program also where `join` is called outside of one: its exchanges between devices are not apart
def _whole(matrix: Array, adapter: dict[str, Array]) -> Array:
    """The matrix with the adapter's product in it, in float32."""
    product = jnp.matmul(adapter[DOWN], adapter[UP], precision="highest")
    whole = matrix.astype(jnp.float32).reshape(product.shape) + product
    if MAGNITUDE in adapter:
        whole = whole * jnp.expand_dims(adapter[MAGNITUDE] / _length(whole), -2)
    return whole.reshape(matrix.shape)


def hold(params: Params, axes: Params, kind: str) -> Params:
    """Parameters that are not trained, in less memory: "float32" leaves them, "bfloat16" casts the matrices, "int8"
    rounds kernels to whole numbers, with a float32 `kernel_scale` a column beside (weight-only), and casts the rest.

    Norms and biases stay as they are. `release` gives float32 again, of what the model computes with.
    """
    if kind == "float32":
        return params
    held, matrices = _flat(params), _matrices(axes)
    for path, (lead, inputs) in matrices.items():
        leaf = held[path]
        if kind == "int8" and path[-1] == KERNEL:
            most = jnp.max(jnp.abs(leaf), axis=tuple(range(lead, lead + inputs)), keepdims=True)
            scale = jnp.where(most > 0, most, 1.0) / 127.0
            held[path], held[*path[:-1], SCALE] = jnp.round(leaf / scale).astype(jnp.int8), scale
        else:
            held[path] = leaf.astype(jnp.bfloat16)
    return unflatten_dict(held)


def held_axes(axes: Params, kind: str) -> Params:
    """Logical axes of what `hold` returns."""
    made = _flat(axes)
    if kind == "int8":
        for path, (lead, inputs) in _matrices(axes).items():
            if path[-1] == KERNEL:
                names = made[path]
                made[*path[:-1], SCALE] = (*names[:lead], *["one"] * inputs, *names[lead + inputs :])
    return unflatten_dict(made)


def kernel_of(params: dict[str, Any]) -> Array:
    """A kernel in the numbers that it stands for."""
    kernel = params[KERNEL]
    return kernel.astype(jnp.float32) * params[SCALE] if SCALE in params else kernel


def release(held: Params) -> Params:
    """The inverse of `hold`, float32."""
    if KERNEL in held:
        rest = {name: leaf for name, leaf in held.items() if name != SCALE}
        return {name: leaf.astype(jnp.float32) for name, leaf in (rest | {KERNEL: kernel_of(held)}).items()}
    return {name: release(part) if isinstance(part, dict) else part.astype(jnp.float32) for name, part in held.items()}
