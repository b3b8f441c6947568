"""Low-rank adapters (LoRA, Hu et al. 2022) on any matrices among the parameters, as functions of trees.

An adapter is stored next to its matrix. That of `query/kernel` is `query/lora_a` and `query/lora_b`, which the layer
applies to activations. That of another matrix, such as `embedding`, is stored below its name, and `apply_adapters` adds
its product to the matrix.

| dims of the matrix                 | lora_a           | lora_b        |
| embed, heads, head_dim (query)     | [D, R]           | [R, H * K]    |
| layers, heads, head_dim, embed     | [N, H * K, R]    | [N, R, D]     |
| vocab, embed (embedding)           | [V, R]           | [R, D]        |

Legend: R rank, N layers, D width, H heads, K head dim, V vocab.
"""

import difflib
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PRNGKeyArray

from jaxstages.config import LoraConfig
from jaxstages.models.lora_layer import DOWN, KERNEL, MAGNITUDE, SCALE, UP, column_lengths, dequantized_kernel
from jaxstages.types import Params

Path = tuple[str, ...]


class Matrix(NamedTuple):
    """How a parameter is read as a stack of matrices: the number of its leading dims, and of its input dims."""

    stack_dims: int
    input_dims: int


def scale_of(config: LoraConfig) -> float:
    """Factor of an adapter's product: `alpha / rank`, or `alpha / sqrt(rank)` (Kalajdzievski 2023)."""
    return config.alpha / (config.rank**0.5 if config.rank_stabilized else config.rank)


def _flatten(tree: Params) -> dict[Path, Any]:
    leaves: Any = flatten_dict(tree)  # the type that Flax declares is wider than that of a tree of arrays
    return leaves


def matrices(axes: Params) -> dict[Path, Matrix]:
    """Find the parameters that are matrices, or stacks of them, by their logical axes."""
    by_path = {}
    for path, names in _flatten(axes).items():
        stack_dims = len([*itertools.takewhile(lambda name: name in ("layers", "expert"), names)])
        dims = len(names) - stack_dims
        if "embed" in names[stack_dims:] and dims > 1:
            by_path[path] = Matrix(stack_dims, dims - 1 if names[-1] == "embed" else 1)
    return by_path


def _targets(axes: Params, patterns: tuple[str, ...]) -> dict[Path, Matrix]:
    """The matrices whose path matches one of the regular expressions.

    Raises:
        ValueError: a pattern matches no matrix. The message names the nearest paths.
    """
    by_path = matrices(axes)
    paths = {"/".join(path): path for path in by_path}
    for pattern in patterns:
        if not any(re.search(pattern, text) for text in paths):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or paths
            raise ValueError(f"lora.targets: {pattern!r} matches no matrix; near it are {', '.join(near)}")

    matches = (path for text, path in paths.items() if any(re.search(pattern, text) for pattern in patterns))
    return {path: by_path[path] for path in matches}


def _adapter_path(path: Path) -> Path:
    return path[:-1] if path[-1] == KERNEL else path


def adapter_axes(axes: Params, config: LoraConfig) -> Params:
    """Return the logical axes of the adapters. Both sides are sharded like their matrix.

    Args:
        axes: `Model.axes`.
    """
    names_by_path: dict[Path, Any] = {}
    flat = _flatten(axes)
    for path, (stack_dims, input_dims) in _targets(axes, config.targets).items():
        stack, inputs, outputs = flat[path][:stack_dims], flat[path][stack_dims], flat[path][stack_dims + input_dims]
        parent = _adapter_path(path)
        names_by_path[*parent, DOWN] = (*stack, inputs, "rank")
        names_by_path[*parent, UP] = (*stack, "rank", outputs)
        if config.dora:
            names_by_path[*parent, MAGNITUDE] = (*stack, outputs)
    return unflatten_dict(names_by_path)


def init(key: PRNGKeyArray, base: Params, axes: Params, config: LoraConfig) -> Params:
    """Initialise adapters that do not change the model yet.

    `lora_a` is uniform within `1 / sqrt(I)` (He et al. 2015, as in PEFT), `lora_b` is 0, and magnitudes are the lengths
    of the base's columns.

    Args:
        base: the adapted parameters in their storage dtype. Only magnitudes need their values.
        axes: `Model.axes`.

    Raises:
        ValueError: a target matches no matrix.
    """
    adapters: dict[Path, Array] = {}
    flat = _flatten(dequantize(base) if config.dora else base)
    order = sorted(_flatten(axes))
    for path, (stack_dims, input_dims) in _targets(axes, config.targets).items():
        shape, parent = flat[path].shape, _adapter_path(path)
        stack = shape[:stack_dims]
        inputs = math.prod(shape[stack_dims : stack_dims + input_dims])
        outputs = math.prod(shape[stack_dims + input_dims :])

        matrix_key, bound = jax.random.fold_in(key, order.index(path)), inputs**-0.5
        down_shape = (*stack, inputs, config.rank)
        adapters[*parent, DOWN] = jax.random.uniform(matrix_key, down_shape, jnp.float32, -bound, bound)
        adapters[*parent, UP] = jnp.zeros((*stack, config.rank, outputs))
        if config.dora:
            adapters[*parent, MAGNITUDE] = column_lengths(flat[path].reshape(*stack, inputs, outputs))
    return unflatten_dict(adapters)


