"""Decoding for a server: rows at different positions, each with its own sampling parameters, share one compiled step.

The host holds the text of each slot, the device its keys and values. The last token of a text is not in the cache yet:
a step reads it, writes its keys and values, and chooses the next token. So a row has no state on the device besides the
cache, and a prompt is only read, without logits.

Legend: B slots of the cache, R rows of one call, T context, M most new tokens of one call, D drafted tokens, L = 1 + D,
V vocab, E stop tokens, K alternatives to a token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxstages.generation.decode import seen_tokens
from jaxstages.generation.sampling import keep_from, keep_top_k, keep_top_p, penalize
from jaxstages.types import HiddenAndHead, Model, Params

MAX_ALTERNATIVES = 20
"""Most alternatives to a token that a request can ask for (OpenAI's `top_logprobs`)."""

NO_TOP_P = 2.0
"""Switches top-p off; 1 would not, because the sum of all probabilities may be rounded to 1 before the last token."""


class Rows(NamedTuple):
    """Texts under way and their sampling parameters, made by the host for each call.

    text_RT: prompt and answer so far; the remaining slots are arbitrary.
    length_R: number of their tokens.
    prompt_R: number of the prompt's tokens.
    limit_R: length at which an answer ends.
    stop_RE: ids that end an answer; -1 is none.
    temperature_R: 0 takes the likeliest token.
    top_k_R: any number from the vocabulary's size on is off.
    top_p_R: `NO_TOP_P` is off.
    log_min_p_R: logarithm of min-p; -inf is off.
    penalty_R: repetition penalty; 1 is off.
    seed_R, choice_R: the i-th new token of a row is drawn with the key `fold_in(fold_in(key(seed), choice), i)`, as
        `make_answers` does.
    wants_log_probs_R: whether log-probabilities are computed; if no row wants them, they are 0.
    """

    text_RT: Int[np.ndarray, "R T"]
    length_R: Int[np.ndarray, " R"]
    prompt_R: Int[np.ndarray, " R"]
    limit_R: Int[np.ndarray, " R"]
    stop_RE: Int[np.ndarray, "R E"]
    temperature_R: Float[np.ndarray, " R"]
    top_k_R: Int[np.ndarray, " R"]
    top_p_R: Float[np.ndarray, " R"]
    log_min_p_R: Float[np.ndarray, " R"]
    penalty_R: Float[np.ndarray, " R"]
    seed_R: UInt32[np.ndarray, " R"]
    choice_R: Int[np.ndarray, " R"]
    wants_log_probs_R: Bool[np.ndarray, " R"]


class LogProbs(NamedTuple):
    """Log-probabilities of the new tokens, of the model itself: before penalty, temperature and filters.

    The m-th entry of a row belongs to its m-th new token of this call.
    """

    chosen_RM: Float[Array, "R M"]
    top_ids_RMK: Int[Array, "R M K"]
    top_RMK: Float[Array, "R M K"]


class Extended(NamedTuple):
    """Rows with their new tokens: `text_RT[r, old_length:length_R[r]]`."""

    text_RT: Int[Array, "R T"]
    length_R: Int[Array, " R"]
    log_probs: LogProbs


class ServingDecode(NamedTuple):
    """Decoding as pure functions, of parameters from `Decoder.prepare`.

    read: `read(params, cache, slot, tokens_1L, start) -> cache` writes the keys and values of a part of a text, which
        begins at position `start`, to a slot.
    extend: `extend(params, cache, slots_R, rows, drafts_RD, steps, most_steps) -> (cache, Extended)` takes at most
        `steps` steps, which is at most `most_steps` (static). The first one also verifies drafts of the next tokens,
        and accepts those that would have been chosen.
    copy: `copy(cache, source, target) -> cache` copies a slot.
    """

    read: Callable[..., Any]
    extend: Callable[..., tuple[Any, Extended]]
    copy: Callable[..., Any]


class _Loop(NamedTuple):
    step: Int[Array, ""]
    rows: Extended
    cache: Any


def make_serving_decode(model: Model, num_slots: int) -> ServingDecode:
    """Make the decoding functions for a cache with `num_slots` rows and, beyond the context, room for the drafts."""
    decode_step = model.required_decoder.step

    def read(params: Params, cache: Any, slot: Array, tokens_1L: Array, start: Array) -> Any:
        positions_1L = start + jnp.arange(tokens_1L.shape[1], dtype=jnp.int32)[None]
        _, row = decode_step(params, tokens_1L, positions_1L, _take(cache, slot))
        return _put(cache, row, slot)

    def copy(cache: Any, source: Array, target: Array) -> Any:
        return _put(cache, _take(cache, source), target)

    def extend(
        params: Params, cache: Any, slots_R: Array, rows: Rows, drafts_RD: Array, steps: Array, most_steps: int
    ) -> tuple[Any, Extended]:
        num_rows, num_drafts = drafts_RD.shape
        choose = make_choose_for_rows(rows)

        def is_ended(texts: Extended) -> Bool[Array, " R"]:
            last_R = _last(texts)
            is_stop_R = jnp.any(last_R[:, None] == rows.stop_RE, axis=1) & (texts.length_R > rows.prompt_R)
            return is_stop_R | (texts.length_R >= rows.limit_R)

        def advance(loop: _Loop, drafts_RD: Array) -> _Loop:
            texts = loop.rows
            tokens_RL = jnp.concatenate([_last(texts)[:, None], drafts_RD], axis=1)
            positions_RL = texts.length_R[:, None] - 1 + jnp.arange(tokens_RL.shape[1], dtype=jnp.int32)[None]
            output, cache = decode_step(params, tokens_RL, positions_RL, loop.cache)
            logits_RLV = output.logits() if isinstance(output, HiddenAndHead) else output.astype(jnp.float32)

            # A token is appended as long as those before it were drafted rightly; after the last draft follows none.
            drafts_RL = jnp.pad(drafts_RD, ((0, 0), (0, 1)), constant_values=-1)

            def choose_next(position: Array, state: tuple[Extended, Array]) -> tuple[Extended, Array]:
                texts, goes_on_R = state
                logits_RV = jax.lax.dynamic_index_in_dim(logits_RLV, position, axis=1, keepdims=False)
                chosen_R = choose(logits_RV, texts)
                texts = append(texts, chosen_R, logits_RV, goes_on_R)
                draft_R = jax.lax.dynamic_index_in_dim(drafts_RL, position, axis=1, keepdims=False)
                return texts, goes_on_R & (chosen_R == draft_R) & ~is_ended(texts)

            texts, _ = jax.lax.fori_loop(0, drafts_RL.shape[1], choose_next, (texts, ~is_ended(texts)))
            return _Loop(loop.step + 1, texts, cache)

        def append(texts: Extended, chosen_R: Array, logits_RV: Array, goes_on_R: Array) -> Extended:
            row = jnp.arange(num_rows)
            # Rows that do not go on write out of bounds, which JAX drops.
            at_R = jnp.where(goes_on_R, texts.length_R, texts.text_RT.shape[1])
            number_R = jnp.where(goes_on_R, texts.length_R - rows.length_R, texts.log_probs.chosen_RM.shape[1])
            log_probs = jax.lax.cond(
                jnp.any(rows.wants_log_probs_R),
                lambda: jax.tree.map(
                    lambda buffer, new: buffer.at[row, number_R].set(new, mode="drop"),
                    texts.log_probs,
                    log_probs_of(logits_RV, chosen_R),
                ),
                lambda: texts.log_probs,
            )
            text_RT = texts.text_RT.at[row, at_R].set(chosen_R, mode="drop")
            return Extended(text_RT, texts.length_R + goes_on_R.astype(jnp.int32), log_probs)

        max_new = most_steps + num_drafts
        log_probs = LogProbs(
            jnp.zeros((num_rows, max_new), jnp.float32),
            jnp.zeros((num_rows, max_new, MAX_ALTERNATIVES), jnp.int32),
            jnp.zeros((num_rows, max_new, MAX_ALTERNATIVES), jnp.float32),
        )
        texts = Extended(jnp.asarray(rows.text_RT), jnp.asarray(rows.length_R), log_probs)
        is_whole_cache = num_rows == num_slots
        part = cache if is_whole_cache else jax.tree.map(lambda leaf: leaf[slots_R], cache)

        loop = _Loop(jnp.int32(0), texts, part)
        if num_drafts:
            loop = advance(loop, drafts_RD)
        loop = jax.lax.while_loop(
            lambda loop: (loop.step < steps) & ~jnp.all(is_ended(loop.rows)),
            lambda loop: advance(loop, jnp.zeros((num_rows, 0), jnp.int32)),
            loop,
        )
        if is_whole_cache:
            return loop.cache, loop.rows
        return jax.tree.map(lambda leaf, new: leaf.at[slots_R].set(new), cache, loop.cache), loop.rows

    return ServingDecode(read, extend, copy)


def _take(cache: Any, slot: Array) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, slot, 1), cache)


