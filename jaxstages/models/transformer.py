"""The decoder-only transformer, as a `Model` of pure functions. Flax stays inside this file.

Legend: B batch, L length, D width, H query heads, G key/value heads, K head dim, F feed-forward, V vocab,
N layers (stacked), S cache slots, E experts.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxstages.config import ModelConfig
from jaxstages.models.activations import KNOWN, activate
from jaxstages.models.attention import (
    Attend,
    Reach,
    attend_cached,
    attend_in_tiles,
    attend_over,
    attend_packed,
    cache_mask,
)
from jaxstages.models.experts import mix_experts
from jaxstages.models.lora import ADAPTER, SCALE, UP, adapt, kernel_of
from jaxstages.models.primitives import gather, last_dim, linear, normalize
from jaxstages.models.rope import frequencies_of, rotate
from jaxstages.models.spread import ROWS, lookup_over, mix_over
from jaxstages.models.unstacked import TURNED, linear_turned, unstack
from jaxstages.types import ALONE, Batch, Headless, Model, Params, Placement

Cache = tuple[Array, Array]
"""Keys and values of one layer, [B, G, S, K] each."""

_POLICIES = jax.checkpoint_policies

REMAT: dict[str, Any] = {
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "offload": _POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": _POLICIES.nothing_saveable,
}
"""What of a layer is kept for the backward pass; the rest is computed again. "none" is no recomputation."""


class Backend(NamedTuple):
    """Where the model runs, how it attends over packed rows there, what of a layer is computed again (`REMAT`), and
    which device holds what."""

    platform: str
    attend: Attend
    place: Placement
    remat: str = "none"


class Kind(NamedTuple):
    """What differs from layer to layer: rope's frequencies, and the place of its reach among the model's. Of all layers
    they are [N, K/2] and [N]."""

    frequencies: Any
    reach: Any


def reaches_of(config: ModelConfig) -> tuple[Reach, ...]:
    """How far the model's layers see, each kind of reach once."""
    part = config.attention
    kinds = dict.fromkeys(_kinds(config))
    return tuple(dict.fromkeys(Reach(part.window if kind == "local" else 0, part.softcap) for kind in kinds))


def _kinds(config: ModelConfig) -> list[str]:
    part = config.attention
    pattern = part.pattern or ("local" if part.window else "global",)
    return [pattern[n % len(pattern)] for n in range(config.layers)]


def _layers(config: ModelConfig) -> list[Kind]:
    """What each layer is."""
    part, reaches = config.attention, reaches_of(config)
    return [
        Kind(frequencies_of(part, kind), reaches.index(Reach(part.window if kind == "local" else 0, part.softcap)))
        for kind in _kinds(config)
    ]


def _kernel(*names: str, scale: float = 0.02) -> Any:
    return nn.with_partitioning(nn.initializers.normal(scale), names)


class Norm(nn.Module):
    """Normalise the last dim; statistics and scale are float32 whatever the activations are."""

    config: ModelConfig
    backend: Backend
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layernorm, plus_one = (self.config.norm == name for name in ("layernorm", "rmsnorm_plus_one"))
        ones = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale: Any = self.param("scale", nn.with_partitioning(ones, (self.axis,)), x.shape[-1:])
        scale = scale + 1.0 if plus_one else scale
        normed = normalize(x, scale, layernorm, self.config.norm_eps, self.backend.platform)
        if not (layernorm and self.config.bias):
            return normed
        bias: Any = self.param("bias", nn.with_partitioning(nn.initializers.zeros, (self.axis,)), x.shape[-1:])
        return normed + last_dim(bias, x.ndim).astype(x.dtype)


class Projection(nn.Module):
    """A linear map of the last dims, as many as `names` has before those of `features`, with an adapter where there is
    one beside the kernel, which may be held in another form (`lora.py`)."""

    config: ModelConfig
    backend: Backend
    features: tuple[int, ...]
    names: tuple[str, ...]
    scale: float = 0.02
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs, dtype = len(self.names) - len(self.features), jnp.dtype(self.config.dtype)
        rows, shape = x.shape[: x.ndim - inputs], x.shape[x.ndim - inputs :]
        x_MI = x.astype(dtype).reshape(*rows, -1)
        if self.has_variable("params", TURNED):
            return self._biased(linear_turned(x_MI, self.get_variable("params", TURNED)), rows)
        kernel: Any = self.param("kernel", _kernel(*self.names, scale=self.scale), (*shape, *self.features))
        beside = {n: self.get_variable("params", n) for n in (SCALE, *ADAPTER) if self.has_variable("params", n)}
        kernel_IO = kernel_of({"kernel": kernel} | beside).reshape(math.prod(shape), -1)
        where = (self.backend.platform, self.backend.place, (self.names[0], self.names[inputs]))
        out = linear(x_MI, kernel_IO.astype(dtype), *where)
        if UP in beside:
            out = adapt(out, x_MI, kernel_IO, beside, *where)
        return self._biased(out, rows)

    def _biased(self, out: Array, rows: tuple[int, ...]) -> Array:
        out = out.reshape(*rows, *self.features)
        if not (self.bias or self.config.bias):
            return out
        names = self.names[-len(self.features) :]
        bias: Any = self.param("bias", nn.with_partitioning(nn.initializers.zeros, names), self.features)
        return out + jnp.expand_dims(bias, tuple(range(len(rows)))).astype(out.dtype)


