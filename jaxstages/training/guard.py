"""Refuse updates that are not finite and, as an option, those of loss spikes.

The step *selects* between new and old values. Multiplying the update by 0 would not do, because 0 * NaN is NaN. Spikes
are detected as in OLMo 2 (2025), by mean and standard deviation of the last steps' losses and gradient norms.

Legend: W window.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxstages.types import GuardState


def init_guard(window: int) -> GuardState:
    """Return the state before the first step. Each field is an array of its own, because the step donates them."""
    return GuardState(
        skipped=jnp.zeros((), jnp.int32),
        streak=jnp.zeros((), jnp.int32),
        losses_W=jnp.zeros(window),
        norms_W=jnp.zeros(window),
        seen=jnp.zeros((), jnp.int32),
    )


def should_apply(
    state: GuardState, loss: Array, grad_norm: Array, update_norm: Array, spike_sigma: float
) -> tuple[Bool[Array, ""], GuardState]:
    """Return whether to apply this step's update, and the new state.

    A spike is a loss or gradient norm more than `spike_sigma` standard deviations above the mean of the window, once
    the window is full; 0 turns detection off. Only finite values enter the window. Spikes enter it too, so a loss that
    stays at a new level becomes the new normal.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
    window = state.losses_W.shape[0]

    apply = finite
    if spike_sigma:
        for value, past_W in ((loss, state.losses_W), (grad_norm, state.norms_W)):
            spike = value > jnp.mean(past_W) + spike_sigma * jnp.std(past_W)
            apply &= ~(spike & (state.seen >= window))

    index = state.seen % window
    return apply, GuardState(
        skipped=state.skipped + (~apply).astype(jnp.int32),
        streak=jnp.where(finite, 0, state.streak + 1).astype(jnp.int32),
        losses_W=jnp.where(finite, state.losses_W.at[index].set(loss), state.losses_W),
        norms_W=jnp.where(finite, state.norms_W.at[index].set(grad_norm), state.norms_W),
        seen=state.seen + finite.astype(jnp.int32),
    )
