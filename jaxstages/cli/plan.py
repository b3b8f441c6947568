"""`jaxstages plan`: does a recipe fit a machine, and how fast should it be? The compiler is asked, nothing is run."""

import math
import time
from typing import Any, NamedTuple

import jax

from jaxstages import config as recipes
from jaxstages.config import ModelConfig, Recipe, StageConfig
from jaxstages.config.checks import validate
from jaxstages.models.attention import Attend
from jaxstages.models.kernels import KERNELS, Machine, Shape
from jaxstages.models.layers import attention_specs
from jaxstages.models.sharding import make_mesh
from jaxstages.plan.chips import Topology, topology_of
from jaxstages.plan.collectives import SMALL, collectives_of, expected, total
from jaxstages.plan.estimate import Flops, Roofline, flops_per_token, held_bytes, roofline, wire_bytes
from jaxstages.runtime.console import duration, say
from jaxstages.train.compile import MEMORY_FRACTION, REMAT_ORDER, first_that_fits, memory_bytes
from jaxstages.train.program import Program, check_fit, make_program


class Plan(NamedTuple):
    """Bytes are a device's; estimate is None where the chip's speed is not known."""

    params: int
    flops: Flops
    param_bytes: int
    optimizer_bytes: int
    logit_bytes: int
    step_bytes: int
    remat: str
    sent: dict[str, int]
    theory: list[tuple[str, str, int]]
    estimate: Roofline | None
    seconds: float


def plan(recipe: Recipe, stage: str | None, asked: str) -> None:
    """Print the plan of a stage, by default the recipe's first, on a topology."""
    validate(recipe)
    stages = recipes.stages(recipe)
    name = stage or next(iter(stages))
    if name not in stages:
        raise ValueError(f"recipe {recipe.name!r} has no stage {name}; it has {', '.join(stages)}")
    topology = topology_of(asked)
    found = make_plan(recipe, name, topology)
    _show(recipe, stages[name], topology, found)


def make_plan(recipe: Recipe, name: str, topology: Topology) -> Plan:
    """Compile the stage's step for the topology, and do the arithmetic."""
    start, stage = time.monotonic(), recipes.stages(recipe)[name]
    model = recipes.builtin_model(recipe, "plan")
    mesh = make_mesh(recipe.mesh, topology.devices)
    check_fit(recipe, name, stage, mesh)
    vocab = max(recipe.tokenizer.vocab_size, model.vocab_size)
    attend = _choose_attention(model, topology.platform) if mesh.shape["context"] == 1 else None
    program = make_program(recipe, name, stage, mesh, vocab, attend, topology.platform)
    remat, compiled = _compile(program, topology)
    sent = total(collectives_of(compiled.as_text()))
    flops, chip = flops_per_token(model, vocab, stage.lora), topology.chip
    tokens = stage.loop.batch_size * recipe.model.context
    frozen = program.abstract_base or program.abstract_reference
    held = held_bytes((program.abstract_state, frozen))
    again = flops.causal / 3 if remat in ("full", "offload") else 0.0
    rows = (
        stage.loop.batch_size // (mesh.size // mesh.shape["tensor"] // mesh.shape["context"]) // stage.loop.accumulate
    )
    tile = stage.loop.loss_tile or recipe.model.context
    return Plan(
        params=sum(leaf.size for leaf in jax.tree.leaves(program.abstract_params)),
        flops=flops,
        param_bytes=held_bytes((program.abstract_state.params, frozen)),
        optimizer_bytes=held_bytes((program.abstract_state.opt_state, program.abstract_state.average)),
        logit_bytes=max(rows, 1) * tile // mesh.shape["context"] * vocab // mesh.shape["tensor"] * 4,
        step_bytes=memory_bytes(compiled),
        remat=remat,
        sent=sent,
        theory=expected(
            *(model, vocab, mesh, stage.loop.batch_size),
            merges=topology.platform != "cpu",
            recomputes=remat != "none",
        ),
        estimate=chip and roofline(chip, mesh.size, tokens * (flops.causal + again), held, wire_bytes(sent, mesh.size)),
        seconds=time.monotonic() - start,
    )


def _compile(program: Program, topology: Topology) -> tuple[str, Any]:
    """With the recipe's remat, or the first of the ladder that fits."""
    asked = program.config.loop.remat
    limit = topology.chip.memory * MEMORY_FRACTION if topology.chip else float("inf")
    rung, _, compiled = first_that_fits(program, REMAT_ORDER if asked == "auto" else (asked,), limit)
    return rung, compiled


def _choose_attention(model: ModelConfig, platform: str) -> Attend | None:
    """The kernel that a run would choose on such a machine, unchecked: nothing can be computed there from here."""
    part, specs = model.attention, attention_specs(model)
    machine = Machine(platform, 9.0 if platform == "gpu" else 0.0)
    chosen = {}
    for spec in specs:
        shape = Shape(model.context, part.heads, part.kv_heads, part.head_dim, model.dtype, 16, spec)
        fit = [kernel for kernel in KERNELS if kernel.platform == platform and not kernel.lacks(machine, shape)]
        if not fit:
            return None
        chosen[spec] = fit[0].make(shape)
    return lambda query, key, value, segments, spec: chosen[spec](query, key, value, segments, spec)


