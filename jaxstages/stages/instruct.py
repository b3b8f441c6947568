"""Stage three, the finish: follow instructions, over one turn or several.

Chats are written by one template (`data/chat.py`); trained on are the assistant's words and the token that ends its
turn. It starts from the best checkpoint of the stage before.
"""

from pathlib import Path
from typing import Any

from jaxstages.config import Recipe
from jaxstages.training.setup import setup_stage
from jaxstages.training.stage import train_stage


def run(recipe: Recipe, workdir: Path, finish: bool = False) -> dict[str, Any] | None:
    """Train (or go on training) the stage in `workdir/instruct`; its result, or None if `stop_after` ended it. With
    `finish` it ends at the step that it has saved."""
    return train_stage(setup_stage(recipe, "instruct", workdir), finish)
