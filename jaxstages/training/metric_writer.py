"""Where the numbers of a run are written: `metrics.jsonl` and TensorBoard event files."""

import importlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jaxstages.runtime.files import write_text


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
