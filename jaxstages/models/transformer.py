"""The decoder-only transformer, as a `Model` of pure functions. Flax stays inside this folder.

Legend: B batch, L length, D width, H query heads, G key/value heads, K head dim, V vocab,
N layers (stacked), S cache slots.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxstages.config import ModelConfig
from jaxstages.models.attention import Attend, attend_in_tiles, attend_over, attend_packed
from jaxstages.models.layers import Backend, Cache, Kind, Layer, Norm, drawn, kinds_of
from jaxstages.models.primitives import gather
from jaxstages.models.spmd import lookup_over
from jaxstages.models.unstacked import unstack
from jaxstages.types import SINGLE_DEVICE, Batch, Decoder, HiddenAndHead, Model, Params, ShardingHooks

_POLICIES = jax.checkpoint_policies

REMAT: dict[str, Any] = {
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "offload": _POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": _POLICIES.nothing_saveable,
}
"""What of a layer is kept for the backward pass; the rest is computed again. "none" is no recomputation."""


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
    ) -> tuple[HiddenAndHead, Any]:
        config, place = self.config, self.backend.place
        dtype = jnp.dtype(config.dtype)
        embedding_VD: Any = self.param("embedding", drawn("vocab", "embed"), (self.vocab, config.width))
        x_BLD = lookup_over(embedding_VD.astype(dtype), tokens_BL, place)
        if self.neftune and not deterministic:
            x_BLD = x_BLD + self._noise(x_BLD, segments_BL)
        if config.scaled_embedding:
            x_BLD = x_BLD * jnp.asarray(config.width**0.5, dtype)
        if config.embedding_scale != 1.0:
            x_BLD = x_BLD * jnp.asarray(config.embedding_scale, dtype)
        if config.attention.position == "learned":
            table: Any = self.param("position_embedding", drawn("position", "embed"), (config.context, config.width))
            gathered: Any = gather(table.astype(dtype), place, ("position", "embed"))
            x_BLD = x_BLD + gathered[positions_BL]
        x_BLD = nn.Dropout(config.dropout, deterministic=deterministic)(x_BLD)
        layers, where = kinds_of(config), (positions_BL, segments_BL)
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
        if config.logit_scale != 1.0:
            x_BLD = x_BLD * jnp.asarray(config.logit_scale, dtype)
        head: Any = embedding_VD
        if not config.tied_head:
            head = self.param("head", drawn("vocab", "embed"), (self.vocab, config.width))
        softcap = jnp.float32(config.logit_softcap) if config.logit_softcap else None
        return HiddenAndHead(x_BLD, gather(head.astype(dtype), place, ("vocab", "embed")), softcap), caches

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
    place: ShardingHooks = SINGLE_DEVICE,
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
    forms = platform if place == SINGLE_DEVICE else "several"
    vocab = max(vocab, config.vocab_size)
    spread = Backend(forms, attend_over(attend, place, config.context), place, remat)
    module = Transformer(config, vocab, spread, neftune=neftune)
    alone = Backend(platform, attend_packed, SINGLE_DEVICE)
    decoder = Transformer(config, vocab, alone, stacked=False)

    @jax.jit  # traced once, however often its shapes are asked for
    def boxed(key: Array) -> Params:
        row = jnp.zeros((1, 2), jnp.int32)  # which no mesh could split
        variables: Any = Transformer(config, vocab, alone).init(key, row, row, row, None, True)
        return variables["params"]  # a dict, if Flax's type says more

    def init(key: Array) -> Params:
        return nn.unbox(boxed(key))

    def hidden(params: Params, batch: Batch, dropout_key: Array | None) -> HiddenAndHead:
        rngs = None if dropout_key is None or not (config.dropout or neftune) else {"dropout": dropout_key}
        rows = (batch.tokens_BL, batch.positions_BL, batch.segments_BL)
        found, _ = module.apply({"params": params}, *rows, None, rngs is None, rngs=rngs)
        return found

    def apply(params: Params, batch: Batch, dropout_key: Array | None) -> Array:
        return hidden(params, batch, dropout_key).logits()

    def init_cache(batch_size: int, slots: int) -> tuple[Cache, ...]:
        shape = (batch_size, config.attention.kv_heads, slots, config.attention.head_dim)
        empty = functools.partial(jnp.zeros, shape, jnp.dtype(config.dtype))
        return tuple((empty(), empty()) for _ in range(config.layers))

    def decode(params: Params, tokens_BL: Array, positions_BL: Array, caches: Any) -> tuple[HiddenAndHead, Any]:
        # Any: Flax's type also has the variables that `mutable` would return.
        found: Any = decoder.apply({"params": params}, tokens_BL, positions_BL, None, caches, True)
        return found

    axes = jax.tree.map(
        lambda leaf: leaf.names,
        jax.eval_shape(boxed, jax.random.key(0)),
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    prepare = functools.partial(unstack, layers=config.layers, dtype=jnp.dtype(config.dtype), platform=platform)
    return Model(init, apply, axes, hidden, Decoder(init_cache, prepare, decode))
