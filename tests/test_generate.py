"""Generation against the naive loop: the whole text through the model again for each new token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstages.config import AttentionConfig, MeshConfig
from jaxstages.decode.generate import make_answers
from jaxstages.decode.label import make_likeliest
from jaxstages.decode.sampling import Sampling
from jaxstages.models.transformer import make_model
from jaxstages.sharding import make_mesh
from jaxstages.types import Batch, Model, Params
from tests.tiny import VOCAB, model_config

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]
NEW = 6


@pytest.fixture(scope="module", params=["rope", "learned"])
def model(request: pytest.FixtureRequest) -> tuple[Model, Params]:
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8, position=request.param)
    made = make_model(model_config(context=32, attention=attention), VOCAB)
    return made, jax.tree.map(lambda x: x * 8.0, jax.jit(made.init)(jax.random.key(1)))


def naive(model: Model, params: Params, prompt: list[int], stop: int) -> list[int]:
    apply = jax.jit(lambda params, batch: model.apply(params, batch, None))
    ids = list(prompt)
    for _ in range(NEW):
        padded = jnp.asarray([ids + [0] * (32 - len(ids))], jnp.int32)
        ones = jnp.ones((1, 32), jnp.int32)
        batch = Batch(padded, padded, ones.astype(jnp.float32), ones, jnp.arange(32)[None, :])
        ids.append(int(jnp.argmax(apply(params, batch)[0, len(ids) - 1])))
        if ids[-1] == stop:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def generate(
    model: Model, params: Params, prompts: list[list[int]], stop: int, batch_size: int, temperature: float = 0.0
):
    sampling = Sampling(max_new_tokens=NEW, temperature=temperature, stop=(stop,))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    answers = make_answers(model, sampling, context=32, batch_size=batch_size, mesh=mesh)
    return [answer for batch in answers(params, prompts, 0) for answer in batch]


def test_greedy_answers_are_those_of_the_naive_loop(model: tuple[Model, Params]) -> None:
    free = [naive(*model, prompt, stop=-1) for prompt in PROMPTS]
    assert generate(*model, PROMPTS, -1, 3) == free, "the last batch is not full"
    stop = free[1][2]  # a token that some answer has in its middle
    assert generate(*model, PROMPTS, stop, 4) == [naive(*model, prompt, stop) for prompt in PROMPTS]
    assert any(stop in answer for answer in free)


def test_an_answer_does_not_depend_on_its_batch(model: tuple[Model, Params]) -> None:
    one = generate(*model, PROMPTS, -1, 1, temperature=1.5)
    four = generate(*model, PROMPTS, -1, 4, temperature=1.5)
    assert one == four
    assert one != generate(*model, PROMPTS, -1, 4)


def test_a_long_prompt_loses_its_beginning_and_an_empty_one_is_refused(model: tuple[Model, Params]) -> None:
    long = [int(i) for i in np.random.default_rng(0).integers(0, VOCAB, 50)]
    assert generate(*model, [long], -1, 1) == generate(*model, [long[-(32 - NEW) :]], -1, 1)
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(*model, [[]], -1, 1)
    with pytest.raises(ValueError, match="max_new_tokens=6 must be less than the context, 6"):
        make_answers(
            model[0], Sampling(NEW, 0.0, ()), context=NEW, batch_size=1, mesh=make_mesh(MeshConfig(), jax.devices()[:1])
        )


def test_the_likeliest_label_by_hand(model: tuple[Model, Params]) -> None:
    made, params = model
    apply = jax.jit(lambda batch: made.apply(params, batch, None))
    labels = [[4, 1], [7, 7, 1], [2, 1]]
    chosen = make_likeliest(made, labels, context=32, batch_size=5)(params, PROMPTS[:2])

    def log_prob(ids: list[int], prompt: int) -> float:
        tokens = jnp.asarray([ids], jnp.int32)
        ones = jnp.ones_like(tokens)
        at = jnp.arange(len(ids))[None, :]
        logits = apply(Batch(tokens, tokens, ones.astype(jnp.float32), ones, at))
        scores = jax.nn.log_softmax(logits[0], axis=-1)
        return float(sum(scores[i - 1, ids[i]] for i in range(prompt, len(ids))))

    for prompt, found in zip(PROMPTS[:2], chosen, strict=True):
        assert found == int(np.argmax([log_prob([*prompt, *label], len(prompt)) for label in labels]))
    with pytest.raises(ValueError, match="shorter than the context"):
        make_likeliest(made, [[1] * 33], context=32, batch_size=1)
