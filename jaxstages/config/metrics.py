"""Names of the built-in metrics, the tasks they apply to, and whether higher is better."""

from collections.abc import Sequence
from typing import Any

from jaxstages.config.parts import as_metric

LOSSES = ("loss", "perplexity", "bits_per_byte", "token_accuracy")
"""Metrics of held-out rows, which every stage reports."""

FITS = {
    "lm": (),
    "seq2seq": ("bleu", "chrf", "exact_match"),
    "classify": ("accuracy", "macro_f1"),
    "chat": ("exact_match", "bleu", "chrf"),
    "own": ("exact_match", "bleu", "chrf"),
}
"""Metrics of generated answers or of labels, by task."""

HIGHER = ("token_accuracy", "bleu", "chrf", "exact_match", "accuracy", "accuracy_norm", "macro_f1")
"""Metrics that are better when higher."""


def higher_is_better(name: str, metrics: Sequence[Any] = ()) -> bool:
    """Return whether a metric is better when it is higher.

    Args:
        name: name of a metric, such as "loss" or "watch/finetune/bleu", or of a part of one, such as
            "exact_match/fact".
        metrics: `evaluation.metrics`, which may contain custom metrics.
    """
    custom = {
        as_metric(metric).name
        for metric in metrics
        if not isinstance(metric, str) and as_metric(metric).better == "max"
    }
    return any(part in HIGHER or part in custom for part in name.split("/"))