def _put(cache: Any, row: Any, slot: Array) -> Any:
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, slot, 0), cache, row)


def _last(texts: Extended) -> Int[Array, " R"]:
    return jnp.take_along_axis(texts.text_RT, texts.length_R[:, None] - 1, axis=1)[:, 0]


def log_probs_of(logits_RV: Float[Array, "R V"], chosen_R: Int[Array, " R"]) -> tuple[Array, Array, Array]:
    """Return the log-probability of the chosen tokens, and the likeliest tokens with theirs: [R], [R, K], [R, K]."""
    log_probs_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    alternatives = min(MAX_ALTERNATIVES, logits_RV.shape[1])
    top_RK, top_ids_RK = jax.lax.top_k(log_probs_RV, alternatives)
    padding = ((0, 0), (0, MAX_ALTERNATIVES - alternatives))
    chosen = jnp.take_along_axis(log_probs_RV, chosen_R[:, None], axis=1)[:, 0]
    return LogProbs(chosen, jnp.pad(top_ids_RK, padding), jnp.pad(top_RK, padding, constant_values=-jnp.inf))


def make_choose_for_rows(rows: Rows) -> Callable[[Array, Extended], Int[Array, " R"]]:
    """Make `choose(logits_RV, texts) -> tokens_R`: for each row what `make_choose` of its sampling parameters returns.

    A filter that no row uses costs nothing.
    """

    def choose(logits_RV: Array, texts: Extended) -> Array:
        logits_RV = _if_any(
            rows.penalty_R != 1,
            lambda x: penalize(
                x, seen_tokens(texts.text_RT, texts.length_R, x.shape[1]), jnp.asarray(rows.penalty_R)[:, None]
            ),
            logits_RV,
        )
        likeliest_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
        is_greedy_R = rows.temperature_R == 0
        return jax.lax.cond(
            jnp.all(is_greedy_R),
            lambda: likeliest_R,
            lambda: jnp.where(is_greedy_R, likeliest_R, draw(logits_RV, texts.length_R - rows.prompt_R)),
        )

    def draw(logits_RV: Array, number_R: Array) -> Array:
        temperature_R = jnp.where(rows.temperature_R == 0, 1.0, rows.temperature_R)
        x = logits_RV / temperature_R[:, None]
        vocab = logits_RV.shape[1]
        x = _if_any(rows.top_k_R < vocab, lambda x: keep_top_k(x, jnp.asarray(rows.top_k_R)[:, None]), x)
        x = _if_any(rows.top_p_R < NO_TOP_P, lambda x: keep_top_p(x, jnp.asarray(rows.top_p_R)[:, None]), x)
        x = keep_from(x, jnp.max(x, axis=-1, keepdims=True) + rows.log_min_p_R[:, None])

        def draw_row(seed: Any, choice: Any, number: Array, logits: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), number)
            return jax.random.categorical(key, logits)

        return jax.vmap(draw_row)(rows.seed_R, rows.choice_R, number_R, x).astype(jnp.int32)

    return choose


def _if_any(flags_R: Any, function: Callable[[Array], Array], x: Array) -> Array:
    return jax.lax.cond(jnp.any(flags_R), function, lambda x: x, x)
