"""Metrics with standard errors: loss from sums, text scores by sacreBLEU, label scores."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from jaxstages.config.parts import Part, as_metric

if TYPE_CHECKING:
    from jaxstages.types import Metrics

RESAMPLES = 100
"""Bootstrap samples for the standard error of a score that is not a mean (Koehn 2004)."""


def from_sums(sums: Mapping[str, SupportsFloat]) -> "Metrics":
    """Compute loss (nats per scored token), perplexity, token accuracy and, if there are "bytes", bits per byte.

    If `sums` has the products of row sums (`evaluate.sum_rows`), each metric has a standard error `NAME_se`: that of a
    ratio of sums over rows, which are assumed to be independent (Cochran 1977, section 6.3).
    """
    weight = float(sums["weight"])
    if not weight:
        raise ValueError("no token was scored: every loss weight is 0; look at the data with `jaxstages inspect`")
    nll = float(sums["nll"])
    metrics = {
        "loss": nll / weight,
        "perplexity": math.exp(min(nll / weight, 700.0)),
    }
    if "correct" in sums:  # a loss of the recipe's own need not count them
        metrics["token_accuracy"] = float(sums["correct"]) / weight
    if float(sums.get("bytes", 0.0)):
        metrics["bits_per_byte"] = nll / math.log(2) / float(sums["bytes"])

    rows = float(sums.get("rows", 0.0))
    if rows <= 1 or not math.isfinite(nll):
        return metrics

    def ratio_error(name: str) -> float:
        mean = float(sums[name]) / weight
        squares = float(sums[f"{name}*{name}"]) - 2 * mean * float(sums[f"{name}*weight"])
        squares += mean**2 * float(sums["weight*weight"])
        return math.sqrt(max(squares, 0.0) * rows / (rows - 1)) / weight

    # Derivatives of each metric by the loss.
    loss_error = ratio_error("nll")
    derivatives = {"loss": 1.0, "perplexity": metrics["perplexity"], "bits_per_byte": weight / math.log(2)}
    derivatives["bits_per_byte"] /= float(sums.get("bytes", 0.0)) or math.inf
    errors = {f"{name}_se": loss_error * factor for name, factor in derivatives.items() if name in metrics}
    if "correct" in sums:
        errors["token_accuracy_se"] = ratio_error("correct")
    return metrics | errors


def score_text(names: Sequence[Any], answers: Sequence[str], references: Sequence[str]) -> tuple["Metrics", list[str]]:
    """Compute corpus scores of generated answers in percent, and sacreBLEU's signatures.

    Args:
        names: "bleu", "chrf" (sacreBLEU's defaults, Post 2018) and "exact_match" (after stripping white space); or own
            metrics, whose standard errors come from resampling.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scores, signatures = {}, []
    for name in names:
        match name:
            case "bleu" | "chrf":
                scorer = BLEU() if name == "bleu" else CHRF()
                scores[name] = scorer.corpus_score(list(answers), [list(references)]).score
                # sacreBLEU's own resampling fails where some scores are 0, and changes the signature.
                counts = scorer._extract_corpus_statistics(list(answers), [list(references)])
                samples = ([counts[i] for i in indices] for indices in _bootstrap_indices(len(counts)))
                scores[f"{name}_se"] = float(np.std([scorer._aggregate_and_compute(each).score for each in samples]))
                signatures.append(str(scorer.get_signature()))
            case "exact_match":
                hits = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
                scores[name] = 100.0 * hits / len(references)
                scores[f"{name}_se"] = _share_error(hits, len(references))
            case str():
                raise ValueError(f"metric {name!r} is not scored from text; known: bleu, chrf, exact_match")
            case metric:
                own = as_metric(metric)
                assert not isinstance(own.score, Part), "the metric's own recipe is loaded"
                scores[own.name] = float(own.score(list(answers), list(references)))
                draws = [
                    own.score([answers[i] for i in chosen], [references[i] for i in chosen])
                    for chosen in _bootstrap_indices(len(references))
                ]
                scores[f"{own.name}_se"] = float(np.std(draws))
    return scores, signatures


def _bootstrap_indices(count: int) -> np.ndarray:
    """[RESAMPLES, count]: indices of examples drawn with replacement, always the same ones."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _share_error(hits: int, count: int) -> float:
    """Standard error of the share `hits / count`, in percent."""
    share = hits / count
    return 100.0 * math.sqrt(share * (1 - share) / count)


def score_labels(predictions: Sequence[str], references: Sequence[str]) -> "Metrics":
    """Compute accuracy and macro-F1 in percent.

    A label counts for macro-F1 if it is predicted or true somewhere (scikit-learn's
    `f1_score(average="macro", zero_division=0)`). The standard error of accuracy is that of a share; that of macro-F1
    is the spread over bootstrap samples.
    """
    labels = {label: code for code, label in enumerate(sorted({*predictions, *references}))}
    predicted, true = (np.asarray([labels[label] for label in names]) for names in (predictions, references))

    def macro_f1(indices: np.ndarray) -> float:
        p, r = predicted[indices], true[indices]
        both = np.bincount(p, minlength=len(labels)) + np.bincount(r, minlength=len(labels))
        hits = np.bincount(p[p == r], minlength=len(labels))
        return 100.0 * float(np.mean(2 * hits[both > 0] / both[both > 0]))

    hits = int(np.sum(predicted == true))
    return {
        "accuracy": 100.0 * hits / len(predicted),
        "accuracy_se": _share_error(hits, len(predicted)),
        "macro_f1": macro_f1(np.arange(len(predicted))),
        "macro_f1_se": float(np.std([macro_f1(indices) for indices in _bootstrap_indices(len(predicted))])),
    }
