"""Classification by scoring labels as text: the answer is the label with the highest probability."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstages.data.batches import to_batch
from jaxstages.data.packing import lay_out
from jaxstages.data.tasks import Example
from jaxstages.runtime.multihost import gather_to_host
from jaxstages.types import Batch, Model, Params


def make_likeliest(
    model: Model,
    labels: Sequence[Sequence[int]],
    *,
    context: int,
    batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
) -> Callable[[Params, Sequence[Sequence[int]]], list[int]]:
    """Make `likeliest(params, prompts)`: index of the likeliest label for each prompt; compiled once.

    A prompt that is too long with its label loses its beginning.

    Args:
        labels: token ids of each label, with the end token.
        before_batch: called before each batch.

    Raises:
        ValueError: a label leaves no room for a prompt.
    """
    longest = max(map(len, labels))
    if longest > context:
        raise ValueError(f"a label has {longest} tokens; it must be shorter than the context, {context}")

    @jax.jit
    def score(params: Params, batch: Batch) -> Float[Array, " B"]:
        """Log-probability of the scored tokens of each row."""
        log_probs_BLV = jax.nn.log_softmax(model.apply(params, batch, None).astype(jnp.float32), axis=-1)
        target_log_probs_BL = jnp.take_along_axis(log_probs_BLV, batch.targets_BL[..., None], axis=-1)[..., 0]
        return jnp.sum(target_log_probs_BL * batch.weights_BL, axis=1)

    def likeliest(params: Params, prompts: Sequence[Sequence[int]]) -> list[int]:
        rows = [
            lay_out([_labeled_example(list(prompt), list(label), context)], context)
            for prompt in prompts
            for label in labels
        ]
        scores: list[float] = []
        for start in range(0, len(rows), batch_size):
            before_batch()
            batch = rows[start : start + batch_size]
            padding = [np.zeros_like(rows[0])] * (batch_size - len(batch))
            scores += gather_to_host(score(params, to_batch([*batch, *padding])))[: len(batch)].tolist()
        return np.asarray(scores).reshape(len(prompts), len(labels)).argmax(axis=1).tolist()

    return likeliest


def _labeled_example(prompt: list[int], label: list[int], context: int) -> Example:
    prompt = prompt[-(context + 1 - len(label)) :]
    weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(label))]).astype(np.float32)
    return Example(np.asarray(prompt + label, np.int32), weights)
