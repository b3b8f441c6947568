"""What a workdir says about its run: recipe, results, curves. Nothing here loads parameters."""

import glob
from pathlib import Path
from typing import Any, NamedTuple

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import finished
from jaxstages.runtime.bucket import is_bucket
from jaxstages.runtime.files import parse_path, read_json
from jaxstages.runtime.workdir import has_begun, result_file
from jaxstages.training.metric_writer import METRICS, read_metrics

PARENTS = "parents"
"""Folder, in that of a sweep, of the runs that train shared stages."""


class Run(NamedTuple):
    """A run as its workdir records it.

    recipe: the recipe as nested dicts, as in `recipe.json`; versions: of the packages that it was last run with.
    results: the content of `result.json` of each finished stage.
    metrics: the lines of `metrics.jsonl` of each stage that has begun.
    matrix: the content of `stage_matrix.json`; None if there is none.
    """

    folder: Path
    recipe: dict[str, Any]
    versions: dict[str, str]
    results: dict[str, dict[str, Any]]
    metrics: dict[str, list[dict[str, Any]]]
    matrix: dict[str, Any] | None

    @property
    def stages(self) -> list[str]:
        """Names of the stages that have begun, in the recipe's order."""
        return list(self.metrics)

    def curve(self, stage: str, kind: str, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric in the lines of a kind, "train" or "eval", where it is finite."""
        lines = self.metrics.get(stage, [])
        return [(line["step"], line[metric]) for line in lines if line["kind"] == kind and line.get(metric) is not None]

    def events(self, stage: str, event: str) -> list[dict[str, Any]]:
        """Return the event lines of a stage with this name, such as "step skipped"."""
        return [line for line in self.metrics.get(stage, []) if line["kind"] == "event" and line["event"] == event]

    def last_step(self, stage: str) -> int:
        """Return the last step that a stage has logged."""
        return max((line["step"] for line in self.metrics.get(stage, [])), default=0)


def stage_names(recipe: dict[str, Any]) -> list[str]:
    """List the stages of a recorded recipe, in order."""
    names = [name for name in ("pretrain", "finetune", "instruct") if recipe.get(name) is not None]
    return names + list(recipe.get("extra_stages") or {})


def stage_config(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a stage of a recorded recipe."""
    return recipe[name] if recipe.get(name) is not None else recipe["extra_stages"][name]


def read_run(folder: Path) -> Run:
    """Read a workdir.

    Raises:
        ValueError: it is no workdir, or a file of it is damaged.
    """
    file = folder / "recipe.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no workdir: it has no recipe.json; name the folder of a run")
    content = read_json(file, {"recipe": (dict,)})
    try:  # fields that are younger than the run have their defaults
        content["recipe"] = recipes.to_dict(recipes.from_dict(content["recipe"]))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    names = [name for name in stage_names(content["recipe"]) if has_begun(folder / name)]
    results = {name: finished(folder / name) for name in names if result_file(folder / name).exists()}
    metrics = {name: read_metrics(folder / name / METRICS) for name in names}
    matrix_file = folder / "stage_matrix.json"
    matrix = read_json(matrix_file) if matrix_file.is_file() else None
    return Run(folder, content["recipe"], content.get("versions", {}), results, metrics, matrix)


def find_runs(patterns: list[str]) -> list[Path]:
    """Return the workdirs that paths and patterns name, each once. A folder of workdirs, as of a sweep, means them all.

    Raises:
        ValueError: a path or pattern names no workdir.
    """
    folders: dict[Path, None] = {}
    for pattern in patterns:
        path = parse_path(pattern, "a run")
        if is_bucket(path) or path.exists():
            runs = _workdirs(path if is_bucket(path) else path.resolve())
        else:
            matches = [Path(name).resolve() for name in sorted(glob.glob(pattern))]
            runs = [run for match in matches if not _is_parents(match) for run in _workdirs(match)]
        if not runs:
            raise ValueError(f"{pattern} names no workdir; name the folder of a run or of a sweep, or a pattern")
        folders |= dict.fromkeys(runs)
    return list(folders)


def _workdirs(folder: Path) -> list[Path]:
    if _is_workdir(folder):
        return [folder]
    return [path for path in sorted(folder.iterdir()) if _is_workdir(path)] if folder.is_dir() else []


def _is_parents(folder: Path) -> bool:
    """Return whether a folder holds the parents of a sweep's trials, which a pattern for the trials matches too."""
    return folder.name == PARENTS and (folder.parent / "sweep.json").is_file()


def _is_workdir(folder: Path) -> bool:
    return (folder / "recipe.json").is_file()


def best_line(run: Run, stage: str) -> dict[str, Any] | None:
    """Return the best evaluation of an unfinished stage so far, by its early-stopping metric; None if there is none.

    `early_stopping.within` is not considered.
    """
    stopping = stage_config(run.recipe, stage)["early_stopping"]
    metric, choose = stopping["metric"], max if stopping["mode"] == "max" else min
    lines = [line for line in run.metrics[stage] if line["kind"] == "eval" and line["step"]]
    return choose((line for line in lines if line.get(metric) is not None), key=lambda line: line[metric], default=None)
