"""The process of `sweep --together`: it trains the swept stage of all trials with one compiled step."""

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxstages.cli.parse import parse
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.cli.train import prepared
from jaxstages.experiments.sweep import Trial
from jaxstages.runtime.console import say
from jaxstages.runtime.files import read_json
from jaxstages.runtime.signals import stop_signals
from jaxstages.runtime.workdir import result_file
from jaxstages.training.setup import setup_stage
from jaxstages.training.together import check_together, train_together
from jaxstages.types import Interrupted


def train_trials(folder: Path, stage: str, config_flags: Sequence[str]) -> None:
    """Train a stage of those trials of a sweep that have not finished it, spread over the devices of this machine.

    Args:
        folder: folder of the sweep, with its `sweep.json`.
        config_flags: `--config=...` and `--config.FIELD=...` without the changes of a trial.

    Raises:
        ValueError: the trials can't be trained together, or some of them failed.
        Interrupted: a signal asked to stop; every trial is resumable.
    """
    trials = [Trial(**trial) for trial in read_json(folder / "sweep.json")["trials"]]
    trials = [trial for trial in trials if not result_file(folder / trial.name / stage).exists()]
    with contextlib.ExitStack() as locks:
        setups, devices = [], itertools.cycle(jax.local_devices())
        for trial in trials:
            workdir = folder / trial.name
            recipe = resolve_recipe(parse("sweep", ["", "sweep", *config_flags, *trial.flags])[1], workdir)
            locks.enter_context(prepared(recipe, workdir, [stage], None))
            setups.append(setup_stage(recipe, stage, workdir, devices=[next(devices)]))
        check_together([setup.recipe for setup in setups], stage)

        with stop_signals() as signals:
            signals.unsaved = True
            outcomes = train_together(setups, signals)

    failures = {t.name: each for t, each in zip(trials, outcomes, strict=True) if isinstance(each, Exception)}
    interrupted = [name for name, error in failures.items() if isinstance(error, Interrupted)]
    for name in failures.keys() - interrupted:
        say(f"{name}: {failures[name]}", "red")
    if interrupted:
        raise Interrupted(f"{stage}: {len(interrupted)} trials have saved; start the sweep again to go on")
    if failures:
        raise ValueError(f"{stage}: {len(failures)} of {len(trials)} trials failed: {', '.join(failures)}")
