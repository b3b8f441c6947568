"""`plan`: compile a stage for a machine, and report its memory, communication and estimated speed. Nothing is run."""

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxstages import config as recipes
from jaxstages.config import MeshConfig, ModelConfig, Recipe, StageConfig
from jaxstages.config.checks import validate
from jaxstages.interop.hf_import import describe, find_folder, source_of, tokenizer_of, with_model_of
from jaxstages.models.attention import Attend
from jaxstages.models.flops import Flops, flops_per_token
from jaxstages.models.kernels import KERNELS, Machine, Shape
from jaxstages.models.layers import attention_specs
from jaxstages.models.sharding import AXES, make_mesh
from jaxstages.plan.collectives import SMALL, collectives_of, total
from jaxstages.plan.estimate import Roofline, bytes_per_device, roofline, wire_bytes
from jaxstages.plan.theory import Traffic, expected_traffic
from jaxstages.plan.topology import Topology, topology_of
from jaxstages.runtime.console import duration, say
from jaxstages.training.compile import MEMORY_FRACTION, REMAT_ORDER, first_that_fits, memory_bytes
from jaxstages.training.program import Program, check_fit, make_program


class Plan(NamedTuple):
    """Report on a compiled stage. Bytes are per device.

    sent: bytes by kind of collective, in the compiled step.
    theory: the same by theory.
    estimate: None if the chip's speed is not known.
    seconds: time that compilation took.
    """

    params: int
    flops: Flops
    param_bytes: int
    optimizer_bytes: int
    logit_bytes: int
    step_bytes: int
    remat: str
    sent: dict[str, int]
    theory: list[Traffic]
    estimate: Roofline | None
    seconds: float


def plan(recipe: Recipe, stage: str | None, topology_name: str) -> None:
    """Print the plan of a stage, by default the recipe's first, on a topology."""
    validate(recipe)
    recipe = with_local_import(recipe)
    stages = recipes.stages(recipe)
    name = stage or next(iter(stages))
    if name not in stages:
        raise ValueError(f"recipe {recipe.name!r} has no stage {name}; it has {', '.join(stages)}")
    topology = topology_of(topology_name)
    _show(recipe, stages[name], topology, make_plan(recipe, name, topology))


def with_local_import(recipe: Recipe) -> Recipe:
    """Return the recipe with the model that it imports, if that is here: a plan downloads nothing."""
    if (source := source_of(recipe)) is None:
        return recipe
    if not Path(source).expanduser().is_dir():
        say(f"{source}, which the recipe imports, is not here: config.model is planned instead", "yellow")
        return recipe
    folder = find_folder(source)
    return with_model_of(recipe, describe(folder), tokenizer_of(folder))


def make_plan(recipe: Recipe, name: str, topology: Topology) -> Plan:
    """Compile the stage's step for the topology and compute the estimates.

    Raises:
        ValueError: the recipe has an own model, or does not fit the topology.
    """
    start, stage = time.monotonic(), recipes.stages(recipe)[name]
    model = recipes.builtin_model(recipe, "plan")
    mesh = make_mesh(recipe.mesh, topology.devices)
    check_fit(recipe, name, stage, mesh)
    vocab = max(recipe.tokenizer.vocab_size, model.vocab_size)
    attend = _choose_attention(model, topology.platform) if mesh.shape["context"] == 1 else None
    program = make_program(recipe, name, stage, mesh, vocab, attend, topology.platform)
    remat, compiled = _compile(program, topology)
    sent = total(collectives_of(compiled.as_text()))

    frozen = program.abstract_base or program.abstract_reference
    state_bytes = bytes_per_device((program.abstract_state, frozen))
    flops = flops_per_token(model, vocab, stage.lora)
    estimate = None
    if topology.chip is not None:
        recomputed = flops.causal / 3 if remat in ("full", "offload") else 0.0
        step_flops = stage.loop.batch_size * model.context * (flops.causal + recomputed)
        estimate = roofline(topology.chip, mesh.size, step_flops, state_bytes, wire_bytes(sent, mesh.size))

    row_shards = mesh.size // mesh.shape["tensor"] // mesh.shape["context"]
    rows = stage.loop.batch_size // row_shards // stage.loop.accumulate
    tile = stage.loop.loss_tile or model.context
    return Plan(
        params=sum(leaf.size for leaf in jax.tree.leaves(program.abstract_params)),
        flops=flops,
        param_bytes=bytes_per_device((program.abstract_state.params, frozen)),
        optimizer_bytes=bytes_per_device((program.abstract_state.opt_state, program.abstract_state.average)),
        logit_bytes=max(rows, 1) * tile // mesh.shape["context"] * vocab // mesh.shape["tensor"] * 4,
        step_bytes=memory_bytes(compiled),
        remat=remat,
        sent=sent,
        theory=expected_traffic(
            model,
            vocab,
            mesh,
            stage.loop.batch_size,
            merges=topology.platform != "cpu",
            recomputes=remat != "none",
        ),
        estimate=estimate,
        seconds=time.monotonic() - start,
    )


def _compile(program: Program, topology: Topology) -> tuple[str, Any]:
    """Compile with the recipe's rematerialization; "auto" takes the first one that fits the device."""
    remat = program.config.loop.remat
    limit = topology.chip.memory * MEMORY_FRACTION if topology.chip else float("inf")
    chosen, _, compiled = first_that_fits(program, REMAT_ORDER if remat == "auto" else (remat,), limit)
    return chosen, compiled


