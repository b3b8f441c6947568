"""Scores of text, by the field's own scorers."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from jaxstages.config.parts import Part, as_metric

if TYPE_CHECKING:
    from jaxstages.types import Metrics

RESAMPLES = 100
"""Resampled sets of examples whose scores give the standard error of a score that is no mean (Koehn 2004)."""


def from_sums(sums: Mapping[str, SupportsFloat]) -> "Metrics":
    """Loss (nats a scored token), perplexity, accuracy of tokens and, where "bytes" is there, bits per byte; and, where
    the sums of several rows' products are there, the standard error of each as `NAME_se`: that of a ratio of sums over
    rows, which are taken for independent (Cochran 1977, section 6.3)."""
    weight = float(sums["weight"])
    if not weight:
        raise ValueError("no token was scored: every loss weight is 0; look at the data with `jaxstages inspect`")
    nll = float(sums["nll"])
    metrics = {
        "loss": nll / weight,
        "perplexity": math.exp(min(nll / weight, 700.0)),
        "token_accuracy": float(sums["correct"]) / weight,
    }
    if float(sums.get("bytes", 0.0)):
        metrics["bits_per_byte"] = nll / math.log(2) / float(sums["bytes"])
    errors = {}
    if (rows := float(sums.get("rows", 0.0))) > 1 and math.isfinite(nll):

        def error(name: str) -> float:
            mean = float(sums[name]) / weight
            squares = float(sums[f"{name}*{name}"]) - 2 * mean * float(sums[f"{name}*weight"])
            squares += mean**2 * float(sums["weight*weight"])
            return math.sqrt(max(squares, 0.0) * rows / (rows - 1)) / weight

        loss = error("nll")
        relative = {"loss": 1.0, "perplexity": metrics["perplexity"], "bits_per_byte": weight / math.log(2)}
        relative["bits_per_byte"] /= float(sums.get("bytes", 0.0)) or math.inf
        errors = {f"{name}_se": loss * factor for name, factor in relative.items() if name in metrics}
        errors["token_accuracy_se"] = error("correct")
    return metrics | errors


def score_text(names: Sequence[Any], answers: Sequence[str], references: Sequence[str]) -> tuple["Metrics", list[str]]:
    """Corpus scores of generated answers, in percent, and sacreBLEU's signatures.

    Args:
        names: of "bleu", "chrf" (sacreBLEU's defaults, Post 2018) and "exact_match" (after stripping white space); or
            own metrics, whose standard errors come from resampling.
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
                drawn = ([counts[i] for i in chosen] for chosen in _resampled(len(counts)))
                scores[f"{name}_se"] = float(np.std([scorer._aggregate_and_compute(some).score for some in drawn]))
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
                    for chosen in _resampled(len(references))
                ]
                scores[f"{own.name}_se"] = float(np.std(draws))
    return scores, signatures


def _resampled(count: int) -> np.ndarray:
    """[R, count]: places of examples, drawn with replacement, the same each time."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _share_error(hits: int, count: int) -> float:
    """Standard error, in percent, of a share of `hits` in `count`."""
    share = hits / count
    return 100.0 * math.sqrt(share * (1 - share) / count)


def score_labels(predictions: Sequence[str], references: Sequence[str]) -> "Metrics":
    """Accuracy and macro-F1 in percent; a label counts for macro-F1 if it is predicted or true somewhere
    (scikit-learn's `f1_score(average="macro", zero_division=0)`). The standard error of accuracy is that of a share, of
    macro-F1 the spread over resampled pairs."""
    labels = {label: code for code, label in enumerate(sorted({*predictions, *references}))}
    claimed, true = (np.asarray([labels[label] for label in side]) for side in (predictions, references))

    def macro_f1(chosen: np.ndarray) -> float:
        p, r = claimed[chosen], true[chosen]
        both = np.bincount(p, minlength=len(labels)) + np.bincount(r, minlength=len(labels))
        hits = np.bincount(p[p == r], minlength=len(labels))
        return 100.0 * float(np.mean(2 * hits[both > 0] / both[both > 0]))

    hits = int(np.sum(claimed == true))
    return {
        "accuracy": 100.0 * hits / len(claimed),
        "accuracy_se": _share_error(hits, len(claimed)),
        "macro_f1": macro_f1(np.arange(len(claimed))),
        "macro_f1_se": float(np.std([macro_f1(chosen) for chosen in _resampled(len(claimed))])),
    }
