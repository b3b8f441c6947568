"""`sweep`: train a recipe with several values of some fields, each in a workdir of its own, then compare the runs.

The driver starts one process per trial and keeps no state of its own: the workdirs tell what is done, so a sweep that
was killed goes on when it is started again.
"""

import collections
import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jaxstages import config as recipes
from jaxstages.cli.flags import TOGETHER
from jaxstages.cli.resolve import kept_recipe, resolve_recipe
from jaxstages.cli.sweep_flags import SweepLine
from jaxstages.config import Recipe
from jaxstages.config.metrics import higher_is_better
from jaxstages.experiments.runs import PARENTS, read_run
from jaxstages.experiments.sweep import (
    Halving,
    Trial,
    make_halving,
    parent_trial,
    promotable,
    shared_stages,
)
from jaxstages.runtime.console import duration, say
from jaxstages.runtime.files import acquire_lock, make_folder, sync, write_json
from jaxstages.runtime.signals import END_WITH_PARENT, INTERRUPTED, Stop, stop_signals
from jaxstages.runtime.workdir import begun_stages, has_begun, lock, result_file, steps_of
from jaxstages.types import Interrupted

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SweepOptions:
    """parallel: trials at a time. index: the only trial to run, for arrays of a cluster; None runs all.
    halving, first_rung: factor and first rung of successive halving; a factor of 0 trains every trial to its end.
    hours: no trial starts after this time, and those that run save and end; 0 is no limit.
    together: train the swept stage of all trials in one process, with one compiled step.
    """

    parallel: int = 1
    index: int | None = None
    halving: int = 0
    first_rung: int = 0
    hours: float = 0.0
    together: bool = False


