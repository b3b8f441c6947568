"""Continuous batching: answers in company are those of `make_answers` alone, and nothing compiles after the warm-up."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxstages.config import AttentionConfig, MeshConfig
from jaxstages.generation.decode import make_answers
from jaxstages.generation.sampling import Sampling
from jaxstages.generation.serving import engine as engines
from jaxstages.generation.serving.drafts import look_up_draft
from jaxstages.generation.serving.engine import Answer, Engine, NewToken
from jaxstages.models.sharding import batch_sharding, make_mesh
from jaxstages.models.transformer import make_model
from jaxstages.types import Batch, Model, Params
from tests.tiny import VOCAB, model_config

CONTEXT = 32

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [5], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6] * 2]

SAMPLINGS = [
    Sampling(9),
    Sampling(7, temperature=1.5, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
    Sampling(5, temperature=0.8, top_k=3),
    Sampling(8, temperature=1.0, top_p=0.5),
    Sampling(6, repetition_penalty=2.0),
    Sampling(12, temperature=1.2),
]


@pytest.fixture(scope="module")
def model() -> tuple[Model, Params]:
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8)
    model = make_model(model_config(context=CONTEXT, attention=attention), VOCAB)

    def grow(path: Any, x: jax.Array) -> jax.Array:
        """Make every token of the text matter: flat attention, and large parameters else."""
        is_score = any(name in jax.tree_util.keystr(path) for name in ("query", "key"))
        return x * (2.0 if is_score else 8.0)

    return model, jax.tree_util.tree_map_with_path(grow, jax.jit(model.init)(jax.random.key(1)))


@pytest.fixture(scope="module", params=[0, 4], ids=["plain", "drafts"])
def engine(request: pytest.FixtureRequest, model: tuple[Model, Params]) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "CHUNKS", (4, 8))
        patch.setattr(engines, "MAX_STEPS", 4)
        patch.setattr(engines, "CALLS_PER_TRIAL", 1)  # always draft
        engine = Engine(*model, context=CONTEXT, num_slots=5, num_drafts=request.param)
        engine.warm_up()
        yield engine


drafting = pytest.mark.parametrize("engine", [4], ids=["drafts"], indirect=True)


class Waiting:
    """An answer with the tokens that have come."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, **options: int) -> None:
        self.tokens: list[NewToken] = []
        self.reason = ""
        self.answer = Answer(list(prompt), sampling, self._receive, **options)

    def _receive(self, tokens: list[NewToken], reason: str) -> None:
        assert not self.reason, "nothing comes after the end"
        self.tokens, self.reason = [*self.tokens, *tokens], reason

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def finish(engine: Engine) -> None:
    while engine.answers:
        engine.step()


def alone(model: tuple[Model, Params], prompt: list[int], sampling: Sampling, seed: int, choice: int) -> list[int]:
    rows = batch_sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    answers = make_answers(model[0], sampling, context=CONTEXT, batch_size=1, rows=rows, seed=seed)
    return next(answers(model[1], [prompt], choice))[0]


def test_answers_that_join_and_leave_are_those_of_each_alone(model: tuple[Model, Params], engine: Engine) -> None:
    requests = [
        Waiting(prompt, sampling, seed=7 + number, choice=number)
        for number, (prompt, sampling) in enumerate((prompt, sampling) for sampling in SAMPLINGS for prompt in PROMPTS)
    ]
    waiting = list(requests)
    while waiting or engine.answers:
        if waiting and engine.has_room:
            engine.add(waiting.pop(0).answer)
        engine.step()

    for number, request in enumerate(requests):
        expected = alone(model, request.answer.prompt, request.answer.sampling, 7 + number, number)
        assert request.ids == expected, (number, request.answer)
        assert request.reason == "length"


def test_a_stop_token_ends_an_answer_and_is_no_part_of_it(model: tuple[Model, Params], engine: Engine) -> None:
    free = alone(model, PROMPTS[1], Sampling(9), 0, 0)
    stopped = Waiting(PROMPTS[1], Sampling(9, stop=(free[4], 28)))
    engine.add(stopped.answer)
    finish(engine)
    assert stopped.ids == free[: free.index(free[4])] and stopped.reason == "stop"


