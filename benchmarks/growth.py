"""How costs grow: with the model's size, length, vocabulary, layers, accumulation and devices; each against a bound.

    python benchmarks/growth.py                                   # all curves; growth.svg, OUT/growth.json
    python benchmarks/growth.py --curves=layers,vocabulary

Bytes are the compiler's own count and do not depend on the machine's load. Seconds are the shortest of several calls.
Ends with code 1 if a bound does not hold.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from contender_jaxstages import optim_config
from limits import best_seconds
from machine import facts
from rows import ROWS, Row, flops_per_token
from weights import model_config

from jaxstages.config import LoopConfig, MeshConfig, Recipe, StageConfig
from jaxstages.models.losses import cross_entropy_loss, cross_entropy_sums
from jaxstages.models.select import global_norm
from jaxstages.models.sharding import make_mesh, shardings_of
from jaxstages.runtime.cpu import disable_malloc_trim
from jaxstages.training.program import fresh_state, make_program
from jaxstages.training.step import make_train_step
from jaxstages.types import Batch, HiddenAndHead

HERE = Path(__file__).resolve().parent
BASE = dataclasses.replace(ROWS["C1"], vocab=512, context=128, batch=8)


class Curve(NamedTuple):
    """What was measured over `x`, the figure that is bounded, its bound, and whether it holds."""

    x_name: str
    x: Sequence[float]
    y_name: str
    y: Sequence[float]
    figure_name: str
    figure: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.figure <= self.bound


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the power law that fits best."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


class Step:
    """A row's jitted train step, with a state and a batch that fit it."""

    def __init__(self, row: Row, accumulate: int = 1, mesh: Any = None) -> None:
        config = model_config(row)
        config.unroll = False
        mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
        stage = StageConfig(optim=optim_config(row), loop=LoopConfig(steps=100))
        program = make_program(Recipe(name="growth", model=config), "pretrain", stage, mesh, row.vocab)
        self.shapes = program.abstract_state
        shape, rows = (row.batch, row.context), program.row_sharding
        dtypes = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
        self.abstract_batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in dtypes))
        step = make_train_step(
            cross_entropy_loss(program.model.outputs), program.tx, accumulate=accumulate, norm=global_norm
        )
        self.jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(self.shapes), None))
        self._row = row
        self._init = lambda: fresh_state(program.model.init(jax.random.key(0)), program.tx, stage.optim)

    def compiled(self) -> Any:
        """Compiled anew."""
        return self.jitted.lower(self.shapes, self.abstract_batch).compile()

    def bytes(self) -> tuple[int, int]:
        """Of the state and batch, and of what the step takes beside them, a device."""
        result = self.compiled().memory_analysis()
        return result.argument_size_in_bytes, result.temp_size_in_bytes

    def seconds(self, budget: float) -> float:
        """Of one step, the shortest of those that fit into so many seconds."""
        row, draw = self._row, np.random.default_rng(0)
        tokens_BL = draw.integers(0, row.vocab, (row.batch, row.context + 1), np.int32)
        ones_BL = np.ones((row.batch, row.context), np.int32)
        positions_BL = np.broadcast_to(np.arange(row.context, dtype=np.int32), ones_BL.shape)
        fields = (tokens_BL[:, :-1], tokens_BL[:, 1:], ones_BL.astype(np.float32), ones_BL, positions_BL)
        batch = Batch(*map(jnp.asarray, fields))
        state = self._init()

        def once() -> None:
            nonlocal state
            state, sums = self.jitted(state, batch)
            jax.block_until_ready((state, sums))

        return best_seconds(once, budget)


def layers(budget: float) -> Curve:
    """Compile seconds with the layers in a loop: constant."""
    x = (4, 8, 16, 32)
    steps = [Step(dataclasses.replace(BASE, layers=n)) for n in x]
    y = [best_seconds(lambda step=step: (jax.clear_caches(), step.compiled()), budget) for step in steps]
    return Curve("layers", x, "seconds to compile", y, "32 layers over 4", y[-1] / y[0], 1.3)


def size(budget: float) -> Curve:
    """Seconds of a step over its floating-point operations: a line, whose intercept is what a step costs by itself."""
    x, y = [], []
    for width in (64, 128, 192, 256, 384):
        row = dataclasses.replace(BASE, width=width)
        x.append(flops_per_token(row) * row.tokens_per_step / 1e9)
        y.append(Step(row).seconds(budget))
    intercept = np.polyfit(x, y, 1)[1]
    return Curve("GFLOP a step (width 64 to 384)", x, "seconds", y, "intercept, seconds", float(intercept), 0.002)


def length(budget: float) -> Curve:
    """Bytes that a step takes beside its state, of one row: linear in the length, no square of it."""
    x = (128, 256, 512, 1024, 2048)
    y = [Step(dataclasses.replace(BASE, context=n, batch=1)).bytes()[1] for n in x]
    return Curve("length", x, "bytes beside the state", y, "exponent, last doubling", exponent(x[-2:], y[-2:]), 1.1)


