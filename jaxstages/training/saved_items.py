"""The items of a stage's checkpoint: what the train state and early stopping are saved as."""

from typing import Any

import numpy as np

from jaxstages.checkpoint.manager import TRAINING, Items
from jaxstages.training.early_stopping import EarlyStoppingState
from jaxstages.types import TrainState

AVERAGE = "average"


def to_items(state: TrainState, stopping: EarlyStoppingState) -> Items:
    """params/, average/ if there is one, and train/: optimizer, step, guard and early stopping."""
    training = {
        "opt_state": state.opt_state,
        "step": state.step,
        "guard": state.guard,
        "early_stopping": {name: np.asarray(value) for name, value in stopping._asdict().items()},
    }
    average = {AVERAGE: state.average} if state.average else {}
    return {"params": state.params, TRAINING: training} | average


def from_items(items: Items) -> tuple[TrainState, EarlyStoppingState]:
    """The inverse of `to_items`."""
    training = items[TRAINING]
    stopping: list[Any] = [np.asarray(training["early_stopping"][name])[()] for name in EarlyStoppingState._fields]
    state = TrainState(
        step=training["step"],
        params=items["params"],
        opt_state=training["opt_state"],
        guard=training["guard"],
        average=items.get(AVERAGE, ()),
    )
    return state, EarlyStoppingState(*stopping)
