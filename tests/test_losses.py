"""The loss against numpy, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstages.models.losses import cross_entropy_sums, kl_sum
from jaxstages.types import HiddenAndHead


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


OPTIONS = {"plain": {}, "smoothing": {"label_smoothing": 0.1}, "z-loss": {"z_loss": 0.01}}
OPTIONS["both"] = OPTIONS["smoothing"] | OPTIONS["z-loss"]


def _headless_case(vocab: int = 11) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    hidden, head = rng.normal(size=(3, 6, 4)), rng.normal(size=(vocab, 4))
    weights = rng.integers(0, 3, (3, 6)) / 2
    targets = jnp.asarray(rng.integers(0, vocab, (3, 6)), jnp.int32)
    return *(jnp.asarray(x, jnp.float32) for x in (hidden, head)), targets, jnp.asarray(weights, jnp.float32)


@pytest.mark.parametrize("tile", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_headless_is_the_same_loss_and_gradient(options: dict[str, float], tile: int) -> None:
    """Within 2e-6 of the largest value, of the formula over all logits in float64; a tile of 4 becomes one of 3."""
    hidden, head, targets, weights = _headless_case()

    def ours(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, object]:
        sums = cross_entropy_sums(HiddenAndHead(hidden, head), targets, weights, tile=tile, **options)
        return 3.0 * sums["objective"], sums  # the factor comes back in the gradient

    (_, sums), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, head)
    alone = cross_entropy_sums(HiddenAndHead(hidden, head), targets, weights, tile=tile, **options)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (hidden, head)]

        def formula(hidden: jax.Array, head: jax.Array) -> jax.Array:
            logits = hidden @ head.T
            log_z = jax.nn.logsumexp(logits, axis=-1)
            log_shares = logits - log_z[..., None]
            smoothing = options.get("label_smoothing", 0.0)
            desired = optax.smooth_labels(jax.nn.one_hot(targets, head.shape[0], dtype=jnp.float64), smoothing)
            objective = -jnp.sum(desired * log_shares, axis=-1) + options.get("z_loss", 0.0) * log_z**2
            return jnp.sum(objective * weights.astype(jnp.float64))

        value, expected = jax.value_and_grad(lambda *x: 3.0 * formula(*x), argnums=(0, 1))(*wide)
    np.testing.assert_allclose(3.0 * sums["objective"], value, rtol=2e-6)
    for left, right in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=2e-6 * np.abs(np.asarray(right)).max(), rtol=0)
    from_logits = cross_entropy_sums(hidden @ head.T, targets, weights, **options)
    assert sums.keys() == from_logits.keys()
    for name in sums:
        np.testing.assert_allclose(sums[name], from_logits[name], rtol=2e-6)
        np.testing.assert_allclose(alone[name], sums[name], rtol=1e-6)


def test_masked_infinity_does_not_poison_a_headless_gradient() -> None:
    hidden, head, targets, weights = _headless_case()
    hidden, weights = hidden.at[0, 0].set(jnp.nan), weights.at[0, 0].set(0.0)
    for tile in (0, 2):
        gradient = jax.grad(
            lambda x, tile=tile: cross_entropy_sums(HiddenAndHead(x, head), targets, weights, tile=tile)["objective"]
        )(hidden)
        assert np.isfinite(gradient).all()


def test_only_the_objective_has_a_gradient() -> None:
    hidden, head, targets, weights = _headless_case()
    for name in ("nll", "correct", "weight"):
        gradient = jax.grad(lambda x, name=name: cross_entropy_sums(HiddenAndHead(x, head), targets, weights)[name])(
            hidden
        )
        assert not np.any(gradient)


def test_memory_of_a_tile_does_not_grow_with_the_row() -> None:
    """Temporary bytes of loss and gradient, by the compiler's own count, with a vocabulary of 4,096."""

    def temporary(length: int, tile: int) -> int:
        shapes = [((2, length, 8), jnp.float32), ((4096, 8), jnp.float32), ((2, length), jnp.int32)]
        hidden, head, targets = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
        weights = jax.ShapeDtypeStruct((2, length), jnp.float32)

        def objective(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
            return cross_entropy_sums(HiddenAndHead(hidden, head), targets, weights, tile=tile)["objective"]

        compiled = jax.jit(jax.grad(objective, argnums=(0, 1))).lower(hidden, head, targets, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 2 * 4096 * 4  # bytes of one position of both rows
    assert 128 * logits < temporary(128, 0) < 1.5 * 128 * logits  # powers, shares and gradient take their place
    assert temporary(128, 8) < 128 * logits / 4
    assert temporary(128, 8) - temporary(64, 8) < 64 * logits / 10


def test_kl_is_that_of_float64_for_logits_hidden_states_and_tiles() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, kept = (jax.random.normal(key, (2, 6, 5)) for key in keys[:2])
    head, kept_head = (jax.random.normal(key, (7, 5)) for key in keys[2:])
    weights = jnp.asarray([[1.0, 0.0, 2.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0, 0.5, 1.0]])
    logits, reference = (
        np.asarray(h, np.float64) @ np.asarray(w, np.float64).T for h, w in ((hidden, head), (kept, kept_head))
    )
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (reference, logits))
    expected = np.sum(np.asarray(weights, np.float64) * np.sum(p * np.log(p / q), -1))
    ours, theirs = HiddenAndHead(hidden, head), HiddenAndHead(kept, kept_head)
    for tile in (0, 1, 2, 4):
        assert float(kl_sum(theirs, ours, weights, tile=tile)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_sum(theirs.logits(), ours.logits(), weights, tile=3)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_sum(ours, ours, weights)) == pytest.approx(0.0, abs=1e-5)


def test_the_gradient_of_kl_is_weight_times_the_difference_of_probabilities() -> None:
    """By our logits: w * (q - p), Hinton et al. 2015. None reaches the reference."""
    ours, theirs = (jax.random.normal(jax.random.key(seed), (1, 4, 6)) for seed in (0, 1))
    weights = jnp.asarray([[1.0, 0.0, 2.0, 0.5]])
    to_theirs, to_ours = jax.grad(lambda a, b: kl_sum(a, b, weights, tile=2), argnums=(0, 1))(theirs, ours)
    np.testing.assert_allclose(to_ours, weights[..., None] * (jax.nn.softmax(ours) - jax.nn.softmax(theirs)), atol=1e-6)
    assert not np.asarray(to_theirs).any()
