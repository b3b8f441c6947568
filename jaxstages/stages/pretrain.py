"""Stage one, the rough sketch: a causal language model of raw text.

The data are unlabelled: every token of every document is a target. Documents share rows, but no token attends to
another document. The stage starts from scratch, or from imported weights.
"""

from pathlib import Path
from typing import Any

from jaxstages.config import Recipe
from jaxstages.generation.evaluate import unigram_perplexity
from jaxstages.runtime.console import say
from jaxstages.training.setup import setup_stage
from jaxstages.training.stage import RunOptions, train_stage


def run(recipe: Recipe, workdir: Path, options: RunOptions = RunOptions()) -> dict[str, Any] | None:
    """Train the stage in `workdir/pretrain`, or resume it.

    Returns its result, or None if `stop_after` ended the run before the stage.
    """
    setup = setup_stage(recipe, "pretrain", workdir)
    result = train_stage(setup, options)
    if result is not None:
        floor = unigram_perplexity(setup.data.train, setup.data.held_out)
        ours = result["best"]["perplexity"]
        say(f"pretrain: held-out perplexity {ours:.2f}; a unigram model has {floor:.1f}, {floor / ours:.1f} times that")
    return result
