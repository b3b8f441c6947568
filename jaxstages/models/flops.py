"""FLOPs of a train step, by counting parameters: XLA's own cost analysis is no FLOP counter on GPU.

Legend: D width, V vocab, T context.
"""

import itertools
from typing import Any, NamedTuple

import jax

from jaxstages.config import LoraConfig, ModelConfig
from jaxstages.models.transformer import make_model


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
