"""Early stopping with a pytree as state: patience and min-delta relative to the best value, safe against NaN.

It avoids two traps of other implementations: comparing with the previous value instead of the best one (an oscillating
plateau then never stops), and letting a NaN become the best (no value can beat it afterwards).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class EarlyStoppingState(NamedTuple):
    """State of early stopping. All fields are arrays, so that a checkpoint can save it with the train state.

    best: the best finite value so far; initially +inf (mode "min") or -inf ("max").
    best_step: the step of `best`; initially -1.
    bad: number of evaluations in a row that did not improve on `best`.
    """

    best: np.float64
    best_step: np.int64
    bad: np.int64


class EarlyStopping(NamedTuple):
    """Functions of a state: `init() -> state`, `update(state, value, step) -> state`, `should_stop(state) -> bool`."""

    init: Callable[[], EarlyStoppingState]
    update: Callable[[EarlyStoppingState, float, int], EarlyStoppingState]
    should_stop: Callable[[EarlyStoppingState], bool]


def early_stopping(*, mode: str = "min", patience: int = 0, min_delta: float = 0.0) -> EarlyStopping:
    """Stop after `patience` evaluations in a row that do not improve on the best value by more than `min_delta`.

    A value that is not finite is not an improvement and never becomes the best. The first finite value is always an
    improvement. With patience 0 the best value is tracked, and training never stops.

    | value, mode "min", patience 2, min_delta 0.1 | 3.0 | 2.5 | 2.45 | nan  |
    | best                                         | 3.0 | 2.5 | 2.5  | 2.5  |
    | bad                                          | 0   | 0   | 1    | 2    |
    | should_stop                                  |     |     |      | True |

    Raises:
        ValueError: mode is neither "min" nor "max", or patience or min_delta is negative.
    """
    if mode not in ("min", "max"):
        raise ValueError(f'early_stopping.mode={mode!r}; known: "min", "max"')
    if patience < 0 or not 0 <= min_delta < np.inf:
        raise ValueError(f"early_stopping: patience={patience} and min_delta={min_delta} must be at least 0 and finite")
    worst = np.inf if mode == "min" else -np.inf

    def init() -> EarlyStoppingState:
        return EarlyStoppingState(best=np.float64(worst), best_step=np.int64(-1), bad=np.int64(0))

    def update(state: EarlyStoppingState, value: float, step: int) -> EarlyStoppingState:
        if not np.isfinite(value):
            return state._replace(bad=state.bad + 1)
        gain = state.best - value if mode == "min" else value - state.best
        if gain > min_delta:
            return EarlyStoppingState(best=np.float64(value), best_step=np.int64(step), bad=np.int64(0))
        return state._replace(bad=state.bad + 1)

    def should_stop(state: EarlyStoppingState) -> bool:
        return bool(patience and state.bad >= patience)

    return EarlyStopping(init, update, should_stop)