def _choose_attention(model: ModelConfig, platform: str) -> Attend | None:
    """Return the kernel that a run would choose on such a machine. It is not checked, as nothing can run there now."""
    attention = model.attention
    machine = Machine(platform, 9.0 if platform == "gpu" else 0.0)
    kernels = {}
    for spec in attention_specs(model):
        heads = (attention.heads, attention.kv_heads, attention.head_dim)
        shape = Shape(model.context, *heads, model.dtype, 16, spec)
        usable = [kernel for kernel in KERNELS if kernel.platform == platform and not kernel.lacks(machine, shape)]
        if not usable:
            return None
        kernels[spec] = usable[0].make(shape)
    return lambda query, key, value, segments, spec: kernels[spec](query, key, value, segments, spec)


# Report -----------------------------------------------------------------------------------------------------------


def _show(recipe: Recipe, stage: StageConfig, topology: Topology, report: Plan) -> None:
    say(f"{recipe.name} on {topology.name}: {len(topology.devices)} devices; nothing was run", "bold")
    count = f"{report.params / 1e9:.3f} billion" if report.params >= 1e8 else f"{report.params:,}"
    tokens = stage.loop.batch_size * recipe.model.context
    say(f"parameters             {count}, {tokens:,} tokens per step, remat {report.remat}")
    unit, scale = ("G", 1e9) if report.flops.causal >= 1e9 else ("M", 1e6)
    causal, full = (f"{flops / scale:.3g} {unit}" for flops in report.flops)
    say(f"FLOPs per token        {causal} causal, {full} full attention")
    _show_memory(report, topology)
    _show_communication(report)
    if report.estimate and topology.chip:
        _show_estimate(stage, tokens, topology, report, report.estimate)
    say(f"compiled in {duration(report.seconds)}; mesh {_mesh_text(recipe.mesh)}")


def _show_memory(report: Plan, topology: Topology) -> None:
    other = report.step_bytes - report.param_bytes - report.optimizer_bytes
    say("bytes per device", "bold")
    say(f"  parameters           {size_text(report.param_bytes):>12}")
    say(f"  optimizer            {size_text(report.optimizer_bytes):>12}")
    say(f"  logits, at a time    {size_text(report.logit_bytes):>12}, included in the next line")
    say(f"  activations, other   {size_text(other):>12}, counted by the compiler")
    say(f"  total of a step      {size_text(report.step_bytes):>12}" + _memory_verdict(report, topology))


def _show_communication(report: Plan) -> None:
    say("communication per step and device, in bytes of whole arrays", "bold")
    theory: Counter[str] = Counter()
    for entry in report.theory:
        theory[entry.kind] += entry.bytes
    for kind in sorted(report.sent.keys() | theory.keys()):
        note = "" if kind == SMALL else f"   theory {size_text(theory[kind]):>12}"
        say(f"  {kind:<20} {size_text(report.sent.get(kind, 0)):>12}{note}")
    for entry in report.theory:
        say(f"    {entry.purpose}: {entry.kind} {size_text(entry.bytes)}", "dim")


def _show_estimate(stage: StageConfig, tokens: int, topology: Topology, report: Plan, estimate: Roofline) -> None:
    assert topology.chip is not None
    chips = len(topology.devices)
    peak = chips * topology.chip.flops
    # The length of an epoch depends on data that are not prepared here, and padding is not known either.
    steps = stage.loop.steps or math.ceil(stage.loop.tokens / tokens)

    say("estimate, never run", "bold")
    compute, memory, exchange = map(time_text, estimate)
    say(f"  products {compute}, memory {memory}, communication {exchange} per step")
    for label, seconds in (("all overlaps", estimate.overlapped), ("nothing overlaps", estimate.one_by_one)):
        causal, full = (tokens * flops / seconds / peak for flops in report.flops)
        hours = steps * seconds / 3600
        whole = f"; {steps:,} steps in {time_text(hours * 3600)}, {hours * chips:,.3g} chip-hours" if steps else ""
        say(
            f"  {label:<16} {time_text(seconds)} per step, {tokens / seconds / chips:,.0f} tokens/s per chip, MFU "
            f"{causal:.1%} causal ({full:.1%} full){whole}"
        )


def size_text(size: float) -> str:
    """Format bytes in the largest unit that fits: `1.50 GiB`, `3.21 MiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def time_text(seconds: float) -> str:
    """Format seconds, however few: `3:05`, `1.20 s`, `4.56 ms`, `7.89 us`."""
    if seconds >= 60 or not seconds:
        return duration(seconds)
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.2f} {unit}"
    return f"{seconds / 1e-6:.2f} us"


def _mesh_text(mesh: MeshConfig) -> str:
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "of one device"


def _memory_verdict(report: Plan, topology: Topology) -> str:
    """Say whether the step fits the chip's memory, and if not, what to change."""
    if not topology.chip:
        return ""
    limit = topology.chip.memory
    if report.step_bytes <= MEMORY_FRACTION * limit:
        return f" of {size_text(limit)}: fits"

    remedies = []
    if report.remat != "full":
        remedies.append("loop.remat=full")
    if report.logit_bytes > 0.05 * limit:
        remedies.append("a smaller loop.loss_tile")
    if report.param_bytes + report.optimizer_bytes > 0.5 * limit:
        remedies.append("a larger mesh.fsdp or mesh.tensor, or more chips")
    remedies.append("a larger loop.accumulate, or a smaller loop.batch_size")
    return f" of {size_text(limit)}: does not fit; try {'; '.join(remedies)}"
