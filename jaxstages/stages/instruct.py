"""Stage three, the finish: follow instructions, over one turn or several.

Chats are rendered by one chat template (`data/chat.py`). The assistant's words and the token that ends its turn are
trained on. The stage starts from the best checkpoint of the stage before, and replays the data of earlier stages.
"""

from pathlib import Path
from typing import Any

from jaxstages.config import Recipe
from jaxstages.training.setup import setup_stage
from jaxstages.training.stage import RunOptions, train_stage


def run(recipe: Recipe, workdir: Path, options: RunOptions = RunOptions()) -> dict[str, Any] | None:
    """Train the stage in `workdir/instruct`, or resume it.

    Returns its result, or None if `stop_after` ended the run before the stage.
    """
    return train_stage(setup_stage(recipe, "instruct", workdir), options)
