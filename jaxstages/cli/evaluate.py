"""`evaluate`: measure a checkpoint on held-out data, or the best ones of all stages as the stage matrix."""

import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from jaxstages.cli.select_checkpoint import choose
from jaxstages.config import Recipe
from jaxstages.data.prepare import prepare
from jaxstages.data.run_tokenizer import cache_folder
from jaxstages.data.sources import open_source
from jaxstages.data.stage_data import EvaluationSet
from jaxstages.experiments.stage_matrix import stage_matrix
from jaxstages.generation.evaluate import unigram_perplexity
from jaxstages.runtime.console import say
from jaxstages.runtime.workdir import writable
from jaxstages.training.handoff import read_parent
from jaxstages.training.metric_writer import plain
from jaxstages.training.setup import StageSetup, make_stage_evaluate, setup_stage


def evaluate(
    recipe: Recipe, workdir: Path, stage: str | None, step: int | None = None, sources: tuple[str, ...] = ()
) -> None:
    """Print the metrics of a stage as one JSON object; without a stage, print the stage matrix.

    Args:
        step: by default the best one.
        sources: held-out data to measure on instead of the recipe's.
    """
    if stage is None:
        if step is not None or sources:
            raise ValueError("evaluate: --step and --data apply to one stage; name it with --stage=NAME")
        stage_matrix(recipe, workdir, keep=writable(workdir))
        return
    chosen = choose(recipe, workdir / stage, step)
    # Missing rows are prepared, and reported on standard error: standard output is one JSON object.
    with tempfile.TemporaryDirectory(prefix="jaxstages-") as scratch, contextlib.redirect_stdout(sys.stderr):
        setup = setup_stage(recipe, stage, workdir, with_data=not sources)
        params, lineage = read_parent(setup.folder, setup.program, setup.contract, chosen)
        sets = [_evaluation_set(setup, sources, Path(scratch))] if sources else None
        report = make_stage_evaluate(setup, sets)(params, True)
    values = {name: plain(value) for name, value in report.metrics.items()}
    if setup.config.data.task == "lm" and not sources:
        values["unigram_perplexity"] = unigram_perplexity(setup.data.train, setup.data.held_out)
    origin = {"stage": stage, "step": lineage["step"]} | ({"data": list(sources)} if sources else {})
    say(json.dumps(origin | values | {"signatures": report.signatures}))


def _evaluation_set(setup: StageSetup, sources: tuple[str, ...], scratch: Path) -> EvaluationSet:
    """Prepare held-out data that the recipe does not name, in the format of the stage's own. The rows go to the cache,
    or to `scratch` if the cache is read-only."""
    data = dataclasses.replace(setup.config.data, train=(), weights=(), validation=sources, holdout=0.0)
    cache, context = cache_folder(setup.recipe, setup.workdir), setup.recipe.model.context
    opened = [open_source(name, cache) for name in sources]
    try:
        rows = [prepare(source, "validation", data, setup.data.tokenizer, context, cache) for source in opened]
    except OSError:
        rows = [prepare(source, "validation", data, setup.data.tokenizer, context, scratch) for source in opened]
    return EvaluationSet("", data.task, setup.config.evaluation, [], rows)