def _show(recipe: Recipe, stage: StageConfig, topology: Topology, found: Plan) -> None:
    mesh = recipe.mesh
    chips, chip = len(topology.devices), topology.chip
    tokens = stage.loop.batch_size * recipe.model.context
    say(f"{recipe.name} on {topology.asked}: {chips} devices; nothing was run", "bold")
    count = f"{found.params / 1e9:.3f} billion" if found.params >= 1e8 else f"{found.params:,}"
    say(f"parameters             {count}, {tokens:,} tokens a step, remat {found.remat}")
    unit, of = ("G", 1e9) if found.flops.causal >= 1e9 else ("M", 1e6)
    causal, full = (f"{flops / of:.3g} {unit}" for flops in (found.flops.causal, found.flops.full))
    say(f"FLOPs a token          {causal} causal, {full} full attention")
    say("bytes a device", "bold")
    say(f"  parameters           {size_text(found.param_bytes):>12}")
    say(f"  optimizer            {size_text(found.optimizer_bytes):>12}")
    say(f"  logits, at once      {size_text(found.logit_bytes):>12}, a part of what follows")
    rest = found.step_bytes - found.param_bytes - found.optimizer_bytes
    say(f"  activations and rest {size_text(rest):>12}, by the compiler's count")
    say(f"  a step, in all       {size_text(found.step_bytes):>12}" + _verdict(found, topology))
    say("sent by a step, as whole arrays, of a device", "bold")
    theory: dict[str, int] = {}
    for _, kind, size in found.theory:
        theory[kind] = theory.get(kind, 0) + size
    for kind in sorted(found.sent.keys() | theory.keys()):
        note = "" if kind == SMALL else f"   theory {size_text(theory.get(kind, 0)):>12}"
        say(f"  {kind:<20} {size_text(found.sent.get(kind, 0)):>12}{note}")
    for what, kind, size in found.theory:
        say(f"    {what}: {kind} {size_text(size)}", "dim")
    if found.estimate and chip:
        one, best, worst = found.estimate, found.estimate.overlapped, found.estimate.one_by_one
        peak = chips * chip.flops
        say("estimate, never run", "bold")
        parts = (one.compute, one.memory, one.exchange)
        compute, memory, exchange = map(time_text, parts)
        say(f"  products {compute}, memory {memory}, exchanges {exchange} a step")
        for label, seconds in (("all overlaps", best), ("nothing overlaps", worst)):
            mfu = [tokens * flops / seconds / peak for flops in found.flops]
            # Passes over data that are not prepared here have no number of steps; padding is not known either.
            steps = stage.loop.steps or math.ceil(stage.loop.tokens / tokens)
            hours = steps * seconds / 3600
            whole = f"; {steps:,} steps in {time_text(hours * 3600)}, {hours * chips:,.3g} chip-hours" if steps else ""
            say(
                f"  {label:<16} {time_text(seconds)} a step, {tokens / seconds / chips:,.0f} tokens/s a chip, MFU "
                f"{mfu[0]:.1%} causal ({mfu[1]:.1%} full){whole}"
            )
    say(f"compiled in {duration(found.seconds)}; mesh {_mesh_text(mesh)}")


def size_text(size: float) -> str:
    """Bytes for people, in the unit in which they are more than nothing: `1.50 GiB`, `3.21 MiB`."""
    for unit, of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= of:
            return f"{size / of:.2f} {unit}"
    return f"{size:.0f} B"


def time_text(seconds: float) -> str:
    """Seconds for people, however few: `3:05`, `1.20 s`, `4.56 ms`, `7.89 us`."""
    if seconds >= 60 or not seconds:
        return duration(seconds)
    for unit, of in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= of:
            return f"{seconds / of:.2f} {unit}"
    return f"{seconds / 1e-6:.2f} us"


def _mesh_text(mesh: Any) -> str:
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "expert", "context", "tensor")}
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "of one device"


def _verdict(found: Plan, topology: Topology) -> str:
    if not topology.chip:
        return ""
    limit = topology.chip.memory
    if found.step_bytes <= MEMORY_FRACTION * limit:
        return f" of {size_text(limit)}: fits"
    remedies = []
    if found.remat != "full":
        remedies.append("loop.remat=full")
    if found.logit_bytes > 0.05 * limit:
        remedies.append("a smaller loop.loss_tile")
    if found.param_bytes + found.optimizer_bytes > 0.5 * limit:
        remedies.append("a larger mesh.fsdp or mesh.tensor, or more chips")
    remedies.append("a larger loop.accumulate, or a smaller loop.batch_size")
    return f" of {size_text(limit)}: does not fit; try {'; '.join(remedies)}"
