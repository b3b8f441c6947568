"""What the contenders in JAX have in common: the gradient's norm, and the line of JSON."""

from typing import Any

import jax
import numpy as np
from contender import Recorder, print_result
from rows import Row


def grad_norm(grads: Any) -> float:
    """The global norm of the gradient, summed in float64."""
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(grads))))


def print_jax_result(row: Row, recorder: Recorder, parameters: int, packages: tuple[str, ...]) -> None:
    """packages: beside jax, jaxlib and numpy."""
    stats = jax.devices()[0].memory_stats() if row.device == "gpu" else None
    print_result(
        row,
        recorder,
        framework="jax",
        parameters=parameters,
        packages=("jax", "jaxlib", *packages, "numpy"),
        peak_device_bytes=stats["peak_bytes_in_use"] if stats else None,
    )
