"""TensorBoard event files: scalars, text, and hyperparameters.

Each event is flushed when it is written, so a kill loses none: tensorboardX's own `SummaryWriter` hands them to a
thread, through a queue that can't be waited for.
"""

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TENSORBOARD = "tensorboard"
"""Folder of event files."""


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keep tensorboardX from importing torch where it is installed: that takes seconds, and is for its tensors only."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # which Python takes for "can't be imported"
    try:
        yield
    finally:
        del sys.modules["torch"]


class EventFile:
    """A new event file in a folder, which may have earlier ones."""

    def __init__(self, folder: Path, first: int = 0) -> None:
        """
        Args:
            first: events of earlier files from this step on are replaced by those of this file.
        """
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter

        # Generated modules, whose names type checkers can't see.
        events: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summaries: Any = importlib.import_module("tensorboardX.summary")
        self._event = events.Event
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{time.time_ns()}"
        self._events = EventsWriter(str(folder / "events"), suffix)
        (self.file,) = folder.glob(f"events*{suffix}")
        start = events.SessionLog(status=events.SessionLog.START)
        self._events.write_event(self._event(step=first, session_log=start))

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summaries.Summary
        self._write(step, summary(value=[summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def write_text(self, step: int, tag: str, markdown: str) -> None:
        """Write Markdown, which TensorBoard shows on its text page."""
        self._write(step, self._summaries.text(tag, markdown))

    def write_hyperparameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Write hyperparameters for TensorBoard's HParams page.

        Args:
            metrics: tags of the scalars to compare runs by.
        """
        scalars = (bool, int, float, str)
        shown = {name: value if isinstance(value, scalars) else str(value) for name, value in values.items()}
        for summary in self._summaries.hparams(shown, dict.fromkeys(metrics)):
            self._write(0, summary)

    def _write(self, step: int, summary: Any) -> None:
        self._events.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a Markdown table. Line breaks and bars in cells are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return "<br>".join(text.strip().splitlines())
