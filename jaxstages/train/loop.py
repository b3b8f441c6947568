"""The loop: steps, evaluation, early stopping, checkpoints. It never waits for the device but where it must.

The sums of step k are read when step k + 1 is already dispatched, or later where steps are tiny, so the device always
has work. Everything that a resumed run needs to write the same numbers is in the checkpoint.
"""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import fingerprint, params_sha256
from jaxstages.checkpoint.manager import Checkpoints, read_params
from jaxstages.config.metrics import higher_is_better
from jaxstages.data.batches import batches_by_step
from jaxstages.data.mixture import describe
from jaxstages.data.prefetch import prefetch
from jaxstages.data.stage_data import WATCH
from jaxstages.generate.evaluate import Report, unigram_perplexity
from jaxstages.models.sharding import place_batch, rows_here
from jaxstages.runtime import multihost
from jaxstages.runtime.console import Progress, duration, say
from jaxstages.runtime.cpu_tuning import freeze_gc_and_trim_heap, lower_thread_priority
from jaxstages.runtime.files import write_json
from jaxstages.runtime.signals import Stop, stop_signals, watchdog
from jaxstages.runtime.workdir import result_file
from jaxstages.train.compile import compile_step
from jaxstages.train.diagnosis import Verdict, judge
from jaxstages.train.early_stopping import EarlyStopping, early_stopping
from jaxstages.train.initial_state import InitialState, LoopProgress, restore_or_init
from jaxstages.train.metric_writer import MetricsWriter, plain, read_metrics
from jaxstages.train.optimizer import make_schedule
from jaxstages.train.saved_items import to_items
from jaxstages.train.setup import StageSetup, make_stage_evaluate
from jaxstages.types import Batch, Diverged, Interrupted, Metrics, Params, Sums, TrainState

SUMMED = ("nll", "weight", "correct")

TINY, AT_ONCE = 1e10, 8
"""Of steps with fewer operations (6 a parameter and token, Kaplan et al. 2020) sums are read, and batches made, so many
at once: what Python does for one of them takes a good part of a step's time, most of it in caches that are cold."""

COMPILING = 10.0
"""What compiles may take so many times the seconds of the watchdog."""


def train_stage(setup: StageSetup, finish: bool = False) -> dict[str, Any] | None:
    """Train a stage from where it starts to its end, and write its result; None if `stop_after` ended it before.

    Args:
        finish: its end is the step that it has saved.

    Raises:
        ValueError: the start rules or the contract forbid it.
        Diverged: too many steps in a row were not finite.
        Interrupted: asked to stop by a signal; everything is saved.
        OSError: a save failed; those before it stand.
    """
    config, stop = setup.config.loop, setup.config.early_stopping
    stopping = early_stopping(mode=stop.mode, patience=stop.patience, min_delta=stop.min_delta)
    with Checkpoints(setup.folder, config.keep) as checkpoints, stop_signals(multihost.preemption_poll()) as signals:
        start = restore_or_init(setup, checkpoints, stopping)
        step = int(start.state.step)
        if finish and not step:
            raise ValueError(f"{setup.folder} has saved no step; there is nothing to hand on")
        if step > config.steps and not finish:
            raise ValueError(
                f"{setup.folder} has made {step} steps, and the recipe's length comes to {config.steps}; raise "
                f"config.{setup.name}.loop.steps, epochs or tokens"
            )
        with (
            MetricsWriter(setup.folder, step if start.progress else -1, multihost.is_process_zero()) as writer,
            watchdog(config.hang_seconds) as alive,
        ):
            run = _Run(setup, start, checkpoints, writer, stopping, signals, alive)
            for line in describe(setup.data.datasets, config.steps, config.batch_size, setup.config.late_from):
                say(f"  {line}")
            for line in _doubts(setup):
                say(f"  {line}", "yellow")
            last = step if finish else min(config.steps, config.stop_after or config.steps)
            run.ends_at = last if finish else config.steps
            state, held = run.steps(start.state, step, last)
            checkpoints.check_last(held)
            signals.unsaved = False
            if held < config.steps and not finish and not stopping.should_stop(run.stopping_state):
                say(f"{setup.name}: stop_after={config.stop_after} reached; start again without it to go on", "yellow")
                return None
            return run.finish(state, held)