class Attention(nn.Module):
    """Attention over the row, or, with a cache, over the cache after this call's keys are written to it."""

    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(
        self, x_BLD: Array, positions_BL: Array, segments_BL: Array | None, kind: Kind, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        config, part = self.config, self.config.attention

        def place(x_BLHK: Array, heads: str) -> Array:
            return self.backend.place.activation(x_BLHK, (*ROWS, heads, ""))

        project = functools.partial(Projection, config, self.backend)
        qkv = {"query": ("heads", part.heads), "key": ("kv_heads", part.kv_heads), "value": ("kv_heads", part.kv_heads)}
        query, key, value = (
            place(
                project((heads, part.head_dim), ("embed", axis, "head_dim"), bias=part.qkv_bias, name=name)(x_BLD), axis
            )
            for name, (axis, heads) in qkv.items()
        )
        if part.qk_norm:
            query, key = self._norm("query_norm", query), self._norm("key_norm", key)
        if part.position == "rope":
            query, key = (rotate(x, positions_BL, jnp.asarray(kind.frequencies)) for x in (query, key))
        if part.scale:  # the scores' usual scale is in what attends
            query = query * jnp.asarray(part.scale * part.head_dim**0.5, query.dtype)
        reaches = reaches_of(config)
        if cache is not None:
            cache = _write(cache[0], key, positions_BL), _write(cache[1], value, positions_BL)
            reach = reaches[kind.reach]
            mask = cache_mask(positions_BL, cache[0].shape[2], reach.window)
            mixed_BLHK = attend_cached(query, cache[0], cache[1], mask, reach.softcap)
        else:
            assert segments_BL is not None, "a row without a cache has segments"
            attend, row = self.backend.attend, (query, key, value, segments_BL)
            ways = [lambda q, k, v, s, reach=reach: attend(q, k, v, s, reach) for reach in reaches]
            mixed_BLHK = place(ways[0](*row) if len(ways) == 1 else jax.lax.switch(kind.reach, ways, *row), "heads")
        scale = 0.02 / (2 * config.layers) ** 0.5  # what adds to the residual stream starts small (Radford et al. 2019)
        out = project((config.width,), ("heads", "head_dim", "embed"), scale, name="out")(mixed_BLHK)
        return out, cache

    def _norm(self, name: str, x_BLHK: Array) -> Array:
        """Of each head, or of all together."""
        if self.config.attention.qk_norm_over == "head":
            return Norm(self.config, self.backend, "head_dim", name=name)(x_BLHK)
        flat = x_BLHK.reshape(*x_BLHK.shape[:2], -1)
        return Norm(self.config, self.backend, name=name)(flat).reshape(x_BLHK.shape)


def _write(held_BGSK: Array, new_BLGK: Array, positions_BL: Array) -> Array:
    """Each of the new ones in the slot of its position; a row's positions follow each other."""
    if len(held_BGSK) == 1:  # as one piece: on CPU a scatter has the cache copied, several times a token
        new_BGLK = new_BLGK.swapaxes(1, 2).astype(held_BGSK.dtype)
        return jax.lax.dynamic_update_slice_in_dim(held_BGSK, new_BGLK, positions_BL[0, 0], axis=2)
    rows = jnp.arange(len(held_BGSK))[:, None]
    return held_BGSK.at[rows, :, positions_BL].set(new_BLGK.astype(held_BGSK.dtype))


class FeedForward(nn.Module):
    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        config = self.config
        project = functools.partial(Projection, config, self.backend)
        hidden = project((config.ff_width,), ("embed", "ff"), name="up")(x_BLD)
        if KNOWN[config.activation].gates:
            gate = project((config.ff_width,), ("embed", "ff"), name="gate")(x_BLD)
            hidden = hidden * activate(config.activation, gate)
        else:
            hidden = activate(config.activation, hidden)
        hidden = self.backend.place.activation(hidden, (*ROWS, "ff"))
        scale = 0.02 / (2 * config.layers) ** 0.5
        return project((config.width,), ("ff", "embed"), scale, name="down")(hidden)


class Experts(nn.Module):
    """A mixture of feed-forwards."""

    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        config, part = self.config, self.config.experts
        wide, scale = (part.count, config.width, config.ff_width), 0.02 / (2 * config.layers) ** 0.5
        router: Any = self.param("router", _kernel("embed", "expert"), (config.width, part.count))
        gate: Any = self.param("gate", _kernel("expert", "embed", "ff"), wide)
        up: Any = self.param("up", _kernel("expert", "embed", "ff"), wide)
        down: Any = self.param("down", _kernel("expert", "ff", "embed", scale=scale), (part.count, *wide[:0:-1]))
        mix = functools.partial(
            mix_experts,
            activation=functools.partial(activate, config.activation),
            per_token=part.per_token,
            normalize=part.normalize,
        )
        kernels = (kernel.astype(x_BLD.dtype) for kernel in (gate, up, down))
        return mix_over(mix, self.backend.place)(x_BLD, router, *kernels)


class Layer(nn.Module):
    """One layer, in the shape that `nn.scan` wants: (carry, what is scanned) -> (carry, what is stacked)."""

    config: ModelConfig
    backend: Backend
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        kind: Kind,
        positions_BL: Array,
        segments_BL: Array | None,
        cache: Cache | None,
    ) -> tuple[Array, Cache | None]:
        config, backend = self.config, self.backend
        drop = nn.Dropout(config.dropout, deterministic=self.deterministic)
        mixed, cache = Attention(config, backend, name="attention")(
            self._norm("before", "attention_norm", x_BLD), positions_BL, segments_BL, kind, cache
        )
        x_BLD = x_BLD + drop(self._norm("after", "attention_post_norm", self._place(mixed)))
        ff: Any = (
            Experts(config, backend, name="experts")
            if config.experts.count
            else FeedForward(config, backend, name="ff")
        )
        mixed = ff(self._norm("before", "ff_norm", x_BLD))
        return x_BLD + drop(self._norm("after", "ff_post_norm", self._place(mixed))), cache

    def _place(self, x_BLD: Array) -> Array:
        return self.backend.place.activation(x_BLD, (*ROWS, ""))

    def _norm(self, place: str, name: str, x_BLD: Array) -> Array:
        here = self.config.norm_place in (place, "both")
        return Norm(self.config, self.backend, name=name)(x_BLD) if here else x_BLD


