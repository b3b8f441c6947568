"""The decoder-only transformer, as a `Model` of pure functions. Flax stays inside this file.

Legend: B batch, L length, D width, H query heads, G key/value heads, K head dim, F feed-forward, V vocab,
N layers (stacked), S cache slots.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxstages.config import ModelConfig
from jaxstages.models.attention import attend, cache_mask, packed_mask, rotate
from jaxstages.types import Batch, Model, Params

Cache = tuple[Array, Array]


def _kernel(*names: str, scale: float = 0.02) -> Any:
    return nn.with_partitioning(nn.initializers.normal(scale), names)


def _norm(config: ModelConfig, name: str, x: Array, axis: str = "norm") -> Array:
    """Normalise the last dim; statistics and scale are float32 whatever the activations are."""
    scale = nn.with_partitioning(nn.initializers.ones, (axis,))
    if config.norm == "layernorm":
        bias = nn.with_partitioning(nn.initializers.zeros, (axis,))
        norm = nn.LayerNorm(use_bias=config.bias, scale_init=scale, bias_init=bias, name=name)
    else:
        norm = nn.RMSNorm(scale_init=scale, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def _project(config: ModelConfig, name: str, features: Any, names: tuple[str, ...], scale: float = 0.02) -> Any:
    """A linear map of the last dim (or, for the attention's output, of the last two)."""
    inputs = len(names) - (len(features) if isinstance(features, tuple) else 1)
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        use_bias=config.bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=_kernel(*names, scale=scale),
        bias_init=nn.with_partitioning(nn.initializers.zeros, names[inputs:]),
        name=name,
    )