class Sweep:
    """A sweep in progress."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        trials: Sequence[Trial],
        config_flags: Sequence[str],
        options: SweepOptions,
    ) -> None:
        """
        Args:
            folder: folder of the sweep. Each trial has a workdir in it.
            recipe: the recipe without the changes of a trial.
            config_flags: `--config=...` and `--config.FIELD=...` of the command line, for the trials' processes.

        Raises:
            ValueError: the sweep's options do not fit the recipe.
        """
        self.folder, self.recipe, self.trials, self.options = folder, recipe, trials, options
        self._config_flags = list(config_flags)
        if not recipe.cache:
            self._config_flags.append(f"--config.cache={folder / 'cache'}")
        self._stages = list(recipes.stages(recipe))
        self._shared = shared_stages(trials, recipe)
        self._swept = self._stages[len(self._shared)]
        self._halving: Halving | None = None
        if options.halving:
            loop = recipes.stages(recipe)[self._swept].loop
            self._halving = make_halving(options.halving, options.first_rung, loop.steps, loop.eval_every)
        elif options.first_rung:
            raise ValueError(f"--first_rung={options.first_rung} has no effect without --halving=FACTOR; add that")
        if options.together and (options.halving or options.index is not None):
            raise ValueError("--together trains all trials to their end; leave out --halving and --index")

    # One trial ----------------------------------------------------------------------------------------------------

    def _command(self, workdir: Path, trial: Trial, command: Sequence[str], more: Sequence[str] = ()) -> list[str]:
        flags = [*self._config_flags, *trial.flags, *more]
        return [sys.executable, "-m", "jaxstages", *command, f"--workdir={workdir}", *flags]

    def is_done(self, trial: Trial) -> bool:
        return all(result_file(self.folder / trial.name / name).exists() for name in self._stages)

    def check_begun(self, recipe_of: Mapping[str, Recipe]) -> None:
        """Check that runs which have begun, trials and the parents that they share, are those of this sweep.

        Args:
            recipe_of: name of a trial -> its recipe.

        Raises:
            ValueError: a run was begun with another recipe.
        """
        for trial in self.trials:
            recipe, workdir, parent_dir = recipe_of[trial.name], self.folder / trial.name, self._parent_folder(trial)
            if begun_stages(workdir):
                resolve_recipe(recipe, workdir)
            if begun_stages(parent_dir) and (kept := kept_recipe(parent_dir)) is not None:
                resolve_recipe(self._with_shared_stages(recipe, kept), parent_dir)

    def _with_shared_stages(self, recipe: Recipe, other: Recipe) -> Recipe:
        """Return the recipe with the stages of another one, apart from the shared stages."""
        later = [name for name in self._stages if name not in self._shared]
        extra = {name: other.extra_stages.get(name, stage) for name, stage in recipe.extra_stages.items()}
        extra |= {name: recipe.extra_stages[name] for name in self._shared if name in recipe.extra_stages}
        main = {name: getattr(other, name) for name in later if name in recipes.STAGES}
        return replace(recipe, extra_stages=extra, **main)

    def rungs(self, trial: Trial) -> dict[int, float]:
        """Return the score of a trial at each rung that it has completed, by the rung's index."""
        stage_dir = self.folder / trial.name / self._swept
        if self._halving is None or not has_begun(stage_dir):
            return {}
        *before, _ = self._halving.rungs
        step = math.inf if result_file(stage_dir).exists() else steps_of(stage_dir)[-1]
        scores = {index: self.score(trial, rung) for index, rung in enumerate(before) if step >= rung}
        return scores | ({len(before): self.score(trial)} if self.is_done(trial) else {})

    def score(self, trial: Trial, up_to: float = math.inf) -> float:
        """Return the best value of the early-stopping metric in the swept stage, so that lower is better; NaN if there
        is none yet.

        Args:
            up_to: the last step that counts.
        """
        run = read_run(self.folder / trial.name)
        stop = recipes.stages(self.recipe)[self._swept].early_stopping
        values = [value for step, value in run.curve(self._swept, "eval", stop.metric) if 0 < step <= up_to]
        if not values:
            return math.nan
        higher = higher_is_better(stop.metric, recipes.all_metrics(self.recipe))
        return -max(values) if higher else min(values)

    def prepare(self, trial: Trial, run: Callable[[list[str], Path], int]) -> int:
        """Give a trial the stages that it shares with others: train them once, then copy them. Returns an exit code."""
        workdir = self.folder / trial.name
        if not self._shared or has_begun(workdir / self._shared[0]):
            return 0
        parent = parent_trial(trial, self.recipe)
        parent_dir, log = self._parent_folder(trial), self.parent_log(trial)
        make_folder(parent_dir.parent)
        with acquire_lock(parent_dir.with_name(f"{parent.name}.lock"), wait=True):  # of several --index processes
            for name in self._shared:
                if not result_file(parent_dir / name).exists():
                    command = [name] if name in recipes.STAGES else ["train", f"--stage={name}"]
                    if code := run(self._command(parent_dir, parent, command), log):
                        return code
        copy = workdir.with_name(f".{workdir.name}.tmp")
        shutil.rmtree(copy, ignore_errors=True)
        for name in ("tokenizer", recipes.IMPORT, *self._shared):
            if (parent_dir / name).is_dir():
                shutil.copytree(parent_dir / name, copy / name)
        for path in (*copy.rglob("*"), copy):
            sync(path)
        shutil.rmtree(workdir, ignore_errors=True)  # nothing has begun there
        copy.rename(workdir)
        sync(workdir.parent)
        return 0

    def _parent_folder(self, trial: Trial) -> Path:
        """Return the workdir of the run that trains the stages which a trial shares with others."""
        return self.folder / PARENTS / parent_trial(trial, self.recipe).name

    def parent_log(self, trial: Trial) -> Path:
        parent_dir = self._parent_folder(trial)
        return parent_dir.with_name(f"{parent_dir.name}.log")

    def command_of(self, trial: Trial, rung: int | None = None) -> list[str]:
        """Return the command that trains a trial, to its end or to a rung."""
        rungs = self._halving.rungs if self._halving else []
        steps = rungs[rung] if rungs and rung is not None and rung < len(rungs) - 1 else 0
        more = [f"--config.{_field(self._swept)}.loop.stop_after={steps}"] if rungs else []
        return self._command(self.folder / trial.name, trial, ["run"], more)

    def command_together(self) -> list[str]:
        """Return the command that trains the swept stage of all trials with one compiled step."""
        return [sys.executable, "-m", "jaxstages", TOGETHER, str(self.folder), self._swept, *self._config_flags]

    def is_trained(self, trial: Trial) -> bool:
        """Whether the swept stage of a trial is finished."""
        return result_file(self.folder / trial.name / self._swept).exists()

    # All trials -----------------------------------------------------------------------------------------------------

    def run_all(self) -> None:
        """Run all trials that are not done.

        Raises:
            ValueError: a trial failed; the others were run.
            Interrupted: a signal asked to stop, or the time is over; every trial is resumable.
        """
        write_json(self.folder / "sweep.json", {"trials": [trial._asdict() for trial in self.trials]})
        with stop_signals() as signals:
            signals.unsaved = True  # the trials save; this process waits for them
            driver = _Driver(self, signals)
            if self.options.together:
                driver.train_together()
            failed = driver.run()
        if failed:
            logs = ", ".join(dict.fromkeys(map(str, failed.values())))  # of one parent, the trials have the same log
            raise ValueError(
                f"{len(failed)} of {len(self.trials)} trials failed; see {logs}, and start the sweep again"
            )

    def run_one(self, index: int) -> int:
        """Run one trial in the foreground, and return its exit code. A signal is forwarded to it."""
        if not 0 <= index < len(self.trials):
            raise ValueError(f"--index={index}: the sweep has {len(self.trials)} trials, 0 to {len(self.trials) - 1}")
        if self._halving is not None:
            raise ValueError("--halving compares trials while they run, and does not go with --index; leave one out")
        trial, end = self.trials[index], self.ends_at()
        say(f"trial {index + 1} of {len(self.trials)}: {trial.name}", "cyan")

        def run(command: list[str]) -> int:
            process, signals.unsaved = _spawn(command), True  # the trial saves; this process waits for it
            code = _wait(process, lambda: signals.poll() or time.monotonic() > end)
            signals.unsaved = False
            return code

        with stop_signals() as signals:
            return self.prepare(trial, lambda command, _: run(command)) or run(self.command_of(trial))

    def ends_at(self) -> float:
        """Return the time, as of `time.monotonic`, at which `--hours` are over."""
        return time.monotonic() + self.options.hours * 3600 if self.options.hours else math.inf


