"""Send the lines of `metrics.jsonl` to trackers, such as Weights & Biases.

A line is sent once a checkpoint of its step, or of a later one, is on disk: no resumed run takes it back any more. So a
tracker has each number once, and none that `metrics.jsonl` does not have. `STAGE/trackers/NAME.json` counts the lines
that the tracker has. A tracker that was out of reach, or is new to the run, gets all lines that it lacks.

Trackers work in threads of their own, and their errors end in a warning: training does not depend on them.
"""

import contextlib
import itertools
import math
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from jaxstages.runtime.bucket import local_copy
from jaxstages.runtime.console import say
from jaxstages.runtime.files import read_json, write_json
from jaxstages.training.metric_writer import METRICS, read_metrics
from jaxstages.types import Interrupted, MakeTracker, TrackedStage

CLOSE_SECONDS = 30.0
"""Time for a tracker to take the last lines. What it has not taken by then is sent at the next start."""


class Tracking:
    """The trackers of one stage, as a context manager. Without trackers it does nothing."""

    def __init__(
        self, folder: Path, stage: TrackedStage, trackers: Mapping[str, MakeTracker], saved_step: Callable[[], int]
    ) -> None:
        """Start the trackers.

        Args:
            folder: folder of the stage.
            stage: what the trackers are told; `run_id`, `folder` and `sent` are set here.
            trackers: makers of trackers by name.
            saved_step: returns the newest step whose checkpoint is on disk, -1 for none.
        """
        self._saved_step, self._step = saved_step, -1
        self._senders = [_Sender(name, folder, stage, make) for name, make in trackers.items()]

    def poll(self) -> None:
        """Send the lines that have become final since the last call, in the background."""
        step = self._saved_step()
        if step > self._step:
            self._step = step
            self._send(step)

    def _send(self, step: int) -> None:
        for sender in self._senders:
            sender.queue.put(step)

    def __enter__(self) -> "Tracking":
        self.poll()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._send(self._saved_step())  # lines at the saved step may have been added since
        status = "finished" if error is None else "interrupted" if isinstance(error, Interrupted) else "failed"
        for sender in self._senders:
            sender.queue.put(status)
        for sender in self._senders:
            sender.join()


class _Record(NamedTuple):
    """Content of `trackers/NAME.json`: the id of the tracker's run, and the number of lines that it has."""

    run_id: str
    sent: int


class _Sender:
    """Sends lines to one tracker. Its queue takes the step up to which lines are final, or, at the end, the status."""

    def __init__(self, name: str, folder: Path, stage: TrackedStage, make: MakeTracker) -> None:
        self._name, self._stage_dir = name, folder
        self._file = folder / "trackers" / f"{name}.json"
        self.queue: queue.SimpleQueue[int | str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        try:
            self._record = self._open_record()
            local = local_copy(folder) / "trackers"
            local.mkdir(parents=True, exist_ok=True)
            self._tracker = make(stage._replace(folder=local, **self._record._asdict()))
        except Exception as error:
            self._warn(error)
        else:
            self._thread.start()

    def join(self) -> None:
        """Wait until the tracker is closed, or has used up its time."""
        if self._thread.ident is None:
            return
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn(f"it has not taken the last lines within {CLOSE_SECONDS:g} seconds")

    def _open_record(self) -> _Record:
        if self._file.exists():
            record = read_json(self._file, {"run_id": (str,), "sent": (int,)})
            return _Record(record["run_id"], record["sent"])
        record = _Record(uuid.uuid4().hex[:12], 0)
        write_json(self._file, record._asdict())
        return record

    def _run(self) -> None:
        tracker = self._tracker
        try:
            while isinstance(step := self.queue.get(), int):
                self._send(step)
            tracker.close(step)
            self._save()
        except Exception as error:
            with contextlib.suppress(Exception):
                tracker.close("failed")
            self._warn(error)

    def _send(self, step: int) -> None:
        """Send the lines up to a step that are not sent yet."""
        lines = read_metrics(local_copy(self._stage_dir) / METRICS)
        final = list(itertools.takewhile(lambda line: line["step"] <= step, lines))
        try:
            for line in final[self._record.sent :]:
                values: dict[str, Any] = {name: math.nan if value is None else value for name, value in line.items()}
                self._tracker.log(values.pop("step"), values.pop("kind"), values)
                self._record = self._record._replace(sent=self._record.sent + 1)
        finally:
            if not self._tracker.buffers:
                self._save()

    def _save(self) -> None:
        write_json(self._file, self._record._asdict())

    def _warn(self, reason: object) -> None:
        line = " ".join(str(reason).split())[:300] or type(reason).__name__
        say(
            f"{self._stage_dir.name}: tracker {self._name} failed: {line}. Training goes on, and metrics.jsonl has all "
            "numbers; the next start of this stage sends what is missing",
            "yellow",
        )
