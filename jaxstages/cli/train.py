"""`run`, `pretrain`, `finetune`, `instruct`: do what is not done, resume what is begun."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import finished
from jaxstages.cli.resolve import keep_recipe, told
from jaxstages.config import Recipe
from jaxstages.config.checks import validate
from jaxstages.data.stage_data import prepare_stages
from jaxstages.experiments.stage_matrix import stage_matrix
from jaxstages.interop.hf_import import bring, source_of
from jaxstages.runtime import lost_host, multihost
from jaxstages.runtime.cluster import ProcessInfo
from jaxstages.runtime.console import say
from jaxstages.runtime.files import read_json
from jaxstages.runtime.workdir import check_workdir, has_begun, lock, result_file
from jaxstages.stages import extra, finetune, instruct, pretrain
from jaxstages.train.handoff import check_lineage
from jaxstages.types import Diverged, Interrupted

SHOWN_WITHIN = 60
"""Seconds that shared storage has to show what process 0 has written: attributes are cached on NFS."""

DRIVERS = {"pretrain": pretrain.run, "finetune": finetune.run, "instruct": instruct.run}
"""The three stages; `stages.extra` trains the others."""


def train(
    recipe: Recipe,
    workdir: Path,
    name: str,
    place: ProcessInfo | None = None,
    lengthen: bool = False,
    finish: bool = False,
) -> bool:
    """One stage; False if `stop_after` ended it before its end.

    Args:
        lengthen: the stage is finished, and goes on to the end that the recipe has now.
        finish: the stage ends at the step that it has saved, and hands on its best one.
    """
    if finish and lengthen:
        raise ValueError("--finish ends a stage, and --lengthen goes on with it; give one of them")
    if finish and not has_begun(workdir / name):
        raise ValueError(f"--finish: {workdir / name} has saved no step; there is nothing to hand on")
    with _ready(recipe, workdir, [name], place):
        if lengthen and multihost.is_process_zero():
            _reopen(recipe, workdir, name)
        multihost.barrier(f"{name} may go on")
        return _train(recipe, workdir, name, finish)


def _reopen(recipe: Recipe, workdir: Path, name: str) -> None:
    """Make a finished stage one that goes on: its result is kept as `result-STEP.json`.

    Raises:
        ValueError: it has stopped early, or a later stage has begun from it; then nothing is changed.
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
    if after := [other for other in later if has_begun(workdir / other)]:
        raise ValueError(f"--lengthen: {after[0]} has begun from {name}; remove {workdir / after[0]} first")
    file.rename(file.with_name(f"result-{result['steps']}.json"))
    say(f"{name}: was finished at step {result['steps']}, and goes on", "cyan")


def run_stages(recipe: Recipe, workdir: Path, place: ProcessInfo | None = None) -> None:
    """All stages of the recipe, one after the other, and then the stage matrix."""
    names = list(recipes.stages(recipe))
    if not names:
        raise ValueError("the recipe has no stage to run; name one that has with --config=FILE")
    with _ready(recipe, workdir, names, place):
        if all(_train(recipe, workdir, name) for name in names):
            stage_matrix(recipe, workdir)


@contextlib.contextmanager
def _ready(recipe: Recipe, workdir: Path, names: list[str], place: ProcessInfo | None) -> Iterator[None]:
    """The run's lock, and the data of all stages prepared: what is bad in a late one is found now, not after hours.

    Of several processes the first does that alone, and the others join it when it is done. Then all see that they have
    the same recipe, versions and rows.
    """
    check_workdir(workdir)
    validate(recipe, result_file(workdir / recipes.IMPORT).exists())
    with contextlib.ExitStack() as held:
        if place is not None:
            say(str(place), "cyan")
        if place is None or place.process_id == 0:
            held.enter_context(lock(workdir))
            keep_recipe(recipe, workdir)
            _import(recipe, workdir, place)
            _warn_of_positions(recipe, workdir)
            prepare_stages(recipe, workdir, names)
        if place is None:
            yield
            return
        multihost.join(place)
        try:
            _compare(recipe, workdir, names)
            yield
        except Interrupted:  # so are the others
            multihost.leave()
            raise
        except (Diverged, FloatingPointError):  # a number of the run, not of a host
            raise
        except Exception as error:
            lost_host.wait_for_lost_peer(error)
            raise
        multihost.leave()


def _compare(recipe: Recipe, workdir: Path, names: list[str]) -> None:
    """Raises ValueError, in all processes, where one would train something else than the others."""
    there = {"recipe.json in --workdir": "there" if _appears(workdir / "recipe.json") else "missing"}
    multihost.assert_same_on_all_hosts(told(recipe) | there)
    rows = prepare_stages(recipe, workdir, names)
    multihost.assert_same_on_all_hosts(
        {f"the rows of {name}": " ".join(part.folder.name for part in rows[name]) for name in names}
    )


def _appears(file: Path) -> bool:
    """Is it there? What another host has just written, network storage may show a while later."""
    end = time.monotonic() + SHOWN_WITHIN
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _import(recipe: Recipe, workdir: Path, place: ProcessInfo | None) -> None:
    """What the recipe starts from, where that is a folder of Hugging Face's form."""
    if (source := source_of(recipe)) is None:
        return
    if place is not None and not result_file(workdir / recipes.IMPORT).exists():
        raise ValueError(f"of several processes none imports; run `jaxstages import --from={source}` first, in one")
    bring(recipe, workdir, source)


def _warn_of_positions(recipe: Recipe, workdir: Path) -> None:
    """Say where rows are longer than any that imported weights were trained on."""
    file, context = result_file(workdir / recipes.IMPORT), recipe.model.context
    source = read_json(file).get("source", {}) if file.exists() else {}
    if 0 < (positions := source.get("positions", 0)) < context:
        say(
            f"config.model.context={context} is more than the {positions} positions that {source['folder']} was "
            "trained on: it has met none beyond them. Train long rows, or set context lower",
            "yellow",
        )


def _train(recipe: Recipe, workdir: Path, name: str, finish: bool = False) -> bool:
    if result_file(workdir / name).exists():
        result = finished(workdir / name)
        check_lineage(workdir / name, result["parent"], recipes.stages(recipe)[name])
        say(f"{name}: already {result['status']} at step {result['steps']}, best step {result['best_step']}", "cyan")
        return True
    if name in DRIVERS:
        return DRIVERS[name](recipe, workdir, finish) is not None
    return extra.run(recipe, name, workdir, finish) is not None