def test_an_answer_may_fill_the_context(model: tuple[Model, Params], engine: Engine) -> None:
    long = [1 + i % 28 for i in range(CONTEXT - 2)]
    request = Waiting(long, Sampling(20))
    engine.add(request.answer)
    finish(engine)
    assert request.ids == alone(model, long, Sampling(2), 0, 0) and request.reason == "length"


def test_the_last_chunk_of_a_prompt_may_reach_beyond_the_context(engine: Engine) -> None:
    long = [1 + i % 28 for i in range(CONTEXT - 2)]
    prompts, tokens = (long, [*long[:-1], 27, 28], [*long[:-1], 27, 28]), []
    engine.reset()
    for number, prompt in enumerate(prompts):
        if number == 2:
            engine.reset()
        request = Waiting(prompt, Sampling(20), num_alternatives=4)
        engine.add(request.answer)
        finish(engine)
        tokens += request.tokens[:1]
        assert request.answer.cached_tokens == (0, CONTEXT - 3, 0)[number], "of a single new token"
    assert tokens[1].id == tokens[2].id
    assert tokens[1].log_prob == pytest.approx(tokens[2].log_prob, abs=1e-4)


def test_nothing_compiles_after_the_warm_up(engine: Engine) -> None:
    sizes = [function._cache_size() for function in (engine._read, engine._copy, engine._extend)]
    for number in range(3):
        for prompt in PROMPTS:
            engine.add(Waiting(prompt, SAMPLINGS[number], num_alternatives=number or None).answer)
        finish(engine)
    assert sizes == [function._cache_size() for function in (engine._read, engine._copy, engine._extend)]
    assert sizes[0] == 2 and sizes[1] == 1


def test_a_conversation_reads_only_what_is_new(model: tuple[Model, Params], engine: Engine) -> None:
    engine.reset()
    first = Waiting(PROMPTS[1], Sampling(4))
    engine.add(first.answer)
    finish(engine)
    text = [*PROMPTS[1], *first.ids]

    turn = Waiting([*text, 11, 12, 13], Sampling(4))
    engine.add(turn.answer)
    finish(engine)
    assert turn.answer.cached_tokens == len(text) - 1, "all but the last token, which no step has read"
    assert turn.ids == alone(model, turn.answer.prompt, Sampling(4), 0, 0)
    assert sum(bool(slot.text) for slot in engine.slots) == 1, "in the same slot"

    # Another conversation with the same beginning copies it, and leaves the first one as it is.
    other = Waiting([*PROMPTS[1], 17, 18], Sampling(4))
    engine.add(other.answer)
    finish(engine)
    assert other.answer.cached_tokens == len(PROMPTS[1])
    assert other.ids == alone(model, other.answer.prompt, Sampling(4), 0, 0)
    again = Waiting([*turn.answer.prompt, *turn.ids, 2], Sampling(4))
    engine.add(again.answer)
    assert again.answer.cached_tokens == len(turn.answer.prompt) + len(turn.ids) - 1
    finish(engine)


def test_the_slot_that_was_not_used_for_longest_is_overwritten(engine: Engine) -> None:
    engine.reset()
    prompts = [[20 + number, 1, 2] for number in range(engine.num_slots + 1)]
    for prompt in prompts:
        engine.add(Waiting(prompt, Sampling(2)).answer)
        finish(engine)
    first_again, second_again = Waiting([*prompts[0], 3], Sampling(2)), Waiting([*prompts[1], 3], Sampling(2))
    engine.add(second_again.answer)
    engine.add(first_again.answer)
    assert (first_again.answer.cached_tokens, second_again.answer.cached_tokens) == (0, 3)
    finish(engine)


def test_a_cancelled_answer_leaves_and_the_others_go_on(model: tuple[Model, Params], engine: Engine) -> None:
    left, stays = Waiting(PROMPTS[0], Sampling(20)), Waiting(PROMPTS[1], Sampling(9))
    for request in (left, stays):
        engine.add(request.answer)
    engine.step()
    left.answer.cancelled = True
    engine.step()
    assert engine.answers == [stays.answer]
    finish(engine)
    assert not left.reason and stays.ids == alone(model, PROMPTS[1], Sampling(9), 0, 0)


