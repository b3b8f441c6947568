"""The step alone, with a bigram table for a model: no transformer, no data, no disk."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstages.config import OptimConfig
from jaxstages.generation.eval_step import make_eval_step
from jaxstages.models.losses import cross_entropy_loss, kl_sum
from jaxstages.models.select import global_norm
from jaxstages.training.optimizer import make_optimizer
from jaxstages.training.step import init_state, make_train_step
from jaxstages.types import Batch, Params, TrainState
from tests.tiny import VOCAB, mixed_batch


def bigram(params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    return params["table"][batch.tokens_BL]


def start(tx: optax.GradientTransformation) -> TrainState:
    table = jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))
    return init_state({"table": table}, tx)


def sgd() -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.sgd(0.5))


def test_one_step_is_the_gradient_of_the_weighted_mean() -> None:
    tx, batch = sgd(), mixed_batch()
    state = start(tx)

    def mean_loss(table: jax.Array) -> jax.Array:
        nll = optax.softmax_cross_entropy_with_integer_labels(table[batch.tokens_BL], jnp.asarray(batch.targets_BL))
        return jnp.sum(nll * batch.weights_BL) / jnp.sum(batch.weights_BL)

    expected = state.params["table"] - 0.5 * jax.grad(mean_loss)(state.params["table"])
    after, sums = jax.jit(make_train_step(cross_entropy_loss(bigram), tx))(state, batch)
    np.testing.assert_allclose(after.params["table"], expected, atol=1e-6)
    assert int(after.step) == 1
    assert float(sums["weight"]) == batch.weights_BL.sum() and sums["tokens"] == np.sum(batch.segments_BL > 0)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_does_not_change_loss_or_gradient(accumulate: int) -> None:
    """Parts with different numbers of scored tokens: a mean of means would differ."""
    tx, batch = sgd(), mixed_batch()
    part_weights = {float(batch.weights_BL[a::accumulate].sum()) for a in range(accumulate)}
    assert len(part_weights) > 1, "the parts must differ for this test to mean something"
    whole, whole_sums = jax.jit(make_train_step(cross_entropy_loss(bigram), tx))(start(tx), batch)
    parts, parts_sums = jax.jit(make_train_step(cross_entropy_loss(bigram), tx, accumulate=accumulate))(
        start(tx), batch
    )
    np.testing.assert_allclose(parts.params["table"], whole.params["table"], atol=1e-6)
    for name in whole_sums:
        np.testing.assert_allclose(parts_sums[name], whole_sums[name], rtol=1e-5)


def test_the_update_takes_three_times_the_parameters() -> None:
    """Gradients, updates and their squares, but no new moments of the optimizer that wait for the guard's decision."""
    params = {"table": jnp.ones((2048, 2048))}
    slots = jnp.ones((1, 8), jnp.int32)
    batch = Batch(slots, slots, jnp.ones((1, 8)), slots, slots)
    tx = make_optimizer(OptimConfig(), 10, {"table": ("vocab", "embed")})
    step = jax.jit(make_train_step(cross_entropy_loss(bigram), tx, norm=global_norm), donate_argnums=0)
    as_users = {"xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT"}
    compiled = step.lower(init_state(params, tx), batch).compile(as_users)
    assert compiled.memory_analysis().temp_size_in_bytes / params["table"].nbytes < 3.5


def test_compiles_once() -> None:
    tx = sgd()
    step = jax.jit(make_train_step(cross_entropy_loss(bigram), tx), donate_argnums=0)
    state = start(tx)
    for _ in range(4):
        state, _ = step(state, mixed_batch())
    assert step._cache_size() == 1


