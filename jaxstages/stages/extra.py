"""A stage beyond the three, under the name that `Recipe.extra_stages` gives it: mid-training, a second language, ...

It can have any task, any loss and any parent. By default it starts from the best checkpoint of the stage before.
"""

from pathlib import Path
from typing import Any

from jaxstages.config import Recipe
from jaxstages.training.setup import setup_stage
from jaxstages.training.stage import RunOptions, train_stage


def run(recipe: Recipe, name: str, workdir: Path, options: RunOptions = RunOptions()) -> dict[str, Any] | None:
    """Train the stage in `workdir/name`, or resume it.

    Returns its result, or None if `stop_after` ended the run before the stage.
    """
    return train_stage(setup_stage(recipe, name, workdir), options)
