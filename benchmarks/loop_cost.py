"""What the loop costs: whole training against the bare jitted step on a resident batch, in turn (A B B A).

    python benchmarks/loop_cost.py --row=C1 --steps=300 --rounds=6

Prints JSON, and keeps it in OUT/loop-ROW.json:

* overhead: a step of the loop (data, placing, metrics, log, progress, signals) over a bare step, minus one, round by
  round. The loop's steps are clocked from outside, by a thread that waits for the sums of each, after the first ten;
  evaluations and saves are left out.
* stall: the longest step while checkpoints are saved, over the median step of the same run.
"""

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from machine import busy_share, facts
from outcome import keep, spread
from recipes import pretrain_recipe
from rows import ROWS, Row

from jaxstages import loop
from jaxstages.commands.train import train
from jaxstages.compilation import compile_step
from jaxstages.data.pipeline import batches_by_step
from jaxstages.process import keep_compiled, keep_freed_memory
from jaxstages.sharding import place_batch
from jaxstages.step import init_state
from jaxstages.workbench import Workbench, open_workbench

LEFT_OUT = 10
"""Steps at the start of a run that are not counted."""


@contextlib.contextmanager
def clocked(times: list[float]) -> Iterator[None]:
    """Within, the loop's steps note when they are done."""
    with ThreadPoolExecutor(1) as watcher:

        def note(sums: Any) -> None:
            jax.block_until_ready(sums)
            times.append(time.perf_counter())

        def compile_clocked(bench: Workbench, base: Any = None) -> tuple[Any, Any]:
            function, jitted = compile_step(bench, base)

            def step(state: Any, batch: Any) -> Any:
                state, sums = jitted(state, batch)
                watcher.submit(note, sums)
                return state, sums

            return function, step

        loop.compile_step = compile_clocked
        try:
            yield
        finally:
            loop.compile_step = compile_step


class Bare:
    """The stage's jitted step, again and again on one batch that is on the device."""

    def __init__(self, bench: Workbench, batch_size: int) -> None:
        self.step = compile_step(bench)[1]
        rows = batches_by_step(bench.train, batch_size=batch_size, seed=0).batch(0)
        self.batch = place_batch(rows, batch_size, bench.rows)
        self.state = jax.block_until_ready(init_state(bench.model.init(jax.random.key(0)), bench.tx))

    def seconds(self, steps: int) -> float:
        """Of one step, when so many are timed."""
        for _ in range(LEFT_OUT):
            self.state, _ = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps


def run_loop(row: Row, folder: Path, steps: int, save_every: int) -> list[float]:
    """Seconds of each step that counts, of a whole new run."""
    times: list[float] = []
    recipe = pretrain_recipe(row, folder, steps, save_every)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    with clocked(times):
        train(recipe, work, "pretrain")
    return [after - before for before, after in zip(times[LEFT_OUT:], times[LEFT_OUT + 1 :], strict=False)]


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=ROWS.__getitem__, default=ROWS["C1"], help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=0, help="of each run; default: the row's")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=None, help="where to train; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    flags = parser.parse_args()
    machine, row = facts(), flags.row
    steps = (flags.steps or row.steps) + LEFT_OUT
    keep_compiled()
    folder = Path(tempfile.mkdtemp(dir=flags.folder))
    recipe = pretrain_recipe(row, folder, steps, steps)
    (folder / "first").mkdir()
    bare = Bare(open_workbench(recipe, "pretrain", folder / "first"), row.batch)
    overheads, stalls, busy = [], [], []
    for number in range(flags.rounds):
        busy.append(round(busy_share(), 3))
        if number % 2:
            whole, alone = statistics.mean(run_loop(row, folder, steps, steps)), bare.seconds(steps)
        else:
            alone, whole = bare.seconds(steps), statistics.mean(run_loop(row, folder, steps, steps))
        overheads.append(whole / alone - 1.0)
        saving = run_loop(row, folder, steps, max(steps // 4, 2))
        stalls.append(max(saving) / statistics.median(saving))
        print(f"round {number}: overhead {overheads[-1]:+.2%}, stall {stalls[-1]:.2f}", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    result = {
        "row": row.name,
        "command": f"python benchmarks/loop_cost.py --row={row.name} --steps={steps - LEFT_OUT} "
        f"--rounds={flags.rounds}",
        "machine": machine,
        "busy_before": busy,
        "overhead, min median max": spread(overheads, 4),
        "stall, min median max": spread(stalls, 4),
    }
    keep(flags.out / f"loop-{row.name}.json", result)


if __name__ == "__main__":
    main()
