"""`run`, `train`, `pretrain`, `finetune`, `instruct`: train what is missing, and resume what is unfinished."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import finished
from jaxstages.checkpoint.staging import check_processes
from jaxstages.cli.resolve import check_stage, flatten_fields, keep_recipe
from jaxstages.config import Recipe
from jaxstages.config.checks import validate
from jaxstages.data.stage_data import prepare_stages
from jaxstages.experiments.report import write_report
from jaxstages.experiments.stage_matrix import stage_matrix
from jaxstages.interop.hf_import import import_folder, source_of
from jaxstages.runtime import bucket, lost_host, multihost
from jaxstages.runtime.cluster import ProcessInfo
from jaxstages.runtime.console import say
from jaxstages.runtime.files import read_json
from jaxstages.runtime.workdir import check_workdir, has_begun, lock, result_file
from jaxstages.stages import extra, finetune, instruct, pretrain
from jaxstages.training.handoff import check_lineage
from jaxstages.training.stage import RunOptions
from jaxstages.training.trackers import trackers_of
from jaxstages.types import Diverged, Interrupted

VISIBLE_SECONDS = 60
"""Time for a file that process 0 has written to appear on other hosts: NFS caches attributes."""

DRIVERS = {"pretrain": pretrain.run, "finetune": finetune.run, "instruct": instruct.run}
"""Drivers of the three stages; `stages.extra` trains all others."""


def train(
    recipe: Recipe,
    workdir: Path,
    name: str,
    process: ProcessInfo | None = None,
    lengthen: bool = False,
    options: RunOptions = RunOptions(),
) -> bool:
    """Train one stage. Returns False if `stop_after` ended the run before the end of the stage.

    Args:
        process: this process, if it is one of several.
        lengthen: train a finished stage further, up to the recipe's new length.

    Raises:
        ValueError: the recipe or the workdir does not allow it.
    """
    check_stage(name, recipe, with_import=False)
    if options.finish and lengthen:
        raise ValueError("--finish ends a stage, and --lengthen goes on with it; give one of them")
    if options.finish and not has_begun(workdir / name):
        raise ValueError(f"--finish: {workdir / name} has saved no step; there is nothing to hand on")

    with prepared(recipe, workdir, [name], process):
        if lengthen and multihost.is_process_zero():
            _reopen(recipe, workdir, name)
        multihost.barrier(f"{name} may go on")
        return _train(recipe, workdir, name, options)


def run_stages(
    recipe: Recipe, workdir: Path, process: ProcessInfo | None = None, options: RunOptions = RunOptions()
) -> None:
    """Train all stages of the recipe, one after the other, then print the stage matrix and write the report."""
    names = list(recipes.stages(recipe))
    if not names:
        raise ValueError("the recipe has no stage to run; name one that has with --config=RECIPE")
    with prepared(recipe, workdir, names, process):
        if all(_train(recipe, workdir, name, options) for name in names):
            stage_matrix(recipe, workdir)
            if multihost.is_process_zero():
                _report(recipe, workdir)


def _report(recipe: Recipe, workdir: Path) -> None:
    """Write the report. The run is finished by then: what keeps the report from being written does not fail it."""
    try:
        say(f"report: {write_report(workdir, recipe)}")
    except Exception as error:
        if not isinstance(error, ValueError | OSError) and not bucket.explain(error):
            raise
        say(f"no report was written: {error}; `jaxstages report --workdir={workdir}` writes it", "yellow")


def _train(recipe: Recipe, workdir: Path, name: str, options: RunOptions) -> bool:
    if result_file(workdir / name).exists():
        result = finished(workdir / name)
        check_lineage(workdir / name, result["parent"], recipes.stages(recipe)[name])
        say(f"{name}: already {result['status']} at step {result['steps']}, best step {result['best_step']}", "cyan")
        return True
    if name in DRIVERS:
        return DRIVERS[name](recipe, workdir, options) is not None
    return extra.run(recipe, name, workdir, options) is not None


def _reopen(recipe: Recipe, workdir: Path, name: str) -> None:
    """Turn a finished stage into an unfinished one, and keep its result as `result-STEP.json`.

    Raises:
        ValueError: it stopped early, or a later stage has begun from it. Nothing is changed then.
    """
    file = result_file(workdir / name)
    if not file.exists():
        return
    result = finished(workdir / name)
    if result["status"] == "early_stopped":
        raise ValueError(f"--lengthen: {name} stopped early, at step {result['steps']}; it would make no more steps")

    loop, names = recipes.stages(recipe)[name].loop, list(recipes.stages(recipe))
    if 0 < loop.steps <= result["steps"]:
        raise ValueError(
            f"--lengthen: {name} has made {result['steps']} steps; set --config.{name}.loop.steps to more than that"
        )
    later = names[names.index(name) + 1 :]
    if begun := [stage for stage in later if has_begun(workdir / stage)]:
        raise ValueError(f"--lengthen: {begun[0]} has begun from {name}; remove {workdir / begun[0]} first")

    file.rename(file.with_name(f"result-{result['steps']}.json"))
    say(f"{name}: was finished at step {result['steps']}, and goes on", "cyan")


# Before the stages ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def prepared(recipe: Recipe, workdir: Path, names: list[str], process: ProcessInfo | None) -> Iterator[None]:
    """Hold the run's lock, with the data of all stages prepared, so that a fault in a late stage shows now and not
    after hours.

    Of several processes, process 0 prepares alone, and the others join it when it is done. Then all of them compare
    recipe, versions and rows.
    """
    check_workdir(workdir)
    check_processes(workdir, 1 if process is None else process.process_count)
    validate(recipe, result_file(workdir / recipes.IMPORT).exists())
    with contextlib.ExitStack() as stack:
        if process is not None:
            say(str(process), "cyan")
        if process is None or process.process_id == 0:
            trackers_of(recipe)  # a missing package shows now
            stack.enter_context(lock(workdir))
            keep_recipe(recipe, workdir)
            _import(recipe, workdir, process)
            _warn_of_positions(recipe, workdir)
            prepare_stages(recipe, workdir, names)
        if process is None:
            yield
            return

        multihost.join(process)
        try:
            _compare(recipe, workdir, names)
            yield
        except Interrupted:  # all processes are interrupted together
            multihost.leave()
            raise
        except (Diverged, FloatingPointError):  # faults of the numbers, which are the same in all processes
            raise
        except Exception as error:
            lost_host.wait_for_lost_peer(error)
            raise
        multihost.leave()


def _compare(recipe: Recipe, workdir: Path, names: list[str]) -> None:
    """Raise ValueError in all processes if one of them would train something else."""
    state = {"recipe.json in --workdir": "there" if _appears(workdir / "recipe.json") else "missing"}
    multihost.assert_same_on_all_hosts(flatten_fields(recipe) | state)
    rows = prepare_stages(recipe, workdir, names)
    multihost.assert_same_on_all_hosts(
        {f"the rows of {name}": " ".join(part.folder.name for part in rows[name]) for name in names}
    )


def _appears(file: Path) -> bool:
    """Wait for a file that another host has written. Returns False if it does not appear."""
    end = time.monotonic() + VISIBLE_SECONDS
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _import(recipe: Recipe, workdir: Path, process: ProcessInfo | None) -> None:
    """Import the Hugging Face checkpoint folder that the recipe starts from, if there is one."""
    if (source := source_of(recipe)) is None:
        return
    if process is not None and not result_file(workdir / recipes.IMPORT).exists():
        raise ValueError(f"of several processes none imports; run `jaxstages import --from={source}` first, in one")
    import_folder(recipe, workdir, source)


def _warn_of_positions(recipe: Recipe, workdir: Path) -> None:
    """Warn if rows are longer than those that imported weights were trained on."""
    file, context = result_file(workdir / recipes.IMPORT), recipe.model.context
    source = read_json(file).get("source", {}) if file.exists() else {}
    if 0 < (positions := source.get("positions", 0)) < context:
        say(
            f"config.model.context={context} is more than the {positions} positions that {source['folder']} was "
            "trained on. Train long rows, or set context lower",
            "yellow",
        )
