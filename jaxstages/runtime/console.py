"""What a person sees while it works: a progress line with ETA, and one-line notes."""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.markup import escape

_console = Console(highlight=False, soft_wrap=True)


def say(text: str, style: str = "") -> None:
    """One line on the standard output; `style` is rich's ("bold", "yellow", ...)."""
    _console.print(escape(text), style=style or None)


def warn(text: str) -> None:
    """One line on the standard error, where a command's output is for programs."""
    print(f"jaxstages: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds for people: `7s`, `3:05`, `1:02:03`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


class Progress:
    """A line that is rewritten in place on a terminal, and printed every 10 seconds elsewhere (a log file)."""

    def __init__(
        self, name: str, total: int, done: int = 0, log_seconds: float = 10.0, to: TextIO | None = None
    ) -> None:
        self._name, self._total, self._first = name, total, done
        self._log_seconds = log_seconds
        self._start = self._last = time.monotonic()
        self._to = to or sys.stdout
        self._live = self._to.isatty()

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last < (0.1 if self._live else self._log_seconds) and done < self._total:
            return
        self._last = now
        fresh = done - self._first
        left = duration((now - self._start) / fresh * (self._total - done)) if fresh else "?"
        self._write(f"{self._name} {done}/{self._total}  {note}{'  ' if note else ''}ETA {left}", done >= self._total)

    def end(self, done: int) -> None:
        """All is done, and it was so much: of what the total counts, a part may be held out."""
        if done < self._total:  # else the last update has said so
            self._write(f"{self._name} {done}/{done}  in {duration(time.monotonic() - self._start)}", last=True)

    def clear(self) -> None:
        """Make room for a note: an unfinished line is wiped, and comes back with the next update."""
        if self._live:
            print(f"\r{'':<{_console.width - 1}}\r", end="", flush=True, file=self._to)

    def _write(self, text: str, last: bool) -> None:
        if self._live:
            width = _console.width - 1
            print(f"\r{text[:width]:<{width}}", end="\n" if last else "", flush=True, file=self._to)
        else:
            print(text, flush=True, file=self._to)
