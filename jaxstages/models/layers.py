"""One layer of the transformer: its norms, projections, attention and feed-forward, as Flax modules.

Legend: B batch, L length, D width, H query heads, G key/value heads, K head dim, F feed-forward, N layers,
S cache slots, E experts, P pairs of dims that rope rotates.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxstages.config.model import ModelConfig
from jaxstages.models.attention import AttentionSpec, attend_cached, cache_mask
from jaxstages.models.lora_layer import ADAPTER, SCALE, UP, add_adapter, dequantized_kernel
from jaxstages.models.moe import mix_experts
from jaxstages.models.ops import ACTIVATIONS, TRANSPOSED, Ops, as_last_dim, linear_transposed
from jaxstages.models.rope import rope_amplitude, rope_frequencies, rotate
from jaxstages.models.spmd import ROWS, expert_parallel_moe
from jaxstages.types import ShardingHooks

Cache = tuple[Array, Array]
"""Keys and values of one layer, [B, G, S, K] each."""


class Backend(NamedTuple):
    """How the layers compute.

    ops: the operations of the platform.
    hooks: how arrays are sharded.
    remat: which activations the backward pass recomputes, a key of `REMAT` or "none".
    """

    ops: Ops
    hooks: ShardingHooks
    remat: str = "none"


class LayerSpec(NamedTuple):
    """What differs between layers. Stacked over layers, the fields are [N, P], [N] and [N].

    rope_frequencies, rope_amplitude: see `rotate`.
    attention_index: index into `attention_specs`.
    """

    rope_frequencies: Any
    rope_amplitude: Any
    attention_index: Any


def _layer_kinds(config: ModelConfig) -> list[str]:
    """The kind of each layer: "global", "local" or "nope"."""
    attention = config.attention
    pattern = attention.pattern or ("local" if attention.window else "global",)
    return [pattern[n % len(pattern)] for n in range(config.layers)]


def _attention_spec(config: ModelConfig, kind: str) -> AttentionSpec:
    return AttentionSpec(config.attention.window if kind == "local" else 0, config.attention.softcap)


def attention_specs(config: ModelConfig) -> tuple[AttentionSpec, ...]:
    """Return the distinct attention specs of the model's layers."""
    return tuple(dict.fromkeys(_attention_spec(config, kind) for kind in _layer_kinds(config)))


def layer_specs(config: ModelConfig) -> list[LayerSpec]:
    """Return the spec of each layer."""
    specs = attention_specs(config)
    return [
        LayerSpec(
            rope_frequencies=rope_frequencies(config.attention, kind),
            rope_amplitude=rope_amplitude(config.attention, kind),
            attention_index=specs.index(_attention_spec(config, kind)),
        )
        for kind in _layer_kinds(config)
    ]


def normal_init(*names: str, scale: float = 0.02) -> Any:
    """Normal initializer for a parameter with these logical axes."""
    return nn.with_partitioning(nn.initializers.normal(scale), names)


def residual_init_scale(config: ModelConfig) -> float:
    """Standard deviation of kernels whose output is added to the residual stream (Radford et al. 2019)."""
    return 0.02 / (2 * config.layers) ** 0.5


