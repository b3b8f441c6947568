"""Generation against the naive loop: the whole text through the model again for each new token."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstages.config import AttentionConfig, MeshConfig
from jaxstages.generation.decode import Answers, make_answers
from jaxstages.generation.label_scores import make_likeliest
from jaxstages.generation.sampling import Sampling
from jaxstages.generation.session import Session
from jaxstages.generation.text_stream import TextStream
from jaxstages.models.sharding import batch_sharding, make_mesh
from jaxstages.models.transformer import make_model
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
    answers = make_answers(model, sampling, context=32, batch_size=batch_size, rows=batch_sharding(mesh))
    return [answer for batch in answers(params, prompts, 0) for answer in batch]


def test_greedy_answers_are_those_of_the_naive_loop(model: tuple[Model, Params]) -> None:
    free = [naive(*model, prompt, stop=-1) for prompt in PROMPTS]
    assert generate(*model, PROMPTS, -1, 3) == free, "the last batch is not full"
    stop = free[1][2]  # a token that some answer has in its middle
    assert generate(*model, PROMPTS, stop, 4) == [naive(*model, prompt, stop) for prompt in PROMPTS]
    assert any(stop in answer for answer in free)


def test_an_answer_does_not_depend_on_its_batch(model: tuple[Model, Params]) -> None:
    single = generate(*model, PROMPTS, -1, 1, temperature=1.5)
    four = generate(*model, PROMPTS, -1, 4, temperature=1.5)
    assert single == four
    assert single != generate(*model, PROMPTS, -1, 4)


HOW = Sampling(NEW, temperature=1.5, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
"""All that a token can depend on beside its prompt."""


def texts_of(answers: Answers, params: Params, prompts: list[list[int]], first: int = 0) -> list[list[int]]:
    return [answer for batch in answers(params, prompts, first) for answer in batch]


def test_a_stream_is_the_answer_at_once_turn_by_turn(
    model: tuple[Model, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxstages.generation.session.BUCKET", 4)  # a turn's new tokens stay below the context
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    whole = make_answers(model[0], HOW, context=32, batch_size=1, rows=batch_sharding(mesh), seed=7)
    session = Session(*model, HOW, context=32, seed=7)
    prompt: list[int] = []
    for turn in range(3):
        prompt = [*prompt, *PROMPTS[turn]]
        pieces = list(session.stream(prompt, turn))
        answer = [token for piece in pieces for token in piece]
        assert [answer] == texts_of(whole, model[1], [prompt], turn), "with what the cache has of the turns before"
        assert [len(piece) for piece in pieces] == [1, 1, 2, 2]
        prompt += answer[:-1]
    tokens = [token for piece in session.stream(PROMPTS[3], 5) for token in piece]
    assert [tokens] == texts_of(whole, model[1], [PROMPTS[3]], 5), "another conversation"
    assert [tokens] != texts_of(whole, model[1], [PROMPTS[3]], 6), "another turn"


def test_a_stream_that_is_left_or_reaches_the_context_goes_on_right(model: tuple[Model, Params]) -> None:
    greedy = Sampling(20)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    session = Session(*model, greedy, context=32)
    left = session.stream(PROMPTS[1])
    results = [*next(left), *next(left)]
    left.close()
    whole = [token for piece in session.stream(PROMPTS[1]) for token in piece]
    assert [whole] == texts_of(
        make_answers(model[0], greedy, context=32, batch_size=1, rows=batch_sharding(mesh)), model[1], [PROMPTS[1]]
    )
    assert results == whole[:2]
    long = [1 + i % 28 for i in range(30)]
    assert sum(len(piece) for piece in session.stream(long)) == 2
    with pytest.raises(ValueError, match="a prompt has 32 tokens"):
        next(session.stream([1] * 32))


def test_nothing_is_compiled_again_for_prompts_of_a_bucket(model: tuple[Model, Params]) -> None:
    traced, decoder = [], model[0].required_decoder

    def counted(*args: Any) -> Any:
        traced.append(1)
        return decoder.step(*args)

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    counting = model[0]._replace(decoder=decoder._replace(step=counted))
    answers = make_answers(counting, HOW, context=32, batch_size=2, rows=batch_sharding(mesh))
    texts_of(answers, model[1], PROMPTS[:2])
    first = len(traced)
    texts_of(answers, model[1], [*PROMPTS, [2] * 20])
    assert first == len(traced) == 2, "prefill, and decoding"
    session = Session(counting, model[1], HOW, context=32)
    for turn, prompt in enumerate(PROMPTS):
        assert list(session.stream(prompt, turn))
    assert len(traced) == 4


def test_answers_go_on_from_any_prompt_and_end_when_all_rows_have_enough(model: tuple[Model, Params]) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    answers = make_answers(model[0], HOW, context=32, batch_size=2, rows=batch_sharding(mesh))
    whole = texts_of(answers, model[1], PROMPTS)
    assert texts_of(answers, model[1], PROMPTS[1:], 1) == whole[1:]
    long = HOW._replace(max_new_tokens=24)
    lengths: list[int] = []

    def enough(tokens: list[int]) -> bool:
        lengths.append(len(tokens))
        return len(tokens) >= 3

    short = make_answers(model[0], long, context=32, batch_size=2, rows=batch_sharding(mesh), is_done=enough)
    assert [len(answer) for answer in texts_of(short, model[1], PROMPTS[:2])] == [17, 17] and max(lengths) == 17


BYTES = {1: b"Hi", 2: b"!", 3: b"\n", 4: b"\nSo", 5: "é".encode()[:1], 6: "é".encode()[1:], 7: b"\xff"}


def text_of(ids: Sequence[int]) -> str:
    return b"".join(BYTES[i] for i in ids).decode(errors="replace")


def test_text_is_cut_before_a_stop_string_that_spans_tokens() -> None:
    spoken = TextStream(text_of, ["\n\n", "absent"])
    assert [spoken.feed([i]) for i in (1, 2, 3)] == ["Hi", "!", ""], "the new line may be a stop string's"
    assert spoken.feed([4]) == "" and spoken.ended and spoken.text == "Hi!"
    assert spoken.feed([1]) == ""
    again = TextStream(text_of, ["\n\n"])
    assert [again.feed([i]) for i in (1, 3, 2)] == ["Hi", "", "\n!"]
    assert again.feed([3, 4, 1]) == "" and again.text == "Hi\n!"
    stream = TextStream(text_of, ["\n\n"])
    assert stream.feed([1, 3]) + stream.feed([], last=True) == "Hi\n"
    first = TextStream(text_of, ["i!", "!"])
    assert first.feed([1, 2, 1]) == "H" and first.ended


def test_text_is_withheld_from_a_string_on_until_the_end() -> None:
    stream = TextStream(text_of, held_from=["!\n"])
    assert [stream.feed([i]) for i in (1, 2, 1, 2, 3, 1)] == ["Hi", "", "!Hi", "", "", ""]
    assert stream.feed([], last=True) == "!\nHi"


def test_no_half_character_is_shown() -> None:
    spoken = TextStream(text_of)
    assert [spoken.feed([i]) for i in (1, 5, 6, 7, 2, 5)] == ["Hi", "", "é", "", "\ufffd!", ""]
    assert spoken.feed([], last=True) == "\ufffd" and spoken.text == "Hié\ufffd!\ufffd"


def test_a_long_prompt_loses_its_beginning_and_an_empty_one_is_refused(model: tuple[Model, Params]) -> None:
    long = [int(i) for i in np.random.default_rng(0).integers(0, VOCAB, 50)]
    assert generate(*model, [long], -1, 1) == generate(*model, [long[-(32 - NEW) :]], -1, 1)
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(*model, [[]], -1, 1)
    with pytest.raises(ValueError, match="max_new_tokens=6 must be less than the context, 6"):
        make_answers(
            model[0],
            Sampling(NEW, 0.0, ()),
            context=NEW,
            batch_size=1,
            rows=batch_sharding(make_mesh(MeshConfig(), jax.devices()[:1])),
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

    for prompt, actual in zip(PROMPTS[:2], chosen, strict=True):
        assert actual == int(np.argmax([log_prob([*prompt, *label], len(prompt)) for label in labels]))
    with pytest.raises(ValueError, match="shorter than the context"):
        make_likeliest(made, [[1] * 33], context=32, batch_size=1)
