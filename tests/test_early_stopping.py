"""Early stopping against the two traps of the field, and against a plain list."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxstages.training.early_stopping import early_stopping


def run(values: list[float], **options: object) -> tuple[list[bool], object]:
    rule = early_stopping(**options)
    state, stops = rule.init(), []
    for step, value in enumerate(values, start=1):
        state = rule.update(state, value, step)
        stops.append(rule.should_stop(state))
    return stops, state


def test_compares_with_the_best_not_with_the_value_before() -> None:
    """An oscillating plateau above the best: each second value improves on the one before it."""
    stops, state = run([1.0, 3.0, 2.0, 3.0, 2.0], patience=4)
    assert stops == [False, False, False, False, True]
    assert (state.best, state.best_step) == (1.0, 1)


def test_a_nan_is_no_improvement_and_never_the_best() -> None:
    stops, state = run([math.nan, 3.0, math.nan, 2.0, math.inf, -math.inf], patience=3)
    assert not any(stops)
    assert (state.best, state.best_step, state.bad) == (2.0, 4, 2)


def test_infinity_against_no_best_yet_is_no_improvement() -> None:
    stops, state = run([math.inf, 1.0], patience=2)
    assert stops == [False, False] and state.best == 1.0


def test_the_docstring_table() -> None:
    rule = early_stopping(mode="min", patience=2, min_delta=0.1)
    state, rows = rule.init(), []
    for step, value in enumerate([3.0, 2.5, 2.45, math.nan]):
        state = rule.update(state, value, step)
        rows.append((float(state.best), int(state.bad), rule.should_stop(state)))
    assert rows == [(3.0, 0, False), (2.5, 0, False), (2.5, 1, False), (2.5, 2, True)]


def test_mode_max_and_min_delta_is_strict() -> None:
    stops, state = run([10.0, 10.5, 11.0], mode="max", patience=1, min_delta=0.5)
    assert stops == [False, True, False]
    assert state.best == 11.0


def test_patience_zero_keeps_book_and_never_stops() -> None:
    stops, state = run([1.0] + [2.0] * 50)
    assert not any(stops)
    assert state.best_step == 1


@hypothesis.given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=30),
    st.sampled_from(["min", "max"]),
)
def test_best_is_that_of_all_finite_values(values: list[float], mode: str) -> None:
    _, state = run(values, mode=mode, patience=2)
    finite = [v for v in values if math.isfinite(v)]
    if finite:
        assert state.best == (min if mode == "min" else max)(finite)
        assert values[int(state.best_step) - 1] == state.best
    else:
        assert state.best_step == -1


@pytest.mark.parametrize(
    "options", [{"mode": "lowest"}, {"patience": -1}, {"min_delta": -0.1}, {"min_delta": math.nan}]
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="early_stopping"):
        early_stopping(**options)
