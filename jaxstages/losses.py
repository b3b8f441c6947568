"""The loss: token-weighted cross-entropy as sums, which are divided once, at the end.

Legend: B batch, L length, V vocab.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxstages.types import Sums


def cross_entropy_sums(
    logits_BLV: Float[Array, "B L V"],
    targets_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """Weighted sums over tokens of the negative log-likelihood and of what is minimised.

    Args:
        logits_BLV: any float dtype; the softmax is in float32.
        targets_BL: token ids in [0, V).
        weights_BL: how much each target counts; 0 leaves it out, also where its logits are not finite.
        label_smoothing: share of the target's probability that is spread evenly over V (Szegedy et al. 2016).
        z_loss: factor of `log(sum(exp(logits)))**2`, which keeps logits from drifting (PaLM, Chowdhery et al. 2022).

    Returns:
        "nll" in nats; "objective", which is nll unless smoothing or z-loss are on; "correct", where the target has
        the largest logit; "weight", the sum of weights that all of them are to be divided by.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    lse_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_logits_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    nll_BL = lse_BL - target_logits_BL
    objective_BL = nll_BL
    if label_smoothing:
        uniform_nll_BL = lse_BL - jnp.mean(logits_BLV, axis=-1)
        objective_BL = (1.0 - label_smoothing) * nll_BL + label_smoothing * uniform_nll_BL
    if z_loss:
        objective_BL = objective_BL + z_loss * jnp.square(lse_BL)
    correct_BL = (target_logits_BL >= jnp.max(logits_BLV, axis=-1)).astype(jnp.float32)

    def total(values_BL: Array) -> Array:
        # Selection, not only multiplication: 0 * inf would be NaN.
        return jnp.sum(jnp.where(weights_BL > 0, values_BL * weights_BL, 0.0))

    return {
        "nll": total(nll_BL),
        "objective": total(objective_BL),
        "correct": total(correct_BL),
        "weight": jnp.sum(weights_BL),
    }
