"""Continuous batching: answers join and leave the slots of one static batch between decode steps.

Every call compiles in `warm_up`, and none later. A prompt is read in chunks between the steps of the other answers.
Keys and values stay in a slot after its answer has ended, until another prompt needs the slot. The next turn of that
conversation, and any prompt with the same beginning, read only what is new.

An `Engine` belongs to one thread; `scheduler.py` runs it.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstages.generation.sampling import Sampling
from jaxstages.generation.serving.decode import NO_TOP_P, Extended, LogProbs, Rows, make_serving_decode
from jaxstages.generation.serving.drafts import look_up_draft
from jaxstages.types import Model, Params

CHUNKS = (32, 128, 512)
"""Tokens of a prompt that one call can read. The last chunk of a prompt is padded to one of these."""

MAX_STEPS = 16
"""Most decode steps of one call."""

CALL_SECONDS = 0.1
"""A call takes as many steps as fit into this time, at least one: other answers wait that long to join."""

CALLS_PER_TRIAL = 32
"""Drafts that do not pay are tried again after this many calls."""

MAX_STOPS = 16
"""Most stop tokens of an answer."""


class NewToken(NamedTuple):
    """A generated token.

    log_prob: its log-probability; 0 unless the answer wants them.
    alternatives: the likeliest tokens at its position, with their log-probabilities.
    """

    id: int
    log_prob: float = 0.0
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Answer:
    """An answer to generate.

    prompt: token ids, at least one, and fewer than the context.
    sampling: sampling parameters; `stop` has at most `MAX_STOPS` ids.
    on_tokens: called with new tokens, and with the reason if the answer has ended: "stop" after a stop token, which is
        not among the tokens, "length", or "error"; else "".
    seed, choice: the answer is the one of `jaxstages generate --seed=SEED` to prompt number CHOICE.
    num_alternatives: alternatives to each token to return with log-probabilities; None for no log-probabilities.
    cancelled: may be set by any thread; the answer then leaves its slot before the next call.
    cached_tokens: tokens of the prompt whose keys and values did not have to be computed.
    """

    prompt: list[int]
    sampling: Sampling
    on_tokens: Callable[[list[NewToken], str], None]
    seed: int = 0
    choice: int = 0
    num_alternatives: int | None = None
    cancelled: bool = False
    cached_tokens: int = 0


@dataclass(eq=False)
class Slot:
    """A row of the cache.

    text: tokens of the prompt and of the answer so far; they stay when the answer has ended.
    num_cached: how many of them have keys and values in the cache.
    answer: the answer under way; None in a free slot.
    last_used: when the slot was last used, in order to overwrite the one that was not used for longest.
    """

    index: int
    text: list[int] = field(default_factory=list)
    num_cached: int = 0
    answer: Answer | None = None
    last_used: float = 0.0

    @property
    def num_unread(self) -> int:
        """Tokens that are still to be read before the last one, which a decode step reads."""
        return max(len(self.text) - 1 - self.num_cached, 0)

    def common_prefix(self, prompt: list[int]) -> int:
        """Number of the prompt's tokens that are cached here; never all, since a step reads the last one."""
        limit = min(self.num_cached, len(prompt) - 1)
        pairs = zip(self.text[:limit], prompt[:limit], strict=True)
        return next((i for i, (cached, token) in enumerate(pairs) if cached != token), limit)


