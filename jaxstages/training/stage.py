"""Train one stage: its initial state, the loop, and the result that makes the stage finished."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import params_sha256
from jaxstages.checkpoint.manager import Checkpoints, read_params
from jaxstages.config import ModelConfig
from jaxstages.config.metrics import higher_is_better
from jaxstages.config.parts import metric_name
from jaxstages.data.batches import batches_by_step, batches_once
from jaxstages.data.mixture import describe
from jaxstages.data.row_text import spans_of
from jaxstages.data.stage_data import WATCH
from jaxstages.generation.evaluate import unigram_perplexity
from jaxstages.models.flops import flops_per_token
from jaxstages.models.sharding import local_row_range, place_batch
from jaxstages.runtime import multihost
from jaxstages.runtime.chips import chip_of
from jaxstages.runtime.console import duration, say
from jaxstages.runtime.files import write_json
from jaxstages.runtime.signals import Stop, stop_signals, watchdog
from jaxstages.runtime.workdir import result_file
from jaxstages.training.compile import compile_step
from jaxstages.training.diagnosis import Verdict, judge
from jaxstages.training.early_stopping import early_stopping
from jaxstages.training.initial_state import InitialState, restore_or_init
from jaxstages.training.loop import Batches, Loop, Training, check_weight
from jaxstages.training.metric_writer import MetricsWriter, plain, read_metrics
from jaxstages.training.profiling import Profiler
from jaxstages.training.saved_items import AVERAGE
from jaxstages.training.setup import StageSetup, make_stage_evaluate
from jaxstages.training.trackers import trackers_of
from jaxstages.training.tracking import Tracking
from jaxstages.types import Diverged, Metrics, Params, Report, TrackedStage, TrainState

SMALL_STEP_FLOPS, GROUP = 1e10, 8
"""Steps cheaper than this (6 operations a parameter and token, Kaplan et al. 2020) are dispatched in groups of 8
between host reads, because host work would otherwise be a visible share of the step."""

EXAMPLES = 3
"""Held-out rows to show in TensorBoard."""

FEW_TOKENS, TOKEN_LOSS_SD = 4000, 2.0
"""A held-out set with fewer scored tokens decides little: losses of single tokens have a standard deviation of about 2
nats, which makes the mean of 4,000 uncertain by 0.03."""


class RunOptions(NamedTuple):
    """How to run a stage. Nothing here changes what is trained, so it is no part of the recipe.

    finish: end the stage at the step that it has saved.
    profile: first and last step of a profiler trace, counted from 1.
    """

    finish: bool = False
    profile: tuple[int, int] | None = None


class OpenStage(NamedTuple):
    """A stage that is ready to run from its initial state, or to resume, with its files open.

    initial: its initial state. step: the step of that state. last: the last step to run.
    """

    setup: StageSetup
    options: RunOptions
    training: Training
    loop: Loop
    initial: InitialState
    step: int
    last: int
    began: float

    def finish(self, state: TrainState, step: int) -> dict[str, Any] | None:
        """End the stage at a step that the loop has saved. Returns its result; None if `stop_after` ended the run.

        Raises:
            Diverged, ValueError: there is nothing to hand on.
            OSError: the last save failed.
        """
        config = self.setup.config.loop
        self.training.checkpoints.check_last(step)
        self.training.writer.sync()
        self.training.signals.unsaved = False
        if step < config.steps and not self.options.finish and not self.loop.should_stop():
            say(f"{self.setup.name}: stop_after={config.stop_after} reached; start again without it to go on", "yellow")
            return None
        return _finish(self.setup, self.loop, state, step, self.initial.parent, self.began)


def train_stage(setup: StageSetup, options: RunOptions = RunOptions()) -> dict[str, Any] | None:
    """Train a stage from its initial state to its end, and write its result.

    Returns the result, or None if `stop_after` ended the run before the stage.

    Raises:
        ValueError: the start rules or the contract forbid it.
        Diverged: too many steps in a row were not finite.
        Interrupted: a signal asked to stop; everything is saved.
        OSError: a save failed; those before it stand.
    """
    with open_stage(setup, options, stop_signals(multihost.preemption_poll())) as stage:
        with contextlib.closing(stage.training.profiler):
            state, step = stage.loop.run(stage.initial.state, stage.step, stage.last)
        return stage.finish(state, step)


@contextlib.contextmanager
def open_stage(
    setup: StageSetup, options: RunOptions, signals: contextlib.AbstractContextManager[Stop]
) -> Iterator[OpenStage]:
    """Restore or initialize a stage, and open its files until the end of the block.

    Args:
        signals: receives requests to stop.

    Raises:
        ValueError: the start rules or the contract forbid it.
    """
    began = time.monotonic()
    config, stop, finish = setup.config.loop, setup.config.early_stopping, options.finish
    stopping = early_stopping(mode=stop.mode, patience=stop.patience, min_delta=stop.min_delta)
    with Checkpoints(setup.folder, config.keep) as checkpoints, signals as stop_requests:
        initial = restore_or_init(setup, checkpoints, stopping)
        step = int(initial.state.step)
        _check_length(setup, step, finish)
        with (
            MetricsWriter(setup.folder, step if initial.progress else -1, multihost.is_process_zero()) as writer,
            _start_tracking(setup, checkpoints) as tracking,
            watchdog(config.hang_seconds) as heartbeat,
        ):
            writer.show_examples(_examples(setup))
            compared = [*dict.fromkeys(("loss", stop.metric))]
            writer.describe(recipes.to_dict(setup.recipe), _hyperparameters(setup), compared)
            for line in describe(setup.data.datasets, config.steps, config.batch_size, setup.config.late_from):
                say(f"  {line}")
            for line in _warnings(setup):
                say(f"  {line}", "yellow")

            def evaluate(trained: Params, scores: bool) -> Report:
                return evaluate_params(setup.program.trainable.join(initial.base, trained), scores)

            training = Training(
                name=setup.name,
                folder=setup.folder,
                config=setup.config,
                compile_step=lambda: compile_step(setup.program, initial.base, _reference(initial)),
                group=_group_size(setup),
                batches=_batches(setup, initial),
                evaluate=evaluate,
                scores={each.prefix: [*map(metric_name, each.config.metrics)] for each in setup.data.evaluation_sets},
                allowed=lambda metrics, start: _within(setup, metrics, start),
                schedule=setup.program.schedule,
                meta=_meta(setup, initial),
                checkpoints=checkpoints,
                writer=writer,
                track=tracking.poll,
                stopping=stopping,
                profiler=Profiler(options.profile, setup.folder),
                utilization=_utilization(setup),
                signals=stop_requests,
                heartbeat=heartbeat,
            )
            last = step if finish else min(config.steps, config.stop_after or config.steps)
            loop = Loop(training, step, last if finish else config.steps, initial.stopping, initial.progress)
            evaluate_params = make_stage_evaluate(setup, before_batch=loop.before_eval_batch)
            yield OpenStage(setup, options, training, loop, initial, step, last, began)


def _check_length(setup: StageSetup, step: int, finish: bool) -> None:
    """Raises ValueError where a stage has already gone beyond its length, or is to finish without a checkpoint."""
    if finish and not step:
        raise ValueError(f"{setup.folder} has saved no step; there is nothing to hand on")
    if step > setup.config.loop.steps and not finish:
        raise ValueError(
            f"{setup.folder} has made {step} steps, and the recipe's length comes to {setup.config.loop.steps}; raise "
            f"config.{setup.name}.loop.steps, epochs or tokens"
        )


def _hyperparameters(setup: StageSetup) -> dict[str, Any]:
    """Return the fields of the stage, of the model, and of the run that differ from their defaults."""
    recipe = setup.recipe
    model = recipe.model if isinstance(recipe.model, ModelConfig) else ModelConfig()
    pairs = {"": (setup.config, recipes.StageConfig()), "model.": (model, ModelConfig())}
    values: dict[str, Any] = {"seed": recipe.seed}
    for prefix, (config, default) in pairs.items():
        fields, defaults = (recipes.flat_fields(recipes.to_dict(each), "") for each in (config, default))
        changed = {name: value for name, value in fields.items() if value != defaults.get(name)}
        values |= {f"{prefix}{name.lstrip('.')}": value for name, value in changed.items()}
    return values


def _examples(setup: StageSetup) -> list[tuple[str, str]]:
    """Return the first held-out rows as text: the whole, and the part that is scored."""
    tokenizer = setup.data.tokenizer
    source = next((source for source in setup.data.held_out if source.index["rows"]), None)
    if source is None:
        return []
    count = min(EXAMPLES, source.index["rows"])
    batch = next(batches_once(source, range(count), batch_size=count))
    try:
        rows = [spans_of(batch, row, tokenizer) for row in range(count)]
    except ValueError:  # a tokenizer that can't decode, which training does not need
        return []
    return [("".join(s.text for s in spans), "".join(s.text for s in spans if s.trained)) for spans in rows]


def _start_tracking(setup: StageSetup, checkpoints: Checkpoints) -> Tracking:
    recipe = setup.recipe
    trackers = trackers_of(recipe) if multihost.is_process_zero() else {}
    tracked = TrackedStage(recipe.name, setup.workdir, setup.name, recipes.to_dict(recipe))
    return Tracking(setup.folder, tracked, trackers, lambda: checkpoints.saved_step)


def _group_size(setup: StageSetup) -> int:
    params = sum(leaf.size for leaf in jax.tree.leaves(setup.program.abstract_params))
    flops = 6 * params * setup.config.loop.batch_size * setup.program.context
    return GROUP if flops < SMALL_STEP_FLOPS else 1


def _utilization(setup: StageSetup) -> float:
    """Return the share of all devices' peak that one token per second takes (model FLOPs utilization, PaLM, 2022), with
    the causal half of attention, as `jaxstages plan` counts. 0 if the peak or the model's FLOPs are not known."""
    chip, model = chip_of(jax.devices()[0]), setup.recipe.model
    if chip is None or not isinstance(model, ModelConfig):
        return 0.0
    flops = flops_per_token(model, setup.data.tokenizer.vocab_size, setup.config.lora)
    return flops.causal / (chip.flops * jax.device_count())