def length_time(budget: float) -> Curve:
    """Seconds a token: constant, but for attention, whose operations a token grow with the length."""
    x, y = (128, 256, 512, 1024, 2048), []
    for n in x:
        row = dataclasses.replace(BASE, context=n, batch=2048 // n)
        y.append(Step(row).seconds(budget) / row.tokens_per_step / flops_per_token(row))
    return Curve("length (2048 tokens)", x, "seconds a FLOP", y, "2048 over 128", y[-1] / y[0], 1.5)


def vocabulary(budget: float) -> Curve:
    """Bytes of the cross-entropy and its gradient, beside its arguments and results, over the tokens, in tiles of 128
    positions: constant."""
    x, y = (1024, 2048, 4096, 8192), []
    for tokens in x:

        def objective(hidden_BLD: Any, head_VD: Any, targets_BL: Any, weights_BL: Any) -> Any:
            sums = cross_entropy_sums(HiddenAndHead(hidden_BLD, head_VD), targets_BL, weights_BL, tile=128)
            return sums["objective"]

        shapes = [
            jax.ShapeDtypeStruct((1, tokens, 64), jnp.float32),
            jax.ShapeDtypeStruct((32768, 64), jnp.float32),
            jax.ShapeDtypeStruct((1, tokens), jnp.int32),
            jax.ShapeDtypeStruct((1, tokens), jnp.float32),
        ]
        result = jax.jit(jax.grad(objective, (0, 1))).lower(*shapes).compile().memory_analysis()
        y.append(result.temp_size_in_bytes)
    return Curve("tokens (vocabulary 32768)", x, "bytes of the loss", y, "8192 over 1024", y[-1] / y[0], 1.5)


def accumulation(budget: float) -> Curve:
    """Bytes that a step takes beside its state and batch, with more parts of the same size: constant."""
    x = (2, 4, 8, 16)
    y = [Step(dataclasses.replace(BASE, batch=4 * n), accumulate=n).bytes()[1] for n in x]
    return Curve("parts of 4 rows", x, "bytes beside the state", y, "16 over 2", y[-1] / y[0], 1.1)


def accumulation_time(budget: float) -> Curve:
    """Seconds of a part: constant."""
    x = (2, 4, 8, 16)
    y = [Step(dataclasses.replace(BASE, batch=4 * n), accumulate=n).seconds(budget) / n for n in x]
    return Curve("parts of 4 rows", x, "seconds a part", y, "16 over 2", y[-1] / y[0], 1.03)


def devices(budget: float) -> Curve:
    """Bytes of the state on each device, parameters and optimizer split over all: inversely proportional."""
    x = (1, 2, 4, 8)
    row = dataclasses.replace(BASE, width=256, vocab=4096)
    meshes = [make_mesh(MeshConfig(data=1, fsdp=n), jax.devices()[:n]) for n in x]
    y = [Step(row, mesh=mesh).bytes()[0] for mesh in meshes]
    return Curve("devices (fsdp)", x, "bytes of state and batch a device", y, "exponent", exponent(x, y), -0.9)


CURVES: dict[str, Callable[[float], Curve]] = {
    function.__name__: function
    for function in (layers, size, length, length_time, vocabulary, accumulation, accumulation_time, devices)
}


def plot(curves: dict[str, Curve], path: Path) -> None:
    """A panel a curve, both axes logarithmic."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "growth"
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(15, 6.5), layout="constrained")
    for panel, (name, curve) in zip(panels.flat, curves.items(), strict=False):
        panel.loglog(curve.x, curve.y, "o-", color="tab:blue" if curve.holds else "tab:red")
        panel.set(xlabel=curve.x_name, ylabel=curve.y_name, xticks=curve.x)
        panel.set_xticks(curve.x, [f"{x:.3g}" for x in curve.x])
        panel.minorticks_off()
        low, high = min(curve.y), max(curve.y)
        panel.set_ylim(low / 2, high * 2)
        panel.set_title(f"{name}: {curve.figure_name} {curve.figure:.3g}, at most {curve.bound:g}", fontsize=9)
    for panel in list(panels.flat)[len(curves) :]:
        panel.set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    disable_malloc_trim()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", default=",".join(CURVES))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each point that is timed")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--plot", type=Path, default=HERE / "growth.svg")
    flags = parser.parse_args()
    names = flags.curves.split(",")
    if unknown := [name for name in names if name not in CURVES]:
        raise SystemExit(f"--curves: {unknown[0]} is unknown; known: {', '.join(CURVES)}")
    jax.config.update("jax_enable_compilation_cache", False)
    machine, measured = facts(), {}
    for name in names:
        began = time.monotonic()
        measured[name] = curve = CURVES[name](flags.seconds)
        mark = "" if curve.holds else "  BOUND BROKEN"
        text = f"{name}: {curve.figure_name} {curve.figure:.4g}, at most {curve.bound:g}{mark}"
        print(f"{text} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
    plot(measured, flags.plot)
    result = {
        "command": f"python benchmarks/growth.py --curves={flags.curves} --seconds={flags.seconds}",
        "machine": machine,
        "curves": {name: {**curve._asdict(), "holds": curve.holds} for name, curve in measured.items()},
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "growth.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not all(curve.holds for curve in measured.values()))


if __name__ == "__main__":
    main()