class _Running(NamedTuple):
    """Process of a trial, the time of its start, and its slot; see `_device_slots`."""

    process: subprocess.Popen
    began: float
    slot: int


class _Driver:
    """Runs trials in child processes, a few at a time."""

    def __init__(self, sweep: Sweep, signals: Stop) -> None:
        self._sweep, self._signals = sweep, signals
        self._running: dict[str, _Running] = {}
        self._seconds: list[float] = []
        self._failed: dict[str, Path] = {}
        self._scores = {trial.name: sweep.rungs(trial) for trial in sweep.trials}
        self._rung = {name: max(scores, default=0) for name, scores in self._scores.items()}
        self._end = sweep.ends_at()
        self._devices = _device_slots(sweep.options.parallel)

    def run(self) -> dict[str, Path]:
        """Run to the end. Returns the trials that failed, each with its log."""
        unfinished = [trial for trial in self._sweep.trials if not self._sweep.is_done(trial)]
        waiting = [trial for trial in unfinished if not self._scores[trial.name]]  # the others wait at a rung
        done = len(self._sweep.trials) - len(unfinished)
        say(
            f"sweep: {len(self._sweep.trials)} trials, {done} of them done; {self._sweep.options.parallel} at a time",
            "bold",
        )
        while True:
            self._check_time()
            while len(self._running) < self._sweep.options.parallel and (trial := self._next(waiting)) is not None:
                self._start(trial)
            if not self._running:
                return self._failed
            time.sleep(POLL_SECONDS)
            for name, trial in list(self._running.items()):
                if (code := trial.process.poll()) is not None:
                    del self._running[name]
                    self._ended(name, code, time.monotonic() - trial.began, len(waiting))

    def train_together(self) -> None:
        """Train the swept stage of all trials in one process. A trial that it could not train is left to `run`."""
        sweep = self._sweep
        waiting = [trial for trial in sweep.trials if not sweep.is_trained(trial)]
        if len(waiting) < 2:
            return
        for trial in waiting:
            self._wait_for_lock(trial)
            if sweep.prepare(trial, self._run_parent):
                return  # `run` reports it
        log = sweep.folder / "together.log"
        say(f"sweep: trains {len(waiting)} trials together; see {log}", "cyan")
        code = self._run_to_end(sweep.command_together(), log, {})
        if code == INTERRUPTED:
            self._interrupt("its trials were interrupted")
        if code:
            say(f"sweep: ended with code {code}; see {log}; what is left is trained one trial at a time", "yellow")

    def _next(self, waiting: list[Trial]) -> Trial | None:
        halving = self._sweep._halving
        if halving is not None and (name := promotable(halving, self._rung, self._scores)) is not None:
            self._rung[name] += 1
            return next(trial for trial in self._sweep.trials if trial.name == name)
        return waiting.pop(0) if waiting else None

    def _start(self, trial: Trial) -> None:
        self._wait_for_lock(trial)
        if code := self._sweep.prepare(trial, self._run_parent):
            if code == INTERRUPTED:
                self._interrupt(f"the parent of {trial.name} was interrupted")
            log = self._failed[trial.name] = self._sweep.parent_log(trial)
            say(f"{trial.name}: the stages before it failed with code {code}; see {log}", "red")
            return
        rung, slot = self._rung[trial.name] if self._sweep._halving else None, self._free_slot()
        process = _spawn(self._sweep.command_of(trial, rung), self._log(trial.name), self._devices[slot])
        self._running[trial.name] = _Running(process, time.monotonic(), slot)
        say(f"{trial.name}: started" + (f", to rung {rung + 1}" if rung is not None else ""))

    def _free_slot(self) -> int:
        """Return the slot with the fewest trials."""
        used = collections.Counter(trial.slot for trial in self._running.values())
        return min(range(len(self._devices)), key=lambda slot: used[slot])

    def _log(self, name: str) -> Path:
        return self._sweep.folder / f"{name}.log"

    def _wait_for_lock(self, trial: Trial) -> None:
        """Wait while another process trains a trial: one of a sweep that was killed, which is saving, or a run that was
        started by hand."""
        workdir, waits = self._sweep.folder / trial.name, False
        while workdir.is_dir():
            try:
                acquire_lock(workdir / "LOCK", wait=False).close()
                return
            except BlockingIOError:
                if not waits:
                    say(f"{trial.name}: waits for the process that trains it", "yellow")
                waits = True
                self._check_time()
                time.sleep(POLL_SECONDS)

    def _run_parent(self, command: list[str], log: Path) -> int:
        say(f"{log.stem}: {command[3]}, for all trials that start from it", "cyan")
        return self._run_to_end(command, log, self._devices[self._free_slot()])

    def _run_to_end(self, command: list[str], log: Path, environment: dict[str, str]) -> int:
        """Run a process and return its exit code. No trial is started meanwhile."""
        code = _wait(_spawn(command, log, environment), lambda: self._signals.poll() or time.monotonic() > self._end)
        self._check_time()
        return code

    def _ended(self, name: str, code: int, seconds: float, waiting: int) -> None:
        trial = next(trial for trial in self._sweep.trials if trial.name == name)
        if code == INTERRUPTED:
            self._interrupt(f"{name} was interrupted")
        if code:
            self._report_failure(name, code)
            return
        self._seconds.append(seconds)
        score = self._sweep.score(trial)
        self._scores[name] = self._sweep.rungs(trial)
        self._rung[name] = max([self._rung[name], *self._scores[name]])  # a trial that stopped early records fewer
        left = waiting + len(self._running)
        eta = sum(self._seconds) / len(self._seconds) * left / self._sweep.options.parallel
        say(f"{name}: done in {duration(seconds)}, {_shown(score)}; {left} to go, ETA {duration(eta)}", "green")

    def _report_failure(self, name: str, code: int) -> None:
        self._failed[name] = self._log(name)
        say(f"{name}: failed with code {code}; see {self._log(name)}", "red")

    def _check_time(self) -> None:
        if self._signals.poll():
            self._interrupt("a signal asked to stop")
        if time.monotonic() > self._end:
            self._interrupt(f"--hours={self._sweep.options.hours:g} are over")

    def _interrupt(self, reason: str) -> None:
        for trial in self._running.values():
            trial.process.terminate()
        for name, trial in self._running.items():
            if (code := trial.process.wait()) not in (0, INTERRUPTED):
                self._report_failure(name, code)
        saved = "the trials that did not fail" if self._failed else "its trials"
        raise Interrupted(f"sweep: {reason}; {saved} have saved, start it again to go on")


