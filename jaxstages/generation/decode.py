"""Generation with a key/value cache: batches of prompts of any lengths, compiled once a bucket of prompt length.

Legend: B batch, P prompt slots, M new tokens, V vocab.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxstages.generation.sampling import Sampling, make_choose
from jaxstages.types import HiddenAndHead, Model, Params

BUCKET = 32
"""Prompts are padded on the right to a multiple of this many tokens."""

TOKENS_PER_POLL = 16
"""New tokens between two checks by the host whether a batch is finished, if stop strings may end it."""


class Decoding(NamedTuple):
    """State of a batch during decoding.

    num_new: number of new tokens of each row.
    out_BM: the new tokens; the last one fills the remaining slots.
    tokens_B: the last token of each row.
    lengths_B: lengths of the prompts.
    keys_B: random key of each row.
    seen_BV: tokens that occur in a row; None without a repetition penalty.
    cache: keys and values.
    """

    num_new: Int[Array, ""]
    out_BM: Int[Array, "B M"]
    tokens_B: Int[Array, " B"]
    lengths_B: Int[Array, " B"]
    keys_B: Array
    seen_BV: Bool[Array, "B V"] | None
    cache: Any


class Decode(NamedTuple):
    """Decoding as two functions of the params that `Decoder.prepare` returns.

    prefill: `prefill(params, texts_BT, start, lengths_B, keys_B, cache, slots) -> Decoding`, with the first new token
        of each row. The first `start` tokens are in the cache already. The next `slots` (static) are read, which must
        reach the end of the longest prompt.
    extend: `extend(params, decoding, until) -> Decoding`, with `until` new tokens a row, or fewer if all rows have
        ended.
    """

    prefill: Callable[..., Decoding]
    extend: Callable[[Params, Decoding, Any], Decoding]


def make_decode(model: Model, sampling: Sampling) -> Decode:
    """Make the decoding functions of a model.

    Prompts are padded on the right. Cache slots beyond a prompt's length have arbitrary content that is never attended
    to: a query attends to the slots up to its own position, and each new token overwrites the slot of its position
    first. After a stop token the row is filled with that token. Row b draws from `keys_B[b]`, so an answer does not
    depend on its batch.
    """
    step = model.required_decoder.step
    stop, choose = jnp.asarray(sampling.stop, jnp.int32), make_choose(sampling)

    def ended(tokens_B: Array) -> Array:
        return jnp.any(tokens_B[:, None] == stop[None, :], axis=1)

    def prefill(
        params: Params, texts_BT: Array, start: Array, lengths_B: Array, keys_B: Array, cache: Any, slots: int
    ) -> Decoding:
        # Clamped as the slice clamps it; reading tokens again leaves their cache slots unchanged.
        start = jnp.minimum(start, texts_BT.shape[1] - slots)
        prompts_BP = jax.lax.dynamic_slice_in_dim(texts_BT, start, slots, axis=1)
        positions_BP = jnp.broadcast_to(start + jnp.arange(slots, dtype=jnp.int32)[None, :], prompts_BP.shape)
        output, cache = step(params, prompts_BP, positions_BP, cache)
        last_BV = _logits_at(output, lengths_B - start - 1)
        seen_BV = seen_tokens(texts_BT, lengths_B, last_BV.shape[1]) if sampling.repetition_penalty != 1 else None
        first_B = choose(last_BV, keys_B, jnp.int32(0), seen_BV)
        out_BM = jnp.broadcast_to(first_B[:, None], (len(first_B), sampling.max_new_tokens))
        return Decoding(jnp.int32(1), out_BM, first_B, lengths_B, keys_B, _mark_seen(seen_BV, first_B), cache)

    def extend(params: Params, decoding: Decoding, until: Array) -> Decoding:
        def unfinished(state: Decoding) -> Array:
            return (state.num_new < until) & ~jnp.all(ended(state.tokens_B))

        def advance(state: Decoding) -> Decoding:
            positions_B1 = (state.lengths_B + state.num_new - 1)[:, None]
            output, cache = step(params, state.tokens_B[:, None], positions_B1, state.cache)
            logits_BV = _logits_at(output, jnp.zeros_like(state.tokens_B))
            chosen_B = choose(logits_BV, state.keys_B, state.num_new, state.seen_BV)
            next_B = jnp.where(ended(state.tokens_B), state.tokens_B, chosen_B)
            out_BM, seen_BV = state.out_BM.at[:, state.num_new].set(next_B), _mark_seen(state.seen_BV, next_B)
            return state._replace(
                num_new=state.num_new + 1, out_BM=out_BM, tokens_B=next_B, seen_BV=seen_BV, cache=cache
            )

        state = jax.lax.while_loop(unfinished, advance, decoding)
        is_unused = jnp.arange(sampling.max_new_tokens)[None, :] >= state.num_new
        return state._replace(out_BM=jnp.where(is_unused, state.tokens_B[:, None], state.out_BM))

    return Decode(prefill, extend)


def _logits_at(output: Array | HiddenAndHead, index_B: Array) -> Float[Array, "B V"]:
    """Return the float32 logits of one position of each row."""
    states_BLD = output.hidden_BLD if isinstance(output, HiddenAndHead) else output
    single = states_BLD.shape[1] == 1
    state_B1D = states_BLD if single else jnp.take_along_axis(states_BLD, index_B[:, None, None], axis=1)
    if isinstance(output, HiddenAndHead):
        return output._replace(hidden_BLD=state_B1D).logits()[:, 0]
    return state_B1D[:, 0].astype(jnp.float32)


def seen_tokens(texts_BT: Array, lengths_B: Array, vocab: int) -> Bool[Array, "B V"]:
    """Mark the tokens that occur in each text. Padding counts as the text's first token, which occurs anyway."""
    rows, slots = texts_BT.shape
    is_text_BT = jnp.arange(slots)[None, :] < lengths_B[:, None]
    tokens_BT = jnp.where(is_text_BT, texts_BT, texts_BT[:, :1])
    return jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], tokens_BT].set(True)


