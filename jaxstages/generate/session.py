"""One answer at a time, token by token as they are made, in a conversation whose cache is kept from turn to turn."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstages.generate.decode import BUCKET, Decoding, compile_decode, until_stop
from jaxstages.generate.sampling import Sampling
from jaxstages.types import Model, Params

PACES = (1, 1, 2, 4)
"""New tokens between two looks of the host: the first ones are shown at once, later ones `PACES[-1]` at a time."""


class Session:
    """Compiled once: decoding, and reading a prompt for each power of two of tokens that are new in it. What a prompt
    has in common with the text of the turn before is in the cache already."""

    def __init__(self, model: Model, params: Params, sampling: Sampling, *, context: int, seed: int = 0) -> None:
        self._compiled = compile_decode(model, sampling)
        self._params = self._compiled.prepare(params)
        self._sampling, self._context = sampling, context
        self._key = jax.random.key(seed)
        self._held: list[int] = []  # tokens whose keys and values are in the cache
        self._cache: Any = None

    def stream(self, prompt: Sequence[int], turn: int = 0) -> Iterator[list[int]]:
        """New tokens as they come, without the stop token, until it or `max_new_tokens` or the end of the context.

        Args:
            turn: answers to the same prompt differ by it, if they are drawn.

        Raises:
            ValueError: an empty prompt, or one that leaves no room in the context.
        """
        prompt = list(prompt)
        if not 0 < len(prompt) < self._context:
            raise ValueError(f"a prompt has {len(prompt)} tokens; it must have 1 to {self._context - 1}, the context")
        most, seen = min(self._sampling.max_new_tokens, self._context - len(prompt)), 0
        state = self._prefill(prompt, turn)
        for until in _looks(most):
            if until > 1:
                state = self._compiled.extend(self._params, state, np.int32(until))
            tokens = np.asarray(state.out_BM)[0, :until].tolist()
            answer = until_stop(tokens, self._sampling.stop)
            fresh, seen = answer[seen:], len(answer)
            ended = len(answer) < until or until == most
            # The last token has been made, but not been read yet.
            self._held, self._cache = prompt + answer[: until - 1], state.cache
            if fresh:
                yield fresh
            if ended:
                return
            self._held, self._cache = [], None  # given away: if the next call is stopped, it is lost

    def _prefill(self, prompt: list[int], turn: int) -> Decoding:
        common = next((i for i, (a, b) in enumerate(zip(prompt, self._held, strict=False)) if a != b), len(self._held))
        start = min(common, len(prompt) - 1)
        slots = BUCKET
        while slots < len(prompt) - start:
            slots *= 2
        texts_BT = np.zeros((1, self._context), np.int32)
        texts_BT[0, : len(prompt)] = prompt
        cache = self._cache if self._cache is not None else self._compiled.init_cache(1, self._context)
        self._held, self._cache = [], None
        keys_B = jax.random.fold_in(self._key, jnp.int32(turn))[None]
        where = np.int32(start), np.asarray([len(prompt)], np.int32), keys_B
        return self._compiled.prefill(self._params, texts_BT, *where, cache, min(slots, self._context))


def _looks(most: int) -> Iterator[int]:
    """1, 2, 4, 8, 12, ..., most."""
    paces = itertools.chain(PACES, itertools.repeat(PACES[-1]))
    yield from itertools.takewhile(lambda until: until < most, itertools.accumulate(paces))
    yield most
