"""One compiled step for several runs of a stage that differ in seed and float hyperparameters only.

The step of `compile.py` is vectorized over the runs of a device: states are stacked, and the numbers in which the runs
differ are arguments. Everything else of a run is its own: batches, guard, evaluations, early stopping, checkpoints.

Legend: T runs.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstages import config as recipes
from jaxstages.config import Recipe
from jaxstages.models.select import limit_memory
from jaxstages.runtime.signals import Stop
from jaxstages.training.compile import abstract_batch, compiler_options, make_step
from jaxstages.training.loop import COMPILING
from jaxstages.training.optimizer import make_optimizer
from jaxstages.training.program import Program
from jaxstages.training.setup import StageSetup
from jaxstages.training.stage import OpenStage, RunOptions, open_stage
from jaxstages.types import Batch, Diverged, Interrupted, Sums, TrainState

FREE = ("schedule.peak_lr", "schedule.end_factor", "beta1", "beta2", "weight_decay", "muon_lr_factor")
"""Fields of `optim` in which the runs may differ, beside the seed. No Python code branches on their values."""

LARGEST_SEED = 2**31 - 1
"""Seeds are int32 in the step; larger ones would give other keys than alone."""

Numbers = dict[str, np.ndarray]
"""Field -> value of each run [T]."""

TogetherStep = Callable[..., tuple[Sequence[TrainState], Sequence[Sums]]]
"""`step(states, batches) -> (states, sums)`, each a sequence with an item per run. The states are donated."""


# The stages -------------------------------------------------------------------------------------------------------


def check_together(runs: Sequence[Recipe], name: str) -> None:
    """Check that runs of a stage can share a compiled step.

    Raises:
        ValueError: they differ in a field that is part of the compiled program, or the stage uses an unsupported part.
    """
    first = recipes.stages(runs[0])[name]
    if first.lora.rank or first.anchor.weight:
        field = "lora.rank" if first.lora.rank else "anchor.weight"
        raise ValueError(f"config.{name}.{field}: runs with frozen parameters can't be trained together")
    if first.loop.remat == "auto":
        raise ValueError(f'config.{name}.loop.remat="auto" measures a single run; name a policy to train runs together')

    free = {f"config.{name}.optim.{field}" for field in FREE}
    for run in runs:
        if run.seed > LARGEST_SEED:
            raise ValueError(f"config.seed={run.seed}: runs that are trained together have seeds up to {LARGEST_SEED}")
        lines = recipes.differences(first, recipes.stages(run)[name], f"config.{name}")
        for part in ("model", "tokenizer", "mesh"):
            lines += recipes.differences(getattr(runs[0], part), getattr(run, part), f"config.{part}")
        for line in lines:
            if line.split(":")[0] not in free:
                raise ValueError(
                    f"{line}: runs that differ in this can't be trained together; they may differ in the seed, and in "
                    f"{', '.join(FREE)} of config.{name}.optim"
                )


def train_together(setups: Sequence[StageSetup], signals: Stop) -> list[dict[str, Any] | Exception | None]:
    """Train a stage of several runs, those of each device with one compiled step. Each run is resumed, evaluated, saved
    and finished as alone.

    Args:
        setups: stages with a mesh of one device each. Those on the same device share a step, and devices work in
            parallel.
        signals: receives requests to stop, for all runs.

    Returns:
        For each run, its result, None if `stop_after` ended it, or the error that ended it.

    Raises:
        ValueError: the runs can't be trained together.
    """
    check_together([setup.recipe for setup in setups], setups[0].name)
    opened: dict[int, OpenStage] = {}
    runs = [_in_turns(setup, signals, functools.partial(opened.__setitem__, i)) for i, setup in enumerate(setups)]
    waiting: dict[int, tuple[TrainState, Batch]] = {}
    outcomes: list[dict[str, Any] | Exception | None] = [None] * len(runs)

    def go_on(index: int, results: tuple[TrainState, Sums] | None) -> None:
        """Let a run go on to its next step, or to its end."""
        waiting.pop(index, None)
        try:
            waiting[index] = next(runs[index]) if results is None else runs[index].send(results)
        except StopIteration as end:
            outcomes[index] = end.value
        except (Diverged, Interrupted, ValueError, OSError) as error:
            outcomes[index] = error

    for index in range(len(runs)):
        go_on(index, None)
    devices = [setup.program.mesh.devices.flat[0] for setup in setups]
    groups: dict[Any, _Group] = {}
    while waiting:
        results: dict[int, tuple[TrainState, Sums]] = {}
        for device in dict.fromkeys(devices[index] for index in waiting):
            active = {index: run for index, run in waiting.items() if devices[index] == device}
            if device not in groups or groups[device].too_large_for(active):
                opened[next(iter(active))].training.heartbeat(COMPILING)  # the watchdog's timer is that of all runs
                groups[device] = _Group(setups, active)
            results |= groups[device].step(active)
        # Only now does anything wait for a result: by then all devices are at work.
        for index, result in results.items():
            go_on(index, result)
    return outcomes


class _Group:
    """The runs of one device, and their compiled step.

    Runs need not be at the same step. The slot of a run that has ended is idle: its state is advanced, and dropped.
    """

    def __init__(self, setups: Sequence[StageSetup], runs: Mapping[int, tuple[TrainState, Batch]]) -> None:
        self._slots = dict(runs)
        self._shared_batch = (
            len({(setups[index].recipe.seed, int(state.step)) for index, (state, _) in runs.items()}) == 1
        )
        self._step = compile_together([setups[index].program for index in runs], self._shared_batch)

    def too_large_for(self, active: Mapping[int, Any]) -> bool:
        """Return whether at least half of the slots are idle."""
        return len(active) <= len(self._slots) // 2

    def step(self, active: Mapping[int, tuple[TrainState, Batch]]) -> dict[int, tuple[TrainState, Sums]]:
        """Dispatch a step of the runs that are active, and return their results."""
        self._slots |= active
        states = [state for state, _ in self._slots.values()]
        batches = [batch for _, batch in (active if self._shared_batch else self._slots).values()]
        results = dict(zip(self._slots, zip(*self._step(states, batches), strict=True), strict=True))
        self._slots = {index: (state, self._slots[index][1]) for index, (state, _) in results.items()}
        return {index: results[index] for index in active}


def _in_turns(
    setup: StageSetup, signals: Stop, on_open: Callable[[OpenStage], None]
) -> Generator[tuple[TrainState, Batch], tuple[TrainState, Sums], dict[str, Any] | None]:
    """Train a stage whose steps are computed by the caller.

    Yields the state and batch of a step, receives its results, and returns the result of the stage.

    Args:
        on_open: called with the stage when its files are open.
    """
    with open_stage(setup, RunOptions(), contextlib.nullcontext(Stop(signals.poll))) as stage:
        on_open(stage)
        state, step = stage.initial.state, stage.step
        if not stage.loop.begin(state, step, stage.last):
            for (batch,) in stage.loop.batches():
                state, sums = yield state, batch
                step += 1
                if stage.loop.after_step(step, state, sums):
                    break
        return stage.finish(state, step)


# The step ---------------------------------------------------------------------------------------------------------


def differing_numbers(programs: Sequence[Program]) -> Numbers:
    """Return the seed and those of the `FREE` fields whose values differ between the runs."""
    numbers: Numbers = {}
    for field in FREE:
        values = [_get(program.config.optim, field) for program in programs]
        if len(set(values)) > 1:
            numbers[field] = np.asarray(values, np.float32)
    return numbers | {"seed": np.asarray([program.seed for program in programs], np.int32)}


def compile_together(programs: Sequence[Program], shared_batch: bool = False) -> TogetherStep:
    """Compile the step of all runs.

    Args:
        programs: programs that differ in the seed and in the `FREE` fields only.
        shared_batch: all runs train on the same batch at each step, which is then not stacked.

    Raises:
        ValueError: the mesh has several devices.
    """
    first, numbers = programs[0], differing_numbers(programs)
    if first.mesh.size > 1:
        raise ValueError(
            f"runs that are trained together have a mesh of one device each, and this one has {first.mesh.size}; pass "
            "setup_stage one of them as devices"
        )

    def step(numbers: dict[str, jax.Array], state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        return make_step(_with_numbers(first, numbers), first.config.loop.remat)(state, batch)

    def together(
        numbers: dict[str, jax.Array], states: Sequence[TrainState], batches: Sequence[Batch]
    ) -> tuple[list[TrainState], list[Sums]]:
        batch, axis = (batches[0], None) if shared_batch else (_stack(batches), 0)
        new_states, sums = jax.vmap(step, in_axes=(0, 0, axis))(numbers, _stack(states), batch)
        return _unstack(new_states, len(programs)), _unstack(sums, len(programs))

    jitted = jax.jit(together, donate_argnums=1, compiler_options=compiler_options(first))
    states = [first.abstract_state] * len(programs)
    batches = [abstract_batch(first, first.config.loop.batch_size)] * (1 if shared_batch else len(programs))
    compiled = jitted.lower(numbers, states, batches).compile()
    run = limit_memory(compiled, compiled, first.mesh.devices.flat[0].platform)

    def call(states: Sequence[TrainState], batches: Sequence[Batch]) -> tuple[list[TrainState], list[Sums]]:
        return run(numbers, list(states), list(batches[:1] if shared_batch else batches))

    return call


def _with_numbers(program: Program, numbers: dict[str, jax.Array]) -> Program:
    """Return the program with the seed and the hyperparameters of one run, which are traced."""
    optim = program.config.optim
    for field, value in numbers.items():
        if field != "seed":
            optim = _replace(optim, field, value)
    tx = make_optimizer(optim, program.config.loop.steps, program.trainable.axes)
    return dataclasses.replace(program, tx=tx, seed=numbers["seed"])


def _get(config: Any, field: str) -> Any:
    name, _, inner = field.partition(".")
    return _get(getattr(config, name), inner) if inner else getattr(config, name)


def _replace(config: Any, field: str, value: Any) -> Any:
    name, _, inner = field.partition(".")
    return dataclasses.replace(config, **{name: _replace(getattr(config, name), inner, value) if inner else value})


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstack(tree: Any, number: int) -> list[Any]:
    leaves, structure = jax.tree.flatten(tree)
    return [structure.unflatten(leaf[index] for leaf in leaves) for index in range(number)]