FEW, SPREAD = 4000, 2.0
"""Scored tokens below which a held-out set is too small; and about how far the losses of single tokens lie apart, in
nats (a standard deviation), which makes the loss of so many uncertain by 0.03."""


class _Abandoned(Exception):
    """An evaluation was left for a signal to stop; it is made when the run goes on."""


class _Run:
    """One stage in progress: what changes from step to step beside the train state."""

    def __init__(
        self,
        setup: StageSetup,
        start: InitialState,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        stopping: EarlyStopping,
        signals: Stop,
        alive: Callable[[float], None],
    ) -> None:
        self._setup, self._config = setup, setup.config.loop
        self._checkpoints, self._writer, self._signals, self._alive = checkpoints, writer, signals, alive
        self._stopping, self.stopping_state = stopping, start.stopping
        self._parent, self._base, self._anchor = start.parent, start.base, start.anchor
        self._evaluate = make_stage_evaluate(setup, before_batch=self._before_eval_batch)
        self._schedule = make_schedule(setup.config.optim.schedule, self._config.steps)
        mixed = setup.data.mix(setup.config.loop, setup.config.late_from)
        size, seed, sharding = self._config.batch_size, setup.recipe.seed, setup.program.row_sharding
        self._batches = batches_by_step(
            mixed.sources,
            batch_size=size,
            seed=seed,
            weights=mixed.weights,
            late=mixed.late,
            local_rows=rows_here(size, sharding),
        )
        if self._anchor is not None:
            size = setup.config.anchor.batch_size
            rows = [self._anchor.rows]
            self._anchors = batches_by_step(rows, batch_size=size, seed=seed, local_rows=rows_here(size, sharding))
        tokens = self._config.batch_size * setup.program.context
        leaves = jax.tree.leaves(setup.program.abstract_params)
        self._at_once = AT_ONCE if 6 * tokens * sum(leaf.size for leaf in leaves) < TINY else 1
        step = int(start.state.step)
        self._saved_step = step
        self.ends_at, self._began = self._config.steps, time.monotonic()
        next_batch = self._batches.digest(step)
        self._progress = start.progress or LoopProgress(interval=dict.fromkeys(SUMMED, 0.0), next_batch=next_batch)
        if self._progress.next_batch != next_batch:
            raise ValueError(
                f"{setup.folder}: batch {step} is not the one that its checkpoint was to go on with: the order of "
                "the data has changed, with a version of grain for one. Install the versions of recipe.json, or take "
                "another --workdir"
            )
        self._note = ""
        self._slack = COMPILING  # the first evaluation compiles

    def steps(self, state: TrainState, first: int, last: int) -> tuple[TrainState, int]:
        """Steps first .. last - 1, or fewer if early stopping acts; the state, and the step that it is at."""
        reference = None if self._anchor is None else self._anchor.reference
        step_function, train_step = compile_step(self._setup.program, self._base, reference)
        self._alive(COMPILING)
        if not first:
            try:
                report = self._report(state.params, False)
            except _Abandoned:
                raise Interrupted(f"{self._setup.name}: interrupted before its first step; start it again") from None
            self._progress.start = {name: plain(value) for name, value in report.metrics.items()}
            self._log_evaluation(0, report, "")
            self._check_names(report)
        if self._stopping.should_stop(self.stopping_state) or self._border(first, state, last):
            return state, first
        freeze_gc_and_trim_heap()
        progress = Progress(self._setup.name, self._config.steps, first)
        pending: collections.deque[tuple[int, Sums]] = collections.deque()
        self._restart_clock()
        self._alive(COMPILING)
        batches = prefetch(self._place, range(first, last), group=self._at_once, init=lower_thread_priority)
        for k, batch in enumerate(batches, start=first):
            try:
                state, sums = train_step(state, *batch)
            except FloatingPointError:
                with jax.disable_jit():
                    step_function(state, *batch)  # raises again, where it happens
                raise
            pending.append((k + 1, sums))
            if k == first:  # compilation is not training time
                jax.block_until_ready(sums)
                fingerprint(state)  # which the first save would compile
                self._signals.unsaved = True
                self._restart_clock()
            if len(pending) > self._at_once or k % self._config.log_every == 0:  # a line's clock is read in time
                while len(pending) > 1:
                    self._read(*pending.popleft())
            self._alive(1.0)
            self._checkpoints.poll()
            done = k + 1
            progress.update(done, self._note)
            if not (self._signals.poll() or self._due(done, last)):
                continue
            while pending:  # what is saved must be known to be finite
                self._read(*pending.popleft())
            paused = time.monotonic()
            progress.clear()
            if self._border(done, state, last):
                return state, done
            self._clock += time.monotonic() - paused
        return state, max(first, last)

    def _evaluates(self, step: int) -> bool:
        """Is an evaluation due at `step` that was not made yet (before a run was interrupted)?"""
        return self._progress.evaluated < step and (step % self._config.eval_every == 0 or step == self.ends_at)

    def _due(self, step: int, last: int) -> bool:
        return self._evaluates(step) or step % self._config.save_every == 0 or step == last

    def _border(self, step: int, state: TrainState, last: int) -> bool:
        """What stands between two steps: evaluation, early stopping, a save. True if early stopping acts.

        Raises:
            Interrupted: asked to stop; everything is saved.
        """
        improved = False
        if self._evaluates(step):
            with contextlib.suppress(_Abandoned):
                improved = self._evaluate_at(step, state)
        asked = self._signals.requested
        stops = self._stopping.should_stop(self.stopping_state)
        if (improved or stops or asked or self._due(step, last)) and step != self._saved_step:
            self._save(step, state)
        if asked:
            self._checkpoints.check_last(step)
            raise Interrupted(f"{self._setup.name}: interrupted; saved at step {step}, start it again to go on")
        return stops

    def _before_eval_batch(self) -> None:
        self._alive(self._slack)
        if self._signals.poll():
            raise _Abandoned

    def _place(self, k: int) -> tuple[Batch, ...]:
        """Batch k on the devices and, with an anchor, the anchor's."""
        rows = self._batches.batch(k)
        if jax.process_count() == 1:  # of several, each sees its own rows only
            self._check_weight(k, np.any(rows.weights_BL))
        batch = place_batch(rows, self._config.batch_size, self._setup.program.row_sharding)
        if self._anchor is None:
            return (batch,)
        size = self._setup.config.anchor.batch_size
        return batch, place_batch(self._anchors.batch(k), size, self._setup.program.row_sharding)

    def _check_weight(self, k: int, weight: Any) -> None:
        if not weight:
            raise ValueError(
                f"batch {k} has no trained-on token; look at the data with `jaxstages inspect`, or raise "
                f"config.{self._setup.name}.loop.batch_size"
            )

    def _restart_clock(self) -> None:
        self._clock, self._clock_tokens = time.monotonic(), 0

    def _read(self, step: int, sums: Sums) -> None:
        """Take in the sums of one step; raises Diverged where too many in a row are not finite."""
        values = {name: float(np.asarray(value)) for name, value in sums.items()}  # a tenth of `device_get`
        self._check_weight(step - 1, values["weight"])
        tokens, interval = int(values["tokens"]), self._progress.interval
        if values["applied"]:
            for name in SUMMED:
                interval[name] += values[name]
        else:
            self._report_skipped(step, values)
        self._progress.tokens += tokens
        self._clock_tokens += tokens
        if step % self._config.log_every and step != self._config.steps:
            return
        seconds = max(time.monotonic() - self._clock, 1e-9)
        weight = interval["weight"] or math.nan  # no step of the interval was applied: the loss is null
        loss, rate = interval["nll"] / weight, self._clock_tokens / seconds
        self._progress.seconds += seconds
        # Of the optimizer's own count, which a skipped step does not advance.
        scheduled = float(np.asarray(self._schedule(step - int(values["skipped"] + values["applied"]))))
        line = {
            "loss": loss,
            "token_accuracy": interval["correct"] / weight,
            "grad_norm": values["grad_norm"],
            "learning_rate": scheduled * values.get("plateau_factor", 1.0),
            "tokens": self._progress.tokens,
            "tokens_per_second": rate,
        }
        if "anchor" in values:
            line["anchor"] = values["anchor"]
        self._writer.write(step, "train", line)
        self._progress.interval = dict.fromkeys(SUMMED, 0.0)
        self._note = f"loss {loss:.3f}  {rate:,.0f} tok/s"
        self._restart_clock()

    def _report_skipped(self, step: int, values: dict[str, float]) -> None:
        """Name the batch whose update was not applied; raises Diverged where it was one too many."""
        streak, most, saved = int(values["streak"]), self._setup.config.optim.max_bad_steps, self._saved_step
        loss = values["nll"] / values["weight"]
        numbers = f"loss {loss:.4g}, gradient {values['grad_norm']:.4g}, update {values['update_norm']:.4g}"
        why = f"not finite, {streak} in a row" if streak else "a spike"
        records = self._batches.where(step - 1)
        norms = {name: values[name] for name in ("grad_norm", "update_norm")}
        event = {"event": "step skipped", "why": why, "loss": loss, **norms, "records": records}
        self._writer.write(step, "event", event)
        say(
            f"{self._setup.name}: step {step} skipped: {numbers} ({why}); batch {step - 1} "
            f"is {', '.join(records[:3])} and {max(len(records) - 3, 0)} more, see metrics.jsonl",
            "yellow",
        )
        if streak >= most:
            stands = f"the checkpoint at step {saved} stands" if saved else "nothing was saved yet"
            way = f" (after removing {self._setup.folder}, or in another --workdir)" if saved else ""
            raise Diverged(
                f"{self._setup.name}: {streak} steps in a row, up to step {step}, are not finite ({numbers}); "
                f"{stands}. Halve peak_lr or lengthen the warm-up{way}, or find the operation with --debug_nans"
            )

    def _check_names(self, report: Report) -> None:
        """Raises ValueError where early stopping asks for a metric of data that are not measured."""
        stop = self._setup.config.early_stopping
        scored = {each.prefix + name for each in self._setup.data.evaluation_sets for name in each.config.metrics}
        known = {name for name in report.metrics if not name.endswith("_se")} | scored
        for field, name in [("metric", stop.metric), *(("within", name) for name, _ in stop.within)]:
            if name not in known:
                raise ValueError(
                    f"config.{self._setup.name}.early_stopping.{field}: {name!r} is not measured here; there are "
                    f"{', '.join(sorted(known))}"
                )

    def _report(self, trained: Params, scores: bool) -> Report:
        params = self._setup.program.trainable.join(self._base, trained)
        try:
            return self._evaluate(params, scores)
        except FloatingPointError:
            with jax.disable_jit():
                self._evaluate(params, scores)  # raises again, where it happens
            raise

    def _judged(self, report: Report) -> float:
        """The value that early stopping compares: NaN, no improvement, where a condition on the step is broken."""
        stop = self._setup.config.early_stopping
        for name, most in stop.within:
            start = self._progress.start.get(name)  # a run of before there was a watch has none
            worse = report.metrics[name] - (math.nan if start is None else start)
            if not (-worse if higher_is_better(name) else worse) <= most:
                return math.nan
        return report.metrics[stop.metric]

    def _evaluate_at(self, step: int, state: TrainState) -> bool:
        stop, reports = self._setup.config.early_stopping, {"params": self._report(state.params, True)}
        if state.average:
            reports["average"] = self._report(state.average, True)
        self._slack = 1.0
        judged = {item: self._judged(report) for item, report in reports.items()}
        # The better one is what this step can hand on; NaN is never better.
        sign = -1.0 if stop.mode == "min" else 1.0
        chosen = max(judged, key=lambda item: -math.inf if math.isnan(judged[item]) else sign * judged[item])
        self._progress.evaluated = step
        self.stopping_state = self._stopping.update(self.stopping_state, judged[chosen], step)
        improved = int(self.stopping_state.best_step) == step
        if improved:
            self._progress.best = {name: plain(value) for name, value in reports[chosen].metrics.items()}
            self._progress.handed_on = chosen
        bad, best = int(self.stopping_state.bad), float(self.stopping_state.best)
        mark = "best so far" if improved else f"{bad} without improvement on {stop.metric} {best:.4g}"
        mark += ", the average" * (improved and chosen == "average")
        mark += ", outside early_stopping.within" * (bool(stop.within) and math.isnan(judged[chosen]))
        values = reports["params"].metrics
        if state.average:
            values = values | {f"average/{name}": value for name, value in reports["average"].metrics.items()}
        self._log_evaluation(step, Report(values, reports["params"].signatures), mark)
        if self._stopping.should_stop(self.stopping_state):
            reason = (
                f"{stop.metric} has not improved by more than {stop.min_delta:g} for {bad} evaluations; "
                f"the best, {best:.4g}, was at step {int(self.stopping_state.best_step)}"
            )
            say(f"{self._setup.name}: early stopping at step {step}: {reason}", "yellow")
            self._writer.write(step, "event", {"event": "early_stopping", "reason": reason})
        return improved

    def _log_evaluation(self, step: int, report: Report, mark: str) -> None:
        self._writer.write(step, "eval", report.metrics)
        if bad := [name for name, value in report.metrics.items() if not math.isfinite(value)]:
            self._writer.write(step, "event", {"event": "not finite", "metrics": ", ".join(bad)})
        names = [name for name in report.metrics if "/" not in name and not name.endswith("_se")]
        shown = "  ".join(_with_error(report.metrics, name) for name in names)
        say(f"{self._setup.name}: eval at step {step}: {shown}{f'  ({mark})' if mark else ''}", "green")
        if (average := report.metrics.get(f"average/{self._setup.config.early_stopping.metric}")) is not None:
            say(f"  average: {self._setup.config.early_stopping.metric} {average:.4g}", "green")
        for each in self._setup.data.evaluation_sets[1:]:
            scored = [name for name in each.config.metrics if each.prefix + name in report.metrics]
            parts = [_with_error(report.metrics, name, each.prefix) for name in ("loss", "perplexity", *scored)]
            say(f"  {each.prefix.strip('/')}: {'  '.join(parts)}", "green")

    def _save(self, step: int, state: TrainState) -> None:
        self._progress.next_batch = self._batches.digest(step)
        meta = self._setup.contract | {
            "stage": self._setup.name,
            "parent": self._parent,
            "lora": recipes.to_dict(self._setup.config.lora) if self._setup.config.lora.rank else None,
            "data": self._setup.data.fingerprints,
            "jax": jax.__version__,
            "carried": dataclasses.asdict(self._progress),  # a copy: it is written while the loop goes on
        }
        self._writer.sync()
        items = to_items(state, self.stopping_state)
        self._checkpoints.save(step, items, meta, int(self.stopping_state.best_step))
        self._saved_step = step

    def finish(self, state: TrainState, step: int) -> dict[str, Any]:
        """The last save is on disk: say what came of it, and write `result.json`, which makes the stage finished."""
        setup, stop = self._setup, self._setup.config.early_stopping
        best_step = int(self.stopping_state.best_step)
        if best_step < 0:
            if stop.within:
                raise ValueError(
                    f"{setup.name}: no evaluation was within {stop.within}, so there is nothing to hand on; raise "
                    f"replay or the anchor, or config.{setup.name}.early_stopping.within, in another --workdir"
                )
            raise Diverged(
                f"{setup.name}: {stop.metric} was never finite; halve peak_lr, or lengthen the warm-up, after removing "
                f"{setup.folder}, or in another --workdir"
            )
        if int(state.guard.skipped) >= step:
            raise Diverged(f"{setup.name}: the updates of all {step} steps were skipped; see metrics.jsonl for why")
        item = self._progress.handed_on
        last = state.average if item == "average" else state.params
        best = (
            last
            if best_step == step
            else read_params(setup.folder, best_step, setup.program.abstract_state.params, item)
        )
        lines = read_metrics(setup.folder / "metrics.jsonl")
        watch = _watch(self._progress.start, self._progress.best)
        verdict = _verdict(setup, lines, watch)
        result = {
            "stage": setup.name,
            "status": self._status(step),
            "steps": step,
            "best_step": best_step,
            "best": self._progress.best,
            "handed_on": item,
            "watch": watch,
            "tokens": self._progress.tokens,
            "seconds": self._progress.seconds,
            "skipped": int(state.guard.skipped),
            "params_sha256": params_sha256(best),
            "last_params_sha256": params_sha256(state.params),
            "parent": self._parent,
            "verdict": verdict._asdict(),
        }
        if multihost.is_process_zero():
            write_json(result_file(setup.folder), {name: plain(value) for name, value in result.items()})
        multihost.barrier(f"{setup.name} is finished")
        say(
            f"{setup.name}: {result['status']} at step {step}; best step {best_step}, {stop.metric} "
            f"{float(self.stopping_state.best):.4g}; params_sha256 {result['params_sha256'][:12]}…",
            "bold",
        )
        say(f"{setup.name}: {verdict}", "bold")
        say(
            f"{setup.name}: took {duration(time.monotonic() - self._began)}; scores in {result_file(setup.folder)}, "
            f"curves in {setup.folder / 'metrics.jsonl'}, next: {_next_command(setup)}"
        )
        return result

    def _status(self, step: int) -> str:
        if step >= self._config.steps:
            return "completed"
        return "early_stopped" if self._stopping.should_stop(self.stopping_state) else "ended"


