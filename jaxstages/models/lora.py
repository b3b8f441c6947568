"""Low-rank adapters (LoRA, Hu et al. 2022) as functions of trees: they lie beside the kernel that they adapt.

Legend: M rows, I inputs, O outputs, R rank.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DOWN, UP, MAGNITUDE = "lora_a", "lora_b", "lora_magnitude"
ADAPTER = (DOWN, UP, MAGNITUDE)
"""Names of an adapter's parameters: [I, R], [R, O] and, with DoRA, [O]."""


def adapt(
    out_MO: Float[Array, "M O"], x_MI: Float[Array, "M I"], kernel_IO: Float[Array, "I O"], adapter: dict[str, Array]
) -> Float[Array, "M O"]:
    """`out + x @ a @ b`, out being `x @ kernel`; with a magnitude, its columns are scaled to that length (DoRA, Liu et
    al. 2024: the length that they are divided by counts as constant)."""
    down_IR, up_RO = (adapter[name].astype(x_MI.dtype) for name in (DOWN, UP))
    out_MO = out_MO + (x_MI @ down_IR) @ up_RO
    if MAGNITUDE not in adapter:
        return out_MO
    whole_IO = kernel_IO.astype(jnp.float32) + adapter[DOWN].astype(jnp.float32) @ adapter[UP].astype(jnp.float32)
    length_O = jax.lax.stop_gradient(jnp.linalg.norm(whole_IO, axis=0))
    return out_MO * (adapter[MAGNITUDE] / length_O).astype(out_MO.dtype)[None, :]
