"""The machine's ceilings: the fastest matrix product and copy that jax, torch and numpy reach on it.

    python benchmarks/limits.py --rows=C1,C2,C3 --out=benchmarks/results/limits.json

Each product is repeated for some time and the best is taken: a ceiling is what the machine can do, not what it mostly
does. Random values (constant ones run faster on some hardware).
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import facts
from rows import ROWS, matmul_shapes

import jaxstages  # noqa: F401  sets the XLA flags that training runs under

Run = Callable[[], object]
Shape = tuple[int, int, int]


def best_seconds(run: Run, seconds: float) -> float:
    """The shortest of the calls that fit into so many seconds, three at least, after one that is not counted."""
    run()
    best, calls, start = float("inf"), 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
        calls += 1
    return best


def jax_matmul(shape: Shape, dtype: str) -> Run:
    """The product by XLA."""
    m, k, n = shape
    a, b = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate(((m, k), (k, n))))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, b))


def numpy_matmul(shape: Shape, dtype: str) -> Run:
    """The product by numpy's BLAS."""
    m, k, n = shape
    draw = np.random.default_rng(0)
    a, b = (draw.standard_normal(s, np.float32) for s in ((m, k), (k, n)))
    out = np.empty((m, n), np.float32)
    return lambda: np.matmul(a, b, out=out)


def torch_matmul(shape: Shape, dtype: str, device: str) -> Run:
    """The product by torch."""
    import torch

    m, k, n = shape
    kind = getattr(torch, dtype)
    a, b = torch.randn(m, k, device=device, dtype=kind), torch.randn(k, n, device=device, dtype=kind)
    out = torch.empty(m, n, device=device, dtype=kind)

    def run() -> None:
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def jax_copy(size: int) -> Run:
    """A copy of so many float32 by XLA."""
    x = jnp.ones(size)
    copy = jax.jit(lambda x: x + 1.0)  # reads and writes as a copy does, and can't be optimised away
    return lambda: jax.block_until_ready(copy(x))


def numpy_copy(size: int) -> Run:
    """A copy of so many float32 by numpy, on one core."""
    source, target = np.ones(size, np.float32), np.empty(size, np.float32)
    return lambda: np.copyto(target, source)


def torch_copy(size: int, device: str) -> Run:
    """A copy of so many float32 by torch."""
    import torch

    source, target = torch.ones(size, device=device), torch.empty(size, device=device)

    def run() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def print_table(matmuls: list[dict[str, Any]], copies: list[dict[str, Any]]) -> None:
    """All figures, a line each."""
    print(f"{'m x k x n':>20}  {'dtype':9} {'library':8} {'GFLOP/s':>10}")
    for result in matmuls:
        shape = " x ".join(map(str, result["shape"]))
        print(f"{shape:>20}  {result['dtype']:9} {result['library']:8} {result['gflops']:10.1f}")
    for result in copies:
        print(f"copy, read and write: {result['library']:8} {result['gb_per_second']:8.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="C1,C2,C3", help="rows whose shapes are measured beside the cube")
    parser.add_argument("--cube", type=int, default=0, help="side of the cube; default 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--copy_megabytes", type=float, default=256.0)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--out", type=Path, default=None)
    flags = parser.parse_args()
    rows = [ROWS[name] for name in flags.rows.split(",")]
    gpu = rows[0].device == "gpu"
    device, cube = ("cuda" if gpu else "cpu"), flags.cube or (8192 if gpu else 2048)
    size = int(flags.copy_megabytes * 1e6 / 4)

    libraries: dict[str, tuple[Callable[[Shape, str], Run], Callable[[int], Run]]] = {"jax": (jax_matmul, jax_copy)}
    if importlib.util.find_spec("torch"):
        libraries["torch"] = (lambda shape, dtype: torch_matmul(shape, dtype, device), lambda n: torch_copy(n, device))
    if not gpu:
        libraries["numpy"] = (numpy_matmul, numpy_copy)

    shapes = dict.fromkeys([(cube,) * 3, *(shape for row in rows for shape in matmul_shapes(row))])
    matmuls, copies = [], []
    for m, k, n in shapes:
        for dtype in ("float32", "bfloat16"):
            for library, (matmul, _) in libraries.items():
                if library == "numpy" and dtype == "bfloat16":
                    continue  # numpy has none
                taken = best_seconds(matmul((m, k, n), dtype), flags.seconds)
                gflops = 2e-9 * m * k * n / taken
                matmuls.append({"library": library, "dtype": dtype, "shape": [m, k, n], "gflops": gflops})
    for library, (_, copy) in libraries.items():
        copies.append({"library": library, "gb_per_second": 8e-9 * size / best_seconds(copy(size), flags.seconds)})
    ceilings = {
        dtype: max(measured["gflops"] for measured in matmuls if measured["dtype"] == dtype)
        for dtype in ("float32", "bfloat16")
    }
    print_table(matmuls, copies)
    print("ceilings, GFLOP/s:", ", ".join(f"{dtype} {value:.1f}" for dtype, value in ceilings.items()))
    if flags.out:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": facts(), "ceilings_gflops": ceilings, "matmul": matmuls, "copy": copies}
        flags.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
