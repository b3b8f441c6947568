"""The loss against numpy, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxstages.losses import cross_entropy_sums


def _case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
    targets = rng.integers(0, 7, (3, 5)).astype(np.int32)
    return logits, targets, rng.integers(0, 2, (3, 5)).astype(np.float32)


def test_against_numpy() -> None:
    logits, targets, weights = _case()
    sums = cross_entropy_sums(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(sums["nll"], (nll * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["objective"], sums["nll"], rtol=1e-6)
    np.testing.assert_allclose(sums["correct"], ((logits.argmax(-1) == targets) * weights).sum())
    assert float(sums["weight"]) == weights.sum()


def test_label_smoothing_is_that_of_optax() -> None:
    logits, targets, weights = _case()
    sums = cross_entropy_sums(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights), label_smoothing=0.1)
    smooth = optax.smooth_labels(jax.nn.one_hot(targets, 7), 0.1)
    expected = (optax.softmax_cross_entropy(jnp.asarray(logits), smooth) * weights).sum()
    np.testing.assert_allclose(sums["objective"], expected, rtol=1e-5)
    assert float(sums["objective"]) != float(sums["nll"])


def test_z_loss() -> None:
    logits, targets, weights = _case()
    sums = cross_entropy_sums(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights), z_loss=0.01)
    log_z = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(sums["objective"] - sums["nll"], 0.01 * (log_z**2 * weights).sum(), rtol=1e-3)


def test_masked_infinity_does_not_poison() -> None:
    logits, targets, weights = _case()
    weights[0, 0] = 0.0
    logits[0, 0] = np.nan
    sums = cross_entropy_sums(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    assert all(np.isfinite(value) for value in sums.values())


def test_low_precision_logits_are_reduced_in_float32() -> None:
    logits, targets, weights = _case()
    low = cross_entropy_sums(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(targets), jnp.asarray(weights))
    high = cross_entropy_sums(
        jnp.asarray(logits, jnp.bfloat16).astype(jnp.float32), jnp.asarray(targets), jnp.asarray(weights)
    )
    assert low["nll"].dtype == jnp.float32
    np.testing.assert_allclose(low["nll"], high["nll"], rtol=1e-6)
