"""Flax modules of the user's own as a `Model`: Linen and NNX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jaxtyping import Array, PRNGKeyArray

from jaxstages.types import Batch, Decoder, Model, Params


def _smallest_batch() -> Batch:
    """Two tokens of one row, enough to initialize a module."""
    row = jnp.zeros((1, 2), jnp.int32)
    return Batch(row, row, jnp.ones((1, 2)), row + 1, jnp.arange(2)[None])


def linen_model(module: linen.Module) -> Model:
    """Return a Linen module as a model.

    The module is called as `module(batch, train)` and returns logits [B, L, V]. `batch.segments_BL` and
    `batch.positions_BL` tell packed documents apart: attention must not cross segments. Dropout takes its keys from the
    collection "dropout".

    Args:
        module: with the collection "params" only.

    >>> import flax.linen as nn
    >>> import jax
    >>> class Bigram(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, batch, train):
    ...         return nn.Embed(16, 16)(batch.tokens_BL)
    >>> params = linen_model(Bigram()).init(jax.random.key(0))
    >>> params["Embed_0"]["embedding"].shape
    (16, 16)
    """

    def init(key: PRNGKeyArray) -> Params:
        variables: Any = module.init(key, _smallest_batch(), False)
        if extra := variables.keys() - {"params"}:
            raise ValueError(f"{type(module).__name__} has variables in {', '.join(extra)}; only params can be trained")
        return linen.unbox(variables["params"])

    def apply(params: Params, batch: Batch, dropout_key: PRNGKeyArray | None) -> Array:
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        logits_BLV: Any = module.apply({"params": params}, batch, dropout_key is not None, rngs=rngs)
        return logits_BLV

    return Model(init, apply, decoder=recomputing_decoder(apply))


def nnx_model(make_module: Callable[[nnx.Rngs], Any]) -> Model:
    """Return an NNX module as a model.

    The module is called as `module(batch, train)`, as that of `linen_model`. With `train`, its dropout layers take keys
    from the stream "dropout" of the generator that the step passes.

    Args:
        make_module: `make_module(rngs)`, the module with fresh parameters.

    >>> import jax
    >>> from flax import nnx
    >>> class Bigram(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.table = nnx.Embed(16, 16, rngs=rngs)
    ...     def __call__(self, batch, train):
    ...         return self.table(batch.tokens_BL)
    >>> params = nnx_model(Bigram).init(jax.random.key(0))
    >>> params["table"]["embedding"].shape
    (16, 16)
    """

    def split(key: PRNGKeyArray) -> tuple[Any, Any, Any]:
        graph, params, rest = nnx.split(make_module(nnx.Rngs(params=key, dropout=key)), nnx.Param, ...)
        return graph, params, rest

    def init(key: PRNGKeyArray) -> Params:
        _, params, _ = split(key)
        return _string_keys(nnx.to_pure_dict(params))

    def apply(params: Params, batch: Batch, dropout_key: PRNGKeyArray | None) -> Array:
        # Only the structure of the module is needed here; its own parameters are never computed.
        key = jax.random.key(0) if dropout_key is None else dropout_key
        graph, abstract, rest = split(key)
        nnx.replace_by_pure_dict(abstract, nnx.restore_int_paths(params))
        module = nnx.merge(graph, abstract, rest)
        return module(batch, dropout_key is not None)

    return Model(init, apply, decoder=recomputing_decoder(apply))


def recomputing_decoder(apply: Callable[[Params, Batch, PRNGKeyArray | None], Array]) -> Decoder:
    """Return a decoder for any causal model: it computes the whole text again for each new token.

    A model of your own can do better with a cache, see `types.Decoder`; this one makes it generate without.
    """

    def init_cache(batch_size: int, slots: int) -> Array:
        return jnp.zeros((batch_size, slots), jnp.int32)

    def step(params: Params, tokens_BL: Array, positions_BL: Array, text_BS: Array) -> tuple[Array, Array]:
        rows_B1 = jnp.arange(tokens_BL.shape[0])[:, None]
        text_BS = text_BS.at[rows_B1, positions_BL].set(tokens_BL)
        slots_1S = jnp.arange(text_BS.shape[1], dtype=jnp.int32)[None, :]
        batch = Batch(
            tokens_BL=text_BS,
            targets_BL=jnp.zeros_like(text_BS),
            weights_BL=jnp.zeros(text_BS.shape, jnp.float32),
            segments_BL=(slots_1S <= positions_BL[:, -1:]).astype(jnp.int32),
            positions_BL=jnp.broadcast_to(slots_1S, text_BS.shape),
        )
        return apply(params, batch, None)[rows_B1, positions_BL], text_BS

    return Decoder(init_cache, lambda params: params, step)


def _string_keys(tree: Any) -> Any:
    """Checkpoints hold nested dicts with string keys; the items of an NNX list have integers."""
    return {str(key): _string_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