class Transformer(nn.Module):
    """stacked: the layers' parameters are one tree whose leaves are stacked, and the layers are a loop; else each has
    its own, `layers_0`, ..., and they stand one after the other, each with its cache.
    neftune: see `make_model`."""

    config: ModelConfig
    vocab: int
    backend: Backend
    stacked: bool = True
    neftune: float = 0.0

    @nn.compact
    def __call__(
        self, tokens_BL: Array, positions_BL: Array, segments_BL: Array | None, caches: Any, deterministic: bool
    ) -> tuple[Headless, Any]:
        config, place = self.config, self.backend.place
        dtype = jnp.dtype(config.dtype)
        embedding_VD: Any = self.param("embedding", _kernel("vocab", "embed"), (self.vocab, config.width))
        x_BLD = lookup_over(embedding_VD.astype(dtype), tokens_BL, place)
        if self.neftune and not deterministic:
            x_BLD = x_BLD + self._noise(x_BLD, segments_BL)
        if config.scaled_embedding:
            x_BLD = x_BLD * jnp.asarray(config.width**0.5, dtype)
        if config.attention.position == "learned":
            table: Any = self.param("position_embedding", _kernel("position", "embed"), (config.context, config.width))
            gathered: Any = gather(table.astype(dtype), place, ("position", "embed"))
            x_BLD = x_BLD + gathered[positions_BL]
        x_BLD = nn.Dropout(config.dropout, deterministic=deterministic)(x_BLD)
        layers, where = _layers(config), (positions_BL, segments_BL)
        if self.stacked:
            kinds = Kind(*map(np.asarray, zip(*layers, strict=True)))
            x_BLD, _ = self._loop()(config, self.backend, deterministic, name="layers")(x_BLD, kinds, *where, None)
        else:
            held = []
            for n, kind in enumerate(layers):
                layer = Layer(config, self.backend, deterministic, name=f"layers_{n}")
                x_BLD, cache = layer(x_BLD, kind, *where, caches[n])
                held.append(cache)
            caches = tuple(held)
        x_BLD = Norm(config, self.backend, name="final_norm")(x_BLD)
        head: Any = embedding_VD
        if not config.tied_head:
            head = self.param("head", _kernel("vocab", "embed"), (self.vocab, config.width))
        softcap = jnp.float32(config.logit_softcap) if config.logit_softcap else None
        return Headless(x_BLD, gather(head.astype(dtype), place, ("vocab", "embed")), softcap), caches

    def _loop(self) -> Any:
        config, layer = self.config, Layer
        if self.backend.remat != "none":
            # In a loop the compiler can't merge what is computed twice; where the layers are unrolled it would.
            layer = nn.remat(Layer, policy=REMAT[self.backend.remat], prevent_cse=config.unroll)
        axes: Any = (0, nn.broadcast, nn.broadcast, nn.broadcast)  # Flax's own default, 0, makes it an int to a checker
        return nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=axes,
            length=config.layers,
            unroll=config.layers if config.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )

    def _noise(self, x_BLD: Array, segments_BL: Array | None) -> Array:
        assert segments_BL is not None, "noise is for training, which has rows"
        same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
        length_BL = jnp.sum(same_BLL, axis=-1).astype(jnp.float32)
        scale_BL = self.neftune * jax.lax.rsqrt(length_BL * x_BLD.shape[-1])
        noise = jax.random.uniform(self.make_rng("dropout"), x_BLD.shape, jnp.float32, -1.0, 1.0)
        return (noise * scale_BL[..., None]).astype(x_BLD.dtype)


