"""Stage two, the detail: labelled pairs, such as English to French, or a text and its class.

Only the target is trained on: the prompt is given, and costs nothing to get wrong. It starts from the best checkpoint
of the stage before, with a fresh optimizer and its own schedule from step 0.
"""

from pathlib import Path
from typing import Any

from jaxstages.config import Recipe
from jaxstages.training.setup import setup_stage
from jaxstages.training.stage import train_stage


def run(recipe: Recipe, workdir: Path, finish: bool = False) -> dict[str, Any] | None:
    """Train (or go on training) the stage in `workdir/finetune`; its result, or None if `stop_after` ended it. With
    `finish` it ends at the step that it has saved."""
    return train_stage(setup_stage(recipe, "finetune", workdir), finish)