def _batches(setup: StageSetup, initial: InitialState) -> Batches:
    """Return the rows of each step: of the mixture, and of the anchor if there is one."""
    size, seed, sharding = setup.config.loop.batch_size, setup.recipe.seed, setup.program.row_sharding
    mixed = setup.data.mix(setup.config.loop, setup.config.late_from)
    rows = batches_by_step(
        mixed.sources,
        batch_size=size,
        seed=seed,
        weights=mixed.weights,
        late=mixed.late,
        local_rows=local_row_range(size, sharding),
    )
    anchored = None
    if initial.anchor is not None:
        anchor_size = setup.config.anchor.batch_size
        local_rows = local_row_range(anchor_size, sharding)
        anchored = batches_by_step([initial.anchor.rows], batch_size=anchor_size, seed=seed, local_rows=local_rows)

    def load(k: int) -> tuple[Any, ...]:
        batch = rows.batch(k)
        if jax.process_count() == 1:  # of several processes, each sees its own rows only
            check_weight(setup.name, k, np.any(batch.weights_BL))
        arguments = [place_batch(batch, size, sharding)]
        if anchored is not None:
            arguments.append(place_batch(anchored.batch(k), setup.config.anchor.batch_size, sharding))
        return tuple(arguments)

    return Batches(load, rows.digest, rows.where)


