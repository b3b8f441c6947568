"""A roofline estimate of a step's time, and bytes on devices and wires. Arithmetic; nothing is measured."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxstages.runtime.chips import Chip

MATMUL_EFFICIENCY = 0.75
"""Share of the peak that large matrix products reach on such chips."""


class Roofline(NamedTuple):
    """Seconds per step: for matrix products, for the least memory traffic, and for communication."""

    compute: float
    memory: float
    exchange: float

    @property
    def overlapped(self) -> float:
        """Time if everything overlaps."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def one_by_one(self) -> float:
        """Time if communication overlaps with nothing."""
        return max(self.compute, self.memory) + self.exchange


def roofline(chip: Chip, chips: int, step_flops: float, state_bytes: float, sent: Mapping[str, float]) -> Roofline:
    """Estimate the time of a step.

    Args:
        step_flops: of all chips together, rematerialization included.
        state_bytes: parameters and optimizer state per chip, each read and written once.
        sent: bytes that a chip sends, by kind (`wire_bytes`).
    """
    return Roofline(
        compute=step_flops / (chips * chip.flops * MATMUL_EFFICIENCY),
        memory=2 * state_bytes / chip.bandwidth,
        exchange=sum(sent.values()) / chip.link,
    )


def wire_bytes(total: Mapping[str, float], devices: int) -> dict[str, float]:
    """Convert the bytes of collectives into the bytes that a ring sends."""
    share = (devices - 1) / devices
    return {kind: size * share * (2 if kind == "all-reduce" else 1) for kind, size in total.items()}


def bytes_per_device(tree: Any) -> int:
    """Sum the bytes that a tree of shapes with shardings takes on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
