"""Linear maps and norms whose gradients are written by hand, where what the compiler makes of them costs time.

Legend: M rows (all leading dims), I inputs, O outputs, D the dim that is normalised.

Two habits of XLA:CPU are worked around. The gradient of a kernel is a product over the rows; XLA writes one operand out
transposed for it, recomputing what that operand came from, and then multiplies in the slower of the library's forms.
And a sum over the last dim is a scalar loop, whose surroundings are fused into every consumer: a backward pass then
recomputes the residual stream's gradient from the top, layer by layer. A product with a vector of ones is as exact,
runs in the matmul library, and ends the fusion.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstages.models.spmd import outer_over
from jaxstages.types import SINGLE_DEVICE, Names, ShardingHooks

_ROWS = (((0,), (0,)), ((), ()))
"""Both operands are contracted over their rows."""


def again(x: Array, after: Array, platform: str) -> Array:
    """x, as a value that the compiler can make no sooner than `after`; NaN where the first of that is not finite.

    What the backward pass makes of what was there before, XLA:CPU makes in the forward pass already, or finds it there,
    and keeps it. Elsewhere that is for an optimization barrier to prevent; here it is dropped too early. A sum, for
    fusion ends there: else each use of x would make anew what `after` is made from."""
    if platform != "cpu":
        return jax.lax.optimization_barrier(x)
    return x + 0.0 * jnp.sum(after[(0,) * (after.ndim - 1)][:8]).astype(x.dtype)


@jax.custom_vjp
def _linear_on_cpu(x_MI: Float[Array, "M I"], kernel_IO: Float[Array, "I O"]) -> Float[Array, "M O"]:
    return x_MI @ kernel_IO


def _on_cpu_backward(saved: tuple[Array, Array], d_out_MO: Array) -> tuple[Array, Array]:
    x_MI, kernel_IO = saved
    # Again, or unrolled layers would keep them: large kernels, cut out of a stack, and norms' outputs of over 1 MiB.
    d_x_MI = d_out_MO @ (again(kernel_IO, d_out_MO, "cpu") if 2 * kernel_IO.size > x_MI.size else kernel_IO).T
    if kernel_IO.shape[0] <= kernel_IO.shape[1]:
        return d_x_MI, jax.lax.dot_general(again(x_MI, d_out_MO, "cpu") if x_MI.size > 2**18 else x_MI, d_out_MO, _ROWS)
    # The narrower operand comes first: the other way round this takes up to 1.8 times as long. The barrier keeps the
    # compiler from turning it back.
    return d_x_MI, jax.lax.optimization_barrier(jax.lax.dot_general(d_out_MO, x_MI, _ROWS)).T


_linear_on_cpu.defvjp(lambda x_MI, kernel_IO: (x_MI @ kernel_IO, (x_MI, kernel_IO)), _on_cpu_backward)


# Over a mesh a kernel is gathered for the product, and again in the backward pass: kept, it would be whole in memory.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear_over(x: Array, kernel_IO: Array, place: ShardingHooks, names: Names) -> Array:
    return x @ place.whole(kernel_IO, names)


def _over_forward(x: Array, kernel_IO: Array, place: ShardingHooks, names: Names) -> tuple[Array, tuple[Array, Array]]:
    kernel_IO = place.split(kernel_IO, names)  # what is kept
    return x @ place.whole(kernel_IO, names), (x, kernel_IO)


def _over_backward(place: ShardingHooks, names: Names, saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, kernel_IO = saved
    kernel_IO, d_out = jax.lax.optimization_barrier((kernel_IO, d_out))  # else unrolled layers share what is gathered
    return d_out @ place.whole(kernel_IO, names).T, outer_over(x, d_out, place, names)


_linear_over.defvjp(_over_forward, _over_backward)


def linear(
    x: Float[Array, "*B I"],
    kernel_IO: Float[Array, "I O"],
    platform: str,
    place: ShardingHooks = SINGLE_DEVICE,
    names: Names = ("", ""),
) -> Float[Array, "*B O"]:
    """`x @ kernel`. On one "cpu" the kernel's gradient is formed as above; elsewhere the compiler does well by itself.

    Args:
        place: which device holds what. names: the kernel's logical axes.
    """
    if place != SINGLE_DEVICE:
        out: Any = _linear_over(x, kernel_IO, place, names)
        return out
    if platform != "cpu":
        return x @ kernel_IO
    return _linear_on_cpu(x.reshape(-1, x.shape[-1]), kernel_IO).reshape(*x.shape[:-1], kernel_IO.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: Array, place: ShardingHooks, names: Names) -> Array:
    """A parameter as it is computed with; its gradient is split as it is stored. (The transpose of a constraint is the
    same constraint: the gradient would be whole on every device.)"""
    return place.whole(x, names)


gather.defvjp(
    lambda x, place, names: (place.whole(x, names), None), lambda place, names, _, d_x: (place.split(d_x, names),)
)


def row_sum(x: Float[Array, "*B D"], platform: str) -> Float[Array, "*B 1"]:
    """Sum over the last dim, which stays."""
    if platform != "cpu":
        return jnp.sum(x, axis=-1, keepdims=True)
    flat_MD = x.reshape(-1, x.shape[-1])
    return (flat_MD @ jnp.ones((x.shape[-1], 1), x.dtype)).reshape(*x.shape[:-1], 1)


def _column_sum(x: Float[Array, "*B D"], platform: str) -> Float[Array, " D"]:
    if platform != "cpu":
        return jnp.sum(x, axis=tuple(range(x.ndim - 1)))
    flat_MD = x.reshape(-1, x.shape[-1])
    return (jnp.ones((1, flat_MD.shape[0]), x.dtype) @ flat_MD)[0]


def normalize(
    x: Float[Array, "*B D"], scale_D: Float[Array, " D"], centred: bool, epsilon: float, platform: str
) -> Float[Array, "*B D"]:
    """`scale * (x - mean) / sqrt(variance + epsilon)` over the last dim (layer norm, Ba et al. 2016); not centred,
    `scale * x / sqrt(mean(x**2) + epsilon)` (RMS norm, Zhang & Sennrich 2019). In float32, whatever x is."""
    out: Any = _normalize(x, scale_D, centred, epsilon, platform)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _normalize(x: Array, scale_D: Array, centred: bool, epsilon: float, platform: str) -> Array:
    return _normalize_forward(x, scale_D, centred, epsilon, platform)[0]


def last_dim(vector_D: Float[Array, " D"], ndim: int) -> Float[Array, "... D"]:
    """A vector as the last of `ndim` dims: ranks are never promoted in silence."""
    return jnp.expand_dims(vector_D, tuple(range(ndim - 1)))


def _mean(x: Array, platform: str) -> Array:
    return row_sum(x, platform) / x.shape[-1]


def _normalize_forward(
    x: Array, scale_D: Array, centred: bool, epsilon: float, platform: str
) -> tuple[Array, tuple[Array, Array | None, Array, Array]]:
    wide = x.astype(jnp.float32)
    mean = _mean(wide, platform) if centred else None
    shifted = wide if mean is None else wide - mean
    rate = jax.lax.rsqrt(_mean(jnp.square(shifted), platform) + epsilon)
    return (shifted * rate * last_dim(scale_D, x.ndim)).astype(x.dtype), (x, mean, rate, scale_D)


def _normalize_backward(
    centred: bool, epsilon: float, platform: str, saved: tuple[Array, Array | None, Array, Array], d_out: Array
) -> tuple[Array, Array]:
    x, mean, rate, scale_D = saved
    wide, d_out = x.astype(jnp.float32), d_out.astype(jnp.float32)
    normed = (wide if mean is None else wide - mean) * rate
    d_normed = d_out * last_dim(scale_D, x.ndim)
    d_x = d_normed - normed * _mean(d_normed * normed, platform)
    if centred:
        d_x = d_x - _mean(d_normed, platform)
    return (d_x * rate).astype(x.dtype), _column_sum(d_out * normed, platform)


_normalize.defvjp(_normalize_forward, _normalize_backward)
