"""One layer of the transformer: its norms, projections, attention and feed-forward, as modules of Flax.

Legend: B batch, L length, D width, H query heads, G key/value heads, K head dim, F feed-forward,
N layers, S cache slots, E experts.
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
from jaxstages.models.attention import Attend, Reach, attend_cached, cache_mask
from jaxstages.models.lora import ADAPTER, SCALE, UP, adapt, kernel_of
from jaxstages.models.moe import mix_experts
from jaxstages.models.primitives import last_dim, linear, normalize
from jaxstages.models.rope import amplitude_of, frequencies_of, rotate
from jaxstages.models.spmd import ROWS, mix_over
from jaxstages.models.unstacked import TURNED, linear_turned
from jaxstages.types import ShardingHooks

Cache = tuple[Array, Array]
"""Keys and values of one layer, [B, G, S, K] each."""


class Backend(NamedTuple):
    """Where the model runs, how it attends over packed rows there, what of a layer is computed again (`REMAT`), and
    which device holds what."""

    platform: str
    attend: Attend
    place: ShardingHooks
    remat: str = "none"


class Kind(NamedTuple):
    """What differs from layer to layer: rope's frequencies and amplitude, and the place of its reach among the model's.
    Of all layers they are [N, P], [N] and [N]."""

    frequencies: Any
    amplitude: Any
    reach: Any


def reaches_of(config: ModelConfig) -> tuple[Reach, ...]:
    """How far the model's layers see, each kind of reach once."""
    part = config.attention
    kinds = dict.fromkeys(_names_of_kinds(config))
    return tuple(dict.fromkeys(Reach(part.window if kind == "local" else 0, part.softcap) for kind in kinds))


def _names_of_kinds(config: ModelConfig) -> list[str]:
    part = config.attention
    pattern = part.pattern or ("local" if part.window else "global",)
    return [pattern[n % len(pattern)] for n in range(config.layers)]


def kinds_of(config: ModelConfig) -> list[Kind]:
    """What each layer is."""
    part, reaches = config.attention, reaches_of(config)
    windows = [part.window if kind == "local" else 0 for kind in _names_of_kinds(config)]
    return [
        Kind(frequencies_of(part, kind), amplitude_of(part, kind), reaches.index(Reach(window, part.softcap)))
        for kind, window in zip(_names_of_kinds(config), windows, strict=True)
    ]


def drawn(*names: str, scale: float = 0.02) -> Any:
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
        kernel: Any = self.param("kernel", drawn(*self.names, scale=self.scale), (*shape, *self.features))
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
            turn = jnp.asarray(kind.frequencies), jnp.asarray(kind.amplitude)
            query, key = (rotate(x, positions_BL, *turn) for x in (query, key))
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
        out = project((config.width,), ("heads", "head_dim", "embed"), scale, part.out_bias, name="out")(mixed_BLHK)
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
        project = functools.partial(Projection, config, self.backend, bias=config.ff_bias)
        hidden = project((config.ff_width,), ("embed", "ff"), name="up")(x_BLD)
        if KNOWN[config.activation].gates:
            gate = project((config.ff_width,), ("embed", "ff"), name="gate")(x_BLD)
            hidden = hidden * activate(config.activation, gate, self.backend.platform)
        else:
            hidden = activate(config.activation, hidden, self.backend.platform)
        hidden = self.backend.place.activation(hidden, (*ROWS, "ff"))
        scale = 0.02 / (2 * config.layers) ** 0.5
        return project((config.width,), ("ff", "embed"), scale=scale, name="down")(hidden)


class Experts(nn.Module):
    """A mixture of feed-forwards."""

    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        config, part = self.config, self.config.experts
        wide, scale = (part.count, config.width, config.ff_width), 0.02 / (2 * config.layers) ** 0.5
        router: Any = self.param("router", drawn("embed", "expert"), (config.width, part.count))
        gate: Any = self.param("gate", drawn("expert", "embed", "ff"), wide)
        up: Any = self.param("up", drawn("expert", "embed", "ff"), wide)
        down: Any = self.param("down", drawn("expert", "ff", "embed", scale=scale), (part.count, *wide[:0:-1]))
        mix = functools.partial(
            mix_experts,
            activation=functools.partial(activate, config.activation, platform=self.backend.platform),
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
        self, x_BLD: Array, kind: Kind, positions_BL: Array, segments_BL: Array | None, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        config, backend = self.config, self.backend
        drop = nn.Dropout(config.dropout, deterministic=self.deterministic)
        mixed, cache = Attention(config, backend, name="attention")(
            self._norm("before", "attention_norm", x_BLD), positions_BL, segments_BL, kind, cache
        )
        x_BLD = x_BLD + drop(self._added("attention_post_norm", mixed))
        ff: Any = (
            Experts(config, backend, name="experts")
            if config.experts.count
            else FeedForward(config, backend, name="ff")
        )
        mixed = ff(self._norm("before", "ff_norm", x_BLD))
        return x_BLD + drop(self._added("ff_post_norm", mixed)), cache

    def _added(self, name: str, mixed_BLD: Array) -> Array:
        """What goes to the residual stream."""
        mixed_BLD, scale = self._norm("after", name, self._place(mixed_BLD)), self.config.residual_scale
        return mixed_BLD if scale == 1.0 else mixed_BLD * jnp.asarray(scale, mixed_BLD.dtype)

    def _place(self, x_BLD: Array) -> Array:
        return self.backend.place.activation(x_BLD, (*ROWS, ""))

    def _norm(self, place: str, name: str, x_BLD: Array) -> Array:
        here = self.config.norm_place in (place, "both")
        return Norm(self.config, self.backend, name=name)(x_BLD) if here else x_BLD
