"""The train step: a pure function of arrays. It knows nothing about data, disk, config or the model.

Legend: B batch, L length, A accumulation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax import contrib

from jaxstages.training.guard import init_guard, should_apply
from jaxstages.types import Batch, LossFn, Params, Sums, TrainState

TrainStep = Callable[..., tuple[TrainState, Sums]]
"""`step(state, batch) -> (state, sums)`; with an anchor `step(state, batch, anchor_batch)`."""

AnchorLoss = Callable[[Params, Batch, Array | None], Array]
"""`anchor(params, batch, dropout_key)`: weighted sum over tokens of the distance between the model and its parent."""

MIN_WEIGHT = 1e-6
"""Smallest divisor of sums. Batches without a scored token are refused earlier; this keeps their gradient at 0."""


def init_state(
    params: Params, tx: optax.GradientTransformation, spike_window: int = 1, average: bool = False
) -> TrainState:
    """Return the state at step 0 of a stage: the parameters, a fresh optimizer and guard, and a copy as the average."""
    copy = jax.tree.map(jnp.copy, params) if average else ()  # a copy because the step donates its arrays
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), init_guard(spike_window), copy)


def make_train_step(
    loss: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    *,
    seed: int | Array = 0,
    accumulate: int = 1,
    spike_sigma: float = 0.0,
    average: float = 0.0,
    anchor: AnchorLoss | None = None,
    anchor_weight: float = 0.0,
    frozen: Params | None = None,
    norm: Callable[[Any], Array] = optax.tree.norm,
) -> TrainStep:
    """Return one optimizer update, `step(state, batch) -> (state, sums)`, to be jitted with the state donated.

    The gradient is that of the objective's sum over all scored tokens, divided once by the weight of the whole batch.
    It does not depend on how the batch is split into micro-batches, devices or hosts. The dropout key is a function of
    seed and step, so no random state is stored. If the guard refuses the update, parameters and optimizer state keep
    their bits, and only the step counter advances.

    Args:
        loss: sums over a batch, such as `cross_entropy_loss` returns.
        accumulate: number of micro-batches, computed one after the other to save memory; divides B.
        spike_sigma: see `should_apply`.
        average: decay of the moving average of the parameters, which the state must then have; 0 is none.
        anchor: a penalty on a second batch, `step(state, batch, anchor_batch)`.
        anchor_weight: factor of the penalty's mean in the objective.
        frozen: tree of bools like params. Parameters marked True get a gradient of 0, which is not computed. The
            optimizer is responsible for leaving them unchanged.
        norm: Euclidean norm of a tree. The loop passes `models.select.global_norm`, which is faster on some platforms.

    Returns:
        A step whose sums are those of the loss and "tokens" (slots with a token), "grad_norm" before clipping,
        "update_norm", "applied" (1 or 0), "skipped" (updates that were not applied so far), "streak" (consecutive steps
        that were not finite); with an anchor "anchor", the penalty's mean; with the plateau schedule "plateau_factor".
    """
    gradient = _make_gradient(loss, accumulate, anchor, frozen)

    def step(state: TrainState, batch: Batch, anchor_batch: Any = ()) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        # The objective is divided by the weight of its batch, the penalty by that of the anchor's batch.
        anchor_sum = jnp.maximum(jnp.sum(anchor_batch.weights_BL), MIN_WEIGHT) if anchor_batch else jnp.ones(())
        anchor_factor = anchor_weight * jnp.sum(batch.weights_BL) / anchor_sum
        grads, sums = gradient(state.params, (batch, anchor_batch), anchor_factor, key)
        if anchor is not None:
            sums["anchor"] = sums["anchor"] / anchor_sum

        weight = jnp.maximum(sums["weight"], MIN_WEIGHT)
        mean_loss, grad_norm = sums["objective"] / weight, norm(grads) / weight
        grads = jax.tree.map(lambda grad: grad / weight.astype(grad.dtype), grads)

        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=mean_loss, grad_norm=grad_norm)
        params = optax.apply_updates(state.params, updates)

        update_norm = norm(updates)
        applied, guard = should_apply(state.guard, mean_loss, grad_norm, update_norm, spike_sigma)
        params, opt_state = _select(applied, (params, opt_state), (state.params, state.opt_state))

        averaged = state.average
        if average:
            moved = jnp.where(applied, 1.0 - average_decay(average, state.step), 0.0)
            averaged = optax.incremental_update(params, averaged, moved)

        sums |= {
            "tokens": jnp.sum(batch.segments_BL > 0),
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "applied": applied.astype(jnp.float32),
            "skipped": guard.skipped,
            "streak": guard.streak,
        }
        if (factor := plateau_factor(opt_state)) is not None:
            sums["plateau_factor"] = factor
        return TrainState(state.step + 1, params, opt_state, guard, averaged), sums

    return step


def _make_gradient(
    loss: LossFn, accumulate: int, anchor: AnchorLoss | None, frozen: Params | None
) -> Callable[..., tuple[Params, Sums]]:
    """Return `gradient(params, (batch, anchor_batch), anchor_factor, key) -> (grads, sums)`, summed over tokens."""

    def objective(params: Params, rows: Any, anchor_factor: Array, key: Array) -> tuple[Array, Sums]:
        batch, anchor_batch = rows
        if frozen is not None:
            params = jax.tree.map(lambda p, is_frozen: jax.lax.stop_gradient(p) if is_frozen else p, params, frozen)
        sums = loss(params, batch, key)
        if anchor is None:
            return sums["objective"], sums
        penalty = anchor(params, anchor_batch, jax.random.fold_in(key, accumulate))
        return sums["objective"] + anchor_factor * penalty, sums | {"anchor": jax.lax.stop_gradient(penalty)}

    gradient = jax.grad(objective, has_aux=True)
    if accumulate == 1:
        return gradient

    def accumulated(params: Params, rows: Any, anchor_factor: Array, key: Array) -> tuple[Params, Sums]:
        micro_batches = jax.tree.map(lambda x: _into_micro_batches(x, accumulate), rows)

        def add(total: Any, index_and_rows: Any) -> tuple[Any, None]:
            index, micro_batch = index_and_rows
            result = gradient(params, micro_batch, anchor_factor, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, result), None

        first = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(gradient, params, first, anchor_factor, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), micro_batches))
        return total

    return accumulated


def _into_micro_batches(x: Array, accumulate: int) -> Array:
    """[B, ...] -> [A, B / A, ...]. Row b goes to micro-batch b % A, so that each device keeps its own rows."""
    return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)


def _select(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def average_decay(decay: float, step: Array) -> Float[Array, ""]:
    """Decay of the moving average at a step: at most `(1 + step) / (10 + step)`, so that the start is soon forgotten
    (as in TensorFlow's ExponentialMovingAverage)."""
    t = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + t) / (10.0 + t))


def plateau_factor(opt_state: Any) -> Array | None:
    """Return the plateau schedule's factor of the learning rate; None with other schedules."""

    def is_plateau(node: Any) -> bool:
        return isinstance(node, contrib.ReduceLROnPlateauState)

    nodes = [node for node in jax.tree.leaves(opt_state, is_leaf=is_plateau) if is_plateau(node)]
    return nodes[0].scale if nodes else None
