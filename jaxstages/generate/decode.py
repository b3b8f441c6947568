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

from jaxstages.generate.sampling import Sampling, make_choose
from jaxstages.types import HiddenAndHead, Model, Params

BUCKET = 32
"""Prompts are padded, on the right, to a multiple of this."""

PACE = 16
"""New tokens between two looks of the host at a batch, where stop strings may end it."""


class Decoding(NamedTuple):
    """Where a batch is. made: tokens of each answer so far. out_BM: those; beyond them, the last one again and again.
    tokens_B: the last of each row. lengths_B: of the prompts. seen_BV: tokens that a row has, None without a penalty.
    """

    made: Int[Array, ""]
    out_BM: Int[Array, "B M"]
    tokens_B: Int[Array, " B"]
    lengths_B: Int[Array, " B"]
    keys_B: Array
    seen_BV: Bool[Array, "B V"] | None
    cache: Any


class Decode(NamedTuple):
    """Both on params from `Decoder.prepare`.

    prefill: `prefill(params, texts_BT, start, lengths_B, keys_B, cache, slots) -> Decoding`, with the first new token
        of each row. The first `start` tokens are in the cache already; of the rest, `slots` (static) are read, which
        must reach to the end of the longest.
    extend: `extend(params, decoding, until) -> Decoding`, with `until` tokens a row, fewer where all rows have ended.
    """

    prefill: Callable[..., Decoding]
    extend: Callable[[Params, Decoding, Any], Decoding]


def make_decode(model: Model, sampling: Sampling) -> Decode:
    """Prompts are padded on the right. Their cache slots beyond a prompt's length hold rubbish that is never seen: a
    query sees the slots up to its own position, and each new token overwrites the slot of its position first. After a
    stop token the row is filled with that token. Row b draws from `keys_B[b]`: an answer does not depend on its batch.
    """
    step = model.required_decoder.step
    stop, choose = jnp.asarray(sampling.stop, jnp.int32), make_choose(sampling)

    def ended(tokens_B: Array) -> Array:
        return jnp.any(tokens_B[:, None] == stop[None, :], axis=1)

    def prefill(
        params: Params, texts_BT: Array, start: Array, lengths_B: Array, keys_B: Array, cache: Any, slots: int
    ) -> Decoding:
        start = jnp.minimum(start, texts_BT.shape[1] - slots)  # as the slice does; what is read twice is as it was
        prompts_BP = jax.lax.dynamic_slice_in_dim(texts_BT, start, slots, axis=1)
        positions_BP = jnp.broadcast_to(start + jnp.arange(slots, dtype=jnp.int32)[None, :], prompts_BP.shape)
        output, cache = step(params, prompts_BP, positions_BP, cache)
        last_BV = _logits_at(output, lengths_B - start - 1)
        seen_BV = _seen(texts_BT, lengths_B, last_BV.shape[1]) if sampling.repetition_penalty != 1 else None
        first_B = choose(last_BV, keys_B, jnp.int32(0), seen_BV)
        out_BM = jnp.broadcast_to(first_B[:, None], (len(first_B), sampling.max_new_tokens))
        return Decoding(jnp.int32(1), out_BM, first_B, lengths_B, keys_B, _see(seen_BV, first_B), cache)

    def extend(params: Params, decoding: Decoding, until: Array) -> Decoding:
        def unfinished(now: Decoding) -> Array:
            return (now.made < until) & ~jnp.all(ended(now.tokens_B))

        def advance(now: Decoding) -> Decoding:
            positions_B1 = (now.lengths_B + now.made - 1)[:, None]
            output, cache = step(params, now.tokens_B[:, None], positions_B1, now.cache)
            chosen_B = choose(_logits_at(output, jnp.zeros_like(now.tokens_B)), now.keys_B, now.made, now.seen_BV)
            next_B = jnp.where(ended(now.tokens_B), now.tokens_B, chosen_B)
            out_BM, seen_BV = now.out_BM.at[:, now.made].set(next_B), _see(now.seen_BV, next_B)
            return now._replace(made=now.made + 1, out_BM=out_BM, tokens_B=next_B, seen_BV=seen_BV, cache=cache)

        now = jax.lax.while_loop(unfinished, advance, decoding)
        rest = jnp.arange(sampling.max_new_tokens)[None, :] >= now.made
        return now._replace(out_BM=jnp.where(rest, now.tokens_B[:, None], now.out_BM))

    return Decode(prefill, extend)


