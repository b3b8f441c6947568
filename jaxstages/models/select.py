"""The choice of operations by platform.

`cpu.py` is imported where it is chosen: other platforms do not load it, and the model can be read without it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstages.models.attention import Attend
from jaxstages.models.fused_cross_entropy import Form, make_loss_head
from jaxstages.models.ops import REFERENCE, Ops, cast_kernels
from jaxstages.models.spmd import sharded
from jaxstages.types import SINGLE_DEVICE, ShardingHooks

ACCELERATOR = REFERENCE._replace(
    norm=jax.checkpoint(REFERENCE.norm, static_argnums=(2, 3)),
    activation=jax.checkpoint(REFERENCE.activation, static_argnums=(0,)),
    loss_head=make_loss_head(Form()),
    prepare_decode=cast_kernels,
)
"""The reference with less memory: norms and activations keep only their input for the backward pass, and decoding has
its kernels in the model's dtype."""


def select_ops(
    platform: str | None = None,
    hooks: ShardingHooks = SINGLE_DEVICE,
    attention: Attend | None = None,
    context: int | None = None,
) -> Ops:
    """Return the operations for a platform.

    Args:
        platform: "cpu", "gpu" or "tpu"; None is JAX's default.
        hooks: how arrays are sharded.
        attention: attention over packed rows, such as a kernel chosen by `choose_attend`; None is the one that every
            machine of the platform supports.
        context: length of the rows that `attention` is made for; None is any length.
    """
    ops = ACCELERATOR
    if (platform or jax.default_backend()) == "cpu":
        from jaxstages.models import cpu

        # All but attention are made for one device: over a mesh they would cost exchanges between devices.
        ops = cpu.OPS if hooks == SINGLE_DEVICE else ACCELERATOR._replace(attention=cpu.OPS.attention)

    if attention is not None:
        ops = ops._replace(attention=attention)
    return ops if hooks == SINGLE_DEVICE else sharded(ops, hooks, context)


def global_norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm of all leaves together, in float32."""
    from jaxstages.models import cpu

    squares = [jnp.atleast_1d(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    total = functools.partial(jax.lax.platform_dependent, cpu=cpu.sum_by_rows, default=jnp.sum)
    return jnp.sqrt(sum(map(total, squares), jnp.zeros(())))


def limit_memory(jitted: Callable[..., Any], compiled: Any, platform: str) -> Callable[..., Any]:
    """Return the jitted step, made to wait for its results where consecutive steps would otherwise need their temporary
    memory at the same time."""
    if platform != "cpu":
        return jitted

    from jaxstages.models import cpu

    return cpu.run_synchronously(jitted, compiled)
