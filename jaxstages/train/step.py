"""The train step: a pure function of arrays. It knows nothing of data, disk, config or Flax.

Legend: B batch, L length, V vocab, A accumulation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxstages.models.losses import cross_entropy_sums
from jaxstages.train.guard import init_guard, judge
from jaxstages.train.optimizer import global_norm, plateau_factor
from jaxstages.types import SINGLE_DEVICE, Apply, Batch, Params, ShardingHooks, Sums, TrainState

TrainStep = Callable[..., tuple[TrainState, Sums]]
"""`step(state, batch) -> (state, sums)`; with an anchor `step(state, batch, anchor_batch)`."""

Part = tuple[Batch, Any]
"""Rows of the batch, and those of the anchor."""

AnchorLoss = Callable[[Params, Batch, Array | None], Array]
"""`anchor(params, batch, dropout_key)`: the sum over tokens, weighted, of how far the model is from its parent."""


def init_state(
    params: Params, tx: optax.GradientTransformation, spike_window: int = 1, average: bool = False
) -> TrainState:
    """Step 0 of a stage: parameters as they are, a fresh optimizer and guard, and the parameters as their average."""
    start = jax.tree.map(jnp.copy, params) if average else ()  # arrays of its own: the step donates them
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), init_guard(spike_window), start)


def average_decay(decay: float, step: Array) -> Float[Array, ""]:
    """Decay of the moving average at a step: at most `(1 + step) / (10 + step)`, so that the start is soon forgotten
    (as in TensorFlow's ExponentialMovingAverage)."""
    t = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + t) / (10.0 + t))


def make_train_step(
    apply: Apply,
    tx: optax.GradientTransformationExtraArgs,
    *,
    seed: int = 0,
    accumulate: int = 1,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_tile: int = 0,
    spike_sigma: float = 0.0,
    average: float = 0.0,
    anchor: AnchorLoss | None = None,
    anchor_weight: float = 0.0,
    frozen: Params | None = None,
    place: ShardingHooks = SINGLE_DEVICE,
) -> TrainStep:
    """One optimizer update as `step(state, batch) -> (state, sums)`, to be jitted with the state donated.

    The gradient is that of the sum over all scored tokens, divided once by the weight of the whole batch: it is the
    same however the batch is split into parts, devices or hosts. The dropout key is a function of seed and step, so
    nothing random is stored. Where the guard (`guard.py`) does not apply the update, parameters and optimizer stay as
    they are, bit for bit, and only the step counts on.

    Args:
        apply: `apply(params, batch, dropout_key)` gives logits_BLV, or `HiddenAndHead`, what they are made from.
        accumulate: parts that the batch is split into, one after the other, to save memory; divides B.
        average: decay of the moving average of the parameters, which the state then has to have; 0 is none.
        anchor: the penalty's sum over a second batch, `step(state, batch, anchor_batch)`.
        anchor_weight: factor of the penalty's mean in what is minimised.
        frozen: tree of bools like params; gradients of the true ones are 0, are not computed, and don't count in the
            norm. That they stay as they are is the optimizer's part.
        place: which device holds what.

    Returns a step whose sums are those of `cross_entropy_sums`, "tokens" (slots that hold one), "grad_norm" before
    clipping, "update_norm", "applied" (1 or 0), "skipped" (updates so far that were not applied) and "streak" (steps in
    a row that were not finite); with an anchor also "anchor", the penalty's mean, and under the plateau schedule
    "plateau_factor", the learning rate's factor.
    """

    def loss(params: Params, part: Part, factor: Array, key: Array) -> tuple[Array, Sums]:
        batch, anchor_batch = part
        if frozen is not None:
            params = jax.tree.map(lambda p, stays: jax.lax.stop_gradient(p) if stays else p, params, frozen)
        sums = cross_entropy_sums(
            apply(params, batch, key),
            batch.targets_BL,
            batch.weights_BL,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            tile=loss_tile,
            place=place,
        )
        if anchor is None:
            return sums["objective"], sums
        penalty = anchor(params, anchor_batch, jax.random.fold_in(key, accumulate))
        return sums["objective"] + factor * penalty, sums | {"anchor": jax.lax.stop_gradient(penalty)}

    gradient = jax.grad(loss, has_aux=True)

    def split(x: Array) -> Array:
        """Row b goes to part b % A, so that each device keeps its own rows whatever A is."""
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def step(state: TrainState, batch: Batch, anchor_batch: Any = ()) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # The objective is divided by the weight of the batch, the penalty by that of its own.
        anchored = jnp.maximum(jnp.sum(anchor_batch.weights_BL), 1e-6) if anchor_batch else jnp.ones(())
        factor = anchor_weight * jnp.sum(batch.weights_BL) / anchored
        if accumulate == 1:
            grads, sums = gradient(state.params, (batch, anchor_batch), factor, key)
        else:
            parts = jax.tree.map(split, (batch, anchor_batch))

            def add(total: tuple[Params, Sums], part: tuple[Part, Array]) -> tuple[tuple[Params, Sums], None]:
                found = gradient(state.params, part[0], factor, jax.random.fold_in(key, part[1]))
                return jax.tree.map(jnp.add, total, found), None

            shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], parts), factor, key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(accumulate)))
        if anchor is not None:
            sums["anchor"] = sums["anchor"] / anchored
        # A batch without a scored token is refused before it gets here; the floor only keeps its gradient at 0.
        weight = jnp.maximum(sums["weight"], 1e-6)
        grad_norm = global_norm(grads) / weight
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        mean_loss = sums["objective"] / weight
        update = functools.partial(tx.update, value=mean_loss, grad_norm=grad_norm)
        given = (grads, state.opt_state, state.params)
        updates, _ = update(*given)
        params: Any = optax.apply_updates(state.params, updates)  # optax's Params may be any tree, ours is a dict
        norms = {"grad_norm": grad_norm, "update_norm": global_norm(updates)}
        applied, guard = judge(state.guard, mean_loss, grad_norm, norms["update_norm"], spike_sigma)
        # Made again, now that it is known whether it stays: kept until here, it would lie beside the old one.
        _, opt_state = update(*jax.lax.optimization_barrier(given))
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        verdict = {"applied": applied.astype(jnp.float32), "skipped": guard.skipped, "streak": guard.streak}
        tokens = {"tokens": jnp.sum(batch.segments_BL > 0)}
        if (factor := plateau_factor(opt_state)) is not None:
            verdict["plateau_factor"] = factor
        averaged = state.average
        if average:
            moved = jnp.where(applied, 1.0 - average_decay(average, state.step), 0.0)
            averaged = optax.incremental_update(params, averaged, moved)
        return TrainState(state.step + 1, params, opt_state, guard, averaged), sums | tokens | norms | verdict

    return step
