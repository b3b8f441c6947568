"""Where the numbers of a run are written: `metrics.jsonl` and TensorBoard event files."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jaxstages.runtime.bucket import is_bucket, local_copy
from jaxstages.runtime.files import copy_file, write_text
from jaxstages.training.event_file import TENSORBOARD, EventFile, markdown_table

METRICS = "metrics.jsonl"

SAMPLES = "samples"
"""Kind of a line with generated answers, and its only field."""


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinities become null."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """Writes `metrics.jsonl`, a JSON object per line with "step" and "kind" (train, eval, samples or event), and
    TensorBoard files.

    Of a workdir in a bucket they are written on the local disk, and published by `sync`.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True) -> None:
        """Open the files at a step.

        Lines of later steps are dropped: a run that resumes from there writes them again. Lines of the step itself are
        not written twice: a run that was killed in between evaluates there once more.

        Args:
            folder: folder of the stage.
            writes: whether this process writes; of several, one does.
        """
        self._folder, self._local = folder, local_copy(folder)
        self._file, self._events, self._written = None, None, []
        if not writes:
            return
        path = self._local / METRICS
        kept = [line for line in read_metrics(folder / METRICS) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._written = [line for line in kept if line["step"] == step]
        self._events = EventFile(self._local / TENSORBOARD, step + 1)
        self._file = path.open("a")

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        line = {"step": step, "kind": kind} | {name: plain(value) for name, value in values.items()}
        if self._file is None or self._events is None or line in self._written:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        self._events.write_scalars(step, {f"{kind}/{name}": value for name, value in numbers.items()})
        if kind == SAMPLES:
            samples = values[SAMPLES]
            self._events.write_text(
                step, SAMPLES, markdown_table([*samples[0]], [[*each.values()] for each in samples])
            )

    def describe(self, recipe: Mapping[str, Any], hyperparameters: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Show the recipe and its hyperparameters in TensorBoard.

        Args:
            hyperparameters: values by name, for the table that compares runs.
            metrics: metrics of evaluations for the same table.
        """
        if self._events is None:
            return
        whole = json.dumps(recipe, indent=2, ensure_ascii=False)
        self._events.write_text(0, "recipe", f"```\n{whole}\n```")
        self._events.write_text(0, "recipe/changed", markdown_table(["field", "value"], [*hyperparameters.items()]))
        self._events.write_hyperparameters(hyperparameters, [f"eval/{metric}" for metric in metrics])

    def show_examples(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show held-out rows in TensorBoard: the whole text of each, and the part of it that is scored."""
        if self._events is not None and rows:
            self._events.write_text(0, "held-out rows", markdown_table(["text", "scored"], rows))

    def sync(self) -> None:
        """Make all lines durable, and publish them in a bucket; called before a checkpoint that relies on them."""
        if self._file is None or self._events is None:
            return
        os.fsync(self._file.fileno())
        if is_bucket(self._folder):
            for path in (self._local / METRICS, self._events.file):
                copy_file(path, self._folder / path.relative_to(self._local))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None and self._events is not None:
            if error is None:
                self.sync()
            self._file.close()
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl`, without a last line that a kill cut short."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