def scaled(x: Array, factor: float) -> Array:
    """Multiply by a constant of the model. bfloat16 would round it, by up to 0.4 %, in the same way everywhere."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


class Norm(nn.Module):
    """Normalise the last dim. Statistics and scale are float32 whatever the dtype of the activations."""

    config: ModelConfig
    backend: Backend
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layernorm, plus_one = (self.config.norm == name for name in ("layernorm", "rmsnorm_plus_one"))
        initializer = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale: Any = self.param("scale", nn.with_partitioning(initializer, (self.axis,)), x.shape[-1:])
        scale = scale + 1.0 if plus_one else scale

        normed = self.backend.ops.norm(x, scale, layernorm, self.config.norm_eps)
        if not (layernorm and self.config.bias):
            return normed
        bias: Any = self.param("bias", nn.with_partitioning(nn.initializers.zeros, (self.axis,)), x.shape[-1:])
        return normed + as_last_dim(bias, x.ndim).astype(x.dtype)


class Projection(nn.Module):
    """A linear map of the last dims.

    The kernel may be quantized or transposed for decoding, and may have an adapter next to it (`lora_layer.py`).

    features: output dims.
    names: logical axes of the kernel, input dims first.
    """

    config: ModelConfig
    backend: Backend
    features: tuple[int, ...]
    names: tuple[str, ...]
    scale: float = 0.02
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype, linear = jnp.dtype(self.config.dtype), self.backend.ops.linear
        input_dims = len(self.names) - len(self.features)
        rows, inputs = x.shape[: x.ndim - input_dims], x.shape[x.ndim - input_dims :]
        x_MI = x.astype(dtype).reshape(*rows, -1)

        if self.has_variable("params", TRANSPOSED):
            return self._add_bias(linear_transposed(x_MI, self.get_variable("params", TRANSPOSED)), rows)

        kernel: Any = self.param("kernel", normal_init(*self.names, scale=self.scale), (*inputs, *self.features))
        extra = {n: self.get_variable("params", n) for n in (SCALE, *ADAPTER) if self.has_variable("params", n)}
        kernel_IO = dequantized_kernel({"kernel": kernel} | extra).reshape(math.prod(inputs), -1)

        names_IO = (self.names[0], self.names[input_dims])
        out = linear(x_MI, kernel_IO.astype(dtype), names_IO)
        if UP in extra:
            out = add_adapter(out, x_MI, kernel_IO, extra, linear, names_IO)
        return self._add_bias(out, rows)

    def _add_bias(self, out: Array, rows: tuple[int, ...]) -> Array:
        out = out.reshape(*rows, *self.features)
        if not (self.bias or self.config.bias):
            return out
        names = self.names[-len(self.features) :]
        bias: Any = self.param("bias", nn.with_partitioning(nn.initializers.zeros, names), self.features)
        return out + jnp.expand_dims(bias, tuple(range(len(rows)))).astype(out.dtype)


class Attention(nn.Module):
    """Attention over the row or, with a cache, over the cache after this call's keys are written to it."""

    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(
        self, x_BLD: Array, positions_BL: Array, segments_BL: Array | None, spec: LayerSpec, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        config, attention = self.config, self.config.attention
        query, key, value = (
            self._project_heads(x_BLD, name, heads, axis)
            for name, heads, axis in (
                ("query", attention.heads, "heads"),
                ("key", attention.kv_heads, "kv_heads"),
                ("value", attention.kv_heads, "kv_heads"),
            )
        )
        if attention.qk_norm:
            query, key = self._norm("query_norm", query), self._norm("key_norm", key)
        if attention.position == "rope":
            frequencies, amplitude = jnp.asarray(spec.rope_frequencies), jnp.asarray(spec.rope_amplitude)
            query, key = (rotate(x, positions_BL, frequencies, amplitude) for x in (query, key))
        if attention.scale:  # relative to the usual scale, which attention itself applies
            query = scaled(query, attention.scale * attention.head_dim**0.5)

        if cache is not None:
            cache = _write(cache[0], key, positions_BL), _write(cache[1], value, positions_BL)
            mixed_BLHK = self._attend_cache(query, cache, positions_BL, spec)
        else:
            assert segments_BL is not None, "a row without a cache has segments"
            mixed_BLHK = self._constrain(self._attend_row(query, key, value, segments_BL, spec), "heads")

        scale = residual_init_scale(config)
        project = Projection(
            config, self.backend, (config.width,), ("heads", "head_dim", "embed"), scale, attention.out_bias, name="out"
        )
        return project(mixed_BLHK), cache

    def _project_heads(self, x_BLD: Array, name: str, heads: int, axis: str) -> Array:
        attention = self.config.attention
        features, names = (heads, attention.head_dim), ("embed", axis, "head_dim")
        project = Projection(self.config, self.backend, features, names, bias=attention.qkv_bias, name=name)
        return self._constrain(project(x_BLD), axis)

    def _attend_row(self, query: Array, key: Array, value: Array, segments: Array, spec: LayerSpec) -> Array:
        attend, row = self.backend.ops.attention, (query, key, value, segments)
        branches = [
            lambda q, k, v, s, attention_spec=attention_spec: attend(q, k, v, s, attention_spec)
            for attention_spec in attention_specs(self.config)
        ]
        # Stacked layers are one loop, in which the index is traced.
        return branches[0](*row) if len(branches) == 1 else jax.lax.switch(spec.attention_index, branches, *row)

    def _attend_cache(self, query: Array, cache: Cache, positions_BL: Array, spec: LayerSpec) -> Array:
        attention_spec = attention_specs(self.config)[spec.attention_index]
        mask = cache_mask(positions_BL, cache[0].shape[2], attention_spec.window)
        return attend_cached(query, cache[0], cache[1], mask, attention_spec.softcap)

    def _norm(self, name: str, x_BLHK: Array) -> Array:
        """Normalise each head, or all heads together."""
        if self.config.attention.qk_norm_over == "head":
            return Norm(self.config, self.backend, "head_dim", name=name)(x_BLHK)
        flat = x_BLHK.reshape(*x_BLHK.shape[:2], -1)
        return Norm(self.config, self.backend, name=name)(flat).reshape(x_BLHK.shape)

    def _constrain(self, x_BLHK: Array, heads: str) -> Array:
        return self.backend.hooks.constrain(x_BLHK, (*ROWS, heads, ""))


def _write(cache_BGSK: Array, new_BLGK: Array, positions_BL: Array) -> Array:
    """Write new entries to the slots of their positions, which are consecutive in a row."""
    if len(cache_BGSK) == 1:  # a slice is updated in place, where a scatter may copy the cache several times per token
        new_BGLK = new_BLGK.swapaxes(1, 2).astype(cache_BGSK.dtype)
        return jax.lax.dynamic_update_slice_in_dim(cache_BGSK, new_BGLK, positions_BL[0, 0], axis=2)
    rows = jnp.arange(len(cache_BGSK))[:, None]
    return cache_BGSK.at[rows, :, positions_BL].set(new_BLGK.astype(cache_BGSK.dtype))


class FeedForward(nn.Module):
    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        config, ops = self.config, self.backend.ops
        project = functools.partial(Projection, config, self.backend, bias=config.ff_bias)

        hidden = project((config.ff_width,), ("embed", "ff"), name="up")(x_BLD)
        if ACTIVATIONS[config.activation].gated:
            gate = project((config.ff_width,), ("embed", "ff"), name="gate")(x_BLD)
            hidden = hidden * ops.activation(config.activation, gate)
        else:
            hidden = ops.activation(config.activation, hidden)
        hidden = self.backend.hooks.constrain(hidden, (*ROWS, "ff"))

        return project((config.width,), ("ff", "embed"), scale=residual_init_scale(config), name="down")(hidden)


class Experts(nn.Module):
    """A mixture of feed-forwards."""

    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        config, experts = self.config, self.config.experts
        count, width, ff_width = experts.count, config.width, config.ff_width
        down_init = normal_init("expert", "ff", "embed", scale=residual_init_scale(config))
        router: Any = self.param("router", normal_init("embed", "expert"), (width, count))
        gate: Any = self.param("gate", normal_init("expert", "embed", "ff"), (count, width, ff_width))
        up: Any = self.param("up", normal_init("expert", "embed", "ff"), (count, width, ff_width))
        down: Any = self.param("down", down_init, (count, ff_width, width))

        mix = functools.partial(
            mix_experts,
            activation=functools.partial(self.backend.ops.activation, config.activation),
            per_token=experts.per_token,
            normalize=experts.normalize,
        )
        kernels = (kernel.astype(x_BLD.dtype) for kernel in (gate, up, down))
        return expert_parallel_moe(mix, self.backend.hooks)(x_BLD, router, *kernels)


class Layer(nn.Module):
    """One layer, with the signature of `nn.scan`: (carry, scanned inputs) -> (carry, stacked outputs)."""

    config: ModelConfig
    backend: Backend
    deterministic: bool

    @nn.compact
    def __call__(
        self, x_BLD: Array, spec: LayerSpec, positions_BL: Array, segments_BL: Array | None, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        config, backend = self.config, self.backend
        drop = nn.Dropout(config.dropout, deterministic=self.deterministic)

        attention = Attention(config, backend, name="attention")
        normed_BLD = self._norm("before", "attention_norm", x_BLD)
        mixed_BLD, cache = attention(normed_BLD, positions_BL, segments_BL, spec, cache)
        x_BLD = x_BLD + drop(self._residual("attention_post_norm", mixed_BLD))

        mixed_BLD = self._feed_forward(self._norm("before", "ff_norm", x_BLD))
        return x_BLD + drop(self._residual("ff_post_norm", mixed_BLD)), cache

    def _feed_forward(self, x_BLD: Array) -> Array:
        if self.config.experts.count:
            return Experts(self.config, self.backend, name="experts")(x_BLD)
        return FeedForward(self.config, self.backend, name="ff")(x_BLD)

    def _residual(self, name: str, mixed_BLD: Array) -> Array:
        """What is added to the residual stream: normalised and scaled, if the recipe says so."""
        mixed_BLD = self._norm("after", name, self.backend.hooks.constrain(mixed_BLD, (*ROWS, "")))
        scale = self.config.residual_scale
        return mixed_BLD if scale == 1.0 else scaled(mixed_BLD, scale)

    def _norm(self, position: str, name: str, x_BLD: Array) -> Array:
        """Normalise if the model has a norm at this position, "before" or "after"."""
        if self.config.norm_place not in (position, "both"):
            return x_BLD
        return Norm(self.config, self.backend, name=name)(x_BLD)
