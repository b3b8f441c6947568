"""Expected communication of a train step, from the model's sizes: the theory beside what the compiler produces.

Legend: B batch, L length, D width, V vocab, H query heads, G key/value heads, K head dim, F feed-forward, N layers.
"""

from typing import NamedTuple

from jax.sharding import Mesh

from jaxstages.config import ModelConfig
from jaxstages.models.ops import ACTIVATIONS


class Traffic(NamedTuple):
    """Communication of a step for one purpose, on each device.

    bytes: of the whole array, as in `collectives.py`.
    """

    purpose: str
    kind: str
    bytes: int


def expected_traffic(
    config: ModelConfig, vocab: int, mesh: Mesh, batch: int, *, merges: bool, recomputes: bool = False
) -> list[Traffic]:
    """Compute what a train step sends under the default sharding rules.

    | axis    | communication
    | ------- | -------------
    | fsdp    | kernels are gathered for the forward pass and again for the backward pass, gradients are scattered
    |         | (ZeRO 3, Rajbhandari et al. 2020)
    | data    | gradients are summed
    | tensor  | activations are summed twice per layer and direction (Shoeybi et al. 2019)
    | context | keys and values are gathered, their gradients are scattered
    | expert  | tokens are gathered and the outputs of experts scattered, in both directions; without a capacity
    |         | limit an all-to-all would have no fixed size

    Args:
        merges: the compiler sums the input gradients of several projections before it communicates, not after.
        recomputes: activations are rematerialized in the backward pass, so kernels are gathered once more.
    """
    data, fsdp, expert, context, tensor = (mesh.shape[a] for a in ("data", "fsdp", "expert", "context", "tensor"))
    attention, item, layers = config.attention, 2 if config.dtype == "bfloat16" else 4, config.layers
    replicas, rows = data * expert * context, batch // (data * fsdp * expert)
    hidden = rows * (config.context // context) * config.width * item
    gated = ACTIVATIONS[config.activation].gated
    experts = config.experts.count

    heads = attention.heads + 2 * attention.kv_heads
    layer = (heads + attention.heads) * attention.head_dim * config.width
    if not experts:
        layer += (3 if gated else 2) * config.width * config.ff_width
    kernels = layers * layer * item // tensor
    table = vocab * config.width // tensor

    traffic: list[Traffic] = []
    if experts:
        traffic += _of_experts(config, mesh, hidden, item, recomputes)
    if fsdp > 1:
        # The last kernel of a feed-forward is not gathered again: the backward pass does not need its output.
        last = 0 if experts else layers * config.ff_width * config.width * item // tensor
        traffic += [
            Traffic("kernels", "all-gather", 3 * kernels - last if recomputes else 2 * kernels),
            Traffic("head", "all-gather", table * item),
            Traffic("gradients of kernels", "reduce-scatter", kernels),
            Traffic("tokens for the embedding lookup", "all-gather", rows * fsdp * (config.context // context) * 4),
            Traffic("embeddings and their gradients", "all-to-all", 2 * hidden),
        ]
    if replicas > 1:
        traffic += [
            Traffic("gradients of kernels", "all-reduce", kernels // fsdp),
            Traffic("gradient of the embedding", "all-reduce", table // fsdp * item),
        ]

    sums = [size for size in ((data * expert, context) if fsdp == 1 else (fsdp,)) if size > 1]
    traffic += [Traffic("gradient of the head", "all-reduce", table * 4) for _ in sums]
    if fsdp > 1 and replicas > 1:
        traffic.append(Traffic("gradient of the head, per shard", "all-reduce", table // fsdp * 4))

    if tensor > 1:
        passes = 2 * (2 if recomputes else 1)
        from_attention = 1 if merges else 3
        from_feed_forward = 1 if experts or merges or not gated else 2
        softmax = 4 * rows * (config.context // context) * 4
        traffic += [
            Traffic("outputs of attention and feed-forward", "all-reduce", passes * layers * hidden),
            Traffic("gradients of their inputs", "all-reduce", (from_attention + from_feed_forward) * layers * hidden),
            Traffic("embeddings, and gradient of the final hidden states", "all-reduce", 2 * hidden),
            Traffic("softmax over the split vocabulary", "all-reduce", softmax),
        ]
    if context > 1:
        keys = 2 * rows * config.context * attention.kv_heads // tensor * attention.head_dim * item
        traffic += [
            Traffic("keys and values", "all-gather", layers * keys),
            Traffic("segments", "all-gather", rows * config.context * 4),
            Traffic("gradients of keys and values", "reduce-scatter", layers * keys),
        ]
    return [entry for entry in traffic if entry.bytes]


def _of_experts(config: ModelConfig, mesh: Mesh, hidden: int, item: int, recomputes: bool) -> list[Traffic]:
    data, fsdp, expert, context, tensor = (mesh.shape[a] for a in ("data", "fsdp", "expert", "context", "tensor"))
    count, layers, passes = config.experts.count, config.layers, 3 if recomputes else 2
    kernels = layers * 3 * count * config.width * config.ff_width * item // (expert * tensor)
    router = layers * config.width * count * 4  # the router is float32
    traffic = [
        Traffic("experts", "all-gather", passes * kernels if fsdp > 1 else 0),
        Traffic("router", "all-gather", passes * router if fsdp * expert > 1 else 0),
        Traffic("gradients of experts", "reduce-scatter", kernels if fsdp > 1 else 0),
        Traffic("gradients of experts", "all-reduce", kernels // fsdp if data * context > 1 else 0),
        Traffic("gradient of the router", "reduce-scatter", router if fsdp * expert > 1 else 0),
        Traffic("gradient of the router", "all-reduce", router // (fsdp * expert) if data * context > 1 else 0),
    ]
    if expert > 1:
        traffic += [
            Traffic("tokens for the experts", "all-gather", passes * layers * hidden * expert),
            Traffic("outputs of experts, and gradients", "reduce-scatter", passes * layers * hidden * expert),
        ]
    return traffic
