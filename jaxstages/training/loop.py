"""The training loop: steps, evaluation, early stopping, checkpoints.

The loop waits for the device as little as possible: it reads the sums of step k after it has dispatched step k + 1, or
later if steps are cheap. A checkpoint contains everything that a resumed run needs to log the same numbers.
"""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstages.checkpoint.manager import Checkpoints
from jaxstages.config import StageConfig
from jaxstages.data.prefetch import prefetch
from jaxstages.runtime import multihost
from jaxstages.runtime.console import Progress, say
from jaxstages.runtime.cpu import freeze_gc_and_trim_heap, lower_thread_priority
from jaxstages.runtime.signals import Stop
from jaxstages.training.early_stopping import EarlyStopping, EarlyStoppingState
from jaxstages.training.metric_writer import SAMPLES, MetricsWriter, plain
from jaxstages.training.profiling import Profiler, peak_memory
from jaxstages.training.saved_items import to_items
from jaxstages.types import Diverged, Interrupted, Metrics, Params, Report, Sums, TrainState

SUMMED = ("nll", "weight", "correct")
"""Sums that the loop accumulates between two training lines."""

COMPILING = 10.0
"""Factor on the watchdog's time limit for work that includes compilation."""


@dataclasses.dataclass(slots=True)
class LoopProgress:
    """Counters that make the log lines and totals of a resumed run equal those of an uninterrupted run.

    tokens: tokens trained on so far.
    seconds: seconds spent on training steps so far.
    interval: sums of the steps since the last training line.
    best: metrics of the best evaluation.
    start: metrics of the evaluation at step 0.
    handed_on: checkpoint item that the next stage starts from, "params" or "average".
    evaluated: last step with an evaluation.
    next_batch: SHA-256 of the next batch.
    """

    tokens: int = 0
    seconds: float = 0.0
    interval: dict[str, float] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: dict[str, Any] = dataclasses.field(default_factory=dict)
    handed_on: str = "params"
    evaluated: int = 0
    next_batch: str = ""


class Batches(NamedTuple):
    """Functions of the batch number k.

    load: `load(k)` returns batch k on the devices, as the arguments of the step after the state.
    digest: `digest(k)` returns the SHA-256 of batch k.
    records: `records(k)` returns the source and number of each record in batch k.
    """

    load: Callable[[int], tuple[Any, ...]]
    digest: Callable[[int], str]
    records: Callable[[int], list[str]]


class Training(NamedTuple):
    """Settings, functions and services that the loop uses; `stage.py` makes them.

    name: name of the stage.
    folder: folder of the stage's checkpoints and metrics.
    config: the stage's part of the recipe.
    compile_step: returns the pure step, and the jitted step, which donates its state.
    group: number of steps to dispatch between two reads of their sums.
    evaluate: `evaluate(trained, scores)` returns held-out metrics of the trained parameters.
    scores: maps the prefix of each held-out set, the stage's own first, to the names of its scores.
    allowed: `allowed(metrics, start)` returns whether a step with these metrics may become the best one.
    schedule: maps an optimizer step to a learning rate.
    meta: metadata that every checkpoint of the stage records.
    track: sends the lines of `writer` to trackers once they are final.
    utilization: MFU at one token per second; 0 if the device's peak is not known.
    heartbeat: `heartbeat(factor)` tells the watchdog that the run is alive; the next call must come within `factor`
        times its limit.
    """

    name: str
    folder: Path
    config: StageConfig
    compile_step: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]
    group: int
    batches: Batches
    evaluate: Callable[[Params, bool], Report]
    scores: Mapping[str, Sequence[str]]
    allowed: Callable[[Metrics, Mapping[str, Any]], bool]
    schedule: Callable[[Any], Any]
    meta: Mapping[str, Any]
    checkpoints: Checkpoints
    writer: MetricsWriter
    track: Callable[[], None]
    stopping: EarlyStopping
    profiler: Profiler
    utilization: float
    signals: Stop
    heartbeat: Callable[[float], None]


class EvaluationInterrupted(Exception):
    """A signal to stop has interrupted an evaluation, which is repeated when the run resumes."""


