"""Where the milliseconds of a step go, by the profiler: a table by part of the model and kind of operation.

    python benchmarks/anatomy.py --row=C1 --steps=20

Prints the table, and keeps it with the longest operations in OUT/anatomy-ROW.json. Times are core time: what runs on
two cores at once counts twice. What a library runs on threads of its own is not seen, among it Eigen's products for the
gradients of kernels: only their start counts.
"""

import argparse
import gzip
import json
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from contender_jaxstages import optim_config
from machine import facts
from rows import ROWS, Row
from weights import model_config

from jaxstages.models.losses import cross_entropy_loss
from jaxstages.models.select import global_norm
from jaxstages.models.transformer import make_model
from jaxstages.runtime.cpu import disable_malloc_trim
from jaxstages.training.optimizer import make_optimizer
from jaxstages.training.step import init_state, make_train_step
from jaxstages.types import Batch

HERE = Path(__file__).resolve().parent
PARTS = (
    ("attention", r"/attention/"),
    ("norms", r"norm/"),
    ("feed-forward", r"/ff/"),
    ("residual and embeddings", r"layer|embed|Transformer"),
    ("optimizer and guard", r"."),
)
"""By the path of the operation in the program; the first that fits."""

PRODUCT = re.compile(r"dot|ynn|matmul|gemm|custom-call")
HOLDS_OTHERS = ("while", "call", "conditional")


class Operation(NamedTuple):
    """An instruction of the compiled program."""

    part: str
    kind: str
    shape: str


def operations(program: str) -> dict[str, Operation]:
    """By name, from the text of the compiled program."""
    results = {}
    for line in program.splitlines():
        match = re.match(r"\s*(?:ROOT )?%([\w.-]+) = (\(?[a-z0-9]+\[[\d,]*\])\S* ?.*?([a-z-]+)\(", line)
        if match is None:
            continue
        name, shape, opcode = match.groups()
        source = re.search(r'op_name="([^"]*)"', line)
        path = source.group(1) if source else ""
        if "_headless" in path or "cross_entropy" in path or "/head" in path:
            part = "head and loss"
        else:
            part = next((part for part, pattern in PARTS if re.search(pattern, path)), "no name")
        words = f"{opcode} {name} {path.rsplit('/', 1)[-1]} {'ynn' if 'ynn' in line else ''}"
        if PRODUCT.search(words):
            kind = "products"
        elif "reduce" in words:
            kind = "sums and maxima"
        elif re.search(r"copy|transpose|concatenate|slice|gather|scatter|broadcast|bitcast", name):
            kind = "copies"
        else:
            kind = "elementwise"
        results[name] = Operation(part, kind, shape)
    return results


def make_step(row: Row) -> tuple[Any, Any, Batch]:
    """The row's jitted step, its state, and a batch."""
    model = make_model(model_config(row), row.vocab)
    tx = make_optimizer(optim_config(row), 1000, model.axes)
    draw, shape = np.random.default_rng(0), (row.batch, row.context)
    tokens_BL, targets_BL = (jnp.asarray(draw.integers(0, row.vocab, shape, np.int32)) for _ in range(2))
    ones_BL = jnp.ones(shape, jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(row.context), shape)
    batch = Batch(tokens_BL, targets_BL, jnp.ones(shape), ones_BL, positions_BL)
    step = jax.jit(make_train_step(cross_entropy_loss(model.outputs), tx, norm=global_norm), donate_argnums=0)
    return step, init_state(model.init(jax.random.key(0)), tx), batch


def trace(step: Any, state: Any, batch: Batch, steps: int) -> tuple[list[dict[str, Any]], float]:
    """The profiler's events of so many steps, and the milliseconds that a step took without it."""
    for _ in range(3):
        state, sums = step(state, batch)
    jax.block_until_ready((state, sums))
    start = time.perf_counter()
    for _ in range(steps):
        state, sums = step(state, batch)
    jax.block_until_ready((state, sums))
    seconds = (time.perf_counter() - start) / steps
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(steps):
                state, sums = step(state, batch)
            jax.block_until_ready((state, sums))
        file = next(Path(folder).rglob("perfetto_trace.json.gz"))
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"], seconds * 1e3


def main() -> None:
    disable_malloc_trim()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=ROWS.__getitem__, default=ROWS["C1"], help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--longest", type=int, default=15, help="operations that are named")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    flags = parser.parse_args()
    machine, (step, state, batch) = facts(), make_step(flags.row)
    known = operations(step.lower(state, batch).compile().as_text())
    events, wall = trace(step, state, batch, flags.steps)
    table: Counter[tuple[str, str]] = Counter()
    single: Counter[str] = Counter()
    for event in events:
        name = event["name"]
        if name in known and not name.startswith(HOLDS_OTHERS):
            milliseconds = event["dur"] / 1e3 / flags.steps
            table[known[name].part, known[name].kind] += milliseconds
            single[re.sub(r"[.\d]+$", "", name) + " " + known[name].shape] += milliseconds
    kinds = ["products", "elementwise", "sums and maxima", "copies"]
    parts = list(dict.fromkeys(part for part, _ in sorted(table)))
    lines = [f"| {flags.row.name}, ms of core time a step | {' | '.join(kinds)} | all |", "|---" * 6 + "|"]
    for part in [*parts, "all"]:
        cells = [sum(ms for (p, k), ms in table.items() if part in (p, "all") and k == kind) for kind in kinds]
        lines.append(f"| {part} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {sum(cells):.2f} |")
    print("\n".join(lines))
    print(f"a step took {wall:.2f} ms without the profiler, {sum(table.values()):.2f} ms of core time with it")
    result = {
        "row": flags.row.name,
        "command": f"python benchmarks/anatomy.py --row={flags.row.name} --steps={flags.steps}",
        "machine": machine,
        "wall_ms": wall,
        "table": lines,
        "longest": [[name, round(ms, 3)] for name, ms in single.most_common(flags.longest)],
    }
    for name, ms in result["longest"]:
        print(f"{ms:9.3f} ms  {name}")
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / f"anatomy-{flags.row.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
