"""The trackers that a recipe can name: Weights & Biases and MLflow. Each is imported only where it is used."""

import importlib
import importlib.util
import itertools
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from jaxstages.config import Recipe
from jaxstages.config.parts import Makes, Part, tracker_name
from jaxstages.runtime.console import say
from jaxstages.training.metric_writer import SAMPLES
from jaxstages.types import MakeTracker, TrackedStage, Tracker


def trackers_of(recipe: Recipe) -> dict[str, MakeTracker]:
    """Return the makers of a recipe's trackers by name.

    Raises:
        ValueError: the package of a tracker is not installed, or the code of an own one is missing.
    """
    makers: dict[str, MakeTracker] = {}
    for index, tracker in enumerate(recipe.trackers):
        where = f"config.trackers[{index}]"
        if isinstance(tracker, Part):
            file, _, name = tracker.part.partition(":")
            raise ValueError(f"{where} is {name}, a part of the recipe's own; name its file with --config={file}.py")
        if not isinstance(tracker, str):
            makers[tracker_name(tracker)] = tracker.make if isinstance(tracker, Makes) else tracker
            continue
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(
                f"{where}={tracker!r}: {tracker} is not installed; pip install '.[{tracker}]', or leave it out"
            )
        makers[tracker] = BUILTIN[tracker]
    return makers


def wandb_tracker(stage: TrackedStage) -> Tracker:
    """Log to Weights & Biases: a run for each stage, grouped by workdir, in the project WANDB_PROJECT or the recipe's
    name. All settings of wandb's are read from its environment variables, such as WANDB_MODE=offline.

    wandb's own step is the number of the line, so that wandb itself drops lines that its server has already. The x axis
    is "step".
    """
    wandb: Any = importlib.import_module("wandb")

    _set_incomplete_runs_aside(stage)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or re.sub(r"[/\\#?%:]", "-", stage.name),
        name=f"{stage.workdir.name}/{stage.stage}",
        group=stage.workdir.name,
        job_type=stage.stage,
        id=stage.run_id,
        resume="allow",
        reinit="create_new",
        dir=str(stage.folder),
        config=stage.recipe,
        settings=wandb.Settings(silent=True),
    )
    if run.url:
        say(f"{stage.stage}: {run.url}", "cyan")
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    numbers, folder = itertools.count(stage.sent), Path(run.dir).parent

    def log(step: int, kind: str, values: dict[str, Any]) -> None:
        row: dict[str, Any] = {f"{kind}/{name}": value for name, value in values.items()}
        if kind == SAMPLES:
            samples = values[SAMPLES]
            row = {SAMPLES: wandb.Table(columns=[*samples[0]], data=[[*sample.values()] for sample in samples])}
        run.log({"step": step} | row, step=next(numbers))

    def close(status: str) -> None:
        run.finish(exit_code=0 if status == "finished" else 1)
        if run.offline:
            (folder / COMPLETE).write_text(str(next(numbers)))

    return Tracker(log, close, buffers=True)


COMPLETE = "lines_at_close"
"""File in the folder of an offline run of wandb's that was closed: the number of lines sent by then."""


def _set_incomplete_runs_aside(stage: TrackedStage) -> None:
    """Rename the folders of offline runs that were killed. wandb loses what it has buffered, so all their lines are
    logged again; `wandb sync` of both would double them."""
    for folder in (stage.folder / "wandb").glob(f"offline-run-*-{stage.run_id}"):
        closed = folder / COMPLETE
        if not closed.exists() or int(closed.read_text()) > stage.sent:
            folder.rename(folder.with_name(f"incomplete-{folder.name}"))


def mlflow_tracker(stage: TrackedStage) -> Tracker:
    """Log to MLflow: a run for each stage, in the experiment MLFLOW_EXPERIMENT_NAME or the recipe's name, at
    MLFLOW_TRACKING_URI.

    The metric "line" counts the lines, so that none is logged twice after a kill. Text becomes artifacts.
    """
    mlflow: Any = importlib.import_module("mlflow")
    metric: Any = importlib.import_module("mlflow.entities").Metric

    experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or stage.name).experiment_id
    client = mlflow.MlflowClient()
    runs = client.search_runs([experiment], f"tags.`jaxstages.id` = '{stage.run_id}'")
    if runs:
        run_id, logged = runs[0].info.run_id, int(runs[0].data.metrics.get("line", -1))
        client.update_run(run_id, status="RUNNING")
    else:
        tags = {"jaxstages.id": stage.run_id, "jaxstages.stage": stage.stage, "jaxstages.workdir": str(stage.workdir)}
        run = client.create_run(experiment, run_name=f"{stage.workdir.name}/{stage.stage}", tags=tags)
        run_id, logged = run.info.run_id, -1
    client.log_dict(run_id, stage.recipe, "recipe.json")
    numbers = itertools.count(stage.sent)

    def log(step: int, kind: str, values: dict[str, Any]) -> None:
        number = next(numbers)
        if number <= logged:
            return
        if kind == SAMPLES:
            text = json.dumps(values[SAMPLES], indent=1, ensure_ascii=False)
            client.log_text(run_id, text, f"{SAMPLES}/{step}.json")
        scalars = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        now = round(1000 * time.time())
        metrics = [metric(_mlflow_name(name), float(value), now, step) for name, value in scalars.items()]
        client.log_batch(run_id, [*metrics, metric("line", number, now, step)])

    def close(status: str) -> None:
        client.set_terminated(run_id, {"finished": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED"))

    return Tracker(log, close)


def _mlflow_name(name: str) -> str:
    """Replace the characters that MLflow refuses in the name of a metric."""
    return re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)


BUILTIN = {"wandb": wandb_tracker, "mlflow": mlflow_tracker}
