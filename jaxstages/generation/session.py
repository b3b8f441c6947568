"""Stream answers token by token, one at a time, and reuse the key/value cache from turn to turn of a conversation."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstages.generation.decode import BUCKET, Decoding, compile_decode, until_stop
from jaxstages.generation.sampling import Sampling
from jaxstages.types import Model, Params

TOKENS_PER_POLL = (1, 1, 2, 4)
"""New tokens between two reads by the host: the first ones are shown at once, later ones four at a time."""


class Session:
    """A conversation with a model.

    Decoding compiles once, prefill once for each power of two of new prompt tokens. The common prefix of a prompt and
    the previous turn's text is in the cache already.
    """

    def __init__(self, model: Model, params: Params, sampling: Sampling, *, context: int, seed: int = 0) -> None:
        self._compiled = compile_decode(model, sampling)
        self._params = self._compiled.prepare(params)
        self._sampling, self._context = sampling, context
        self._key = jax.random.key(seed)
        self._cached_tokens: list[int] = []  # tokens whose keys and values are in the cache
        self._cache: Any = None

    def stream(self, prompt: Sequence[int], turn: int = 0) -> Iterator[list[int]]:
        """Yield new tokens as they are decoded, up to the stop token, `max_new_tokens`, or the end of the context.

        Args:
            turn: changes the random key, so that sampled answers to the same prompt differ.

        Raises:
            ValueError: the prompt is empty, or leaves no room in the context.
        """
        prompt = list(prompt)
        if not 0 < len(prompt) < self._context:
            raise ValueError(f"a prompt has {len(prompt)} tokens; it must have 1 to {self._context - 1}, the context")
        max_new, yielded = min(self._sampling.max_new_tokens, self._context - len(prompt)), 0
        state = self._prefill(prompt, turn)
        for until in _poll_lengths(max_new):
            if until > 1:
                state = self._compiled.extend(self._params, state, np.int32(until))
            tokens = np.asarray(state.out_BM)[0, :until].tolist()
            answer = until_stop(tokens, self._sampling.stop)
            new_tokens, yielded = answer[yielded:], len(answer)
            is_complete = len(answer) < until or until == max_new
            # The last token is chosen, but its keys and values are not in the cache yet.
            self._cached_tokens, self._cache = prompt + answer[: until - 1], state.cache
            if new_tokens:
                yield new_tokens
            if is_complete:
                return
            self._cached_tokens, self._cache = [], None  # the next call donates the cache, and may be interrupted

    def _prefill(self, prompt: list[int], turn: int) -> Decoding:
        pairs = enumerate(zip(prompt, self._cached_tokens, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), len(self._cached_tokens))
        start = min(common, len(prompt) - 1)  # at least the last token is read, for its logits
        slots = BUCKET
        while slots < len(prompt) - start:
            slots *= 2
        texts_BT = np.zeros((1, self._context), np.int32)
        texts_BT[0, : len(prompt)] = prompt
        cache = self._cache if self._cache is not None else self._compiled.init_cache(1, self._context)
        self._cached_tokens, self._cache = [], None
        keys_B = jax.random.fold_in(self._key, jnp.int32(turn))[None]
        lengths_B = np.asarray([len(prompt)], np.int32)
        slots = min(slots, self._context)
        return self._compiled.prefill(self._params, texts_BT, np.int32(start), lengths_B, keys_B, cache, slots)


def _poll_lengths(limit: int) -> Iterator[int]:
    """1, 2, 4, 8, 12, ..., limit."""
    strides = itertools.chain(TOKENS_PER_POLL, itertools.repeat(TOKENS_PER_POLL[-1]))
    yield from itertools.takewhile(lambda until: until < limit, itertools.accumulate(strides))
    yield limit
