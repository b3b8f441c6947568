"""Stage two, the detail: labelled pairs, such as English to French, or a text and its class.

Only the target is trained on; the loss weights of the prompt are 0. The stage starts from the best checkpoint of the
stage before, with a fresh optimizer and its own schedule from step 0, and replays that stage's data.
"""

from pathlib import Path
from typing import Any

from jaxstages.config import Recipe
from jaxstages.training.setup import setup_stage
from jaxstages.training.stage import RunOptions, train_stage


def run(recipe: Recipe, workdir: Path, options: RunOptions = RunOptions()) -> dict[str, Any] | None:
    """Train the stage in `workdir/finetune`, or resume it.

    Returns its result, or None if `stop_after` ended the run before the stage.
    """
    return train_stage(setup_stage(recipe, "finetune", workdir), options)
