"""The loop: steps, evaluation, early stopping, checkpoints. It never waits for the device but where it must.

The sums of step k are read when step k + 1 is already dispatched, so the device always has work. Everything that a
resumed run needs to write the same numbers is in the checkpoint.
"""

import collections
import copy
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstages.checkpoint import Checkpoints, params_sha256, read_params
from jaxstages.console import Progress, say
from jaxstages.data.pipeline import batches_by_step, prefetch
from jaxstages.early_stopping import EarlyStopping, early_stopping
from jaxstages.evaluate import Report, make_evaluate, unigram_perplexity
from jaxstages.metrics import MetricsWriter, plain, read_metrics
from jaxstages.optim import make_schedule, path_matches
from jaxstages.sharding import place_batch
from jaxstages.start import Start, contract_of, find_start
from jaxstages.step import make_train_step
from jaxstages.types import Batch, Diverged, Interrupted, Sums, TrainState
from jaxstages.verdict import Verdict, judge
from jaxstages.workbench import Workbench
from jaxstages.workdir import result_file, write_json

SUMMED = ("nll", "weight", "correct")


class Placed(NamedTuple):
    """A batch on the devices, and how many of its slots hold tokens."""

    batch: Batch
    tokens: int


def train_stage(bench: Workbench) -> dict[str, Any] | None:
    """Train a stage from where it starts to its end, and write its result; None if `stop_after` ended it before.

    Raises:
        ValueError: the start rules or the contract forbid it.
        Diverged: the loss or the gradient is not finite.
        Interrupted: SIGTERM or SIGINT; everything is saved.
    """
    config, stop = bench.stage.loop, bench.stage.early_stopping
    stopping = early_stopping(mode=stop.mode, patience=stop.patience, min_delta=stop.min_delta)
    with Checkpoints(bench.stage_dir, config.keep) as checkpoints:
        start = find_start(bench, checkpoints, stopping)
        step = int(start.state.step)
        with MetricsWriter(bench.stage_dir, step if start.carried else -1) as writer, _signals() as asked:
            run = _Run(bench, start, checkpoints, writer, stopping)
            last = min(config.steps, config.stop_after or config.steps)
            state, held = run.steps(start.state, step, last, asked)
            checkpoints.wait()
            if held < config.steps and not stopping.should_stop(run.stopping_state):
                say(f"{bench.name}: stop_after={config.stop_after} reached; start again without it to go on", "yellow")
                return None
            result = run.finish(state, held)
            if asked:
                raise Interrupted(f"{bench.name}: interrupted after its end; start again to go on")
            return result


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT; the second one ends the process at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            signal.default_int_handler(number, frame)
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """One stage in progress: what changes from step to step beside the train state."""

    def __init__(
        self,
        bench: Workbench,
        start: Start,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        stopping: EarlyStopping,
    ) -> None:
        self._bench, self._config = bench, bench.stage.loop
        self._checkpoints, self._writer = checkpoints, writer
        self._stopping, self.stopping_state = stopping, start.stopping
        self._parent = start.parent
        self._evaluate = make_evaluate(bench)
        self._schedule = make_schedule(bench.stage.optim.schedule, self._config.steps)
        self._saved_step = int(start.state.step)
        # What a checkpoint carries over so that a resumed run's lines and totals are those of an unbroken one.
        self._carried = start.carried or {
            "tokens": 0,
            "seconds": 0.0,
            "interval": dict.fromkeys(SUMMED, 0.0),
            "best": {},
        }
        self._note = ""

    def steps(self, state: TrainState, first: int, last: int, asked: list[int]) -> tuple[TrainState, int]:
        """Steps first .. last - 1, or fewer if early stopping acts; the state, and the step that it is at."""
        bench, config = self._bench, self._config
        optim = bench.stage.optim
        train_step = jax.jit(
            make_train_step(
                bench.model.apply,
                bench.tx,
                seed=bench.recipe.seed,
                accumulate=config.accumulate,
                label_smoothing=optim.label_smoothing,
                z_loss=optim.z_loss,
                frozen=path_matches(optim.freeze, bench.shapes.params),
            ),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, bench.shapes), None),
        )
        if self._stopping.should_stop(self.stopping_state):
            return state, first
        if not first:
            self._log_evaluation(0, self._evaluate(state.params, False), "")
        progress = Progress(bench.name, config.steps, first)
        pending: collections.deque[tuple[int, Sums, int]] = collections.deque()
        self._restart_clock()
        for k, placed in enumerate(prefetch(self._batch_at(), first, last), start=first):
            state, sums = train_step(state, placed.batch)
            pending.append((k + 1, sums, placed.tokens))
            if k == first:  # compilation is not training time
                jax.block_until_ready(sums)
                self._restart_clock()
            while len(pending) > 1:
                self._read(*pending.popleft())
            done = k + 1
            progress.update(done, self._note)
            evaluates = done % config.eval_every == 0 or done == config.steps
            if not (evaluates or done % config.save_every == 0 or done == last or asked):
                continue
            while pending:  # what is saved must be known to be finite
                self._read(*pending.popleft())
            paused = time.monotonic()
            improved = False
            if evaluates:
                progress.clear()
                improved = self._evaluate_at(done, state)
            stops = self._stopping.should_stop(self.stopping_state)
            if improved or stops or done % config.save_every == 0 or done == last or asked:
                self._save(done, state)
            if asked:
                self._checkpoints.wait()
                raise Interrupted(f"{bench.name}: interrupted; saved at step {done}, start it again to go on")
            if stops:
                return state, done
            self._clock += time.monotonic() - paused
        return state, max(first, last)

    def _batch_at(self) -> Callable[[int], Placed]:
        bench = self._bench
        batch = batches_by_step(
            bench.train,
            batch_size=self._config.batch_size,
            seed=bench.recipe.seed,
            weights=bench.stage.data.weights,
            process=jax.process_index(),
            processes=jax.process_count(),
        )

        def place(k: int) -> Placed:
            rows = batch(k)
            if not np.any(rows.weights_BL) and jax.process_count() == 1:
                raise ValueError(
                    f"batch {k} has no trained-on token; look at the data with `jaxstages inspect`, or raise "
                    f"config.{bench.name}.loop.batch_size"
                )
            return Placed(place_batch(rows, bench.mesh), int(np.sum(rows.segments_BL > 0)) * jax.process_count())

        return place

    def _restart_clock(self) -> None:
        self._clock, self._clock_tokens = time.monotonic(), 0

    def _read(self, step: int, sums: Sums, tokens: int) -> None:
        """Take in the sums of one step; raises Diverged where they are not finite."""
        values = {name: float(value) for name, value in jax.device_get(sums).items()}
        interval = self._carried["interval"]
        for name in SUMMED:
            interval[name] += values[name]
        self._carried["tokens"] += tokens
        self._clock_tokens += tokens
        # With the update finite, the parameters after it are, which is what a save relies on.
        if not all(math.isfinite(values[name]) for name in ("objective", "grad_norm", "update_norm")):
            loss = values["nll"] / values["weight"]
            stands = (
                f"the checkpoint at step {self._saved_step} stands" if self._saved_step else "nothing was saved yet"
            )
            self._writer.write(step, "event", {"event": "not finite", "loss": loss, "grad_norm": values["grad_norm"]})
            raise Diverged(
                f"{self._bench.name}: loss {loss} and gradient norm {values['grad_norm']} at step {step} are not "
                f"finite; {stands}. Halve peak_lr, or lengthen the warm-up"
            )
        if step % self._config.log_every and step != self._config.steps:
            return
        seconds = max(time.monotonic() - self._clock, 1e-9)
        loss, rate = interval["nll"] / interval["weight"], self._clock_tokens / seconds
        self._carried["seconds"] += seconds
        line = {
            "loss": loss,
            "token_accuracy": interval["correct"] / interval["weight"],
            "grad_norm": values["grad_norm"],
            "learning_rate": float(np.asarray(self._schedule(step - 1))),
            "tokens": self._carried["tokens"],
            "tokens_per_second": rate,
        }
        self._writer.write(step, "train", line)
        self._carried["interval"] = dict.fromkeys(SUMMED, 0.0)
        self._note = f"loss {loss:.3f}  {rate:,.0f} tok/s"
        self._restart_clock()

    def _evaluate_at(self, step: int, state: TrainState) -> bool:
        report = self._evaluate(state.params, True)
        stop = self._bench.stage.early_stopping
        value = report.metrics[stop.metric]
        self.stopping_state = self._stopping.update(self.stopping_state, value, step)
        improved = int(self.stopping_state.best_step) == step
        if improved:
            self._carried["best"] = {name: plain(number) for name, number in report.metrics.items()}
        bad, best = int(self.stopping_state.bad), float(self.stopping_state.best)
        mark = "best so far" if improved else f"{bad} without improvement on {stop.metric} {best:.4g}"
        self._log_evaluation(step, report, mark)
        if self._stopping.should_stop(self.stopping_state):
            reason = (
                f"{stop.metric} has not improved by more than {stop.min_delta:g} for {bad} evaluations; "
                f"the best, {best:.4g}, was at step {int(self.stopping_state.best_step)}"
            )
            say(f"{self._bench.name}: early stopping at step {step}: {reason}", "yellow")
            self._writer.write(step, "event", {"event": "early_stopping", "reason": reason})
        return improved

    def _log_evaluation(self, step: int, report: Report, mark: str) -> None:
        self._writer.write(step, "eval", report.metrics)
        bad = [name for name, value in report.metrics.items() if not math.isfinite(value)]
        if bad:
            self._writer.write(step, "event", {"event": "not finite", "metrics": ", ".join(bad)})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in report.metrics.items() if "/" not in name)
        say(f"{self._bench.name}: eval at step {step}: {shown}{f'  ({mark})' if mark else ''}", "green")

    def _save(self, step: int, state: TrainState) -> None:
        meta = contract_of(self._bench) | {
            "stage": self._bench.name,
            "parent": self._parent,
            "data": [source.folder.name for source in self._bench.train],
            "jax": jax.__version__,
            "carried": copy.deepcopy(self._carried),  # it is written while the loop goes on
        }
        self._checkpoints.save(step, state, self.stopping_state, meta, int(self.stopping_state.best_step))
        self._saved_step = step

    def finish(self, state: TrainState, step: int) -> dict[str, Any]:
        """The last save is on disk: say what came of it, and write `result.json`, which makes the stage finished."""
        bench, stop = self._bench, self._bench.stage.early_stopping
        best_step = int(self.stopping_state.best_step)
        if best_step < 0:
            raise Diverged(f"{bench.name}: {stop.metric} was never finite; halve peak_lr, or lengthen the warm-up")
        best = state.params if best_step == step else read_params(bench.stage_dir, best_step, bench.shapes.params)
        lines = read_metrics(bench.stage_dir / "metrics.jsonl")
        verdict = _verdict(bench, lines)
        result = {
            "stage": bench.name,
            "status": "completed" if step >= self._config.steps else "early_stopped",
            "steps": step,
            "best_step": best_step,
            "best": self._carried["best"],
            "tokens": self._carried["tokens"],
            "seconds": self._carried["seconds"],
            "params_sha256": params_sha256(best),
            "last_params_sha256": params_sha256(state.params),
            "parent": self._parent,
            "verdict": verdict._asdict(),
        }
        write_json(result_file(bench.stage_dir), {name: plain(value) for name, value in result.items()})
        say(
            f"{bench.name}: {result['status']} at step {step}; best step {best_step}, {stop.metric} "
            f"{float(self.stopping_state.best):.4g}; params_sha256 {result['params_sha256'][:12]}…",
            "bold",
        )
        say(f"{bench.name}: {verdict}", "bold")
        return result


def _verdict(bench: Workbench, lines: list[dict[str, Any]]) -> Verdict:
    def curve(kind: str) -> list[tuple[int, float]]:
        found = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind and "loss" in line]
        return [(step, math.nan if loss is None else loss) for step, loss in found]

    baseline = math.log(unigram_perplexity(bench.train, bench.held_out))
    return judge(curve("train"), curve("eval"), baseline)
