"""The decoder-only transformer, as a `Model` of pure functions. Flax stays inside this file.

Legend: B batch, L length, D width, H query heads, G key/value heads, K head dim, F feed-forward, V vocab,
N layers (stacked), S cache slots.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxstages.config import ModelConfig
from jaxstages.models.activations import KNOWN, activate
from jaxstages.models.attention import Attend, Reach, attend_in_tiles, attend_masked, attend_packed, cache_mask, rotate
from jaxstages.models.primitives import last_dim, linear, normalize
from jaxstages.types import Batch, Headless, Model, Params

Cache = tuple[Array, Array]

_POLICIES = jax.checkpoint_policies

REMAT: dict[str, Any] = {
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "offload": _POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": _POLICIES.nothing_saveable,
}
"""What of a layer is kept for the backward pass; the rest is computed again. "none" is no recomputation."""


class Backend(NamedTuple):
    """Where the model runs, how it attends over packed rows there, and what of a layer is computed again (`REMAT`)."""

    platform: str
    attend: Attend
    remat: str = "none"


def _kernel(*names: str, scale: float = 0.02) -> Any:
    return nn.with_partitioning(nn.initializers.normal(scale), names)


class Norm(nn.Module):
    """Normalise the last dim; statistics and scale are float32 whatever the activations are."""

    config: ModelConfig
    backend: Backend
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layernorm = self.config.norm == "layernorm"
        scale: Any = self.param("scale", nn.with_partitioning(nn.initializers.ones, (self.axis,)), x.shape[-1:])
        normed = normalize(x, scale, layernorm, self.config.norm_eps, self.backend.platform)
        if not (layernorm and self.config.bias):
            return normed
        bias: Any = self.param("bias", nn.with_partitioning(nn.initializers.zeros, (self.axis,)), x.shape[-1:])
        return normed + last_dim(bias, x.ndim).astype(x.dtype)


def _project(
    config: ModelConfig, platform: str, name: str, features: Any, names: tuple[str, ...], scale: float = 0.02
) -> Any:
    """A linear map of the last dim (or, for the attention's output, of the last two)."""
    inputs = len(names) - (len(features) if isinstance(features, tuple) else 1)

    def dot_general(x: Array, kernel: Array, dimension_numbers: Any, precision: Any = None) -> Array:
        del dimension_numbers, precision  # the last dims of x with the first of the kernel
        flat_IO = kernel.reshape(math.prod(kernel.shape[:inputs]), -1)
        out = linear(x.reshape(*x.shape[: x.ndim - inputs], flat_IO.shape[0]), flat_IO, platform)
        return out.reshape(*out.shape[:-1], *kernel.shape[inputs:])

    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        use_bias=config.bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=_kernel(*names, scale=scale),
        bias_init=nn.with_partitioning(nn.initializers.zeros, names[inputs:]),
        dot_general=dot_general,
        name=name,
    )


class Attention(nn.Module):
    """Attention over the row, or, with a cache, over the cache after this call's keys are written to it."""

    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(
        self, x_BLD: Array, positions_BL: Array, segments_BL: Array | None, cache: Cache | None
    ) -> tuple[Array, Any]:
        config, part = self.config, self.config.attention
        project = functools.partial(_project, config, self.backend.platform)
        query = project("query", (part.heads, part.head_dim), ("embed", "heads", "head_dim"))(x_BLD)
        key = project("key", (part.kv_heads, part.head_dim), ("embed", "kv_heads", "head_dim"))(x_BLD)
        value = project("value", (part.kv_heads, part.head_dim), ("embed", "kv_heads", "head_dim"))(x_BLD)
        if part.qk_norm:
            query = Norm(config, self.backend, "head_dim", name="query_norm")(query)
            key = Norm(config, self.backend, "head_dim", name="key_norm")(key)
        if part.position == "rope":
            query = rotate(query, positions_BL, part.rope_theta)
            key = rotate(key, positions_BL, part.rope_theta)
        if cache is None:
            assert segments_BL is not None, "a row without a cache has segments"
            mixed_BLHK = self.backend.attend(query, key, value, segments_BL, Reach())
        else:
            rows = jnp.arange(x_BLD.shape[0])[:, None]
            key = cache[0].at[rows, positions_BL].set(key.astype(cache[0].dtype))
            value = cache[1].at[rows, positions_BL].set(value.astype(cache[1].dtype))
            cache = (key, value)
            mixed_BLHK = attend_masked(query, key, value, cache_mask(positions_BL, key.shape[1]))
        scale = 0.02 / (2 * config.layers) ** 0.5  # what adds to the residual stream starts small (Radford et al. 2019)
        out = project("out", config.width, ("heads", "head_dim", "embed"), scale)(mixed_BLHK)
        return out, cache


class FeedForward(nn.Module):
    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        config = self.config
        project = functools.partial(_project, config, self.backend.platform)
        hidden = project("up", config.ff_width, ("embed", "ff"))(x_BLD)
        if KNOWN[config.activation].gates:
            gate = project("gate", config.ff_width, ("embed", "ff"))(x_BLD)
            hidden = hidden * activate(config.activation, gate)
        else:
            hidden = activate(config.activation, hidden)
        scale = 0.02 / (2 * config.layers) ** 0.5
        return project("down", config.width, ("ff", "embed"), scale)(hidden)


