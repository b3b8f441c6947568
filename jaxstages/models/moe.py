"""Mixture of experts without capacity: tokens are sorted by expert, so that each expert has one product for all of its.

Legend: M tokens, D width, F feed-forward, E experts, X experts of this device, T experts a token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def mix_experts(
    x_MD: Float[Array, "M D"],
    router_DE: Float[Array, "D E"],
    experts: tuple[Float[Array, "X D F"], Float[Array, "X D F"], Float[Array, "X F D"]],
    activation: Callable[[Array], Array],
    per_token: int,
    normalize: bool,
    first: Any = 0,
) -> Float[Array, "M D"]:
    """Of each token's `per_token` likeliest experts, `down(activation(gate(x)) * up(x))`, weighted by the router's
    softmax (which is float32), as in Mixtral (Jiang et al. 2024).

    Args:
        experts: kernels of gate, up and down; fewer than E where other devices have the others, whose part is left out.
        normalize: weights of the chosen ones are divided by their sum.
        first: number of the first of `experts`.
    """
    shares_ME = jax.nn.softmax(x_MD.astype(jnp.float32) @ router_DE.astype(jnp.float32), axis=-1)
    weights_MT, chosen_MT = jax.lax.top_k(shares_ME, per_token)
    if normalize:
        weights_MT = weights_MT / jnp.sum(weights_MT, axis=-1, keepdims=True)
    chosen = chosen_MT.reshape(-1)
    here, count = len(experts[0]), router_DE.shape[1]
    if here < count:
        chosen = (chosen - first) % count  # those of this device come first
    order = jnp.argsort(chosen, stable=True)
    sizes_X = jnp.bincount(chosen, length=here).astype(jnp.int32)
    gate_XDF, up_XDF, down_XFD = (kernel.astype(x_MD.dtype) for kernel in experts)
    rows = order // per_token
    sorted_ = x_MD[rows]
    hidden = activation(jax.lax.ragged_dot(sorted_, gate_XDF, sizes_X)) * jax.lax.ragged_dot(sorted_, up_XDF, sizes_X)
    out = jax.lax.ragged_dot(hidden, down_XFD, sizes_X)
    if here < count:
        out = jnp.where((chosen[order] < here)[:, None], out, 0.0)
    weighted = out * weights_MT.reshape(-1)[order][:, None].astype(out.dtype)
    return jnp.zeros_like(x_MD).at[rows].add(weighted)
