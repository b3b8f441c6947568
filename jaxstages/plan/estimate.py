"""FLOPs of a train step, and a roofline estimate of its time. Arithmetic; nothing is measured.

Legend: D width, V vocab, T context.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxstages.config import LoraConfig, ModelConfig
from jaxstages.models.transformer import make_model
from jaxstages.plan.chips import Chip

MATMUL_EFFICIENCY = 0.75
"""Share of the peak that large matrix products reach on such chips."""


class Flops(NamedTuple):
    """FLOPs per token in training, forward and backward.

    causal: counts the unmasked half of attention (MaxText since 2025).
    full: counts all of attention (nanoGPT, PaLM).
    """

    causal: float
    full: float


def flops_per_token(config: ModelConfig, vocab: int, lora: LoraConfig | None = None) -> Flops:
    """Compute `6 * (parameters in products) + 6 * layers * T * heads * head_dim` (causal).

    Lookups, norms, softmax and the optimizer are not counted. A mixture counts the experts that a token is routed to.
    With adapters the frozen products cost 4 FLOPs per parameter, because they have no gradient of their own.
    """
    attention, width = config.attention, config.width
    shapes: Any = jax.eval_shape(make_model(config, vocab).init, jax.random.key(0))
    layers = sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"]) if leaf.ndim > 2)
    if config.experts.count:
        expert = config.layers * config.width * config.ff_width * 3
        layers -= expert * (config.experts.count - config.experts.per_token)
    products = layers + max(vocab, config.vocab_size) * width
    dense = 4 * products if lora is not None and lora.rank else 6 * products

    window = min(config.context, attention.window or config.context)
    spans = [window if local else config.context for local in _local_layers(config)]
    heads = attention.heads * attention.head_dim
    full = sum(12 * span * heads for span in spans)
    # With a window of W, a query sees W keys, except for the first W queries, which see half as many on average.
    causal = sum(
        12 * heads * (span - span * (span - 1) / (2 * config.context)) if span < config.context else 6 * span * heads
        for span in spans
    )
    return Flops(dense + causal, dense + full)


def _local_layers(config: ModelConfig) -> list[bool]:
    attention = config.attention
    pattern = attention.pattern or ("local" if attention.window else "global",)
    return [kind == "local" for kind in itertools.islice(itertools.cycle(pattern), config.layers)]


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