class Engine:
    """Generates answers with one model, `num_slots` at a time.

    Args:
        num_drafts: while a single answer is under way, draft this many tokens by looking up the answer's last tokens in
            its text, and verify them in one step (prompt lookup; a case of speculative decoding, Leviathan et al.
            2023). A draft is accepted where the model chooses the same token, so answers do not change. The engine
            drafts as long as that saves time. 0 is off.
    """

    def __init__(self, model: Model, params: Params, *, context: int, num_slots: int = 8, num_drafts: int = 0) -> None:
        decode, decoder = make_serving_decode(model, num_slots), model.required_decoder
        self._read = jax.jit(decode.read, donate_argnums=1)
        self._copy = jax.jit(decode.copy, donate_argnums=0)
        self._extend = jax.jit(decode.extend, static_argnums=6, donate_argnums=1)
        self._init_cache = jax.jit(decoder.init_cache, static_argnums=(0, 1))
        self._params = jax.jit(decoder.prepare)(params)

        self.context, self.num_slots, self._num_drafts = context, num_slots, min(num_drafts, context - 1)
        self._chunks = [size for size in CHUNKS if size <= context] or [context]
        self._row_counts = sorted({min(4**power, num_slots) for power in range(num_slots.bit_length())})
        self._step_seconds = CALL_SECONDS
        self._token_seconds = [0.0, 0.0]  # of a single answer: without drafts, with drafts
        self._num_alone = 0
        self.reset()

    def reset(self) -> None:
        """Forget all answers and texts."""
        self._cache: Any = None  # there may be no room for two
        self._cache = self._init_cache(self.num_slots, self.context)
        self.slots = [Slot(index) for index in range(self.num_slots)]

    @property
    def answers(self) -> list[Answer]:
        """Answers under way."""
        return [slot.answer for slot in self.slots if slot.answer is not None]

    @property
    def has_room(self) -> bool:
        return len(self.answers) < self.num_slots

    def warm_up(self) -> None:
        """Compile every call."""
        for size in self._chunks:
            self._cache = self._read(self._params, self._cache, np.int32(0), np.zeros((1, size), np.int32), np.int32(0))
        self._cache = self._copy(self._cache, np.int32(0), np.int32(0))
        for count in self._row_counts:
            for drafts in {0, self._num_drafts if count == 1 else 0}:
                self._call_extend(self.slots[:count], np.zeros((count, drafts), np.int32))

    # Joining ------------------------------------------------------------------------------------------------------

    def add(self, answer: Answer) -> None:
        """Give the answer a slot, and all of its prompt that some slot has cached. There must be room."""
        source = max(self.slots, key=lambda slot: slot.common_prefix(answer.prompt))
        common = source.common_prefix(answer.prompt)

        # A conversation goes on in its own slot. Any other prompt takes another slot, and the conversation stays.
        is_continued = source.answer is None and 0 < common == min(source.num_cached, len(answer.prompt) - 1)
        free = [slot for slot in self.slots if slot.answer is None]
        target = source if is_continued else min(free, key=lambda slot: (slot.last_used, slot.index))
        if common and target is not source:
            self._cache = self._copy(self._cache, np.int32(source.index), np.int32(target.index))

        target.text, target.num_cached, target.answer = list(answer.prompt), common, answer
        target.last_used, answer.cached_tokens = time.monotonic(), common

    # Steps --------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Read a chunk of one prompt, if one is unread, and extend the other answers by some tokens."""
        for slot in self.slots:
            if slot.answer is not None and slot.answer.cancelled:
                slot.answer = None

        busy = [slot for slot in self.slots if slot.answer is not None]
        unread = [slot for slot in busy if slot.num_unread]
        if unread:
            self._read_chunk(min(unread, key=lambda slot: slot.last_used))
        ready = [slot for slot in busy if not slot.num_unread]
        if ready:
            self._extend_answers(ready)

    def _read_chunk(self, slot: Slot) -> None:
        size = max((size for size in self._chunks if size < 2 * slot.num_unread), default=self._chunks[0])
        # Near the end of the context, a chunk begins earlier; reading tokens again leaves their keys and values.
        start = min(slot.num_cached, self.context - size)
        tokens = slot.text[start : start + size]
        chunk = np.zeros((1, size), np.int32)
        chunk[0, : len(tokens)] = tokens
        self._cache = self._read(self._params, self._cache, np.int32(slot.index), chunk, np.int32(start))
        slot.num_cached = min(start + size, len(slot.text) - 1)

    def _extend_answers(self, ready: list[Slot]) -> None:
        started = time.monotonic()
        is_alone = len(ready) == 1
        has_room = len(ready[0].text) + self._num_drafts <= self.context  # a model knows no position beyond it
        wants_draft = is_alone and has_room and self._wants_draft()
        draft = look_up_draft(ready[0].text, self._num_drafts) if wants_draft else None
        if draft is not None:
            rows, drafts_RD = ready, np.asarray([draft], np.int32)
        else:
            count = min(count for count in self._row_counts if count >= len(ready))
            # Other slots fill up the rows; their texts do not change.
            others = [slot for slot in self.slots if slot not in ready]
            rows = sorted([*ready, *others[: count - len(ready)]], key=lambda slot: slot.index)
            drafts_RD = np.zeros((count, 0), np.int32)

        old_lengths = [slot.num_cached + 1 for slot in rows]
        extended = self._call_extend(rows, drafts_RD)
        seconds = (time.monotonic() - started) / int(np.max(np.asarray(extended.length_R) - old_lengths))
        if draft is None:
            self._step_seconds = (self._step_seconds + seconds) / 2
        if is_alone:
            self._token_seconds[draft is not None] = (self._token_seconds[draft is not None] + seconds) / 2
        self._deliver(rows, extended)

    def _wants_draft(self) -> bool:
        """Whether to draft: while that takes less time per token, and now and then to see whether it does."""
        self._num_alone += 1
        plain, drafted = self._token_seconds
        return self._num_drafts > 0 and (drafted <= plain or self._num_alone % CALLS_PER_TRIAL == 0)

    def _call_extend(self, rows: list[Slot], drafts_RD: np.ndarray) -> Extended:
        steps = int(np.clip(CALL_SECONDS / self._step_seconds, 1, MAX_STEPS))
        slots_R = np.asarray([slot.index for slot in rows], np.int32)
        arguments = (slots_R, _to_rows(rows, self.context), drafts_RD, np.int32(steps))
        self._cache, extended = self._extend(self._params, self._cache, *arguments, MAX_STEPS)
        return jax.tree.map(np.asarray, extended)

    def _deliver(self, rows: list[Slot], extended: Extended) -> None:
        """Hand new tokens to the answers, and free the slots of those that have ended."""
        for row, slot in enumerate(rows):
            answer, length = slot.answer, int(extended.length_R[row])
            if answer is None or slot.num_unread:
                continue
            new_ids = extended.text_RT[row, len(slot.text) : length].tolist()
            slot.text += new_ids
            slot.num_cached, slot.last_used = length - 1, time.monotonic()

            reason = ""
            if new_ids[-1] in answer.sampling.stop:
                reason = "stop"
                new_ids.pop()
            elif length >= _limit(answer, self.context):
                reason = "length"
            if reason:
                slot.answer = None
            answer.on_tokens(
                _new_tokens(new_ids, answer, jax.tree.map(lambda x, r=row: x[r], extended.log_probs)), reason
            )