def _logits_at(output: Array | HiddenAndHead, index_B: Array) -> Float[Array, "B V"]:
    """Return the float32 logits of one position of each row."""
    states_BLD = output.hidden_BLD if isinstance(output, HiddenAndHead) else output
    single = states_BLD.shape[1] == 1
    state_B1D = states_BLD if single else jnp.take_along_axis(states_BLD, index_B[:, None, None], axis=1)
    if isinstance(output, HiddenAndHead):
        return output._replace(hidden_BLD=state_B1D).logits()[:, 0]
    return state_B1D[:, 0].astype(jnp.float32)


def _seen(texts_BT: Array, lengths_B: Array, vocab: int) -> Bool[Array, "B V"]:
    """Which tokens a text has; padding counts as its first token, which it has anyway."""
    rows, slots = texts_BT.shape
    real_BT = jnp.arange(slots)[None, :] < lengths_B[:, None]
    tokens_BT = jnp.where(real_BT, texts_BT, texts_BT[:, :1])
    return jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], tokens_BT].set(True)


def _see(seen_BV: Array | None, tokens_B: Array) -> Array | None:
    return None if seen_BV is None else seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True)


class Compiled(NamedTuple):
    """The functions of a `Decode` and those of the model that go before, jitted: once for each shape of batch and
    prompt. Caches and `Decoding`s that go in can't be used again."""

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
"""`answers(params, prompts, first)`: the prompts' answers, a batch at a time, without the stop token and what follows
it. `first`: the number of the first of these prompts, which is its seed's."""


def make_answers(
    model: Model,
    sampling: Sampling,
    *,
    context: int,
    batch_size: int,
    rows: NamedSharding,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
    done: Callable[[list[int]], bool] | None = None,
) -> Answers:
    """It compiles once for each bucket of prompt length, however often it is called. The last batch is filled up, and
    its filling left out.

    Args:
        rows: how a batch is split.
        between: called before each batch.
        done: asked now and then of a row's tokens so far: is that enough? A batch ends when all its rows have.

    A prompt that leaves no room for `max_new_tokens` in the context loses its beginning.

    Raises:
        ValueError: `max_new_tokens` is as long as the context; later, an empty prompt.
    """
    # A prompt is as long as its bucket, which no axis of the mesh need divide.
    whole_rows = NamedSharding(rows.mesh, PartitionSpec(rows.spec[0]))
    room, most = context - sampling.max_new_tokens, sampling.max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens={most} must be less than the context, {context}")
    compiled = compile_decode(model, sampling)
    key = jax.random.key(seed)
    keys_of = jax.jit(lambda first: jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(batch_size)))
    pace = most if done is None else PACE

    def batch(params: Params, chosen: list[list[int]], slots: int, first: int) -> list[list[int]]:
        prompts_BP = np.zeros((batch_size, slots), np.int32)
        lengths_B = np.ones(batch_size, np.int32)
        for b, prompt in enumerate(chosen):
            prompts_BP[b, : len(prompt)], lengths_B[b] = prompt, len(prompt)
        rows = (
            jax.device_put(prompts_BP, whole_rows),
            np.int32(0),
            jax.device_put(lengths_B, whole_rows),
            keys_of(first),
        )
        state = compiled.prefill(params, *rows, compiled.init_cache(batch_size, slots + most), slots)
        answers: list[list[int]] = []
        for until in (*range(1 + pace, most, pace), most):
            state = compiled.extend(params, state, np.int32(until))
            tokens_BM = state.out_BM
            if jax.process_count() > 1:
                tokens_BM = multihost_utils.process_allgather(tokens_BM, tiled=True)
            made = np.asarray(tokens_BM)[: len(chosen), :until].tolist()
            answers = [until_stop(row, sampling.stop) for row in made]
            if all(len(row) < until or (done is not None and done(row)) for row in answers):
                break
        return answers

    def answers(params: Params, prompts: Sequence[Sequence[int]], first: int) -> Iterator[list[list[int]]]:
        cut = [list(prompt)[-room:] for prompt in prompts]
        if not all(cut):
            raise ValueError("a prompt is empty; give it at least one token")
        slots = min(-(-max(map(len, cut), default=1) // BUCKET) * BUCKET, room)
        params = compiled.prepare(params)
        for start in range(0, len(cut), batch_size):
            between()
            yield batch(params, cut[start : start + batch_size], slots, first + start)

    return answers


def until_stop(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    """What comes before the first stop token."""
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens
