"""A typed `jax.custom_vjp`."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def with_backward(
    function: Callable[P, R],
    forward: Callable[P, tuple[R, Any]],
    backward: Callable[..., tuple[Any, ...]],
    static: tuple[int, ...] = (),
) -> Callable[P, R]:
    """Return `function` with a hand-written gradient.

    `jax.custom_vjp` loses the types of the function. A function with such a gradient has no forward-mode derivative.

    Args:
        forward: `forward(*args) -> (output, residuals)`.
        backward: `backward(*static_args, residuals, d_output)` returns one gradient for each other argument.
        static: indices of arguments that are not arrays.
    """
    wrapped = jax.custom_vjp(function, nondiff_argnums=static)
    wrapped.defvjp(forward, backward)
    return wrapped