def _reference(initial: InitialState) -> Params | None:
    return None if initial.anchor is None else initial.anchor.reference


def _within(setup: StageSetup, metrics: Metrics, start: Mapping[str, Any]) -> bool:
    """Whether every condition of `early_stopping.within` holds: no such metric is worse by more than its limit."""
    known = [metric for each in setup.data.evaluation_sets for metric in each.config.metrics]
    for name, limit in setup.config.early_stopping.within:
        before = start.get(name)  # absent from runs that began before there was a watch
        change = metrics[name] - (math.nan if before is None else before)
        if not (-change if higher_is_better(name, known) else change) <= limit:
            return False
    return True


def _meta(setup: StageSetup, initial: InitialState) -> dict[str, Any]:
    return setup.contract | {
        "stage": setup.name,
        "parent": initial.parent,
        "lora": recipes.to_dict(setup.config.lora) if setup.config.lora.rank else None,
        "data": setup.data.fingerprints,
        "jax": jax.__version__,
    }


def _warnings(setup: StageSetup) -> list[str]:
    """Describe faults of the data that are no errors: tokens cut off by the context, and held-out sets too small to
    decide anything."""
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
        if scored < FEW_TOKENS:
            name = each.prefix.strip("/") or setup.name
            lines.append(
                f"held-out data of {name}: {scored:,} scored tokens are too few to decide anything: a difference of "
                f"{2 * TOKEN_LOSS_SD / max(scored, 1) ** 0.5:.2f} nats may be chance; hold out more, with "
                "data.validation or data.holdout"
            )
    return lines


