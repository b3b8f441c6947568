"""The train step of a stage, compiled: for its mesh, with its options, and with as much recomputation as memory needs.

| `loop.remat` | kept of each layer for the backward pass    | costs                            |
| none         | all                                         | memory                           |
| dots         | what matrix products give                   | elementwise operations again     |
| offload      | the same, in the host's memory              | copies there and back            |
| full         | its input                                   | the layer's forward pass again   |
| auto         | the first of none, dots, full that fits     | a compilation for each one tried |
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxstages.models.losses import kl_sum
from jaxstages.models.sharding import shardings_of
from jaxstages.runtime.console import say
from jaxstages.train.optimizer import path_matches
from jaxstages.train.program import Program
from jaxstages.train.step import TrainStep, make_train_step
from jaxstages.types import Batch, HiddenAndHead, Params, Sums, TrainState

REMAT_ORDER = ("none", "dots", "full")
"""Of "auto": each saves more memory than the one before, and takes more time."""

SHARE = 0.92
"""Of the memory that a step may take; the rest is for what a compiler's count leaves out."""

MUCH = 2**28
"""Temporary bytes of a step on CPU, beside which the milliseconds that are waited between two steps are nothing."""


def compile_step(program: Program, base: Any = (), reference: Params | None = None) -> tuple[TrainStep, Any]:
    """The stage's step as a pure function, and the same one jitted, `step(state, batch)`, its state donated; with an
    anchor `step(state, batch, anchor_batch)`.

    Args:
        base: what the stage's adapters lie beside.
        reference: the parent's parameters, which the anchor keeps to.
    """
    asked, device = program.config.loop.remat, program.mesh.devices.flat[0]
    rungs, limit = (REMAT_ORDER, _memory_of(device)) if asked == "auto" else ((asked,), 0)
    rung, (step, jitted), compiled = first_that_fits(program, rungs, SHARE * limit)
    if asked == "auto":
        need = bytes_of(compiled)
        say(
            f"{program.name}: remat {rung}: a step takes {need / 2**30:.2f} of {limit / 2**30:.2f} GiB a device", "cyan"
        )
        if need > SHARE * limit:
            say(f"{program.name}: that may be too much; lower loop.batch_size, or raise loop.accumulate", "yellow")
    frozen = {"base": base, "reference": reference}
    return functools.partial(step, **frozen), paced(functools.partial(jitted, **frozen), compiled, device.platform)


def paced(jitted: Any, compiled: Any, platform: str) -> Any:
    """The jitted step. On CPU one with much temporary memory is waited for: the next one, dispatched while it runs,
    would have its own beside it, and so would one dispatched in the moment between the results and the release."""

    def step(*arguments: Any) -> Any:
        results = jax.block_until_ready(jitted(*arguments))
        time.sleep(0.002)  # seconds until it is released; 0.0005 was too short after 1 step of 25
        return results

    much = compiled.memory_analysis().temp_size_in_bytes > MUCH
    return step if platform == "cpu" and much else jitted


def first_that_fits(program: Program, rungs: Sequence[str], most: float) -> tuple[str, tuple[Any, Any], Any]:
    """The first way of `remat` by which a step takes at most so many bytes of a device, or else the last: its name,
    what `jit_step` gives for it, and that compiled."""
    rung, *others = rungs
    found = jit_step(program, rung)
    compiled = (
        found[1]
        .lower(*abstract_step_arguments(program), base=program.abstract_base, reference=program.abstract_reference)
        .compile()
    )
    fits = bytes_of(compiled) <= most or not others
    return (rung, found, compiled) if fits else first_that_fits(program, others, most)


def jit_step(program: Program, remat: str) -> tuple[Any, Any]:
    """The step, and the step jitted: `step(state, batch, anchor_batch, base=, reference=)`. Base and reference are
    arguments, not constants of the program; nothing is differentiated by them."""
    config, optim, neftune = program.config.loop, program.config.optim, program.config.neftune_alpha
    model = program.remake(remat=remat, neftune=neftune) if remat != "none" or neftune else program.model
    make = functools.partial(
        make_train_step,
        tx=program.tx,
        seed=program.seed,
        accumulate=config.accumulate,
        label_smoothing=optim.label_smoothing,
        z_loss=optim.z_loss,
        loss_tile=config.loss_tile,
        spike_sigma=optim.spike_sigma,
        average=optim.average,
        anchor_weight=program.config.anchor.weight,
        frozen=path_matches(optim.freeze, program.abstract_state.params),
        place=program.hooks,
    )

    def step(
        state: TrainState,
        batch: Batch,
        anchor_batch: Batch | tuple[()] = (),
        base: Any = (),
        reference: Params | None = None,
    ) -> tuple[TrainState, Sums]:
        def hidden(trained: Params, part: Batch, key: Any) -> jax.Array | HiddenAndHead:
            return model.outputs(program.trainable.join(base, trained), part, key)

        def penalty(trained: Params, part: Batch, key: Any) -> jax.Array:
            assert reference is not None
            kept = model.outputs(reference, part, None)
            return kl_sum(kept, hidden(trained, part, key), part.weights_BL, tile=config.loss_tile)

        return make(hidden, anchor=None if reference is None else penalty)(state, batch, anchor_batch)

    debug = jax.config.values["jax_debug_nans"]
    jitted = jax.jit(
        step,
        donate_argnums=() if debug else 0,  # to find the operation, the step is run again
        out_shardings=(shardings_of(program.abstract_state), None),
        compiler_options=_compiler_options(program),
    )
    return step, jitted


def _compiler_options(program: Program) -> dict[str, str | bool]:
    """Tried on a program of one operation: raises ValueError for one that XLA does not have, or a wrong value."""
    asked, words = program.config.loop.compiler_options, {"true": True, "false": False}
    options = {name: words.get(value, value) for name, _, value in (option.partition("=") for option in asked)}
    try:
        if options:
            jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"config.{program.name}.loop.compiler_options={asked}: {error}; mend or drop it") from error
    return options


def abstract_step_arguments(program: Program) -> tuple[Any, ...]:
    """The arguments of a step as shapes: state, batch and, with an anchor, its batch."""
    anchor = (
        (abstract_batch(program, program.config.anchor.batch_size),) if program.abstract_reference is not None else ()
    )
    return program.abstract_state, abstract_batch(program, program.config.loop.batch_size), *anchor


def abstract_batch(program: Program, batch_size: int) -> Batch:
    shape, rows = (batch_size, program.context), program.row_sharding
    dtypes = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    fields: Any = (jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in dtypes)
    return Batch(*fields)


def bytes_of(compiled: Any) -> int:
    """What a device needs at once: arguments and results, which share memory where they are donated, and the rest."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def _memory_of(device: Any) -> int:
    """Bytes that this process may take on the device; on CPU what the machine has left."""
    if stats := device.memory_stats():
        return stats["bytes_limit"]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
