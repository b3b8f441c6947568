"""Stage one, the rough sketch: a causal language model over raw text.

What the model meets here is unlabelled: every token of every document is a target. Documents share rows, but no
token sees another document. It starts from scratch.
"""

from pathlib import Path
from typing import Any

from jaxstages.config import Recipe
from jaxstages.generation.evaluate import unigram_perplexity
from jaxstages.runtime.console import say
from jaxstages.training.setup import setup_stage
from jaxstages.training.stage import train_stage


def run(recipe: Recipe, workdir: Path, finish: bool = False) -> dict[str, Any] | None:
    """Train (or go on training) the stage in `workdir/pretrain`; its result, or None if `stop_after` ended it. With
    `finish` it ends at the step that it has saved."""
    setup = setup_stage(recipe, "pretrain", workdir)
    result = train_stage(setup, finish)
    if result is not None:
        floor = unigram_perplexity(setup.data.train, setup.data.held_out)
        ours = result["best"]["perplexity"]
        say(f"pretrain: held-out perplexity {ours:.2f}; a unigram model has {floor:.1f}, {floor / ours:.1f} times that")
    return result
