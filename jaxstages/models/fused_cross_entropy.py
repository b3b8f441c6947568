"""Cross-entropy from hidden states, with the gradient computed in the forward pass.

As in Liger's fused linear cross-entropy (Hsu et al. 2024), but with tiles along the row, so that each device keeps its
own rows: logits of a tile exist once, and three matmuls are enough for loss and gradient.

Legend: B batch, L length, D width, V vocab, T positions of a tile, P shards of the rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxstages.models.custom_vjp import with_backward
from jaxstages.models.ops import LossHead, into_tiles, tile_size, weighted_sums
from jaxstages.types import HiddenAndHead, Sums


def head_gradient(d_logits_BTV: Array, hidden_BTD: Array) -> Float[Array, "V D"]:
    """Gradient of the head, summed over tokens in float32."""
    dims = (((0, 1), (0, 1)), ((), ()))
    return jax.lax.dot_general(d_logits_BTV, hidden_BTD, dims, preferred_element_type=jnp.float32)


class Form(NamedTuple):
    """How a loss head computes.

    head_gradient: `head_gradient(d_logits_BTV, hidden_BTD) -> [V, D]`.
    flatten: logits are [B * T, V] instead of [B, T, V].
    num_shards: number of shards of the rows. With several, and several tiles, each shard accumulates a gradient of the
        head, and devices exchange their sums once, after the last tile.
    sharded_head_gradient: `sharded_head_gradient(d_logits_BTV, hidden_BTD) -> [P, V, D]`, for several shards.
    """

    head_gradient: Callable[[Array, Array], Array] = head_gradient
    flatten: bool = False
    num_shards: int = 1
    sharded_head_gradient: Callable[[Array, Array], Array] | None = None


class Settings(NamedTuple):
    label_smoothing: float
    z_loss: float
    tile: int
    form: Form


def make_loss_head(form: Form) -> LossHead:
    """Return a loss head that computes logits and their gradient tile by tile."""

    def loss_head(
        outputs: HiddenAndHead,
        targets_BL: Int[Array, "B L"],
        weights_BL: Float[Array, "B L"],
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        tile: int = 0,
    ) -> Sums:
        settings = Settings(label_smoothing, z_loss, tile_size(targets_BL.shape[1], tile), form)
        return _fused(outputs, targets_BL, weights_BL, settings)

    return loss_head


def _fused_sums(outputs: HiddenAndHead, targets_BL: Array, weights_BL: Array, settings: Settings) -> Sums:
    return _all_tiles(outputs, targets_BL, weights_BL, settings, differentiate=False)[0]


def _forward(
    outputs: HiddenAndHead, targets_BL: Array, weights_BL: Array, settings: Settings
) -> tuple[Sums, tuple[Any, Array | None]]:
    sums, gradients = _all_tiles(outputs, targets_BL, weights_BL, settings, differentiate=True)
    return sums, (gradients, outputs.softcap)


def _backward(settings: Settings, residuals: Any, d_sums: Sums) -> tuple[HiddenAndHead, None, None]:
    del settings
    gradients, softcap = residuals
    d_hidden, d_head = ((d.astype(jnp.float32) * d_sums["objective"]).astype(d.dtype) for d in gradients)
    return HiddenAndHead(d_hidden, d_head, None if softcap is None else jnp.zeros_like(softcap)), None, None


_fused = with_backward(_fused_sums, _forward, _backward, static=(3,))


def _all_tiles(
    outputs: HiddenAndHead, targets_BL: Array, weights_BL: Array, settings: Settings, differentiate: bool
) -> tuple[Sums, tuple[Array, Array] | None]:
    """The sums and the objective's gradients by hidden states and head."""
    hidden_BLD, head_VD, softcap = outputs
    form = settings.form

    if settings.tile == targets_BL.shape[1]:
        gradient = form.head_gradient if differentiate else None
        sums, d_hidden, d_head = _tile(outputs, targets_BL, weights_BL, settings, gradient)
        if d_hidden is None or d_head is None:
            return sums, None
        return sums, (d_hidden, d_head.astype(head_VD.dtype))

    shards = form.num_shards
    gradient = form.sharded_head_gradient if shards > 1 else form.head_gradient

    def add_tile(totals: Any, rows: Any) -> tuple[Any, Any]:
        hidden_BTD, targets_BT, weights_BT = rows
        tile_outputs = HiddenAndHead(hidden_BTD, head_VD, softcap)
        sums, d_hidden, d_head = _tile(
            tile_outputs, targets_BT, weights_BT, settings, gradient if differentiate else None
        )
        return jax.tree.map(jnp.add, totals, (sums, d_head)), d_hidden

    zero_sums = dict.fromkeys(("nll", "objective", "correct", "weight"), jnp.zeros(()))
    zero_head = jnp.zeros((shards,) * (shards > 1) + head_VD.shape, jnp.float32) if differentiate else None
    tiles = tuple(into_tiles(x, settings.tile) for x in (hidden_BLD, targets_BL, weights_BL))
    (sums, d_head), d_hiddens = jax.lax.scan(add_tile, (zero_sums, zero_head), tiles)
    if d_head is None:
        return sums, None

    d_head_VD = (jnp.sum(d_head, axis=0) if shards > 1 else d_head).astype(head_VD.dtype)
    return sums, (d_hiddens.swapaxes(0, 1).reshape(hidden_BLD.shape), d_head_VD)


def _tile(
    outputs: HiddenAndHead,
    targets: Array,
    weights: Array,
    settings: Settings,
    gradient: Callable[[Array, Array], Array] | None,
) -> tuple[Sums, Array | None, Array | None]:
    """The sums of one tile and, if there is a `gradient` function, the gradients by hidden states and head."""
    hidden_BTD, head_VD, softcap = outputs
    smoothing, z_loss = settings.label_smoothing, settings.z_loss
    dtype, vocab = hidden_BTD.dtype, head_VD.shape[0]

    logits = outputs.logits()
    if settings.form.flatten:
        logits, targets, weights = (jax.lax.collapse(x, 0, 2) for x in (logits, targets, weights))

    largest = jnp.max(logits, axis=-1)
    powers = jnp.exp(logits - largest[..., None])
    total = jnp.sum(powers, axis=-1)
    lse = largest + jnp.log(total)
    sums = weighted_sums(logits, lse, targets, weights, smoothing, z_loss)
    if gradient is None:
        return sums, None, None

    # The gradient of z * lse**2 is 2 * z * lse times the probabilities, which are the gradient of lse.
    slope = 1.0 + 2.0 * z_loss * lse if z_loss else jnp.ones_like(lse)
    smoothed = (1.0 - smoothing) * jax.nn.one_hot(targets, vocab) + smoothing / vocab
    d_logits = (powers / total[..., None] * slope[..., None] - smoothed) * weights[..., None]
    if softcap is not None:
        d_logits = d_logits * (1.0 - jnp.square(logits / softcap))

    # Cast to the model's dtype: float32 operands would miss the fast matmuls of accelerators.
    d_logits_BTV = jnp.where(weights[..., None] > 0, d_logits, 0.0).astype(dtype).reshape(*hidden_BTD.shape[:2], -1)
    d_hidden_BTD = jnp.einsum("BTV,VD->BTD", d_logits_BTV, head_VD.astype(dtype))
    return sums, d_hidden_BTD, gradient(d_logits_BTV, hidden_BTD)
