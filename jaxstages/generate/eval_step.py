"""The eval step: a pure function of parameters and one batch.

Legend: B batch, L length, V vocab.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstages.models.losses import cross_entropy_sums
from jaxstages.types import Apply, Batch, HiddenAndHead, Params, Sums


def make_eval_step(
    apply: Apply, token_bytes_V: Float[Array, " V"] | None = None, loss_tile: int = 0
) -> Callable[[Params, Batch], Sums]:
    """Make `eval_step(params, batch) -> sums`: the loss sums of each row [B], without dropout.

    Args:
        token_bytes_V: UTF-8 bytes of each token; adds "bytes", the bytes of scored text, for bits per byte.
        loss_tile: see `LoopConfig`.
    """

    def row_sums(outputs: Any, targets_L: Array, weights_L: Array) -> Sums:
        outputs = HiddenAndHead(outputs[0][None], *outputs[1:]) if isinstance(outputs, HiddenAndHead) else outputs[None]
        return cross_entropy_sums(outputs, targets_L[None], weights_L[None], tile=loss_tile)

    def step(params: Params, batch: Batch) -> Sums:
        outputs = apply(params, batch, None)
        axes: Any = HiddenAndHead(0, None, None) if isinstance(outputs, HiddenAndHead) else 0  # type: ignore[arg-type]
        sums = jax.vmap(row_sums, (axes, 0, 0))(outputs, batch.targets_BL, batch.weights_BL)
        if token_bytes_V is not None:
            scored_BL = jnp.where(batch.weights_BL > 0, token_bytes_V[batch.targets_BL], 0.0)
            sums["bytes"] = jnp.sum(scored_BL, axis=1)
        return sums

    return step