def _with_error(metrics: Metrics, name: str, prefix: str = "") -> str:
    """A score, and its standard error where it has one: `loss 2.345 ± 0.012`."""
    error = metrics.get(f"{prefix}{name}_se")
    shown = "" if error is None else f" ± {error:.0f}" if error >= 100 else f" ± {error:.2g}"
    return f"{name} {metrics[prefix + name]:.4g}{shown}"


def _next_command(setup: StageSetup) -> str:
    names = list(recipes.stages(setup.recipe))
    after = names[names.index(setup.name) + 1 :]
    if after:
        return f"`jaxstages {after[0]} --workdir={setup.workdir}`"
    what = "chat" if setup.config.data.task == "chat" else "generate --prompt=TEXT"
    return f"`jaxstages {what} --workdir={setup.workdir}`"


def _doubts(setup: StageSetup) -> list[str]:
    """What is wrong with a stage's data that no error says: tokens that the context cuts off, and held-out data that
    are too few to decide anything."""
    lines = []
    for source in {source.folder: source for source in setup.data.all_rows}.values():
        index = source.index
        lost, kept = index["cut_tokens"], index["tokens"]
        if lost:
            lines.append(
                f"{index['source']} ({index['part']}): {lost / (lost + kept):.1%} of its tokens, {lost:,} of "
                f"{lost + kept:,}, are lost to config.model.context={index['context']}: {index['cut_examples']:,} of "
                f"{index['examples']:,} examples are longer"
            )
    for each in setup.data.evaluation_sets:
        scored = round(sum(source.index["scored"] for source in each.held_out))
        if scored < FEW:
            name = each.prefix.strip("/") or setup.name
            lines.append(
                f"held-out data of {name}: {scored:,} scored tokens are too few to decide anything: a difference of "
                f"{2 * SPREAD / max(scored, 1) ** 0.5:.2f} nats may be chance; hold out more, with data.validation or "
                "data.holdout"
            )
    return lines


def _watch(start: dict[str, Any], best: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the stage did to earlier ones: each watched metric at the start, and at the step that is handed on."""
    return {name: {"start": start.get(name), "best": best[name]} for name in best if name.startswith(WATCH)}


def _verdict(setup: StageSetup, lines: list[dict[str, Any]], watch: dict[str, dict[str, Any]]) -> Verdict:
    def curve(kind: str) -> list[tuple[int, float]]:
        found = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind and "loss" in line]
        return [(step, math.nan if loss is None else loss) for step, loss in found]

    baseline = math.log(unigram_perplexity(setup.data.train, setup.data.held_out))
    losses = {
        name.removeprefix(WATCH).removesuffix("/loss"): (entry["start"], entry["best"])
        for name, entry in watch.items()
        if name.endswith("/loss") and None not in entry.values()
    }
    return judge(curve("train"), curve("eval"), baseline, losses, comparable=len(setup.data.datasets) == 1)