def _spawn(
    command: list[str], log: Path | None = None, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen:
    """Start a process that does not outlive this one.

    Args:
        log: file for its output; None is the output of this process.
    """
    with contextlib.ExitStack() as files:
        output = None
        if log is not None:
            make_folder(log.parent)
            output = files.enter_context(log.open("ab"))
        return subprocess.Popen(
            command,
            env=os.environ | environment | {END_WITH_PARENT: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if log is not None else None,
            start_new_session=True,  # a terminal's Ctrl-C reaches it through this process, once
        )


def _wait(process: subprocess.Popen, is_over: Callable[[], bool]) -> int:
    """Wait for a process, and end it once `is_over()`. Returns its exit code."""
    while process.poll() is None:
        if is_over():
            process.terminate()
            process.wait()
        time.sleep(POLL_SECONDS)
    return process.returncode


def _shown(score: float) -> str:
    return "no score" if math.isnan(score) else f"best {abs(score):.4g}"


def _field(stage: str) -> str:
    return stage if stage in recipes.STAGES else f"extra_stages.{stage}"


def _device_slots(parallel: int) -> list[dict[str, str]]:
    """Return the environment of each slot: with several trials at a time on a machine with GPUs, a GPU each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else []
    if visible is None and parallel > 1 and shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
            numbers = [str(number) for number in range(len(re.findall(r"^GPU \d", listed, re.MULTILINE)))]
    if parallel == 1 or len(numbers) < 2:
        return [{}]
    return [{"CUDA_VISIBLE_DEVICES": number} for number in numbers]


def sweep(line: SweepLine, folder: Path, options: SweepOptions) -> int:
    """Run a sweep, or the trial with an index, then compare the runs. Returns an exit code.

    Raises:
        ValueError: another sweep runs in the folder, or trained there with another recipe, or trials failed.
        Interrupted: every trial is resumable.
    """
    running = Sweep(folder, line.recipe, line.trials, line.config_flags, options)
    running.check_begun({trial.name: recipe for trial, recipe in zip(line.trials, line.recipes, strict=True)})
    if options.index is not None:
        return running.run_one(options.index)
    with lock(folder):
        running.run_all()
    from jaxstages.cli.compare import compare_runs

    begun = [str(folder / trial.name) for trial in line.trials if (folder / trial.name / "recipe.json").is_file()]
    if len(begun) > 1:
        compare_runs(begun, None, None, None, None)
    return 0
