"""How much a step computes, and how fast it should be: arithmetic, no measurement.

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

MATMULS = 0.75
"""Share of the peak that large matrix products reach on such chips."""


class Flops(NamedTuple):
    """Of one token in training, forward and backward. causal counts the half of attention that is not masked (MaxText
    since 2025), full all of it (nanoGPT, PaLM)."""

    causal: float
    full: float


def flops_per_token(config: ModelConfig, vocab: int, lora: LoraConfig | None = None) -> Flops:
    """`6 * (parameters in products) + 6 * layers * T * heads * head_dim` (causal); lookups, norms, softmax and
    optimizer are not counted. Of a mixture the experts that a token takes count. With adapters the frozen products cost
    4 each: they have no gradient of their own."""
    part, width = config.attention, config.width
    shapes: Any = jax.eval_shape(make_model(config, vocab).init, jax.random.key(0))
    layers = sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"]) if leaf.ndim > 2)
    if config.experts.count:
        wide = config.layers * config.width * config.ff_width * 3
        layers -= wide * (config.experts.count - config.experts.per_token)
    products = layers + max(vocab, config.vocab_size) * width
    seen = [min(config.context, part.window or config.context) if kind else config.context for kind in _local(config)]
    heads = part.heads * part.head_dim
    full = sum(12 * length * heads for length in seen)
    # A query of a window of W in a row of T sees W keys, but for the first W, which see half as many on average.
    causal = sum(
        12 * heads * (w - w * (w - 1) / (2 * config.context)) if w < config.context else 6 * w * heads for w in seen
    )
    dense = 4 * products if lora is not None and lora.rank else 6 * products
    return Flops(dense + causal, dense + full)


def _local(config: ModelConfig) -> list[bool]:
    part = config.attention
    kinds = part.pattern or ("local" if part.window else "global",)
    return [kind == "local" for kind in itertools.islice(itertools.cycle(kinds), config.layers)]


class Roofline(NamedTuple):
    """Seconds of a step: of its products, of what it reads and writes of memory at least, of its exchanges; the sum of
    the larger of the first two and the last, and, where all overlap, the largest."""

    compute: float
    memory: float
    exchange: float

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.memory, self.exchange)

    @property
    def one_by_one(self) -> float:
        return max(self.compute, self.memory) + self.exchange


def roofline(chip: Chip, chips: int, step_flops: float, state_bytes: float, sent: Mapping[str, float]) -> Roofline:
    """
    Args:
        step_flops: of all chips together, with what is computed again.
        state_bytes: parameters and optimizer of a chip, each read and written once.
        sent: bytes that a chip sends, by kind, see `wire_bytes`.
    """
    return Roofline(
        step_flops / (chips * chip.flops * MATMULS), 2 * state_bytes / chip.bandwidth, sum(sent.values()) / chip.link
    )


def wire_bytes(total: Mapping[str, float], devices: int) -> dict[str, float]:
    """What a ring sends for collectives of so many bytes."""
    share = (devices - 1) / devices
    return {kind: size * share * (2 if kind == "all-reduce" else 1) for kind, size in total.items()}


def held_bytes(tree: Any) -> int:
    """Of a tree of shapes with shardings, on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
