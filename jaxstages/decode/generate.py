"""Generation with a key/value cache: batches of prompts of any lengths, compiled once a bucket of prompt length.

Legend: B batch, P prompt slots, M new tokens, V vocab.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxstages.sharding import batch_sharding
from jaxstages.types import Model, Params

Carry = tuple[Array, Array, Array, Any]
"""Of the decoding loop: tokens made so far, all of them, the last of each row, the cache."""

BUCKET = 32
"""Prompts are padded, on the right, to a multiple of this."""


class Sampling(NamedTuple):
    """max_new_tokens: at most. temperature: 0 takes the likeliest token. stop: ids that end an answer."""

    max_new_tokens: int
    temperature: float
    stop: tuple[int, ...]


def make_generate(
    model: Model, sampling: Sampling
) -> Callable[[Params, Int[Array, "B P"], Int[Array, " B"], Array], Int[Array, "B M"]]:
    """`generate(params, prompts_BP, lengths_B, keys_B) -> tokens_BM`, to be jitted.

    Prompts are padded on the right. Their cache slots beyond a prompt's length hold rubbish that is never seen: a
    query sees the slots up to its own position, and each new token overwrites the slot of its position first. After a
    stop token the row is filled with that token. Row b draws from `keys_B[b]`: an answer does not depend on its batch.
    """
    stop = jnp.asarray(sampling.stop, jnp.int32)

    def choose(logits_BV: Float[Array, "B V"], keys_B: Array, i: Array) -> Int[Array, " B"]:
        if not sampling.temperature:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        draw = jax.vmap(lambda key, logits: jax.random.categorical(jax.random.fold_in(key, i), logits))
        return draw(keys_B, logits_BV / sampling.temperature).astype(jnp.int32)

    def ended(tokens_B: Int[Array, " B"]) -> Array:
        return jnp.any(tokens_B[:, None] == stop[None, :], axis=1)

    def generate(params: Params, prompts_BP: Array, lengths_B: Array, keys_B: Array) -> Array:
        rows, slots = prompts_BP.shape
        params, cache = model.unstack(params), model.init_cache(rows, slots + sampling.max_new_tokens)
        positions_BP = jnp.broadcast_to(jnp.arange(slots)[None, :], (rows, slots))
        found, cache = model.decode(params, prompts_BP, positions_BP, cache)
        last_B1D = jnp.take_along_axis(found.hidden_BLD, (lengths_B - 1)[:, None, None], axis=1)
        last_BV = found._replace(hidden_BLD=last_B1D).logits()[:, 0]
        first_B = choose(last_BV, keys_B, jnp.int32(0))
        out_BM = jnp.zeros((rows, sampling.max_new_tokens), jnp.int32).at[:, 0].set(first_B)

        def unfinished(carry: Carry) -> Array:
            i, _, tokens_B, _ = carry
            return (i < sampling.max_new_tokens) & ~jnp.all(ended(tokens_B))

        def advance(carry: Carry) -> Carry:
            i, out_BM, tokens_B, cache = carry
            positions_B1 = (lengths_B + i - 1)[:, None]
            found, cache = model.decode(params, tokens_B[:, None], positions_B1, cache)
            next_B = jnp.where(ended(tokens_B), tokens_B, choose(found.logits()[:, 0], keys_B, i))
            return i + 1, out_BM.at[:, i].set(next_B), next_B, cache

        i, out_BM, tokens_B, _ = jax.lax.while_loop(unfinished, advance, (jnp.int32(1), out_BM, first_B, cache))
        rest = jnp.arange(sampling.max_new_tokens)[None, :] >= i
        return jnp.where(rest, tokens_B[:, None], out_BM)

    return generate


def make_generate_all(
    model: Model,
    sampling: Sampling,
    *,
    context: int,
    batch_size: int,
    mesh: Mesh,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> Callable[[Params, Sequence[Sequence[int]]], list[list[int]]]:
    """`generate_all(params, prompts)`: answers to all prompts, without the stop token and what follows it.

    It compiles once for each bucket of prompt length, however often it is called. The last batch is filled up, and its
    filling left out.

    Args:
        between: called before each batch.

    A prompt that leaves no room for `max_new_tokens` in the context loses its beginning.

    Raises:
        ValueError: `max_new_tokens` is as long as the context; later, an empty prompt.
    """
    room = context - sampling.max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens={sampling.max_new_tokens} must be less than the context, {context}")
    generate = jax.jit(make_generate(model, sampling))
    sharding = batch_sharding(mesh)
    key = jax.random.key(seed)

    def generate_all(params: Params, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        cut = [list(prompt)[-room:] for prompt in prompts]
        if not all(cut):
            raise ValueError("a prompt is empty; give it at least one token")
        slots = min(-(-max(map(len, cut)) // BUCKET) * BUCKET, room)
        answers: list[list[int]] = []
        for start in range(0, len(cut), batch_size):
            between()
            chosen = cut[start : start + batch_size]
            prompts_BP = np.zeros((batch_size, slots), np.int32)
            lengths_B = np.ones(batch_size, np.int32)
            for b, prompt in enumerate(chosen):
                prompts_BP[b, : len(prompt)], lengths_B[b] = prompt, len(prompt)
            keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(start, start + batch_size))
            tokens_BM = generate(
                params, jax.device_put(prompts_BP, sharding), jax.device_put(lengths_B, sharding), keys_B
            )
            if jax.process_count() > 1:
                tokens_BM = multihost_utils.process_allgather(tokens_BM, tiled=True)
            answers += [_until_stop(row, sampling.stop) for row in np.asarray(tokens_BM)[: len(chosen)].tolist()]
        return answers

    return generate_all


def _until_stop(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens
