"""Being asked to stop (SIGTERM, SIGINT, a terminal's SIGHUP, SLURM's SIGUSR1), and a watchdog for what hangs.

Where nothing is unsaved the process ends at once with code 75: all files are written whole or not at all, so an end is
as safe as a kill. In training it is noted, and the loop saves after the step. A thread does both, since Python's own
handlers wait for whatever the main thread is doing in C++, and a compilation can take longer than the grace time.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

INTERRUPTED = 75
ASKED_BY = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

SAME = 1.0
"""Seconds in which a second signal is the first one again: launchers forward what the whole group got already."""


def end_at_once(why: str) -> None:
    print(f"jaxstages: {why}: nothing is unsaved; start it again to go on", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


class Stop:
    """asked: a signal came. unsaved: there is work that an end would lose; set by who does that work.

    Args:
        together: for several processes, a question that each of them must ask as often as the others.
    """

    def __init__(self, together: Callable[[], bool] | None = None) -> None:
        self.asked = False
        self.unsaved = False
        self._together = together
        self._first = 0.0

    def poll(self) -> bool:
        """Asked for between two pieces of work: is it time to stop?"""
        if self._together is not None and not self.asked:
            self.asked = self._together()
        return self.asked

    def note(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self.unsaved:
            end_at_once(name)
        if not self.asked:
            self.asked, self._first = True, time.monotonic()
            print(f"jaxstages: {name}: saves after this step; once more ends at once", file=sys.stderr, flush=True)
        elif time.monotonic() - self._first > SAME:
            print(
                f"jaxstages: {name} again: ends without saving, the last checkpoint stands", file=sys.stderr, flush=True
            )
            os._exit(1)


@contextlib.contextmanager
def stop_signals(
    together: Callable[[], bool] | None = None, instead: Callable[[int, Any], None] | None = None
) -> Iterator[Stop]:
    """From here to the end of the block, signals reach the `Stop` that this gives; blocks may be nested. With
    `together`, JAX has the signals, and the processes agree. `instead` takes SIGINT, as a handler of Python's."""
    stop = Stop(together)
    if together is not None:
        outer = signal.set_wakeup_fd(-1)
        try:
            yield stop
        finally:
            signal.set_wakeup_fd(outer)
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while got := os.read(reader, 1):
            if got[0] in ASKED_BY and (instead is None or got[0] != signal.SIGINT):
                stop.note(got[0])

    thread = threading.Thread(target=watch, name="stop-signals", daemon=True)
    thread.start()
    # What is ignored from outside stays so: `nohup` means that SIGHUP ends nothing.
    heard = [n for n in ASKED_BY if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in heard}
    if instead is not None:
        signal.signal(signal.SIGINT, instead)
    outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(outer)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # the thread reads an end of file
        thread.join()
        os.close(reader)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[float], None]]:
    """`alive(factor)`, called now and then, puts the end off: without a call for `seconds * factor` the stacks of all
    threads are printed, and the process ends with code 1."""
    last, slack = float("-inf"), 0.0

    def alive(factor: float = 1.0) -> None:
        nonlocal last, slack
        now = time.monotonic()
        if factor != slack or now - last > min(1.0, seconds / 10):  # each call starts a thread
            faulthandler.dump_traceback_later(seconds * factor, exit=True, file=2)
            last, slack = now, factor

    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()