def _mark_seen(seen_BV: Array | None, tokens_B: Array) -> Array | None:
    return None if seen_BV is None else seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True)


class Compiled(NamedTuple):
    """The functions of a `Decode`, and of the model before them, jitted: once for each shape of batch and prompt.

    Caches and `Decoding` arguments are donated.
    """

    prepare: Callable[[Params], Params]
    init_cache: Callable[[int, int], Any]
    prefill: Callable[..., Decoding]
    extend: Callable[[Params, Decoding, Any], Decoding]


def compile_decode(model: Model, sampling: Sampling) -> Compiled:
    decode, decoder = make_decode(model, sampling), model.required_decoder
    return Compiled(
        prepare=jax.jit(decoder.prepare),
        init_cache=jax.jit(decoder.init_cache, static_argnums=(0, 1)),
        prefill=jax.jit(decode.prefill, static_argnums=6, donate_argnums=5),
        extend=jax.jit(decode.extend, donate_argnums=1),
    )


Answers = Callable[[Params, Sequence[Sequence[int]], int], Iterator[list[list[int]]]]
"""`answers(params, prompts, first)`: yields the prompts' answers, a batch at a time, up to the stop token. `first` is
the number of the first prompt; the random key of a prompt depends on its number."""


def make_answers(
    model: Model,
    sampling: Sampling,
    *,
    context: int,
    batch_size: int,
    rows: NamedSharding,
    seed: int = 0,
    before_batch: Callable[[], None] = lambda: None,
    is_done: Callable[[list[int]], bool] | None = None,
) -> Answers:
    """Make a function that answers prompts. It compiles once for each bucket of prompt length.

    A prompt that leaves no room for `max_new_tokens` in the context loses its beginning.

    Args:
        rows: sharding of a batch.
        before_batch: called before each batch.
        is_done: whether the tokens of a row so far are a complete answer. A batch ends when all its rows are done.

    Raises:
        ValueError: `max_new_tokens` is as long as the context. The function raises it for an empty prompt.
    """
    # Prompts are sharded by batch only: an axis of the mesh need not divide the bucket.
    prompt_sharding = NamedSharding(rows.mesh, PartitionSpec(rows.spec[0]))
    max_new_tokens = sampling.max_new_tokens
    max_prompt = context - max_new_tokens
    if max_prompt < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be less than the context, {context}")

    compiled = compile_decode(model, sampling)
    key = jax.random.key(seed)
    keys_of = jax.jit(lambda first: jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(batch_size)))
    stride = max_new_tokens if is_done is None else TOKENS_PER_POLL

    def answer_batch(params: Params, prompts: list[list[int]], slots: int, first: int) -> list[list[int]]:
        prompts_BP = np.zeros((batch_size, slots), np.int32)
        lengths_B = np.ones(batch_size, np.int32)
        for b, prompt in enumerate(prompts):
            prompts_BP[b, : len(prompt)], lengths_B[b] = prompt, len(prompt)

        state = compiled.prefill(
            params,
            jax.device_put(prompts_BP, prompt_sharding),
            np.int32(0),
            jax.device_put(lengths_B, prompt_sharding),
            keys_of(first),
            compiled.init_cache(batch_size, slots + max_new_tokens),
            slots,
        )
        answers: list[list[int]] = []
        for until in (*range(1 + stride, max_new_tokens, stride), max_new_tokens):
            state = compiled.extend(params, state, np.int32(until))
            tokens_BM = state.out_BM
            if jax.process_count() > 1:
                tokens_BM = multihost_utils.process_allgather(tokens_BM, tiled=True)
            new_tokens = np.asarray(tokens_BM)[: len(prompts), :until].tolist()
            answers = [until_stop(row, sampling.stop) for row in new_tokens]
            if all(len(row) < until or (is_done is not None and is_done(row)) for row in answers):
                break
        return answers

    def answers(params: Params, prompts: Sequence[Sequence[int]], first: int) -> Iterator[list[list[int]]]:
        cut = [list(prompt)[-max_prompt:] for prompt in prompts]
        if not all(cut):
            raise ValueError("a prompt is empty; give it at least one token")
        slots = min(-(-max(map(len, cut), default=1) // BUCKET) * BUCKET, max_prompt)
        params = compiled.prepare(params)
        for start in range(0, len(cut), batch_size):
            before_batch()
            yield answer_batch(params, cut[start : start + batch_size], slots, first + start)

    return answers


def until_stop(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    """Return the tokens before the first stop token."""
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens
