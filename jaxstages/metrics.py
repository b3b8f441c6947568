"""Scores of text, by the field's own scorers, and where the numbers of a run are written."""

import importlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from jaxstages.disk import write_text

if TYPE_CHECKING:
    from jaxstages.types import Metrics

HIGHER = ("token_accuracy", "bleu", "chrf", "exact_match", "accuracy", "macro_f1")
"""Metrics that are better when they are higher."""


RESAMPLES = 100
"""Resampled sets of examples whose scores give the standard error of a score that is no mean (Koehn 2004)."""


def higher_is_better(name: str) -> bool:
    """Args: name: of a metric, such as "loss" or "watch/finetune/bleu"; or of a part of one, "exact_match/fact"."""
    return any(part in HIGHER for part in name.split("/"))


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


def score_text(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> tuple["Metrics", list[str]]:
    """Corpus scores of generated answers, in percent, and sacreBLEU's signatures.

    Args:
        names: of "bleu", "chrf" (sacreBLEU's defaults, Post 2018) and "exact_match" (after stripping white space).
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scores, signatures = {}, []
    for name in names:
        match name:
            case "bleu" | "chrf":
                scorer = BLEU() if name == "bleu" else CHRF()
                scores[name] = scorer.corpus_score(list(answers), [list(references)]).score
                # By a scorer of its own: the signature of the score is the one without resampling.
                resampled = type(scorer)().corpus_score(list(answers), [list(references)], n_bootstrap=RESAMPLES)
                scores[f"{name}_se"] = resampled._ci / 1.96
                signatures.append(str(scorer.get_signature()))
            case "exact_match":
                hits = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
                scores[name] = 100.0 * hits / len(references)
                scores[f"{name}_se"] = _share_error(hits, len(references))
            case _:
                raise ValueError(f"metric {name!r} is not scored from text; known: bleu, chrf, exact_match")
    return scores, signatures


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

    everything = np.arange(len(claimed))
    resampled = np.random.default_rng(0).integers(0, len(claimed), (RESAMPLES, len(claimed)))
    hits = int(np.sum(claimed == true))
    return {
        "accuracy": 100.0 * hits / len(claimed),
        "accuracy_se": _share_error(hits, len(claimed)),
        "macro_f1": macro_f1(everything),
        "macro_f1_se": float(np.std([macro_f1(chosen) for chosen in resampled])),
    }


def plain(value: Any) -> Any:
    """A number that JSON can hold: NaN and infinities become null."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """`metrics.jsonl`, a JSON object a line with "step" and "kind" ("train", "eval" or "event"), and TensorBoard files.

    Opened at `step`, it drops the lines of later steps: a run that is resumed from there writes them again. Those of
    `step` itself it does not write twice: a run that was killed in between evaluates there once more. Of several
    processes one `writes`.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True) -> None:
        self._file, self._board, self._there = None, None, []
        if not writes:
            return
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._there = [line for line in kept if line["step"] == step]
        self._board = _Board(folder / "tensorboard", step + 1)
        self._file = path.open("a")

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        line = {"step": step, "kind": kind} | {name: plain(value) for name, value in values.items()}
        if self._file is None or self._board is None or line in self._there:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        self._board.write(step, {f"{kind}/{name}": value for name, value in numbers.items()})

    def sync(self) -> None:
        """What is written is on disk: called before a checkpoint that relies on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


class _Board:
    """TensorBoard's files, each event on its way to the disk when it is written: a kill loses none. tensorboardX's own
    `SummaryWriter` hands them to a thread, through a queue that can't be waited for."""

    def __init__(self, folder: Path, first: int) -> None:
        """Args: first: what earlier files have of this step, and later ones, does not count."""
        from tensorboardX.event_file_writer import EventsWriter  # imports torch where it is installed: seconds

        # Generated modules, whose names type checkers can't see.
        events: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        self._event = events.Event
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        start = events.SessionLog(status=events.SessionLog.START)
        self._events.write_event(self._event(step=first, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._events.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
