"""What trusted checkpoints cost: our save against plain Orbax's, in pairs (A B A B) on the same state.

    python benchmarks/save_cost.py --megabytes=200 --pairs=12

Prints, as JSON, ratios ours / plain with their spread (minimum, median, maximum): of the stall (how long `save` keeps
the loop) and of the whole (until the checkpoint is on disk under its name). Plain is a CheckpointManager with the same
items and asynchronous options, without seal, fingerprint and fsync of what Orbax leaves unsynced.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from jaxstages.checkpoint.manager import Checkpoints
from jaxstages.training.early_stopping import early_stopping
from jaxstages.training.saved_items import to_items
from jaxstages.training.step import init_state
from jaxstages.types import TrainState


def make_state(megabytes: float) -> TrainState:
    """Ten parameters and Adam's two moments of each, `megabytes` in all."""
    rows = max(1, int(megabytes * 1e6 / 4 / 3 / 10 / 1024))
    params = {f"layer{i}": jax.random.normal(jax.random.key(i), (rows, 1024)) for i in range(10)}
    return jax.block_until_ready(init_state(params, optax.adamw(1e-3)))


def timed(save: Callable[[], object], wait: Callable[[], object]) -> tuple[float, float]:
    start = time.perf_counter()
    save()
    stall = time.perf_counter() - start
    wait()
    return stall, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--folder", default=None, help="where to write; default: a temporary folder")
    flags = parser.parse_args()
    state, stopping = make_state(flags.megabytes), early_stopping().init()
    folder = Path(tempfile.mkdtemp(dir=flags.folder))
    plain = ocp.CheckpointManager(
        folder / "plain", options=ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    )
    ratios: dict[str, list[float]] = {"stall": [], "whole": []}
    with Checkpoints(folder / "ours", 2) as ours:
        for step in range(flags.pairs + 1):
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                train=ocp.args.StandardSave({"opt_state": state.opt_state, "step": state.step}),
                meta=ocp.args.JsonSave({"step": step}),
            )
            a = timed(lambda: ours.save(step, to_items(state, stopping), {}, -1), ours.wait)  # noqa: B023
            b = timed(lambda: plain.save(step, args=items), plain.wait_until_finished)  # noqa: B023
            if step:  # the first of each compiles and makes folders
                ratios["stall"].append(a[0] / b[0])
                ratios["whole"].append(a[1] / b[1])
    plain.close()
    shutil.rmtree(folder)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if isinstance(leaf, jnp.ndarray)) / 1e6
    spread = {n: [round(f(v), 2) for f in (min, statistics.median, max)] for n, v in ratios.items()}
    print(json.dumps({"megabytes": round(size), "pairs": flags.pairs, "ours / plain, min median max": spread}))


if __name__ == "__main__":
    main()
