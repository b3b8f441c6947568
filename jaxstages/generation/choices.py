"""Multiple-choice scores: the likelihood of each choice, given the question."""

from collections.abc import Callable, Sequence

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


def make_log_likelihoods(
    text_model: TextModel, batch_size: int, loss_tile: int = 0, before_batch: Callable[[], None] = lambda: None
) -> Callable[[Params, np.ndarray], np.ndarray]:
    """Make `log_likelihoods(params, rows)`: of the scored tokens of each row, in nats, float64 [N].

    Args:
        batch_size: rows at a time.
        before_batch: called before each batch; an exception in it ends the evaluation.
    """
    step = jax.jit(make_eval_step(text_model.model.outputs, loss_tile=loss_tile))
    sharding = text_model.row_sharding
    local = local_row_range(batch_size, sharding)

    def log_likelihoods(params: Params, rows: np.ndarray) -> np.ndarray:
        sums = []
        for start in range(0, len(rows), batch_size):
            before_batch()
            batch = np.zeros((batch_size, *rows.shape[1:]), rows.dtype)
            batch[: len(rows) - start] = rows[start : start + batch_size]
            placed = place_batch(to_batch(list(batch[local.start : local.stop])), batch_size, sharding)
            sums.append(step(params, placed)["nll"])  # on the devices, so that no batch waits for the one before
        return -np.concatenate([gather_to_host(each) for each in sums])[: len(rows)].astype(np.float64)

    return log_likelihoods


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
    log_likelihoods = make_log_likelihoods(text_model, batch_size, loss_tile, before_batch)

    def scorer(params: Params) -> Metrics:
        metrics: Metrics = {}
        for choices in sets:
            metrics |= score_choices(choices, log_likelihoods(params, choices.rows))
        return metrics

    return scorer
