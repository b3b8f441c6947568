"""Mixture of experts without capacity: tokens are sorted by expert, so that each expert computes one product.

Legend: M tokens, D width, F feed-forward, E experts, X experts on this device, T experts per token.
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
    """Sum `down(activation(gate(x)) * up(x))` over the `per_token` likeliest experts of each token, weighted by the
    router's softmax in float32, as in Mixtral (Jiang et al. 2024).

    Args:
        experts: kernels of gate, up and down. If other devices have other experts, X < E, and their share of the sum is
            left out.
        normalize: divide the weights of the chosen experts by their sum.
        first: index of the first of `experts` among all experts.
    """
    probabilities_ME = jax.nn.softmax(x_MD.astype(jnp.float32) @ router_DE.astype(jnp.float32), axis=-1)
    weights_MT, experts_MT = jax.lax.top_k(probabilities_ME, per_token)
    if normalize:
        weights_MT = weights_MT / jnp.sum(weights_MT, axis=-1, keepdims=True)

    # One entry per token and expert, sorted by expert. Experts of this device come first.
    expert = experts_MT.reshape(-1)
    num_local, count = len(experts[0]), router_DE.shape[1]
    if num_local < count:
        expert = (expert - first) % count
    order = jnp.argsort(expert, stable=True)
    sizes_X = jnp.bincount(expert, length=num_local).astype(jnp.int32)
    token = order // per_token

    gate_XDF, up_XDF, down_XFD = (kernel.astype(x_MD.dtype) for kernel in experts)
    inputs = x_MD[token]
    gate = activation(jax.lax.ragged_dot(inputs, gate_XDF, sizes_X))
    hidden = gate * jax.lax.ragged_dot(inputs, up_XDF, sizes_X)
    out = jax.lax.ragged_dot(hidden, down_XFD, sizes_X)
    if num_local < count:
        out = jnp.where((expert[order] < num_local)[:, None], out, 0.0)

    weighted = out * weights_MT.reshape(-1)[order][:, None].astype(out.dtype)
    return jnp.zeros_like(x_MD).at[token].add(weighted)
