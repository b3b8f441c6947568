"""The feed-forward's nonlinearities, each with its slope, which the backward pass makes from the input.

Only the input is kept for it. Derived by JAX, several arrays would be (the input, the power or tanh, their products),
and so would be for a slope that the forward pass makes, where layers are unrolled: XLA:CPU makes it late, from those.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstages.models.primitives import again


class Activation(NamedTuple):
    """compute: the function's value and slope. gates: it is taken of a gate, which multiplies (Shazeer 2020)."""

    compute: Callable[[Array], tuple[Array, Array]]
    gates: bool = False


def _gelu(x: Array) -> tuple[Array, Array]:
    """`x * Phi(x)`, Phi the normal distribution's (Hendrycks & Gimpel 2016).

    Phi and its density share one power: Phi(-|x|) is the power times a polynomial in 1 / u, u = 1 + p |x|, to 1e-7
    (Abramowitz & Stegun 1964, 7.1.26; halved, and with |x| / sqrt(2) for their x). Here it is one in u, divided by
    u**5, and each result takes one power and one quotient: XLA:CPU stores what is expensive and used twice.
    """
    size, power = jnp.abs(x), jnp.exp(-0.5 * jnp.square(x))
    u = 1.0 + (0.3275911 * 0.5**0.5) * jnp.minimum(size, 100.0)  # the power is 0 long before
    polynomial = 0.0
    for factor in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429):
        polynomial = polynomial * u + 0.5 * factor
    ratio = polynomial / (u * jnp.square(jnp.square(u)))
    fallen = power * (ratio - size * (2.0 * jnp.pi) ** -0.5)
    return jnp.maximum(x, 0.0) - size * ratio * power, jnp.where(x < 0, fallen, 1.0 - fallen)


def _gelu_by_tanh(x: Array) -> tuple[Array, Array]:
    """GPT-2's form of it: Phi(x) as `(1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))) / 2`."""
    root, cubic = (2.0 / jnp.pi) ** 0.5, 0.044715
    tanh = jnp.tanh(root * (x + cubic * x * jnp.square(x)))
    below = 0.5 + 0.5 * tanh
    inner_slope = root * (1.0 + 3.0 * cubic * jnp.square(x))
    return x * below, below + 0.5 * x * (1.0 - jnp.square(tanh)) * inner_slope


def _silu(x: Array) -> tuple[Array, Array]:
    """`x * sigmoid(x)` (Elfwing et al. 2017)."""
    share = jax.nn.sigmoid(x)
    return x * share, share + x * share * (1.0 - share)


def _relu2(x: Array) -> tuple[Array, Array]:
    """`max(x, 0)**2` (So et al. 2021)."""
    positive = jnp.maximum(x, 0.0)
    return jnp.square(positive), 2.0 * positive


KNOWN = {
    "swiglu": Activation(_silu, gates=True),
    "geglu": Activation(_gelu_by_tanh, gates=True),
    "gelu": Activation(_gelu_by_tanh),
    "gelu_erf": Activation(_gelu),
    "relu2": Activation(_relu2),
}
"""By the recipe's name."""


def activate(name: str, x: Float[Array, "*B F"], platform: str) -> Float[Array, "*B F"]:
    """The function `name` of `KNOWN`, elementwise; in float32, whatever x is. platform: "cpu" is one of those alone."""
    out: Any = _activate(name, platform, x)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _activate(name: str, _platform: str, x: Array) -> Array:
    return KNOWN[name].compute(x.astype(jnp.float32))[0].astype(x.dtype)


def _backward(name: str, platform: str, x: Array, d_out: Array) -> tuple[Array]:
    _, slope = KNOWN[name].compute(again(x, d_out, platform).astype(jnp.float32))
    return ((slope * d_out).astype(x.dtype),)


_activate.defvjp(lambda name, platform, x: (_activate(name, platform, x), x), _backward)
