"""Terminal output: a progress line with ETA, one-line notes, and tables.

Text is printed as it is: data and answers may contain what rich would take for markup, such as "[/INST]".
"""

import sys
import time
from typing import TextIO

from rich.console import Console

_console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(text: str, style: str = "") -> None:
    """Print a line to standard output; `style` is rich's ("bold", "yellow", ...)."""
    _console.print(text, style=style or None)


def table_console(width: int) -> Console:
    """Return a console that prints tables.

    Args:
        width: characters per line where the output is no terminal.
    """
    return Console(width=None if _console.is_terminal else width, markup=False, emoji=False)


def warn(text: str) -> None:
    """Print a line to standard error, for commands whose output is read by programs."""
    print(f"jaxstages: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Format seconds: `7s`, `3:05`, `1:02:03`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


class Progress:
    """A progress line: rewritten in place on a terminal, printed every `log_seconds` to a log.

    Not rich.progress: that redraws from a thread of its own, and prints nothing to a log before the end.
    """

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
        advanced = done - self._first
        eta = duration((now - self._start) / advanced * (self._total - done)) if advanced else "?"
        self._write(f"{self._name} {done}/{self._total}  {note}{'  ' if note else ''}ETA {eta}", done >= self._total)

    def end(self, done: int) -> None:
        """Finish at `done`, which may be less than the total, for example where records are held out."""
        if done < self._total:  # else the last update has finished the line
            self._write(f"{self._name} {done}/{done}  in {duration(time.monotonic() - self._start)}", last=True)

    def clear(self) -> None:
        """Erase an unfinished line before a note is printed. The next update writes it again."""
        if self._live:
            print(f"\r{'':<{_console.width - 1}}\r", end="", flush=True, file=self._to)

    def _write(self, text: str, last: bool) -> None:
        if self._live:
            width = _console.width - 1
            print(f"\r{text[:width]:<{width}}", end="\n" if last else "", flush=True, file=self._to)
        else:
            print(text, flush=True, file=self._to)
