"""The decoder-only transformer as a `Model` of pure functions. Flax modules do not leave this package.

Legend: B batch, L length, D width, H query heads, G key/value heads, K head dim, V vocab, N layers (stacked),
S cache slots.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxstages.config.model import ModelConfig
from jaxstages.models.attention import Attend
from jaxstages.models.layers import Backend, Cache, Layer, LayerSpec, Norm, layer_specs, normal_init, scaled
from jaxstages.models.ops import Ops
from jaxstages.models.select import select_ops
from jaxstages.types import SINGLE_DEVICE, Batch, Decoder, HiddenAndHead, Model, Params, ShardingHooks

_POLICIES = jax.checkpoint_policies

REMAT: dict[str, Any] = {
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "offload": _POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": _POLICIES.nothing_saveable,
}
"""Policies for the activations of a layer that are saved for the backward pass. The others are rematerialized."""


class Transformer(nn.Module):
    """stacked: the parameters of all layers are stacked in one tree, and the layers are a scan. Otherwise each layer
    has its own parameters (`layers_0`, ...) and its own cache.
    neftune: see `make_model`.
    """

    config: ModelConfig
    vocab: int
    backend: Backend
    stacked: bool = True
    neftune: float = 0.0

    @nn.compact
    def __call__(
        self, tokens_BL: Array, positions_BL: Array, segments_BL: Array | None, caches: Any, deterministic: bool
    ) -> tuple[HiddenAndHead, Any]:
        config, hooks = self.config, self.backend.hooks
        dtype = jnp.dtype(config.dtype)

        embedding_VD: Any = self.param("embedding", normal_init("vocab", "embed"), (self.vocab, config.width))
        x_BLD = self.backend.ops.embed(embedding_VD, tokens_BL, dtype)
        if self.neftune and not deterministic:
            x_BLD = x_BLD + self._embedding_noise(x_BLD, segments_BL)
        if config.scaled_embedding:
            x_BLD = x_BLD * jnp.asarray(config.width**0.5, dtype)
        if config.embedding_scale != 1.0:
            x_BLD = scaled(x_BLD, config.embedding_scale)
        if config.attention.position == "learned":
            axes = ("position", "embed")
            table: Any = self.param("position_embedding", normal_init(*axes), (config.context, config.width))
            x_BLD = x_BLD + hooks.gather_param(table, axes)[positions_BL].astype(dtype)
        x_BLD = nn.Dropout(config.dropout, deterministic=deterministic)(x_BLD)

        if self.stacked:
            x_BLD = self._stacked_layers(x_BLD, positions_BL, segments_BL, deterministic)
        else:
            x_BLD, caches = self._separate_layers(x_BLD, positions_BL, segments_BL, caches, deterministic)

        x_BLD = Norm(config, self.backend, name="final_norm")(x_BLD)
        if config.logit_scale != 1.0:
            x_BLD = scaled(x_BLD, config.logit_scale)
        head: Any = embedding_VD
        if not config.tied_head:
            head = self.param("head", normal_init("vocab", "embed"), (self.vocab, config.width))
        head_VD = hooks.gather_param(head.astype(dtype), ("vocab", "embed"))
        softcap = jnp.float32(config.logit_softcap) if config.logit_softcap else None
        return HiddenAndHead(x_BLD, head_VD, softcap), caches

    def _stacked_layers(
        self, x_BLD: Array, positions_BL: Array, segments_BL: Array | None, deterministic: bool
    ) -> Array:
        config, layer = self.config, Layer
        if self.backend.remat != "none":
            # A loop keeps the compiler from merging the recomputation with the original. Unrolled layers need barriers.
            layer = nn.remat(Layer, policy=REMAT[self.backend.remat], prevent_cse=config.unroll)

        in_axes: Any = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        scan = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=config.layers,
            unroll=config.layers if config.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        specs = LayerSpec(*map(np.asarray, zip(*layer_specs(config), strict=True)))
        layers: Any = scan(config, self.backend, deterministic, name="layers")
        x_BLD, _ = layers(x_BLD, specs, positions_BL, segments_BL, None)
        return x_BLD

    def _separate_layers(
        self, x_BLD: Array, positions_BL: Array, segments_BL: Array | None, caches: Any, deterministic: bool
    ) -> tuple[Array, tuple[Cache | None, ...]]:
        new_caches = []
        for n, spec in enumerate(layer_specs(self.config)):
            layer = Layer(self.config, self.backend, deterministic, name=f"layers_{n}")
            x_BLD, cache = layer(x_BLD, spec, positions_BL, segments_BL, caches[n])
            new_caches.append(cache)
        return x_BLD, tuple(new_caches)

    def _embedding_noise(self, x_BLD: Array, segments_BL: Array | None) -> Array:
        assert segments_BL is not None, "noise is for training, which has rows"
        same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
        length_BL = jnp.sum(same_BLL, axis=-1).astype(jnp.float32)
        scale_BL = self.neftune * jax.lax.rsqrt(length_BL * x_BLD.shape[-1])
        noise = jax.random.uniform(self.make_rng("dropout"), x_BLD.shape, jnp.float32, -1.0, 1.0)
        return (noise * scale_BL[..., None]).astype(x_BLD.dtype)


def unstack(params: Params, layers: int) -> Params:
    """Split the stacked `layers` into `layers_0`, `layers_1`, ..."""
    separate = {f"layers_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"]) for n in range(layers)}
    return {name: part for name, part in params.items() if name != "layers"} | separate


def make_model(
    config: ModelConfig,
    vocab: int,
    *,
    platform: str | None = None,
    attend: Attend | None = None,
    hooks: ShardingHooks = SINGLE_DEVICE,
    ops: Ops | None = None,
    remat: str = "none",
    neftune: float = 0.0,
) -> Model:
    """Return the transformer of `config` over `vocab` tokens. Parameters are float32, activations `config.dtype`.

    A position beyond `config.context` has no learned embedding; callers stay within it.

    Args:
        platform: "cpu", "gpu" or "tpu"; None is JAX's default.
        attend: attention over packed rows, such as a kernel chosen by `choose_attend`; None is the one that every
            machine of the platform supports.
        hooks: how arrays are sharded.
        ops: the operations to use instead of those of the platform, such as `REFERENCE`.
        remat: which activations the backward pass recomputes, see `REMAT`; outputs do not depend on it.
        neftune: in training, uniform noise of this over `sqrt(tokens of the example * width)` is added to embeddings
            (NEFTune, Jain et al. 2023); 0 is none.
    """
    vocab = max(vocab, config.vocab_size)
    row_ops = ops or select_ops(platform, hooks, attend, config.context)
    single_device = Backend(ops or select_ops(platform), SINGLE_DEVICE)
    model = Transformer(config, vocab, Backend(row_ops, hooks, remat), neftune=neftune)
    decoder = Transformer(config, vocab, single_device, stacked=False)

    @jax.jit  # traced once, however often the shapes are needed
    def boxed(key: Array) -> Params:
        row = jnp.zeros((1, 2), jnp.int32)  # too small for any mesh to split
        variables: Any = Transformer(config, vocab, single_device).init(key, row, row, row, None, True)
        return variables["params"]

    def init(key: Array) -> Params:
        return nn.unbox(boxed(key))

    def hidden(params: Params, batch: Batch, dropout_key: Array | None) -> HiddenAndHead:
        deterministic = dropout_key is None or not (config.dropout or neftune)
        rngs: Any = None if deterministic else {"dropout": dropout_key}
        rows = (batch.tokens_BL, batch.positions_BL, batch.segments_BL)
        outputs, _ = model.apply({"params": params}, *rows, None, deterministic, rngs=rngs)
        return outputs

    def apply(params: Params, batch: Batch, dropout_key: Array | None) -> Array:
        return hidden(params, batch, dropout_key).logits()

    def init_cache(batch_size: int, slots: int) -> tuple[Cache, ...]:
        shape = (batch_size, config.attention.kv_heads, slots, config.attention.head_dim)
        zeros = functools.partial(jnp.zeros, shape, jnp.dtype(config.dtype))
        return tuple((zeros(), zeros()) for _ in range(config.layers))

    def prepare(params: Params) -> Params:
        prepare_layer, dtype = single_device.ops.prepare_decode, jnp.dtype(config.dtype)

        def prepare_part(name: str, part: Any) -> Any:
            if name in ("embedding", "head", "position_embedding"):
                return part.astype(dtype)
            return prepare_layer(part, dtype) if name.startswith("layers_") else part

        return {name: prepare_part(name, part) for name, part in unstack(params, config.layers).items()}

    def decode(params: Params, tokens_BL: Array, positions_BL: Array, caches: Any) -> tuple[HiddenAndHead, Any]:
        # Flax's type also includes the variables that `mutable` would return.
        outputs: Any = decoder.apply({"params": params}, tokens_BL, positions_BL, None, caches, True)
        return outputs

    axes = jax.tree.map(
        lambda leaf: leaf.names,
        jax.eval_shape(boxed, jax.random.key(0)),
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    return Model(init, apply, axes, hidden, Decoder(init_cache, prepare, decode))