def _finish(
    setup: StageSetup, loop: Loop, state: TrainState, step: int, parent: dict[str, Any] | None, began: float
) -> dict[str, Any]:
    """Write `result.json`, which makes the stage finished, and report it. The last save is on disk.

    Raises:
        Diverged: no evaluation was finite, or no step was applied.
        ValueError: no evaluation met the conditions of `early_stopping.within`.
    """
    stop, progress = setup.config.early_stopping, loop.progress
    best_step = int(loop.stopping_state.best_step)
    if best_step < 0 and stop.within:
        raise ValueError(
            f"{setup.name}: no evaluation was within {stop.within}, so there is nothing to hand on; raise "
            f"replay or the anchor, or config.{setup.name}.early_stopping.within, in another --workdir"
        )
    if best_step < 0:
        raise Diverged(
            f"{setup.name}: {stop.metric} was never finite; halve peak_lr, or lengthen the warm-up, after removing "
            f"{setup.folder}, or in another --workdir"
        )
    if int(state.guard.skipped) >= step:
        raise Diverged(f"{setup.name}: the updates of all {step} steps were skipped; see metrics.jsonl for why")

    best = state.average if progress.handed_on == AVERAGE else state.params
    if best_step != step:
        best = read_params(setup.folder, best_step, setup.program.abstract_state.params, progress.handed_on)
    watch = _watch(progress.start, progress.best)
    verdict = _diagnose(setup, read_metrics(setup.folder / "metrics.jsonl"), watch)
    result = {
        "stage": setup.name,
        "status": _status(setup, loop, step),
        "steps": step,
        "best_step": best_step,
        "best": progress.best,
        "handed_on": progress.handed_on,
        "watch": watch,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "skipped": int(state.guard.skipped),
        "params_sha256": params_sha256(best),
        "last_params_sha256": params_sha256(state.params),
        "parent": parent,
        "verdict": verdict._asdict(),
    }
    if multihost.is_process_zero():
        write_json(result_file(setup.folder), {name: plain(value) for name, value in result.items()})
    multihost.barrier(f"{setup.name} is finished")

    say(
        f"{setup.name}: {result['status']} at step {step}; best step {best_step}, {stop.metric} "
        f"{float(loop.stopping_state.best):.4g}; params_sha256 {result['params_sha256'][:12]}…",
        "bold",
    )
    say(f"{setup.name}: {verdict}", "bold")
    say(
        f"{setup.name}: took {duration(time.monotonic() - began)}; scores in {result_file(setup.folder)}, "
        f"curves in {setup.folder / 'metrics.jsonl'}, next: {_next_command(setup)}"
    )
    return result


def _status(setup: StageSetup, loop: Loop, step: int) -> str:
    if step >= setup.config.loop.steps:
        return "completed"
    return "early_stopped" if loop.should_stop() else "ended"


def _next_command(setup: StageSetup) -> str:
    names = list(recipes.stages(setup.recipe))
    later = names[names.index(setup.name) + 1 :]
    code = " --config=RECIPE" if recipes.own_parts(setup.recipe) else ""  # recipe.json has no code
    where = f"--workdir={setup.workdir}{code}"
    if later:
        command = later[0] if later[0] in recipes.STAGES else f"train --stage={later[0]}"
        return f"`jaxstages {command} {where}`"
    command = "chat" if setup.config.data.task == "chat" else "generate --prompt=TEXT"
    return f"`jaxstages {command} {where}`, or `jaxstages serve {where}` for a page in the browser"


def _watch(start: Mapping[str, Any], best: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each watched metric at the start of the stage, and at the step that is handed on."""
    return {name: {"start": start.get(name), "best": best[name]} for name in best if name.startswith(WATCH)}


def _diagnose(setup: StageSetup, lines: list[dict[str, Any]], watch: dict[str, dict[str, Any]]) -> Verdict:
    def curve(kind: str) -> list[tuple[int, float]]:
        points = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind and "loss" in line]
        return [(step, math.nan if loss is None else loss) for step, loss in points]

    baseline = math.log(unigram_perplexity(setup.data.train, setup.data.held_out))
    losses = {
        name.removeprefix(WATCH).removesuffix("/loss"): (values["start"], values["best"])
        for name, values in watch.items()
        if name.endswith("/loss") and None not in values.values()
    }
    return judge(curve("train"), curve("eval"), baseline, losses, comparable=len(setup.data.datasets) == 1)
