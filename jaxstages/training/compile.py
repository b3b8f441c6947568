"""Compile the train step of a stage for its mesh, with the compiler options and rematerialization of the recipe.

| `loop.remat` | saved in each layer for the backward pass    | cost                               |
| none         | everything                                   | memory                             |
| dots         | outputs of matrix products                   | elementwise operations recomputed  |
| offload      | the same, in host memory                     | copies to the host and back        |
| full         | its input                                    | the layer's forward pass           |
| auto         | the first of none, dots, full that fits      | a compilation for each attempt     |
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxstages.models.losses import cross_entropy_loss, kl_sum
from jaxstages.models.select import global_norm, limit_memory
from jaxstages.models.sharding import shardings_of
from jaxstages.runtime import multihost
from jaxstages.runtime.console import say
from jaxstages.training.optimizer import path_matches
from jaxstages.training.program import Program
from jaxstages.training.step import TrainStep, make_train_step
from jaxstages.types import Batch, LossFn, Model, Params, Sums, TrainState

REMAT_ORDER = ("none", "dots", "full")
"""Policies that "auto" tries. Each needs less memory and more time than the one before."""

MEMORY_FRACTION = 0.92
"""Fraction of a device's memory that a step may take. The compiler's count omits some allocations."""


def compile_step(program: Program, base: Any = (), reference: Params | None = None) -> tuple[TrainStep, Any]:
    """Return the stage's step as a pure function, and as a jitted function that donates its state.

    Both are called as `step(state, batch)`, or with an anchor as `step(state, batch, anchor_batch)`.

    Args:
        base: frozen parameters beside the stage's adapters.
        reference: parameters of the parent, for the anchor.
    """
    device, remat = program.mesh.local_devices[0], program.config.loop.remat
    policies, limit = (remat,), 0
    if remat == "auto":  # all processes have to choose the same program
        limits = multihost.gather_floats({"limit": float(_memory_limit(device))})["limit"]
        policies, limit = REMAT_ORDER, int(min(limits))

    policy, (step, jitted), compiled = first_that_fits(program, policies, MEMORY_FRACTION * limit)
    if remat == "auto":
        _report_memory(program.name, policy, memory_bytes(compiled), limit)

    frozen = {"base": base, "reference": reference}
    jitted = limit_memory(functools.partial(jitted, **frozen), compiled, device.platform)
    return functools.partial(step, **frozen), jitted


def _report_memory(name: str, policy: str, needed: int, limit: int) -> None:
    say(f"{name}: remat {policy}: a step takes {needed / 2**30:.2f} of {limit / 2**30:.2f} GiB a device", "cyan")
    if needed > MEMORY_FRACTION * limit:
        say(f"{name}: that may be too much; lower loop.batch_size, or raise loop.accumulate", "yellow")


def first_that_fits(program: Program, policies: Sequence[str], limit: float) -> tuple[str, tuple[Any, Any], Any]:
    """Compile the step with the first of `policies` that needs at most `limit` bytes per device, or else the last one.

    Args:
        policies: rematerialization policies in the order to try them.

    Returns:
        The policy, the result of `jit_step`, and the compiled step.
    """
    policy, *others = policies
    step, jitted = jit_step(program, policy)
    base, reference = program.abstract_base, program.abstract_reference
    compiled = jitted.lower(*abstract_step_arguments(program), base=base, reference=reference).compile()

    if memory_bytes(compiled) <= limit or not others:
        return policy, (step, jitted), compiled
    return first_that_fits(program, others, limit)


def make_loss(program: Program, model: Model) -> LossFn:
    """Return the loss of a stage, `loss(params, batch, dropout_key) -> sums`, on the parameters of the model."""
    if program.config.loss is not None:
        return _custom_loss(program, model)
    optim = program.config.optim
    return cross_entropy_loss(
        model.outputs,
        label_smoothing=optim.label_smoothing,
        z_loss=optim.z_loss,
        tile=program.config.loop.loss_tile,
        hooks=program.hooks,
        platform=program.mesh.devices.flat[0].platform,
    )


def _custom_loss(program: Program, model: Model) -> LossFn:
    """Return the recipe's custom loss. The sum "nll" is reported as the loss; it defaults to the objective."""
    custom = program.config.loss
    assert custom is not None

    def loss(params: Params, batch: Batch, dropout_key: Any) -> Sums:
        sums = dict(custom(model, params, batch, dropout_key))
        if missing := {"objective", "weight"} - sums.keys():
            raise ValueError(f"config.{program.name}.loss returns no {', '.join(sorted(missing))}; it has {[*sums]}")
        return {"nll": jax.lax.stop_gradient(sums["objective"])} | sums

    return loss


