"""Filters and penalties against numpy, by the formulas of transformers' logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstages.generation import sampling as tested
from jaxstages.generation.sampling import Sampling, check_sampling, filter_logits, make_choose

LOGITS = np.random.default_rng(0).standard_normal((5, 97)).astype(np.float32) * 3


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kept(logits: jax.Array) -> np.ndarray:
    return np.isfinite(np.asarray(logits))


def top_p_by_sorting(logits: np.ndarray, p: float) -> np.ndarray:
    """As TopPLogitsWarper: ascending, what has at most 1 - p together with those below it goes; one stays."""
    keep = np.zeros(logits.shape, bool)
    for row, order in enumerate(np.argsort(logits, axis=-1, kind="stable")):
        removed = np.cumsum(softmax(logits[row].astype(np.float64))[order]) <= 1 - p
        removed[-1] = False
        keep[row, order[~removed]] = True
    return keep


@pytest.mark.parametrize("k", [1, 7, 97, 500])
def test_top_k_keeps_the_largest(k: int) -> None:
    least = np.sort(LOGITS, axis=-1)[:, -min(k, 97)][:, None]
    actual = jax.jit(lambda x: tested.keep_top_k(x, k))(LOGITS)
    np.testing.assert_array_equal(kept(actual), least <= LOGITS)
    np.testing.assert_array_equal(np.asarray(actual)[kept(actual)], LOGITS[least <= LOGITS])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_nucleus(p: float) -> None:
    keep = jax.jit(lambda x: tested.keep_top_p(x, p))
    np.testing.assert_array_equal(kept(keep(LOGITS)), top_p_by_sorting(LOGITS, p))
    # Already filtered, and one token that is certain.
    cut = np.where(LOGITS > 0, LOGITS, -np.inf).astype(np.float32)
    np.testing.assert_array_equal(kept(keep(cut)), top_p_by_sorting(cut, p) & (cut > -np.inf))
    sure = np.where(np.arange(97) == 3, 200.0, LOGITS).astype(np.float32)
    np.testing.assert_array_equal(kept(keep(sure)), np.broadcast_to(np.arange(97) == 3, sure.shape))


def test_equals_stay_together() -> None:
    even = jnp.zeros((1, 8))
    assert kept(tested.keep_top_p(even, 0.3)).all() and kept(tested.keep_top_k(even, 2)).all()


@pytest.mark.parametrize("p", [0.02, 0.3, 0.99])
def test_min_p_is_relative_to_the_likeliest(p: float) -> None:
    shares = softmax(LOGITS)
    expected = shares >= p * shares.max(-1, keepdims=True)
    np.testing.assert_array_equal(kept(jax.jit(lambda x: tested.keep_min_p(x, p))(LOGITS)), expected)


def test_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    seen = np.random.default_rng(1).random(LOGITS.shape) < 0.3
    expected = np.where(seen, np.where(LOGITS < 0, LOGITS * 1.7, LOGITS / 1.7), LOGITS)
    np.testing.assert_allclose(jax.jit(lambda x, s: tested.penalize(x, s, 1.7))(LOGITS, seen), expected, rtol=1e-6)


def test_filters_go_one_after_the_other_and_cost_nothing_if_not_asked_for() -> None:
    how = Sampling(1, temperature=2.0, top_k=20, top_p=0.8, min_p=0.1)
    warm = LOGITS / 2
    warm = np.where(warm >= np.sort(warm)[:, -20][:, None], warm, -np.inf).astype(np.float32)
    warm = np.where(top_p_by_sorting(warm, 0.8), warm, -np.inf)
    expected = softmax(warm) >= 0.1 * softmax(warm).max(-1, keepdims=True)
    np.testing.assert_array_equal(kept(jax.jit(lambda x: filter_logits(x, how))(LOGITS)), expected)
    choose = make_choose(Sampling(1, temperature=1.0))
    keys = jax.random.split(jax.random.key(0), 5)
    plain = jax.jit(choose, static_argnums=3).lower(LOGITS, keys, jnp.int32(0), None).as_text()
    assert not any(word in plain for word in ("sort", "top_k", "exponential"))


def test_a_rows_draw_depends_on_its_key_and_place_only() -> None:
    choose = jax.jit(make_choose(Sampling(1, temperature=1.5, top_p=0.9)), static_argnums=3)
    keys = jax.random.split(jax.random.key(0), 5)
    five = np.asarray(choose(LOGITS, keys, jnp.int32(3), None))
    for row in range(5):
        assert choose(LOGITS[row : row + 1], keys[row : row + 1], jnp.int32(3), None)[0] == five[row]
    draws = [np.asarray(choose(LOGITS, keys, jnp.int32(i), None)) for i in range(8)]
    assert len({tuple(draw) for draw in draws}) > 1
    greedy = jax.jit(make_choose(Sampling(1)), static_argnums=3)
    np.testing.assert_array_equal(greedy(LOGITS, keys, jnp.int32(0), None), LOGITS.argmax(-1))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": float("nan")}, "temperature=nan must"),
        ({"top_k": -1}, "top_k=-1 must be"),
        ({"top_p": 0.0}, "top_p=0.0 must be larger than 0"),
        ({"top_p": float("nan")}, "top_p=nan must be"),
        ({"min_p": 1.0}, "min_p=1.0 must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be"),
        ({"temperature": 0.0, "top_k": 3}, "top_k needs a temperature above 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(changes: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_sampling(Sampling(**({"max_new_tokens": 4, "temperature": 1.0} | changes)))