class Loop:
    """A stage in progress, with everything that changes from step to step except the train state."""

    def __init__(
        self,
        training: Training,
        step: int,
        ends_at: int,
        stopping_state: EarlyStoppingState,
        progress: LoopProgress | None,
    ) -> None:
        """
        Args:
            step: step at which the stage starts or resumes.
            ends_at: step of the last evaluation.
            stopping_state: state of early stopping at `step`.
            progress: counters of a resumed stage; None at step 0.

        Raises:
            ValueError: the next batch differs from the one that the checkpoint expects.
        """
        self._training, self._config = training, training.config.loop
        self._ends_at = ends_at
        self.stopping_state = stopping_state

        next_batch = training.batches.digest(step)
        self.progress = progress or LoopProgress(interval=dict.fromkeys(SUMMED, 0.0), next_batch=next_batch)
        if self.progress.next_batch != next_batch:
            raise ValueError(
                f"{training.folder}: batch {step} differs from the one that its checkpoint expects: the order of the "
                "data has changed, perhaps with the version of grain. Install the versions in recipe.json, or use "
                "another --workdir"
            )
        self._first = self._last = self._saved_step = step
        self._pending: collections.deque[tuple[int, Sums]] = collections.deque()
        self._bar = Progress(training.name, self._config.steps, step)
        self._note = ""
        self._eval_patience = COMPILING  # the first evaluation compiles

    def run(self, state: TrainState, first: int, last: int) -> tuple[TrainState, int]:
        """Run steps `first` to `last - 1`, or fewer with early stopping.

        Returns:
            The train state and its step.

        Raises:
            Diverged: too many steps in a row were not finite.
            Interrupted: a signal requested a stop; everything is saved.
        """
        training = self._training
        pure_step, train_step = training.compile_step()
        if self.begin(state, first, last):
            return state, first

        for k, batch in enumerate(self.batches(), start=first):
            try:
                with training.profiler.step(k + 1):
                    state, sums = train_step(state, *batch)
            except FloatingPointError:
                with jax.disable_jit():
                    pure_step(state, *batch)  # raises at the operation that makes the NaN
                raise
            if self.after_step(k + 1, state, sums):
                return state, k + 1
        return state, max(first, last)

    # The parts of `run`, which `together.py` calls for several loops at once.

    def begin(self, state: TrainState, first: int, last: int) -> bool:
        """Evaluate and save what is due before the first step; return whether the stage ends there.

        Raises:
            Interrupted: a signal requested a stop.
        """
        training = self._training
        self._first, self._last = first, last
        training.heartbeat(COMPILING)
        if not first:
            self._evaluate_start(state)
        if self.should_stop() or self._evaluate_and_save(first, state):
            return True

        freeze_gc_and_trim_heap()
        self._bar = Progress(training.name, self._config.steps, first)  # its rate is that of the steps alone
        self._restart_clock()
        training.heartbeat(COMPILING)
        return False

    def batches(self) -> Iterator[tuple[Any, ...]]:
        """Yield the batches of the steps to run, as the arguments of a step after the state."""
        training, steps = self._training, range(self._first, self._last)
        return prefetch(training.batches.load, steps, group=training.group, init=lower_thread_priority)

    def after_step(self, step: int, state: TrainState, sums: Sums) -> bool:
        """Log, evaluate and save what is due after a step; return whether early stopping ends the stage.

        Args:
            sums: of the step, perhaps not computed yet.

        Raises:
            Diverged: too many steps in a row were not finite.
            Interrupted: a signal requested a stop; everything is saved.
        """
        training, pending = self._training, self._pending
        pending.append((step, sums))
        training.profiler.after(step, sums)

        if step == self._first + 1:  # compilation does not count as training time
            jax.block_until_ready(sums)
            training.checkpoints.compile_for(to_items(state, self.stopping_state))
            training.signals.unsaved = True
            self._restart_clock()

        if len(pending) > training.group or (step - 1) % self._config.log_every == 0:  # training lines must be on time
            while len(pending) > 1:
                self._read_sums(*pending.popleft())

        training.heartbeat(1.0)
        training.checkpoints.poll()
        training.track()
        self._bar.update(step, self._note)
        if not (training.signals.poll() or self._is_due(step)):
            return False

        while pending:  # only a state with finite sums may be saved
            self._read_sums(*pending.popleft())
        paused = time.monotonic()
        self._bar.clear()
        stops = self._evaluate_and_save(step, state)
        self._clock += time.monotonic() - paused
        return stops

    def should_stop(self) -> bool:
        """Return whether early stopping ends the stage."""
        return bool(self._training.stopping.should_stop(self.stopping_state))

    def before_eval_batch(self) -> None:
        """Tell the watchdog that the run is alive, and poll for signals, before each batch of an evaluation."""
        self._training.heartbeat(self._eval_patience)
        if self._training.signals.poll():
            raise EvaluationInterrupted

    # Evaluation, early stopping and saving between two steps.

    def _evaluation_is_due(self, step: int) -> bool:
        scheduled = step % self._config.eval_every == 0 or step == self._ends_at
        return scheduled and self.progress.evaluated < step

    def _is_due(self, step: int) -> bool:
        return self._evaluation_is_due(step) or step % self._config.save_every == 0 or step == self._last

    def _evaluate_and_save(self, step: int, state: TrainState) -> bool:
        """Evaluate and save if due at this step; return whether early stopping ends the stage.

        Raises:
            Interrupted: a signal requested a stop; everything is saved.
        """
        training = self._training
        improved = False
        if self._evaluation_is_due(step):
            with contextlib.suppress(EvaluationInterrupted):
                improved = self._evaluate(step, state)

        interrupted = training.signals.requested
        stops = self.should_stop()
        if (improved or stops or interrupted or self._is_due(step)) and step != self._saved_step:
            self._save(step, state)
        if interrupted:
            training.checkpoints.check_last(step)
            raise Interrupted(f"{training.name}: interrupted; saved at step {step}, start it again to go on")
        return stops

    def _evaluate_start(self, state: TrainState) -> None:
        """Evaluate the initial parameters of the stage; their answers only if `early_stopping.within` compares them."""
        own = {prefix: names for prefix, names in self._training.scores.items() if not prefix.startswith("watch/")}
        scores = tuple(prefix + name for prefix, names in own.items() for name in names)
        needs_answers = any(name.startswith(scores) for name, _ in self._training.config.early_stopping.within)
        try:
            report = self._report(state.params, needs_answers)
        except EvaluationInterrupted:
            raise Interrupted(
                f"{self._training.name}: interrupted before its first step; start it again to go on"
            ) from None
        self.progress.start = {name: plain(value) for name, value in report.metrics.items()}
        self._log_evaluation(0, report, "")
        self._check_names(report)

    def _check_names(self, report: Report) -> None:
        """Raise ValueError if early stopping uses a metric that this stage does not measure."""
        stop = self._training.config.early_stopping
        measured = {name for name in report.metrics if not name.endswith("_se")}
        measured |= {prefix + name for prefix, names in self._training.scores.items() for name in names}
        for field, name in [("metric", stop.metric), *(("within", name) for name, _ in stop.within)]:
            if name not in measured:
                raise ValueError(
                    f"config.{self._training.name}.early_stopping.{field}: {name!r} is not measured here; known: "
                    f"{', '.join(sorted(measured))}"
                )

    def _report(self, trained: Params, scores: bool) -> Report:
        try:
            return self._training.evaluate(trained, scores)
        except FloatingPointError:
            with jax.disable_jit():
                self._training.evaluate(trained, scores)  # raises at the operation that makes the NaN
            raise

    def _evaluate(self, step: int, state: TrainState) -> bool:
        """Evaluate the parameters, and their average if any; return whether this step is the best so far."""
        training, stop = self._training, self._training.config.early_stopping
        reports = {"params": self._report(state.params, True)}
        if state.average:
            reports["average"] = self._report(state.average, True)
        self._eval_patience = 1.0

        values = {
            item: report.metrics[stop.metric] if training.allowed(report.metrics, self.progress.start) else math.nan
            for item, report in reports.items()
        }
        chosen = _best_item(values, stop.mode)
        self.progress.evaluated = step
        self.stopping_state = training.stopping.update(self.stopping_state, values[chosen], step)
        improved = int(self.stopping_state.best_step) == step
        if improved:
            self.progress.best = {name: plain(value) for name, value in reports[chosen].metrics.items()}
            self.progress.handed_on = chosen

        stale, best = int(self.stopping_state.bad), float(self.stopping_state.best)
        note = "best so far" if improved else f"{stale} without improvement on {stop.metric} {best:.4g}"
        if improved and chosen == "average":
            note += ", the average"
        if stop.within and math.isnan(values[chosen]):
            note += ", outside early_stopping.within"
        metrics = reports["params"].metrics
        if state.average:
            metrics = metrics | {f"average/{name}": value for name, value in reports["average"].metrics.items()}
        self._log_evaluation(step, reports["params"]._replace(metrics=metrics), note)

        if self.should_stop():
            reason = (
                f"{stop.metric} has not improved by more than {stop.min_delta:g} for {stale} evaluations; "
                f"the best, {best:.4g}, was at step {int(self.stopping_state.best_step)}"
            )
            say(f"{training.name}: early stopping at step {step}: {reason}", "yellow")
            training.writer.write(step, "event", {"event": "early_stopping", "reason": reason})
        return improved

    def _log_evaluation(self, step: int, report: Report, note: str) -> None:
        training, metrics = self._training, report.metrics
        training.writer.write(step, "eval", metrics)
        if report.samples:
            training.writer.write(step, SAMPLES, {SAMPLES: [sample._asdict() for sample in report.samples]})
        if not_finite := [name for name, value in metrics.items() if not math.isfinite(value)]:
            training.writer.write(step, "event", {"event": "not finite", "metrics": ", ".join(not_finite)})

        names = [name for name in metrics if "/" not in name and not name.endswith("_se")]
        line = "  ".join(with_error(metrics, name) for name in names)
        say(f"{training.name}: eval at step {step}: {line}{f'  ({note})' if note else ''}", "green")
        metric = training.config.early_stopping.metric
        if (average := metrics.get(f"average/{metric}")) is not None:
            say(f"  average: {metric} {average:.4g}", "green")
        if choices := [name for name in metrics if name.startswith("choice/") and name.endswith("/accuracy")]:
            parts = [f"{name.split('/')[1]} {with_error(metrics, name).partition(' ')[2]}" for name in choices]
            say(f"  choice accuracy: {'  '.join(parts)}", "green")
        for prefix, scores in [*training.scores.items()][1:]:
            measured = [name for name in scores if prefix + name in metrics]
            parts = [with_error(metrics, name, prefix) for name in ("loss", "perplexity", *measured)]
            say(f"  {prefix.strip('/')}: {'  '.join(parts)}", "green")

    def _save(self, step: int, state: TrainState) -> None:
        self.progress.next_batch = self._training.batches.digest(step)
        # asdict copies, because the metadata is written while the loop continues.
        meta = dict(self._training.meta) | {"carried": dataclasses.asdict(self.progress)}
        memory = multihost.gather_floats(peak_memory())
        self._training.writer.write(step, "event", {"event": "peak memory", **memory})
        self._training.writer.sync()
        items = to_items(state, self.stopping_state)
        self._training.checkpoints.save(step, items, meta, int(self.stopping_state.best_step))
        self._saved_step = step

    # The sums of a step, and the training line.

    def _restart_clock(self) -> None:
        self._clock, self._clock_tokens = time.monotonic(), 0

    def _read_sums(self, step: int, sums: Sums) -> None:
        """Add up the sums of one step; raise Diverged if too many steps in a row are not finite."""
        values = {name: float(np.asarray(value)) for name, value in sums.items()}  # ten times as fast as device_get
        check_weight(self._training.name, step - 1, values["weight"])
        if values["applied"]:
            for name in SUMMED:
                self.progress.interval[name] += values.get(name, 0.0)
        else:
            self._report_skipped(step, values)
        self.progress.tokens += int(values["tokens"])
        if step > self._first + 1:  # the clock starts after the first step, which compiles
            self._clock_tokens += int(values["tokens"])
        if step % self._config.log_every == 0 or step == self._config.steps:
            self._log_train(step, values)

    def _log_train(self, step: int, values: Mapping[str, float]) -> None:
        training = self._training
        seconds = max(time.monotonic() - self._clock, 1e-9)
        self.progress.seconds += seconds
        interval = self.progress.interval
        weight = interval["weight"] or math.nan  # NaN, logged as null, if no step of the interval was applied
        loss, rate = interval["nll"] / weight, self._clock_tokens / seconds if self._clock_tokens else math.nan
        # A skipped step does not advance the step count of the optimizer.
        learning_rate = float(np.asarray(training.schedule(step - int(values["skipped"] + values["applied"]))))
        line = {
            "loss": loss,
            "grad_norm": values["grad_norm"],
            "learning_rate": learning_rate * values.get("plateau_factor", 1.0),
            "tokens": self.progress.tokens,
            "tokens_per_second": rate,
        }
        if training.utilization:
            line["mfu"] = rate * training.utilization
        if "correct" in values:
            line["token_accuracy"] = interval["correct"] / weight
        if "anchor" in values:
            line["anchor"] = values["anchor"]
        training.writer.write(step, "train", line)
        self.progress.interval = dict.fromkeys(SUMMED, 0.0)
        self._note = f"loss {loss:.3f}  {rate:,.0f} tok/s"
        if training.utilization:
            self._note += f"  MFU {line['mfu']:.1%}"
        self._restart_clock()

    def _report_skipped(self, step: int, values: Mapping[str, float]) -> None:
        """Report the batch of a skipped step; raise Diverged if too many steps in a row are not finite."""
        training, streak = self._training, int(values["streak"])
        loss = values["objective"] / values["weight"]
        norms = {name: values[name] for name in ("grad_norm", "update_norm")}
        numbers = f"loss {loss:.4g}, gradient {norms['grad_norm']:.4g}, update {norms['update_norm']:.4g}"
        reason = f"not finite, {streak} in a row" if streak else "a spike"

        records = training.batches.records(step - 1)
        event = {"event": "step skipped", "why": reason, "loss": loss, **norms, "records": records}
        training.writer.write(step, "event", event)
        say(
            f"{training.name}: step {step} skipped: {numbers} ({reason}); batch {step - 1} "
            f"is {', '.join(records[:3])} and {max(len(records) - 3, 0)} more, see metrics.jsonl",
            "yellow",
        )

        if streak >= training.config.optim.max_bad_steps:
            saved = self._saved_step
            saved_note = f"the checkpoint at step {saved} stands" if saved else "nothing was saved yet"
            where = f" (after removing {training.folder}, or in another --workdir)" if saved else ""
            raise Diverged(
                f"{training.name}: {streak} steps in a row, up to step {step}, are not finite ({numbers}); "
                f"{saved_note}. Halve peak_lr or lengthen the warm-up{where}, or find the operation with --debug_nans"
            )


def check_weight(name: str, k: int, weight: Any) -> None:
    """Raise ValueError if no token of batch k has a loss weight."""
    if not weight:
        raise ValueError(
            f"batch {k} has no token to train on; look at the data with `jaxstages inspect`, or raise "
            f"config.{name}.loop.batch_size"
        )


def with_error(metrics: Metrics, name: str, prefix: str = "") -> str:
    """Format a score with its standard error, if it has one: `loss 2.345 ± 0.012`."""
    error = metrics.get(f"{prefix}{name}_se")
    suffix = "" if error is None else f" ± {error:.0f}" if error >= 100 else f" ± {error:.2g}"
    return f"{name} {metrics[prefix + name]:.4g}{suffix}"


def _best_item(values: Mapping[str, float], mode: str) -> str:
    """Return the key of the best value; NaN counts as the worst."""
    sign = -1.0 if mode == "min" else 1.0
    return max(values, key=lambda item: -math.inf if math.isnan(values[item]) else sign * values[item])
