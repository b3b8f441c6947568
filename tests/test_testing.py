"""The property checks of `jaxstages.testing` pass what is right, and find planted faults."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstages import testing
from jaxstages.data.tasks import Encoded, Example, Question
from jaxstages.models.transformer import make_model
from jaxstages.training.step import init_state
from jaxstages.types import Batch, Model
from tests.own_parts import Mean
from tests.tiny import VOCAB, model_config

OWN = [Mean().make(VOCAB), Mean(nnx=True).make(VOCAB)]


@functools.cache
def ours() -> Model:
    return make_model(model_config(), VOCAB)


@pytest.mark.parametrize("model", [*OWN, None], ids=["linen", "nnx", "built in"])
def test_every_check_passes_a_model_that_is_right(model: Model | None) -> None:
    testing.check_model(model or ours(), VOCAB)


def planted(change: str) -> Model:
    """A model with a fault."""
    model = OWN[0]

    def apply(params: dict, batch: Batch, key: jax.Array | None) -> jax.Array:
        match change:
            case "future":
                return model.apply(params, batch, key) + jnp.roll(model.apply(params, batch, key), -1, axis=1) * 0.1
            case "leak":
                return model.apply(params, batch._replace(segments_BL=jnp.ones_like(batch.segments_BL)), key)
            case "positions":
                ramp_BL1 = jnp.arange(batch.tokens_BL.shape[1], dtype=jnp.float32)[None, :, None]
                return model.apply(params, batch, key) * (1.0 + 0.01 * ramp_BL1)
        raise AssertionError(change)

    return model._replace(apply=apply)


@pytest.mark.parametrize(
    ("change", "message"),
    [("future", "sees the future"), ("leak", "leak into each other"), ("positions", "packed row than alone")],
)
def test_a_faulty_model_is_found(change: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_model(planted(change), VOCAB)


def test_a_decode_with_a_position_off_by_one_is_found() -> None:
    decoder = ours().required_decoder
    wrong = decoder._replace(step=lambda p, tokens, positions, cache: decoder.step(p, tokens, positions + 1, cache))
    with pytest.raises(AssertionError, match="decoding differs"):
        model = ours()._replace(decoder=wrong)
        testing.check_decoding(model, jax.jit(model.init)(jax.random.key(0)), VOCAB, length=12)


def step_of(accumulate: int, mean_of_means: bool = False):
    """A step on the bigram table, which adds up sums, or means."""
    tx = optax.sgd(0.1)

    def loss(table_VV: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        log_probs = jax.nn.log_softmax(table_VV[batch.tokens_BL])
        log_prob_BL = jnp.take_along_axis(log_probs, batch.targets_BL[:, :, None], axis=-1)[:, :, 0]
        total, weight = -jnp.sum(log_prob_BL * batch.weights_BL), jnp.sum(batch.weights_BL)
        return (total / weight, jnp.ones(())) if mean_of_means else (total, weight)

    def step(state, batch: Batch):
        rows = batch.tokens_BL.shape[0] // accumulate
        grads, weight = jnp.zeros_like(state.params["table"]), jnp.zeros(())
        for part in range(accumulate):
            rows_of_part = jax.tree.map(lambda x, part=part: x[part * rows : (part + 1) * rows], batch)
            grad, part_weight = jax.grad(loss, has_aux=True)(state.params["table"], rows_of_part)
            grads, weight = grads + grad, weight + part_weight
        updates, _ = tx.update({"table": grads / weight}, state.opt_state)
        return state._replace(params=optax.apply_updates(state.params, updates)), {}

    return step


def test_a_step_that_averages_over_parts_is_found() -> None:
    state = init_state({"table": jnp.zeros((VOCAB, VOCAB))}, optax.sgd(0.1))
    batch = testing.documents(VOCAB)
    testing.check_accumulation(step_of, state, batch)
    with pytest.raises(AssertionError, match="parameters move elsewhere"):
        testing.check_accumulation(functools.partial(step_of, mean_of_means=True), state, batch)


def test_a_mask_that_trains_on_the_prompt_is_found() -> None:
    def encode(record: str, prompt_weight: float = 0.0) -> Encoded:
        ids = np.arange(6, dtype=np.int32)
        weights = np.asarray([0, prompt_weight, prompt_weight, 1, 1, 1], np.float32)
        return Encoded([Example(ids, weights)], Question([0, 1, 2], record, ""), 0)

    testing.check_task(encode, ["x"], context=8)
    with pytest.raises(AssertionError, match="trains on 2 tokens of the prompt"):
        testing.check_task(functools.partial(encode, prompt_weight=1.0), ["x"], context=8)


def test_a_shape_that_recompiles_is_found() -> None:
    def step(x: jax.Array) -> jax.Array:
        return x * 2

    testing.check_compiles_once(step, [(jnp.ones(4),), (jnp.zeros(4),)])
    with pytest.raises(AssertionError, match="2 compilations"):
        testing.check_compiles_once(step, [(jnp.ones(4),), (jnp.zeros(5),)])


def test_a_loss_that_returns_means_is_found() -> None:
    model = OWN[0]
    params, batch = model.init(jax.random.key(0)), testing.documents(VOCAB)

    def sums(params: dict, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
        return testing._cross_entropy(model, params, batch, key)

    def means(params: dict, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
        total = sums(params, batch, key)
        return {"objective": total["objective"] / total["weight"], "weight": jnp.ones(())}

    testing.check_loss(sums, params, batch)
    with pytest.raises(AssertionError, match="return sums over tokens"):
        testing.check_loss(means, params, batch)
