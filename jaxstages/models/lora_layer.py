"""Parameters of a linear map with a low-rank adapter (LoRA, Hu et al. 2022) or a quantized kernel, and their use.

Legend: I inputs, O outputs, R rank.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstages.models.ops import Linear, as_last_dim
from jaxstages.types import Names

KERNEL, SCALE = "kernel", "kernel_scale"
DOWN, UP, MAGNITUDE = "lora_a", "lora_b", "lora_magnitude"
ADAPTER = (DOWN, UP, MAGNITUDE)
"""Names of an adapter's parameters: [I, R], [R, O] and, with DoRA, [O]."""


def add_adapter(
    out: Float[Array, "*B O"],
    x: Float[Array, "*B I"],
    kernel_IO: Array,
    adapter: dict[str, Array],
    linear: Linear,
    names: Names = ("", ""),
) -> Float[Array, "*B O"]:
    """`out + x @ a @ b`, where out is `x @ kernel`.

    With a magnitude (DoRA, Liu et al. 2024), columns are scaled to that length; the length that they are divided by
    counts as a constant.
    """
    down_IR, up_RO = (adapter[name].astype(x.dtype) for name in (DOWN, UP))
    low_rank = linear(x, down_IR, (names[0], "rank"))
    out = out + linear(low_rank, up_RO, ("rank", names[1]))
    if MAGNITUDE not in adapter:
        return out

    length_O = column_lengths(kernel_IO.astype(jnp.float32) + adapter[DOWN] @ adapter[UP])
    return out * as_last_dim((adapter[MAGNITUDE] / length_O).astype(out.dtype), out.ndim)


def column_lengths(matrix: Float[Array, "*B I O"]) -> Float[Array, "*B O"]:
    """Euclidean length of each column, without a gradient."""
    return jax.lax.stop_gradient(jnp.linalg.norm(matrix, axis=-2))


def dequantized_kernel(params: dict[str, Any]) -> Array:
    """Return the kernel, in float32 if it is quantized."""
    kernel = params[KERNEL]
    return kernel.astype(jnp.float32) * params[SCALE] if SCALE in params else kernel