def test_log_probabilities_are_those_of_the_model(model: tuple[Model, Params], engine: Engine) -> None:
    request = Waiting(PROMPTS[1], Sampling(6, temperature=1.3, top_k=5), seed=3, num_alternatives=3)
    plain = Waiting(PROMPTS[1], Sampling(6, temperature=1.3, top_k=5), seed=3)
    for each in (request, plain):
        engine.add(each.answer)
    finish(engine)
    assert plain.ids == request.ids and plain.tokens[0].log_prob == 0

    text = [*PROMPTS[1], *request.ids]
    row = jnp.asarray([text + [0] * (CONTEXT - len(text))], jnp.int32)
    ones = jnp.ones_like(row)
    batch = Batch(row, row, ones.astype(jnp.float32), ones, jnp.arange(CONTEXT)[None])
    expected = np.asarray(jax.nn.log_softmax(model[0].apply(model[1], batch, None)))[0, len(PROMPTS[1]) - 1 :]
    for number, token in enumerate(request.tokens):
        assert token.log_prob == pytest.approx(expected[number, token.id], abs=1e-4)
        order = np.argsort(-expected[number])[:3]
        assert [i for i, _ in token.alternatives] == order.tolist()
        np.testing.assert_allclose([x for _, x in token.alternatives], expected[number][order], atol=1e-4)


def test_prompt_lookup() -> None:
    assert look_up_draft([1, 2, 3, 9, 1, 2], 3) == [3, 9, 1], "what followed the same two tokens"
    assert look_up_draft([7, 1, 2, 5, 1, 2, 6, 7, 1, 2], 2) == [5, 1], "the longest match, not the latest"
    assert look_up_draft([1, 2, 5, 1, 2, 6, 1, 2], 1) == [6], "the latest of equally long ones"
    assert look_up_draft([4, 4, 4], 4) == [4, 0, 0, 0], "filled up"
    assert look_up_draft([1, 2, 3, 1], 4) is None, "one token is no match"
    assert look_up_draft([1], 4) is None


@drafting
def test_the_engine_drafts_while_that_saves_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CALLS_PER_TRIAL", 32)
    engine._token_seconds = [2.0, 1.0]
    assert all(engine._wants_draft() for _ in range(40))
    engine._token_seconds = [1.0, 2.0]
    assert sum(engine._wants_draft() for _ in range(64)) == 2, "tried now and then"


@drafting
def test_a_draft_is_verified_in_one_step(
    model: tuple[Model, Params], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts: list[list[list[int]]] = []
    call = engine._call_extend
    monkeypatch.setattr(
        engine, "_call_extend", lambda rows, drafts_RD: drafts.append(drafts_RD.tolist()) or call(rows, drafts_RD)
    )
    greedy = alone(model, PROMPTS[0], Sampling(12), 0, 0)

    request = Waiting([*PROMPTS[0], *greedy[:5], 28, *PROMPTS[0]], Sampling(9))
    engine.add(request.answer)
    finish(engine)
    assert request.ids == alone(model, request.answer.prompt, Sampling(9), 0, 0)
    assert drafts[0] == [greedy[:4]]


@drafting
def test_sampling_with_drafts_keeps_the_distribution(model: tuple[Model, Params], engine: Engine) -> None:
    sampling = Sampling(2, temperature=3.0, top_k=4)
    prompt = [3, 1, 4, 1, 5, 3, 1]  # the draft is [4, 1]
    counts: dict[int, int] = {}
    for seed in range(400):
        request = Waiting(prompt, sampling, seed=seed)
        engine.add(request.answer)
        finish(engine)
        counts[request.ids[1]] = counts.get(request.ids[1], 0) + 1

    # The distribution of the second token, over all first ones.
    def distribution(text: list[int]) -> np.ndarray:
        row = jnp.asarray([text + [0] * (CONTEXT - len(text))], jnp.int32)
        ones = jnp.ones_like(row)
        batch = Batch(row, row, ones.astype(jnp.float32), ones, jnp.arange(CONTEXT)[None])
        logits = np.array(model[0].apply(model[1], batch, None))[0, len(text) - 1] / 3.0
        logits[np.argsort(logits)[:-4]] = -np.inf
        return np.asarray(jax.nn.softmax(jnp.asarray(logits)))

    first = distribution(prompt)
    second = sum(first[token] * distribution([*prompt, token]) for token in np.flatnonzero(first).tolist())
    support = np.flatnonzero(second > 1e-9)
    observed = np.asarray([counts.get(token, 0) for token in support])
    expected = second[support].astype(np.float64)
    assert observed.sum() == 400
    assert chisquare(observed, 400 * expected / expected.sum()).pvalue > 1e-3
