"""Which updates are applied: not those of a step whose numbers are not finite, nor (an option) of a spike.

The step *selects* between the new values and the old. A product with 0 would not do, for 0 * NaN is NaN. Spikes are
judged as in OLMo 2 (2025): by mean and standard deviation of the last steps' loss and gradient norm.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxstages.types import GuardState


def init_guard(window: int) -> GuardState:
    def zeros(*shape: int, dtype: type = jnp.int32) -> Array:
        return jnp.zeros(shape, dtype)  # an array each: the step donates them

    return GuardState(zeros(), zeros(), zeros(window, dtype=jnp.float32), zeros(window, dtype=jnp.float32), zeros())


def judge(
    state: GuardState, loss: Array, grad_norm: Array, update_norm: Array, spike_sigma: float
) -> tuple[Bool[Array, ""], GuardState]:
    """Is this step's update applied? And the guard's state after it.

    A spike is a loss or a gradient norm more than `spike_sigma` standard deviations above the mean of the window, once
    that is full; with 0 there are none. Only finite values enter the window, spikes among them: where the loss stays
    on a new level, that becomes what is usual.
    """
    finite = applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
    if spike_sigma:
        window = state.losses_W.shape[0]
        for value, past_W in ((loss, state.losses_W), (grad_norm, state.norms_W)):
            spike = value > jnp.mean(past_W) + spike_sigma * jnp.std(past_W)
            applied &= ~(spike & (state.seen >= window))
    place = state.seen % state.losses_W.shape[0]
    streak = jnp.where(finite, 0, state.streak + 1)
    return applied, GuardState(
        skipped=state.skipped + (~applied).astype(jnp.int32),
        streak=streak.astype(jnp.int32),
        losses_W=jnp.where(finite, state.losses_W.at[place].set(loss), state.losses_W),
        norms_W=jnp.where(finite, state.norms_W.at[place].set(grad_norm), state.norms_W),
        seen=state.seen + finite.astype(jnp.int32),
    )
