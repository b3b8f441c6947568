"""What the loop costs: training against the bare jitted step on a resident batch, in blocks by turns.

    python benchmarks/loop_cost.py --row=C1 --steps=300 --rounds=4

Prints JSON, and keeps it in OUT/loop-ROW.json:

* overhead: a step of the loop (data, placing, metrics, log, progress, signals) over a bare step, minus one: of each
  block, whose steps the loop makes, over the blocks of bare steps before and after it, in the same process, so that a
  machine whose speed changes from second to second changes both.
* stall: the longest step while checkpoints are saved, over the median step of the same run.
"""

import argparse
import contextlib
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from machine import busy_share, facts
from outcome import keep, spread
from recipes import pretrain_recipe
from rows import ROWS, Row

from jaxstages.cli.train import train
from jaxstages.runtime.compilation_cache import enable_compilation_cache
from jaxstages.runtime.cpu import disable_malloc_trim
from jaxstages.training import stage
from jaxstages.training.compile import compile_step

LEFT_OUT = 10
"""Steps at the start of a run that are not counted."""

BLOCK = 20
"""Steps between two turns."""


class Clocked:
    """A jitted step that notes when the sums of each call are there, by a thread that waits for them."""

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted
        self._watcher = ThreadPoolExecutor(1)
        self._noted: list[Future[float]] = []

    def __call__(self, state: Any, batch: Any) -> Any:
        state, sums = self._jitted(state, batch)
        self._noted.append(self._watcher.submit(self._note, sums))
        return state, sums

    @staticmethod
    def _note(sums: Any) -> float:
        jax.block_until_ready(sums)
        return time.perf_counter()

    def take(self) -> list[float]:
        """Seconds of each step since the last call of this, but for the first, which found the device idle."""
        times = [noted.result() for noted in self._noted]
        self._noted.clear()
        return [after - before for before, after in itertools.pairwise(times)]


class InTurn(Clocked):
    """After each block of steps, as many on the block's last batch with nothing around them."""

    def __init__(self, jitted: Any) -> None:
        super().__init__(jitted)
        self._bare, self._steps = None, 0
        self.blocks: list[tuple[float, float]] = []
        """Seconds of a step within the loop, and of a bare one."""

    def __call__(self, state: Any, batch: Any) -> Any:
        self._bare = self._bare or jax.tree.map(jnp.copy, state)
        result = super().__call__(state, batch)
        self._steps += 1
        if self._steps % BLOCK == 0:
            whole = statistics.mean(self.take())
            for _ in range(BLOCK):
                self._bare, _ = super().__call__(self._bare, batch)
            self.blocks.append((whole, statistics.mean(self.take())))
        return result

    def overheads(self) -> list[float]:
        """Of each block but the first, in which the step was compiled."""
        pairs = itertools.pairwise(self.blocks)
        return [2 * whole / (before + after) - 1.0 for (_, before), (whole, after) in pairs]


@contextlib.contextmanager
def stepping(wrap: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Within, the loop's jitted step is what `wrap` makes of it; each is kept in the list."""
    made: list[Any] = []

    def compile_wrapped(*arguments: Any) -> tuple[Any, Any]:
        function, jitted = compile_step(*arguments)
        made.append(wrap(jitted))
        return function, made[-1]

    stage.compile_step = compile_wrapped
    try:
        yield made
    finally:
        stage.compile_step = compile_step


def run_loop(wrap: Callable[[Any], Any], row: Row, folder: Path, steps: int, save_every: int) -> Any:
    """A whole new run; what `wrap` made of its step."""
    recipe = pretrain_recipe(row, folder, steps, save_every)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    with stepping(wrap) as made:
        train(recipe, work, "pretrain")
    return made[0]


def main() -> None:
    disable_malloc_trim()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=ROWS.__getitem__, default=ROWS["C1"], help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=0, help="of each run, at least 40; default: the row's")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None, help="where to train; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    flags = parser.parse_args()
    machine, row = facts(), flags.row
    steps = max(flags.steps or row.steps, 2 * BLOCK)
    enable_compilation_cache()
    folder = Path(tempfile.mkdtemp(dir=flags.folder))
    overheads: list[float] = []
    stalls, busy = [], []
    for number in range(flags.rounds):
        busy.append(round(busy_share(), 3))
        overheads += (measured := run_loop(InTurn, row, folder, steps, steps).overheads())
        saving = run_loop(Clocked, row, folder, steps, max(steps // 4, 2)).take()[LEFT_OUT:]
        stalls.append(max(saving) / statistics.median(saving))
        print(f"round {number}: overhead {statistics.median(measured):+.2%}, stall {stalls[-1]:.2f}", file=sys.stderr)
    shutil.rmtree(folder)
    result = {
        "row": row.name,
        "command": f"python benchmarks/loop_cost.py --row={row.name} --steps={steps} --rounds={flags.rounds}",
        "machine": machine,
        "busy_before": busy,
        "blocks": len(overheads),
        "overhead, quartiles": [round(value, 4) for value in statistics.quantiles(overheads, n=4)],
        "stall, min median max": spread(stalls, 4),
    }
    keep(flags.out / f"loop-{row.name}.json", result)


if __name__ == "__main__":
    main()
