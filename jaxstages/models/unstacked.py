"""Parameters in the form that decoding reads them in: each layer's by themselves and, on CPU, kernels turned.

Legend: I inputs, O outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TURNED = "turned"
"""A kernel as [O, I], two dims, in the dtype of activations. On CPU a product of few rows, memory's to wait for, takes
up to 1.4 times (one row) or 1.7 times (16) as long with [I, O]."""

_TWO_INPUTS = ("out",)
"""Projections whose input has two dims, heads and head_dim."""


def unstack(params: dict[str, Any], layers: int, dtype: Any, platform: str) -> dict[str, Any]:
    """`layers_0`, ... instead of the stacked `layers`. A kernel with an adapter beside it stays as it is."""
    rest = {name: part for name, part in params.items() if name != "layers"}
    own = {f"layers_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"]) for n in range(layers)}
    if platform == "cpu":
        own = {name: _turn(layer, name, dtype) for name, layer in own.items()}
    return rest | own


def _turn(part: Any, name: str, dtype: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part.keys() - {"bias"} != {"kernel"}:
        return {inner: _turn(leaf, inner, dtype) for inner, leaf in part.items()}
    kernel: Array = part["kernel"]
    inputs = kernel.shape[0] * (kernel.shape[1] if name in _TWO_INPUTS else 1)
    turned_OI = kernel.reshape(inputs, -1).T.astype(dtype)
    return {TURNED: turned_OI} | {key: leaf for key, leaf in part.items() if key != "kernel"}


def linear_turned(x: Float[Array, "*B I"], turned_OI: Float[Array, "O I"]) -> Float[Array, "*B O"]:
    """`x @ turned.T`."""
    flat = jnp.reshape(x, (-1, x.shape[-1]))
    out = jax.lax.dot_general(flat, turned_OI, (((1,), (1,)), ((), ())))
    return out.reshape(*x.shape[:-1], len(turned_OI))