def make_model(
    config: ModelConfig,
    vocab: int,
    *,
    platform: str | None = None,
    attend: Attend | None = None,
    place: Placement = ALONE,
    remat: str = "none",
    neftune: float = 0.0,
) -> Model:
    """The transformer of `config` over `vocab` tokens. Parameters are float32; activations are `config.dtype`.

    A position beyond `config.context` has no learned embedding; callers keep within it.

    Args:
        platform: "cpu", "gpu" or "tpu", which the functions are to run on; None is jax's own default.
        attend: how it attends over packed rows, as `choose_attend` found it; None is what every machine of the platform
            can do.
        place: which device holds what.
        remat: what the backward pass computes again, see `REMAT`; outputs do not depend on it.
        neftune: in training, uniform noise of this over `sqrt(tokens of the example * width)` is added to embeddings
            (NEFTune, Jain et al. 2023); 0 is none.
    """
    platform = platform or jax.default_backend()
    attend = attend or (attend_in_tiles if platform == "cpu" else attend_packed)
    # The forms that are fast on CPU know one device only.
    forms = platform if place is ALONE else "several"
    vocab = max(vocab, config.vocab_size)
    spread = Backend(forms, attend_over(attend, place, config.context), place, remat)
    module = Transformer(config, vocab, spread, neftune=neftune)
    alone = Backend(platform, attend_packed, ALONE)
    decoder = Transformer(config, vocab, alone, stacked=False)

    def boxed(key: Array) -> Params:
        row = jnp.zeros((1, 2), jnp.int32)  # which no mesh could split
        variables: Any = Transformer(config, vocab, alone).init(
            key, row, row, row, None, True
        )  # a dict, if Flax's type says more
        return variables["params"]

    def init(key: Array) -> Params:
        return nn.unbox(boxed(key))

    def headless(params: Params, batch: Batch, dropout_key: Array | None) -> Headless:
        rngs = None if dropout_key is None or not (config.dropout or neftune) else {"dropout": dropout_key}
        rows = (batch.tokens_BL, batch.positions_BL, batch.segments_BL)
        found, _ = module.apply({"params": params}, *rows, None, rngs is None, rngs=rngs)
        return found

    def apply(params: Params, batch: Batch, dropout_key: Array | None) -> Array:
        return headless(params, batch, dropout_key).logits()

    def init_cache(batch_size: int, slots: int) -> tuple[Cache, ...]:
        shape = (batch_size, config.attention.kv_heads, slots, config.attention.head_dim)
        empty = functools.partial(jnp.zeros, shape, jnp.dtype(config.dtype))
        return tuple((empty(), empty()) for _ in range(config.layers))

    def decode(params: Params, tokens_BL: Array, positions_BL: Array, caches: Any) -> tuple[Headless, Any]:
        # Any: Flax's type also has the variables that `mutable` would return.
        found: Any = decoder.apply({"params": params}, tokens_BL, positions_BL, None, caches, True)
        return found

    axes = jax.tree.map(
        lambda leaf: leaf.names,
        jax.eval_shape(boxed, jax.random.key(0)),
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    return Model(
        *(init, apply, headless, axes),
        init_cache=init_cache,
        unstack=lambda params: unstack(params, config.layers, jnp.dtype(config.dtype), platform),
        decode=decode,
    )
