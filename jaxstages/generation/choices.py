"""Multiple-choice scores: the likelihood of each choice, given the question."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxstages.data.batches import to_batch
from jaxstages.data.choices import ChoiceSet, split_by_question
from jaxstages.generation.eval_step import make_eval_step
from jaxstages.generation.evaluate import TextModel
from jaxstages.models.sharding import local_row_range, place_batch
from jaxstages.runtime.multihost import gather_to_host
from jaxstages.types import Metrics, Params

PREFIX = "choice/"


class RowScores(NamedTuple):
    """Scores of the scored tokens of rows.

    log_likelihoods: their sum in each row, in nats, float64 [N].
    greedy: whether each of them is the likeliest token, bool [N].
    """

    log_likelihoods: np.ndarray
    greedy: np.ndarray


def make_row_scores(
    text_model: TextModel, batch_size: int, loss_tile: int = 0, before_batch: Callable[[], None] = lambda: None
) -> Callable[[Params, np.ndarray], RowScores]:
    """Make `row_scores(params, rows)`, for rows [N, 5, L] of `packing.lay_out`.

    Args:
        batch_size: rows at a time.
        before_batch: called before each batch; an exception in it ends the evaluation.
    """
    step = jax.jit(make_eval_step(text_model.model.outputs, loss_tile=loss_tile))
    sharding = text_model.row_sharding
    local = local_row_range(batch_size, sharding)

    def row_scores(params: Params, rows: np.ndarray) -> RowScores:
        sums = []
        for start in range(0, len(rows), batch_size):
            before_batch()
            batch = np.zeros((batch_size, *rows.shape[1:]), rows.dtype)
            batch[: len(rows) - start] = rows[start : start + batch_size]
            placed = place_batch(to_batch(list(batch[local.start : local.stop])), batch_size, sharding)
            sums.append(step(params, placed))  # on the devices, so that no batch waits for the one before

        def gather(name: str) -> np.ndarray:
            return np.concatenate([gather_to_host(each[name]) for each in sums])[: len(rows)]

        return RowScores(-gather("nll").astype(np.float64), gather("correct") == gather("weight"))

    return row_scores


def score_choices(choices: ChoiceSet, log_likelihoods: np.ndarray) -> Metrics:
    """Return accuracies in percent: of the likeliest choice, and of the likeliest per character ("accuracy_norm"), with
    their standard errors.

    Both are lm-evaluation-harness's `acc` and `acc_norm`.
    """
    metrics: Metrics = {}
    for name, values in {"accuracy": log_likelihoods, "accuracy_norm": log_likelihoods / choices.lengths}.items():
        chosen = [int(np.argmax(of_question)) for of_question in split_by_question(values, choices.counts)]
        share = float(np.mean([number == gold for number, gold in zip(chosen, choices.golds, strict=True)]))
        metrics[f"{PREFIX}{choices.name}/{name}"] = 100.0 * share
        metrics[f"{PREFIX}{choices.name}/{name}_se"] = 100.0 * (share * (1 - share) / len(chosen)) ** 0.5
    return metrics


def make_choice_scorer(
    text_model: TextModel,
    sets: Sequence[ChoiceSet],
    batch_size: int,
    loss_tile: int = 0,
    before_batch: Callable[[], None] = lambda: None,
) -> Callable[[Params], Metrics]:
    """Make `scorer(params)`: the metrics of all sets."""
    row_scores = make_row_scores(text_model, batch_size, loss_tile, before_batch)

    def scorer(params: Params) -> Metrics:
        metrics: Metrics = {}
        for choices in sets:
            metrics |= score_choices(choices, row_scores(params, choices.rows).log_likelihoods)
        return metrics

    return scorer
