"""The eval step: a pure function of parameters and one batch.

Legend: B batch, L length, V vocab.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstages.models.losses import cross_entropy_sums
from jaxstages.types import Apply, Batch, HiddenAndHead, LossFn, Params, Sums


def make_eval_step(
    apply: Apply,
    token_bytes_V: Float[Array, " V"] | None = None,
    loss_tile: int = 0,
    loss: LossFn | None = None,
) -> Callable[[Params, Batch], Sums]:
    """Return `eval_step(params, batch) -> sums`, sums over each row of a batch, [B] each, without dropout.

    Args:
        apply: logits, or hidden states and head.
        token_bytes_V: UTF-8 bytes of each token; with it the sums have "bytes", the scored text, for bits per byte.
        loss_tile: see `LoopConfig`.
        loss: computes the sums instead of cross-entropy; it may add "nll", which is then reported as the loss.
    """
    row_sums = _cross_entropy_rows(apply, loss_tile) if loss is None else _loss_sums(loss)

    def step(params: Params, batch: Batch) -> Sums:
        sums = row_sums(params, batch)
        if token_bytes_V is not None:
            scored_BL = jnp.where(batch.weights_BL > 0, token_bytes_V[batch.targets_BL], 0.0)
            sums["bytes"] = jnp.sum(scored_BL, axis=1)
        return sums

    return step


def _cross_entropy_rows(apply: Apply, loss_tile: int) -> Callable[[Params, Batch], Sums]:
    def of_row(outputs: Any, targets_L: Array, weights_L: Array) -> Sums:
        outputs = HiddenAndHead(outputs[0][None], *outputs[1:]) if isinstance(outputs, HiddenAndHead) else outputs[None]
        return cross_entropy_sums(outputs, targets_L[None], weights_L[None], tile=loss_tile)

    def row_sums(params: Params, batch: Batch) -> Sums:
        outputs = apply(params, batch, None)
        axes: Any = HiddenAndHead(0, None, None) if isinstance(outputs, HiddenAndHead) else 0  # type: ignore[arg-type]
        return jax.vmap(of_row, (axes, 0, 0))(outputs, batch.targets_BL, batch.weights_BL)

    return row_sums


def _loss_sums(loss: LossFn) -> Callable[[Params, Batch], Sums]:
    """The sums of a whole batch as those of a single row, [1]: a model over a mesh can't take its rows one by one."""

    def batch_sums(params: Params, batch: Batch) -> Sums:
        return {name: jnp.reshape(value, (1,)) for name, value in loss(params, batch, None).items()}

    return batch_sums