def _limit(answer: Answer, context: int) -> int:
    return min(len(answer.prompt) + answer.sampling.max_new_tokens, context)


def _new_tokens(ids: list[int], answer: Answer, log_probs: LogProbs) -> list[NewToken]:
    if answer.num_alternatives is None:
        return [NewToken(token) for token in ids]
    chosen_M, top_ids_MK, top_MK = log_probs
    count = answer.num_alternatives

    def alternatives(number: int) -> tuple[tuple[int, float], ...]:
        pairs = zip(top_ids_MK[number, :count].tolist(), top_MK[number, :count].tolist(), strict=True)
        return tuple(pair for pair in pairs if pair[1] > -math.inf)  # a small vocabulary has fewer

    return [NewToken(token, float(chosen_M[number]), alternatives(number)) for number, token in enumerate(ids)]


def _to_rows(slots: list[Slot], context: int) -> Rows:
    """Make the rows of a call. Slots without an answer, and those whose prompt is still to be read, do not advance."""
    greedy = Answer([0], Sampling(1), lambda tokens, reason: None)
    advancing = [slot.answer if slot.answer is not None and not slot.num_unread else None for slot in slots]
    answers = [answer or greedy for answer in advancing]
    sampling = [answer.sampling for answer in answers]

    text_RT = np.zeros((len(slots), context), np.int32)
    stop_RE = np.full((len(slots), MAX_STOPS), -1, np.int32)
    for row, (slot, answer) in enumerate(zip(slots, answers, strict=True)):
        text_RT[row, : len(slot.text)] = slot.text
        stop_RE[row, : len(answer.sampling.stop)] = answer.sampling.stop

    return Rows(
        text_RT=text_RT,
        # Rows that do not advance write keys and values too: those of the token after the cached ones, which are right.
        length_R=np.asarray([slot.num_cached + 1 for slot in slots], np.int32),
        prompt_R=np.asarray([len(answer.prompt) for answer in answers], np.int32),
        limit_R=np.asarray([0 if answer is None else _limit(answer, context) for answer in advancing], np.int32),
        stop_RE=stop_RE,
        temperature_R=np.asarray([each.temperature for each in sampling], np.float32),
        top_k_R=np.asarray([each.top_k or np.iinfo(np.int32).max for each in sampling], np.int32),
        top_p_R=np.asarray([each.top_p if each.top_p < 1 else NO_TOP_P for each in sampling], np.float32),
        log_min_p_R=np.asarray([math.log(each.min_p) if each.min_p else -np.inf for each in sampling], np.float32),
        penalty_R=np.asarray([each.repetition_penalty for each in sampling], np.float32),
        seed_R=np.asarray([answer.seed for answer in answers], np.uint32),
        choice_R=np.asarray([answer.choice for answer in answers], np.int32),
        wants_log_probs_R=np.asarray([answer.num_alternatives is not None for answer in answers]),
    )