def make_step(program: Program, remat: str) -> Any:
    """Return the step of a stage as a pure function, `step(state, batch, anchor_batch, base=, reference=)`.

    Base and reference are arguments, so that a compiled program does not contain them as constants. They get no
    gradient.
    """
    config, optim, neftune = program.config.loop, program.config.optim, program.config.neftune_alpha
    model = program.remake(remat=remat, neftune=neftune) if remat != "none" or neftune else program.model
    loss = make_loss(program, model)
    make = functools.partial(
        make_train_step,
        tx=program.tx,
        seed=program.seed,
        accumulate=config.accumulate,
        spike_sigma=optim.spike_sigma,
        average=optim.average,
        anchor_weight=program.config.anchor.weight,
        frozen=path_matches(optim.freeze, program.abstract_state.params),
        norm=global_norm,
    )

    def step(
        state: TrainState,
        batch: Batch,
        anchor_batch: Batch | tuple[()] = (),
        base: Any = (),
        reference: Params | None = None,
    ) -> tuple[TrainState, Sums]:
        join = functools.partial(program.trainable.join, base)

        def trained_loss(trained: Params, rows: Batch, key: Any) -> Sums:
            return loss(join(trained), rows, key)

        def penalty(trained: Params, rows: Batch, key: Any) -> jax.Array:
            assert reference is not None
            reference_outputs = model.outputs(reference, rows, None)
            outputs = model.outputs(join(trained), rows, key)
            return kl_sum(reference_outputs, outputs, rows.weights_BL, tile=config.loss_tile)

        return make(trained_loss, anchor=None if reference is None else penalty)(state, batch, anchor_batch)

    return step


def jit_step(program: Program, remat: str) -> tuple[Any, Any]:
    """Return the step of `make_step`, and the jitted step."""
    step = make_step(program, remat)
    debug = jax.config.values["jax_debug_nans"]
    jitted = jax.jit(
        step,
        donate_argnums=() if debug else 0,  # with --debug_nans the loop runs the step again to find the operation
        out_shardings=(shardings_of(program.abstract_state), None),
        compiler_options=compiler_options(program),
    )
    return step, jitted


def compiler_options(program: Program) -> dict[str, str | bool]:
    """Parse `loop.compiler_options`, and compile a small program with them.

    Raises:
        ValueError: XLA does not know an option, or refuses its value.
    """
    words, booleans = program.config.loop.compiler_options, {"true": True, "false": False}
    options = {name: booleans.get(value, value) for name, _, value in (word.partition("=") for word in words)}
    try:
        if options:
            jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"config.{program.name}.loop.compiler_options={words}: {error}; mend or drop it") from error
    return options


def abstract_step_arguments(program: Program) -> tuple[Any, ...]:
    """Return the abstract arguments of a step: state, batch and, with an anchor, its batch."""
    state, batch = program.abstract_state, abstract_batch(program, program.config.loop.batch_size)
    if program.abstract_reference is None:
        return state, batch
    return state, batch, abstract_batch(program, program.config.anchor.batch_size)


def abstract_batch(program: Program, batch_size: int) -> Batch:
    """Return an abstract batch of the stage, [batch_size, context]."""
    field = functools.partial(jax.ShapeDtypeStruct, (batch_size, program.context), sharding=program.row_sharding)
    fields: Any = map(field, (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32))
    return Batch(*fields)


def memory_bytes(compiled: Any) -> int:
    """Return the bytes per device of a program: arguments, results and temporaries, counting donated buffers once."""
    stats = compiled.memory_analysis()
    arguments_and_results = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return arguments_and_results + stats.temp_size_in_bytes


def _memory_limit(device: Any) -> int:
    """Return the bytes of device memory that this process may use; for CPU, the available memory of the machine."""
    if stats := device.memory_stats():
        return stats["bytes_limit"]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
