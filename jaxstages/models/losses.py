"""Losses as sums over tokens. The step divides once, by the weight of the whole batch.

Legend: B batch, L length, D width, V vocab, T positions of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxstages.models.ops import Ops, cross_entropy, into_tiles, tile_size
from jaxstages.models.select import select_ops
from jaxstages.types import SINGLE_DEVICE, Apply, Batch, HiddenAndHead, LossFn, Params, ShardingHooks, Sums


def cross_entropy_loss(
    apply: Apply,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    tile: int = 0,
    hooks: ShardingHooks = SINGLE_DEVICE,
    platform: str | None = None,
    ops: Ops | None = None,
) -> LossFn:
    """Return the next-token cross-entropy of a model as `loss(params, batch, dropout_key) -> sums`.

    Args:
        apply: `apply(params, batch, dropout_key)` returns logits or `HiddenAndHead`, such as `Model.hidden`.
        label_smoothing, z_loss, tile: see `cross_entropy_sums`.
        hooks: how arrays are sharded.
        platform: "cpu", "gpu" or "tpu"; None is JAX's default.
        ops: the operations to use instead of those of the platform.
    """
    ops = ops or select_ops(platform, hooks)

    def loss(params: Params, batch: Batch, dropout_key: PRNGKeyArray | None) -> Sums:
        return cross_entropy_sums(
            apply(params, batch, dropout_key),
            batch.targets_BL,
            batch.weights_BL,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            tile=tile,
            ops=ops,
        )

    return loss


def cross_entropy_sums(
    outputs: Float[Array, "B L V"] | HiddenAndHead,
    targets_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    tile: int = 0,
    ops: Ops | None = None,
) -> Sums:
    """Weighted sums over tokens of the negative log-likelihood and of the objective.

    Args:
        outputs: logits of any float dtype, or the `HiddenAndHead` that produces them.
        targets_BL: token ids in [0, V).
        weights_BL: weight of each target. Targets of weight 0 are left out, even if their logits are not finite.
        label_smoothing: share of the target's probability that is spread evenly over V (Szegedy et al. 2016).
        z_loss: factor of `log(sum(exp(logits)))**2`, which keeps logits from drifting (PaLM, Chowdhery et al. 2022).
        tile: positions per row whose logits are in memory at a time, rounded down to a divisor of L; 0 is the whole
            row. Tiles save memory and cost some time. Only for `HiddenAndHead`.
        ops: the operations to use; None selects those of JAX's default platform.

    Returns:
        "nll" in nats; "objective", which is nll unless smoothing or z-loss are on, and the only sum with a gradient;
        "correct", the weight of targets with the largest logit; "weight", the divisor of all of them.
    """
    if isinstance(outputs, HiddenAndHead):
        loss_head = (ops or select_ops()).loss_head
        sums = loss_head(outputs, targets_BL, weights_BL, label_smoothing, z_loss, tile)
    else:
        sums = cross_entropy(outputs, targets_BL, weights_BL, label_smoothing, z_loss)

    constants = {name: jax.lax.stop_gradient(value) for name, value in sums.items() if name != "objective"}
    return constants | {"objective": sums["objective"]}


def kl_sum(
    reference: Float[Array, "B L V"] | HiddenAndHead,
    outputs: Float[Array, "B L V"] | HiddenAndHead,
    weights_BL: Float[Array, "B L"],
    *,
    tile: int = 0,
) -> Float[Array, ""]:
    """Weighted sum over tokens of KL(reference || outputs), in nats, between next-token distributions.

    Args:
        reference: logits or `HiddenAndHead` of the reference model, which gets no gradient.
        outputs: logits or `HiddenAndHead` of the trained model.
        tile: positions per row whose logits are in memory at a time; 0 is all. The backward pass recomputes them.
    """
    split = functools.partial(into_tiles, size=tile_size(weights_BL.shape[1], tile))

    def states(side: Array | HiddenAndHead) -> Array:
        return split(side.hidden_BLD if isinstance(side, HiddenAndHead) else side)

    def log_probabilities(side: Array | HiddenAndHead, rows: Array) -> Array:
        logits = side._replace(hidden_BLD=rows).logits() if isinstance(side, HiddenAndHead) else rows
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    @jax.checkpoint
    def tile_sum(rows: tuple[Array, Array, Array]) -> Array:
        reference_rows, output_rows, weights_BT = rows
        target = jax.lax.stop_gradient(log_probabilities(reference, reference_rows))
        predicted = log_probabilities(outputs, output_rows)
        kl_BT = jnp.sum(jnp.exp(target) * (target - predicted), axis=-1)
        return jnp.sum(jnp.where(weights_BT > 0, kl_BT * weights_BT, 0.0))

    return jnp.sum(jax.lax.map(tile_sum, (states(reference), states(outputs), split(weights_BL))))