class Layer(nn.Module):
    """One layer, in the shape that `nn.scan` wants: (carry, what is scanned) -> (carry, what is stacked)."""

    config: ModelConfig
    backend: Backend
    deterministic: bool

    @nn.compact
    def __call__(
        self, x_BLD: Array, cache: Cache | None, positions_BL: Array, segments_BL: Array | None
    ) -> tuple[Array, Any]:
        config, backend = self.config, self.backend
        drop = nn.Dropout(config.dropout, deterministic=self.deterministic)
        normed = Norm(config, backend, name="attention_norm")(x_BLD)
        mixed, cache = Attention(config, backend, name="attention")(normed, positions_BL, segments_BL, cache)
        x_BLD = x_BLD + drop(mixed)
        normed = Norm(config, backend, name="ff_norm")(x_BLD)
        return x_BLD + drop(FeedForward(config, backend, name="ff")(normed)), cache


class Transformer(nn.Module):
    config: ModelConfig
    vocab: int
    backend: Backend

    @nn.compact
    def __call__(
        self, tokens_BL: Array, positions_BL: Array, segments_BL: Array | None, cache: Any, deterministic: bool
    ) -> tuple[Headless, Any]:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        embedding_VD = self.param("embedding", _kernel("vocab", "embed"), (self.vocab, config.width))
        x_BLD = embedding_VD.astype(dtype)[tokens_BL]
        if config.attention.position == "learned":
            table = self.param("position_embedding", _kernel("position", "embed"), (config.context, config.width))
            x_BLD = x_BLD + table.astype(dtype)[positions_BL]
        x_BLD = nn.Dropout(config.dropout, deterministic=deterministic)(x_BLD)
        axes: Any = (0, nn.broadcast, nn.broadcast)  # Flax's own default, 0, makes it an int to a type checker
        layer: Any = Layer
        if self.backend.remat != "none":
            # In a loop the compiler can't merge what is computed twice; where the layers are unrolled it would.
            layer = nn.remat(Layer, policy=REMAT[self.backend.remat], prevent_cse=config.unroll)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=axes,
            length=config.layers,
            unroll=config.layers if config.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, self.backend, deterministic, name="layers")
        x_BLD, cache = layers(x_BLD, cache, positions_BL, segments_BL)
        x_BLD = Norm(config, self.backend, name="final_norm")(x_BLD)
        head: Any = embedding_VD
        if not config.tied_head:
            head = self.param("head", _kernel("vocab", "embed"), (self.vocab, config.width))
        return Headless(x_BLD, head), cache


def make_model(
    config: ModelConfig,
    vocab: int,
    *,
    platform: str | None = None,
    attend: Attend | None = None,
    remat: str = "none",
) -> Model:
    """The transformer of `config` over `vocab` tokens. Parameters are float32; activations are `config.dtype`.

    A position beyond `config.context` has no learned embedding; callers keep within it.

    Args:
        platform: "cpu", "gpu" or "tpu", which the functions are to run on; None is jax's own default.
        attend: how it attends over packed rows, as `choose_attend` found it; None is what every machine of the platform
            can do.
        remat: what the backward pass computes again, see `REMAT`; outputs do not depend on it.
    """
    platform = platform or jax.default_backend()
    attend = attend or (attend_in_tiles if platform == "cpu" else attend_packed)
    module = Transformer(config, vocab, Backend(platform, attend, remat))

    def boxed(key: Array) -> Params:
        row = jnp.zeros((1, 2), jnp.int32)
        variables: Any = module.init(key, row, row, row, None, True)  # a dict, if Flax's type says more
        return variables["params"]

    def init(key: Array) -> Params:
        return nn.unbox(boxed(key))

    def headless(params: Params, batch: Batch, dropout_key: Array | None) -> Headless:
        rngs = None if dropout_key is None or not config.dropout else {"dropout": dropout_key}
        found, _ = module.apply(
            {"params": params},
            batch.tokens_BL,
            batch.positions_BL,
            batch.segments_BL,
            None,
            rngs is None,
            rngs=rngs,
        )
        return found

    def apply(params: Params, batch: Batch, dropout_key: Array | None) -> Array:
        return headless(params, batch, dropout_key).logits()

    def init_cache(batch_size: int, slots: int) -> Cache:
        shape = (config.layers, batch_size, slots, config.attention.kv_heads, config.attention.head_dim)
        empty = functools.partial(jnp.zeros, shape, jnp.dtype(config.dtype))
        return empty(), empty()

    def decode(params: Params, tokens_BL: Array, positions_BL: Array, cache: Cache) -> tuple[Array, Cache]:
        # Any: Flax's type also has the variables that `mutable` would return.
        found: Any = module.apply({"params": params}, tokens_BL, positions_BL, None, cache, True)
        return found[0].logits(), found[1]

    axes = jax.tree.map(
        lambda leaf: leaf.names,
        jax.eval_shape(boxed, jax.random.key(0)),
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    return Model(init=init, apply=apply, headless=headless, axes=axes, init_cache=init_cache, decode=decode)