def test_dropout_key_is_a_function_of_seed_and_step() -> None:
    def noisy(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        return params["table"][batch.tokens_BL] + jax.random.normal(key, (*batch.tokens_BL.shape, VOCAB))

    tx, batch = sgd(), mixed_batch()
    steps = {seed: jax.jit(make_train_step(cross_entropy_loss(noisy), tx, seed=seed)) for seed in (0, 1)}

    def loss(seed: int, at: int) -> float:
        return float(steps[seed](start(tx)._replace(step=jnp.int32(at)), batch)[1]["nll"])

    losses = {(seed, at): loss(seed, at) for seed, at in itertools.product((0, 1), (0, 1))}
    assert len(set(losses.values())) == 4
    assert loss(1, 1) == losses[1, 1]


def test_eval_step_counts_bytes_of_scored_tokens_only() -> None:
    batch = mixed_batch()
    sizes = np.arange(VOCAB).astype(np.float32)
    sums = jax.jit(make_eval_step(bigram, jnp.asarray(sizes)))(start(sgd()).params, batch)
    np.testing.assert_allclose(sums["bytes"].sum(), sizes[batch.targets_BL][np.asarray(batch.weights_BL) > 0].sum())


def kl_to(table: jax.Array):
    """The anchor of a bigram table: KL(table || model) over a batch."""

    def penalty(params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
        return kl_sum(table[batch.tokens_BL], bigram(params, batch, key), batch.weights_BL)

    return penalty


def test_an_anchor_adds_the_gradient_of_its_mean() -> None:
    """The loss is divided by the weight of the batch, the penalty by that of the rows that it is taken on."""
    tx, batch, rows = sgd(), mixed_batch(), mixed_batch(4)
    state, kept = start(tx), jax.random.normal(jax.random.key(1), (VOCAB, VOCAB))

    def objective(table: jax.Array) -> jax.Array:
        nll = optax.softmax_cross_entropy_with_integer_labels(table[batch.tokens_BL], jnp.asarray(batch.targets_BL))
        mean = jnp.sum(nll * batch.weights_BL) / jnp.sum(batch.weights_BL)
        p = jax.nn.log_softmax(kept[rows.tokens_BL])
        kl = jnp.sum(jnp.exp(p) * (p - jax.nn.log_softmax(table[rows.tokens_BL])), -1)
        return mean + 0.7 * jnp.sum(kl * rows.weights_BL) / jnp.sum(rows.weights_BL)

    expected = state.params["table"] - 0.5 * jax.grad(objective)(state.params["table"])
    for accumulate in (1, 2, 4):
        step = make_train_step(
            cross_entropy_loss(bigram), tx, anchor=kl_to(kept), anchor_weight=0.7, accumulate=accumulate
        )
        after, sums = jax.jit(step)(state, batch, rows)
        np.testing.assert_allclose(after.params["table"], expected, atol=1e-6)
        plain = jax.jit(make_train_step(cross_entropy_loss(bigram), tx))(state, batch)[1]
        np.testing.assert_allclose(sums["nll"], plain["nll"], rtol=1e-5)
        assert float(sums["anchor"]) > 0


def test_an_anchor_of_weight_0_changes_no_bit() -> None:
    tx = sgd()
    kept = jax.random.normal(jax.random.key(1), (VOCAB, VOCAB))
    anchored = jax.jit(make_train_step(cross_entropy_loss(bigram), tx, anchor=kl_to(kept), anchor_weight=0.0))
    plain = jax.jit(make_train_step(cross_entropy_loss(bigram), tx))
    states = [start(tx), start(tx)]
    for _ in range(3):
        states = [anchored(states[0], mixed_batch(), mixed_batch(4))[0], plain(states[1], mixed_batch())[0]]
    assert (np.asarray(states[0].params["table"]) == np.asarray(states[1].params["table"])).all()


def test_the_average_forgets_its_start_and_skipped_steps_leave_it() -> None:
    """At step t the decay is the smaller of the recipe's and (1 + t) / (10 + t)."""
    tx, decay = sgd(), 0.2
    step = jax.jit(make_train_step(cross_entropy_loss(bigram), tx, average=decay))
    table = start(tx).params["table"]
    state = init_state({"table": table}, tx, average=True)
    expected = np.asarray(table, np.float64)
    for t in range(4):
        state, _ = step(state, mixed_batch())
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * np.asarray(state.params["table"], np.float64)
        np.testing.assert_allclose(state.average["table"], expected, rtol=1e-5)
    bad = mixed_batch()._replace(weights_BL=mixed_batch().weights_BL * jnp.nan)
    after, sums = step(state, bad)
    assert not float(sums["applied"])
    assert (np.asarray(after.average["table"]) == np.asarray(state.average["table"])).all()
