"""`evaluate`: a finished stage's best checkpoint on its held-out data, or all of them as the stage matrix."""

import json
from pathlib import Path

from jaxstages.config import Recipe
from jaxstages.console import say
from jaxstages.evaluate import make_evaluate, unigram_perplexity
from jaxstages.metrics import plain
from jaxstages.parent import contract_of, finished, read_parent
from jaxstages.report.matrix import stage_matrix
from jaxstages.workbench import open_workbench


def evaluate(recipe: Recipe, workdir: Path, stage: str | None) -> None:
    """Print the metrics as one JSON object; without a stage, the matrix."""
    if stage is None:
        stage_matrix(recipe, workdir)
        return
    finished(workdir / stage)
    bench = open_workbench(recipe, stage, workdir)
    params, lineage = read_parent(bench.stage_dir, bench, contract_of(bench))
    report = make_evaluate(bench)(params, True)
    values = {name: plain(value) for name, value in report.metrics.items()}
    if bench.stage.data.task == "lm":
        values["unigram_perplexity"] = unigram_perplexity(bench.train, bench.held_out)
    say(json.dumps({"stage": stage, "step": lineage["step"]} | values | {"signatures": report.signatures}))
