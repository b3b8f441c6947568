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

_ROWS = (((0,), (0,)), ((), ()))
"""Both operands are contracted over their rows."""


@jax.custom_vjp
def _linear_on_cpu(x_MI: Float[Array, "M I"], kernel_IO: Float[Array, "I O"]) -> Float[Array, "M O"]:
    return x_MI @ kernel_IO


def _linear_forward(x_MI: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array]]:
    return x_MI @ kernel_IO, (x_MI, kernel_IO)


def _linear_backward(saved: tuple[Array, Array], d_out_MO: Array) -> tuple[Array, Array]:
    x_MI, kernel_IO = saved
    d_x_MI = d_out_MO @ kernel_IO.T
    if kernel_IO.shape[0] <= kernel_IO.shape[1]:
        return d_x_MI, jax.lax.dot_general(x_MI, d_out_MO, _ROWS)
    # The narrower operand comes first: the other way round this takes up to 1.8 times as long. The barrier keeps the
    # compiler from turning it back.
    return d_x_MI, jax.lax.optimization_barrier(jax.lax.dot_general(d_out_MO, x_MI, _ROWS)).T


_linear_on_cpu.defvjp(_linear_forward, _linear_backward)


def linear(x: Float[Array, "*B I"], kernel_IO: Float[Array, "I O"], platform: str) -> Float[Array, "*B O"]:
    """`x @ kernel`. On "cpu" the kernel's gradient is formed as above; elsewhere the compiler does well by itself."""
    if platform != "cpu":
        return x @ kernel_IO
    return _linear_on_cpu(x.reshape(-1, x.shape[-1]), kernel_IO).reshape(*x.shape[:-1], kernel_IO.shape[1])


def row_sum(x: Float[Array, "*B D"], platform: str) -> Float[Array, "*B 1"]:
    """Sum over the last dim, which stays."""
    if platform != "cpu":
        return jnp.sum(x, axis=-1, keepdims=True)
    flat_MD = x.reshape(-1, x.shape[-1])
    return (flat_MD @ jnp.ones((x.shape[-1], 1), x.dtype)).reshape(*x.shape[:-1], 1)


def _column_sum(x: Float[Array, "*B D"], platform: str) -> Float[Array, " D"]:
    flat_MD = x.reshape(-1, x.shape[-1])
    return jnp.sum(flat_MD, axis=0) if platform != "cpu" else (jnp.ones((1, flat_MD.shape[0]), x.dtype) @ flat_MD)[0]


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