class Attention(nn.Module):
    """Attention over the row, or, with a cache, over the cache after this call's keys are written to it."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: Array, positions_BL: Array, mask: Array, cache: Cache | None) -> tuple[Array, Any]:
        config, part = self.config, self.config.attention
        query = _project(config, "query", (part.heads, part.head_dim), ("embed", "heads", "head_dim"))(x_BLD)
        key = _project(config, "key", (part.kv_heads, part.head_dim), ("embed", "kv_heads", "head_dim"))(x_BLD)
        value = _project(config, "value", (part.kv_heads, part.head_dim), ("embed", "kv_heads", "head_dim"))(x_BLD)
        if part.qk_norm:
            query = _norm(config, "query_norm", query, "head_dim")
            key = _norm(config, "key_norm", key, "head_dim")
        if part.position == "rope":
            query = rotate(query, positions_BL, part.rope_theta)
            key = rotate(key, positions_BL, part.rope_theta)
        if cache is not None:
            rows = jnp.arange(x_BLD.shape[0])[:, None]
            key = cache[0].at[rows, positions_BL].set(key.astype(cache[0].dtype))
            value = cache[1].at[rows, positions_BL].set(value.astype(cache[1].dtype))
            cache = (key, value)
        mixed_BLHK = attend(query, key, value, mask)
        scale = 0.02 / (2 * config.layers) ** 0.5  # what adds to the residual stream starts small (Radford et al. 2019)
        out = _project(config, "out", config.width, ("heads", "head_dim", "embed"), scale)(mixed_BLHK)
        return out, cache


class FeedForward(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        config = self.config
        hidden = _project(config, "up", config.ff_width, ("embed", "ff"))(x_BLD)
        match config.activation:
            case "swiglu" | "geglu":  # Shazeer 2020
                gate = _project(config, "gate", config.ff_width, ("embed", "ff"))(x_BLD)
                hidden = hidden * (nn.silu(gate) if config.activation == "swiglu" else nn.gelu(gate))
            case "gelu":
                hidden = nn.gelu(hidden)
            case "relu2":  # So et al. 2021
                hidden = jnp.square(nn.relu(hidden))
            case _:
                raise ValueError(f"model.activation={config.activation!r}; known: swiglu, geglu, gelu, relu2")
        scale = 0.02 / (2 * config.layers) ** 0.5
        return _project(config, "down", config.width, ("ff", "embed"), scale)(hidden)


class Layer(nn.Module):
    """One layer, in the shape that `nn.scan` wants: (carry, what is scanned) -> (carry, what is stacked)."""

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BLD: Array, cache: Cache | None, positions_BL: Array, mask: Array) -> tuple[Array, Any]:
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=self.deterministic)
        normed = _norm(config, "attention_norm", x_BLD)
        mixed, cache = Attention(config, name="attention")(normed, positions_BL, mask, cache)
        x_BLD = x_BLD + drop(mixed)
        normed = _norm(config, "ff_norm", x_BLD)
        return x_BLD + drop(FeedForward(config, name="ff")(normed)), cache


class Transformer(nn.Module):
    config: ModelConfig
    vocab: int

    @nn.compact
    def __call__(
        self, tokens_BL: Array, positions_BL: Array, mask: Array, cache: Any, deterministic: bool
    ) -> tuple[Array, Any]:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        embedding_VD = self.param("embedding", _kernel("vocab", "embed"), (self.vocab, config.width))
        x_BLD = embedding_VD.astype(dtype)[tokens_BL]
        if config.attention.position == "learned":
            table = self.param("position_embedding", _kernel("position", "embed"), (config.context, config.width))
            x_BLD = x_BLD + table.astype(dtype)[positions_BL]
        x_BLD = nn.Dropout(config.dropout, deterministic=deterministic)(x_BLD)
        axes: Any = (0, nn.broadcast, nn.broadcast)  # Flax's own default, 0, makes it an int to a type checker
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=axes,
            length=config.layers,
            unroll=config.layers if config.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, deterministic, name="layers")
        x_BLD, cache = layers(x_BLD, cache, positions_BL, mask)
        x_BLD = _norm(config, "final_norm", x_BLD)
        if config.tied_head:
            head_VD = embedding_VD
        else:
            head_VD = self.param("head", _kernel("vocab", "embed"), (self.vocab, config.width))
        # float32 out of low-precision operands: the softmax needs the range.
        logits = jnp.einsum("BLD,VD->BLV", x_BLD, head_VD.astype(dtype), preferred_element_type=jnp.float32)
        return logits, cache


def make_model(config: ModelConfig, vocab: int) -> Model:
    """The transformer of `config` over `vocab` tokens. Parameters are float32; activations are `config.dtype`.

    A position beyond `config.context` has no learned embedding; callers keep within it.
    """
    module = Transformer(config, vocab)

    def boxed(key: Array) -> Params:
        row = jnp.zeros((1, 2), jnp.int32)
        variables: Any = module.init(key, row, row, packed_mask(row), None, True)  # a dict, if Flax's type says more
        return variables["params"]

    def init(key: Array) -> Params:
        return nn.unbox(boxed(key))

    def apply(params: Params, batch: Batch, dropout_key: Array | None) -> Array:
        rngs = None if dropout_key is None or not config.dropout else {"dropout": dropout_key}
        logits_BLV, _ = module.apply(
            {"params": params},
            batch.tokens_BL,
            batch.positions_BL,
            packed_mask(batch.segments_BL),
            None,
            rngs is None,
            rngs=rngs,
        )
        return logits_BLV

    def init_cache(batch_size: int, slots: int) -> Cache:
        shape = (config.layers, batch_size, slots, config.attention.kv_heads, config.attention.head_dim)
        empty = functools.partial(jnp.zeros, shape, jnp.dtype(config.dtype))
        return empty(), empty()

    def decode(params: Params, tokens_BL: Array, positions_BL: Array, cache: Cache) -> tuple[Array, Cache]:
        mask = cache_mask(positions_BL, cache[0].shape[2])
        # Any: Flax's type also has the variables that `mutable` would return.
        found: Any = module.apply({"params": params}, tokens_BL, positions_BL, mask, cache, True)
        return found

    axes = jax.tree.map(
        lambda leaf: leaf.names,
        jax.eval_shape(boxed, jax.random.key(0)),
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    return Model(init=init, apply=apply, axes=axes, init_cache=init_cache, decode=decode)


def count_params(params: Params) -> int:
    """Number of parameters, embeddings included; takes arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