def apply_adapters(base: Params, adapters: Params, config: LoraConfig) -> Params:
    """Return the parameters that the model computes with: adapters next to their kernels, their scale in `lora_b`.

    Products are multiplied out only for matrices that are no kernels. The base may be quantized.
    """
    return _combine(base, adapters, scale_of(config), multiply_kernels=False)


def merge(base: Params, adapters: Params, config: LoraConfig) -> Params:
    """Return plain float32 parameters that compute the same: the product of each adapter is added to its matrix."""
    return _combine(dequantize(base), adapters, scale_of(config), multiply_kernels=True)


def _combine(base: Params, adapters: Params, scale: float, multiply_kernels: bool) -> Params:
    combined = dict(base)
    if UP in adapters:
        adapter = adapters | {UP: adapters[UP] * scale}
        combined |= {KERNEL: _merged_matrix(base[KERNEL], adapter)} if multiply_kernels else adapter
        return combined

    for name, part in adapters.items():
        if isinstance(base[name], dict):
            combined[name] = _combine(base[name], part, scale, multiply_kernels)
        else:
            combined[name] = _merged_matrix(base[name], part | {UP: part[UP] * scale})
    return combined


@jax.jit  # one program even where the caller is not jitted, so that its collectives stay together
def _merged_matrix(matrix: Array, adapter: dict[str, Array]) -> Array:
    """Return the matrix plus the adapter's product, in float32."""
    product = jnp.matmul(adapter[DOWN], adapter[UP], precision="highest")
    merged = matrix.astype(jnp.float32).reshape(product.shape) + product
    if MAGNITUDE in adapter:
        merged = merged * jnp.expand_dims(adapter[MAGNITUDE] / column_lengths(merged), -2)
    return merged.reshape(matrix.shape)


def quantize_base(params: Params, axes: Params, dtype: str) -> Params:
    """Store parameters that are not trained in less memory.

    "float32" leaves them unchanged; "bfloat16" casts the matrices; "int8" rounds kernels to integers, with a float32
    `kernel_scale` per column next to them (weight-only), and casts the other matrices to bfloat16. Norms and biases
    stay as they are. `dequantize` returns float32.
    """
    if dtype == "float32":
        return params

    flat = _flatten(params)
    for path, (stack_dims, input_dims) in matrices(axes).items():
        leaf = flat[path]
        if dtype == "int8" and path[-1] == KERNEL:
            input_axes = tuple(range(stack_dims, stack_dims + input_dims))
            largest = jnp.max(jnp.abs(leaf), axis=input_axes, keepdims=True)
            scale = jnp.where(largest > 0, largest, 1.0) / 127.0
            flat[path] = jnp.round(leaf / scale).astype(jnp.int8)
            flat[*path[:-1], SCALE] = scale
        else:
            flat[path] = leaf.astype(jnp.bfloat16)
    return unflatten_dict(flat)


def base_axes(axes: Params, dtype: str) -> Params:
    """Return the logical axes of the result of `quantize_base`."""
    flat = _flatten(axes)
    if dtype == "int8":
        for path, (stack_dims, input_dims) in matrices(axes).items():
            if path[-1] == KERNEL:
                names = flat[path]
                # A dim of size 1 has a name of its own, which no mesh axis splits.
                flat[*path[:-1], SCALE] = (
                    *names[:stack_dims],
                    *["one"] * input_dims,
                    *names[stack_dims + input_dims :],
                )
    return unflatten_dict(flat)


def dequantize(base: Params) -> Params:
    """Invert `quantize_base`, in float32."""
    if KERNEL in base:
        leaves = {name: leaf for name, leaf in base.items() if name != SCALE} | {KERNEL: dequantized_kernel(base)}
        return {name: leaf.astype(jnp.float32) for name, leaf in leaves.items()}
    return {
        name: dequantize(part) if isinstance(part, dict) else part.astype(jnp.float32) for name, part in base.items()
    }
