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

from jaxstages.runtime.bucket import is_bucket, local_copy
from jaxstages.runtime.files import copy_file, write_text

METRICS = "metrics.jsonl"


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinities become null."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """Writes `metrics.jsonl`, a JSON object per line with "step" and "kind" (train, eval or event), and TensorBoard
    files.

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
        self._file, self._board, self._written = None, None, []
        if not writes:
            return
        path = self._local / METRICS
        kept = [line for line in read_metrics(folder / METRICS) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._written = [line for line in kept if line["step"] == step]
        self._board = _Board(self._local / "tensorboard", step + 1)
        self._file = path.open("a")

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        line = {"step": step, "kind": kind} | {name: plain(value) for name, value in values.items()}
        if self._file is None or self._board is None or line in self._written:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        self._board.write(step, {f"{kind}/{name}": value for name, value in numbers.items()})

    def sync(self) -> None:
        """Make all lines durable, and publish them in a bucket; called before a checkpoint that relies on them."""
        if self._file is None or self._board is None:
            return
        os.fsync(self._file.fileno())
        if is_bucket(self._folder):
            for path in (self._local / METRICS, self._board.file):
                copy_file(path, self._folder / path.relative_to(self._local))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None and self._board is not None:
            if error is None:
                self.sync()
            self._file.close()
            self._board.close()


class _Board:
    """A TensorBoard event file. Each event is flushed when it is written, so a kill loses none: tensorboardX's own
    `SummaryWriter` hands them to a thread, through a queue that can't be waited for."""

    def __init__(self, folder: Path, first: int) -> None:
        """
        Args:
            first: events of earlier files from this step on are replaced by those of this file.
        """
        from tensorboardX.event_file_writer import EventsWriter  # imports torch where it is installed: seconds

        # Generated modules, whose names type checkers can't see.
        events: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        self._event = events.Event
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{time.time_ns()}"
        self._events = EventsWriter(str(folder / "events"), suffix)
        (self.file,) = folder.glob(f"events*{suffix}")
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
    """Read the lines of a `metrics.jsonl`, without a last line that a kill cut short."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
