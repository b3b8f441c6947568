"""Choice of the checkpoint that a command reads: by default the best one, which is handed on. An unfinished stage gives
its best so far, and --step any step that is kept."""

from pathlib import Path
from typing import Any

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import finished, read_meta
from jaxstages.runtime.console import warn
from jaxstages.runtime.workdir import checkpoint_folder, result_file, steps_of
from jaxstages.training.handoff import lineage_break


def choose(recipe: recipes.Recipe, stage_dir: Path, step: int | None = None) -> dict[str, Any]:
    """Choose the checkpoint that a command reads, and return its `result_at`. Warn if it is not the one that is handed
    on, or if its parent has been trained anew."""
    result = result_at(stage_dir, step)
    stage = recipes.stages(recipe).get(stage_dir.name)
    for note in (describe(stage_dir, result), lineage_break(stage_dir, result["parent"], stage)):
        if note:
            warn(note)
    return result


def result_at(stage_dir: Path, step: int | None = None) -> dict[str, Any]:
    """Return the result of a stage at a step.

    For an unfinished stage, or a step that is not handed on, the result is made from the checkpoint: `status` is
    "unfinished" or "kept", and `params_sha256` is "".

    Args:
        step: by default the best one, or the newest if the best is not known or was removed.

    Raises:
        ValueError: the stage was not trained, or does not keep this step.
    """
    steps = steps_of(stage_dir)
    if result_file(stage_dir).exists() and (step is None or finished(stage_dir)["best_step"] == step):
        return finished(stage_dir)
    if not steps:
        return finished(stage_dir)  # raises, and names the command to run
    if step is not None and step not in steps:
        raise ValueError(f"{stage_dir} keeps no step {step}; --step can be {', '.join(map(str, steps))}")
    newest = read_meta(checkpoint_folder(stage_dir, steps[-1]))
    best = newest["best_step"] if newest["best_step"] in steps else steps[-1]
    chosen = best if step is None else step
    meta = read_meta(checkpoint_folder(stage_dir, chosen))
    is_best = chosen == newest["best_step"]
    return {
        "stage": meta["stage"],
        "status": "unfinished" if step is None else "kept",
        "steps": steps[-1],
        "best_step": chosen,
        "best": newest["carried"].get("best", {}) if is_best else {},
        "handed_on": newest["carried"].get("handed_on", "params") if is_best else "params",
        "tokens": meta["carried"].get("tokens", 0),
        "params_sha256": "",
        "parent": meta["parent"],
    }


def describe(stage_dir: Path, result: dict[str, Any]) -> str:
    """Describe a `result_at` whose parameters are not the ones that are handed on; "" for those that are."""
    match result["status"]:
        case "unfinished":
            which = f"its best so far, step {result['best_step']}" if result["best"] else f"step {result['best_step']}"
            return f"{stage_dir.name} is not finished, at step {result['steps']}: this is {which}"
        case "kept":
            return f"{stage_dir.name}: this is step {result['best_step']}, not the one that is handed on"
    return ""


def last_finished(recipe: recipes.Recipe, workdir: Path) -> str:
    """Return the last finished stage of the recipe, else the import, else the last stage that has a checkpoint.

    Raises:
        ValueError: the workdir has none of them.
    """
    names = (recipes.IMPORT, *recipes.stages(recipe))
    done = [name for name in names if result_file(workdir / name).exists()]
    done = done or [name for name in names if steps_of(workdir / name)]
    if not done:
        raise ValueError(f"{workdir} has no finished stage; train one with `jaxstages run --workdir={workdir}`")
    return done[-1]
