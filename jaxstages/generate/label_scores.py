"""Classification by scoring each label as text: the label that the model finds likeliest is its answer."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstages.data.batches import to_batch
from jaxstages.data.packing import lay_out
from jaxstages.data.tasks import Example
from jaxstages.types import Batch, Model, Params


def make_likeliest(
    model: Model,
    labels: Sequence[Sequence[int]],
    *,
    context: int,
    batch_size: int,
    between: Callable[[], None] = lambda: None,
) -> Callable[[Params, Sequence[Sequence[int]]], list[int]]:
    """`likeliest(params, prompts)`: index of the likeliest label for each prompt; compiled once.

    Args:
        between: called before each batch.
        labels: token ids of each, with the end token. A prompt that is too long with its label loses its beginning.

    Raises:
        ValueError: a label that leaves no room for a prompt.
    """
    longest = max(map(len, labels))
    if longest > context:
        raise ValueError(f"a label has {longest} tokens; it must be shorter than the context, {context}")

    @jax.jit
    def score(params: Params, batch: Batch) -> Float[Array, " B"]:
        """Log-probability of each row's scored tokens."""
        log_probs_BLV = jax.nn.log_softmax(model.apply(params, batch, None).astype(jnp.float32), axis=-1)
        chosen_BL = jnp.take_along_axis(log_probs_BLV, batch.targets_BL[..., None], axis=-1)[..., 0]
        return jnp.sum(chosen_BL * batch.weights_BL, axis=1)

    def likeliest(params: Params, prompts: Sequence[Sequence[int]]) -> list[int]:
        rows = [lay_out([_candidate(list(p), list(label), context)], context) for p in prompts for label in labels]
        scores: list[float] = []
        for start in range(0, len(rows), batch_size):
            between()
            chosen = rows[start : start + batch_size]
            fill = [np.zeros_like(rows[0])] * (batch_size - len(chosen))
            scores += np.asarray(score(params, to_batch([*chosen, *fill])))[: len(chosen)].tolist()
        return np.asarray(scores).reshape(len(prompts), len(labels)).argmax(axis=1).tolist()

    return likeliest


def _candidate(prompt: list[int], label: list[int], context: int) -> Example:
    prompt = prompt[-(context + 1 - len(label)) :]
    weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(label))]).astype(np.float32)
    return Example(np.asarray(prompt + label, np.int32), weights)
