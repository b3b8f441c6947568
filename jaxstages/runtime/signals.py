"""Stop requests by signal (SIGTERM, SIGINT, a terminal's SIGHUP, SLURM's SIGUSR1), and a watchdog for hangs.

During training a request is recorded, and the loop saves after the step. If nothing is unsaved, the program ends at
once with code 75: files are written atomically, so that is as safe as a kill. A thread handles signals there, because
Python's own handlers wait for the main thread to return from C++, and a compilation can take longer than the grace
period. In a process that is not ours, such as a notebook's, the main thread gets a KeyboardInterrupt instead.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

INTERRUPTED = 75
"""Exit code of an interrupted process."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

REPEAT_SECONDS = 1.0
"""A second signal within this time is a copy of the first: launchers forward what the whole process group got."""


END_WITH_PARENT = "JAXSTAGES_END_WITH_PARENT"
"""Environment variable with the process ID of a parent that this process must not outlive."""

_PR_SET_PDEATHSIG = 1
"""From Linux's prctl.h: the signal that a process gets when its parent dies."""


def end_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent named by END_WITH_PARENT dies: no trial outlives a killed sweep.

    The process asks for itself, since a parent with JAX's threads must not run code between fork and exec.
    """
    parent = os.environ.get(END_WITH_PARENT)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it has died before that
        end_at_once("its sweep has ended")


def end_at_once(reason: str) -> None:
    print(f"jaxstages: {reason}: nothing is unsaved; start it again to go on", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


class Stop:
    """A request to stop.

    requested: whether a signal came.
    unsaved: whether ending now would lose work; set by the code that does the work.
    """

    def __init__(self, agree: Callable[[], bool] | None = None, owns_process: bool = False) -> None:
        """
        Args:
            agree: for several processes, `multihost.preemption_poll()`.
            owns_process: end the process where there is nothing to save; else raise KeyboardInterrupt.
        """
        self.requested = False
        self.unsaved = False
        self._agree, self._owns_process = agree, owns_process
        self._first_time = 0.0

    def poll(self) -> bool:
        """Return whether to stop; called between two pieces of work."""
        if self._agree is not None and not self.requested:
            self.requested = self._agree()
        return self.requested

    def receive(self, number: int) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: there is nothing to save, or this is the second signal, in a process that is not ours.
        """
        name = signal.Signals(number).name
        if not self.unsaved:
            if not self._owns_process:
                raise KeyboardInterrupt
            end_at_once(name)
        if not self.requested:
            self.requested, self._first_time = True, time.monotonic()
            print(f"jaxstages: {name}: saves after this step; once more ends at once", file=sys.stderr, flush=True)
        elif time.monotonic() - self._first_time > REPEAT_SECONDS:
            if not self._owns_process:
                raise KeyboardInterrupt
            print(
                f"jaxstages: {name} again: ends without saving, the last checkpoint stands", file=sys.stderr, flush=True
            )
            os._exit(1)


@contextlib.contextmanager
def stop_signals(
    agree: Callable[[], bool] | None = None,
    on_interrupt: Callable[[int, Any], None] | None = None,
    owns_process: bool = False,
) -> Iterator[Stop]:
    """Send signals to a `Stop` until the end of the block; blocks may be nested.

    Args:
        agree: for several processes, `multihost.preemption_poll()`. JAX handles the signals then.
        on_interrupt: Python signal handler of SIGINT, which then does not reach the `Stop`.
        owns_process: whether a signal may end the process; blocks inside this one inherit it.
    """
    owns_process |= signal.getsignal(signal.SIGTERM) is _handled_by_thread
    stop = Stop(agree, owns_process)
    # SIGHUP stays ignored under `nohup`.
    handled = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    if agree is not None:
        with python_signals():
            yield stop
    elif owns_process:
        with _thread_for(stop, handled, on_interrupt):
            yield stop
    elif threading.current_thread() is threading.main_thread():
        handlers: dict[int, Callable[[int, Any], None]] = {n: lambda number, _: stop.receive(number) for n in handled}
        if on_interrupt is not None:
            handlers[signal.SIGINT] = on_interrupt
        with _handlers(handlers):
            yield stop
    else:  # Python allows handlers in the main thread only
        yield stop


def _handled_by_thread(number: int, frame: Any) -> None:
    """Python's handler of a signal that a thread handles."""


@contextlib.contextmanager
def _handlers(handlers: Mapping[int, Callable[[int, Any], None]]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _thread_for(stop: Stop, handled: Sequence[int], on_interrupt: Callable[[int, Any], None] | None) -> Iterator[None]:
    """Pass signals to a `Stop` in a thread of its own."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while received := os.read(reader, 1):
            if received[0] in STOP_SIGNALS and (on_interrupt is None or received[0] != signal.SIGINT):
                stop.receive(received[0])

    thread = threading.Thread(target=watch, name="stop-signals", daemon=True)
    thread.start()
    handlers: dict[int, Callable[[int, Any], None]] = dict.fromkeys(handled, _handled_by_thread)
    if on_interrupt is not None:
        handlers[signal.SIGINT] = on_interrupt
    try:
        with _handlers(handlers):
            outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            try:
                yield
            finally:
                signal.set_wakeup_fd(outer)
    finally:
        os.close(writer)  # ends the thread's read
        thread.join()
        os.close(reader)


@contextlib.contextmanager
def python_signals() -> Iterator[None]:
    """Leave signals to Python's handlers, such as a server's, until the end of the block."""
    outer = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(outer)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[float], None]]:
    """End a hanging process: `heartbeat(factor)` restarts a timer of `seconds * factor`. When it expires, the stacks of
    all threads are printed, and the process ends with code 1. The time in which Ctrl-Z suspends it does not count."""
    last_time, last_factor = float("-inf"), 0.0

    def heartbeat(factor: float = 1.0) -> None:
        nonlocal last_time, last_factor
        now = time.monotonic()
        if factor != last_factor or now - last_time > min(1.0, seconds / 10):  # seldom: each restart starts a thread
            faulthandler.dump_traceback_later(seconds * factor, exit=True, file=2)
            last_time, last_factor = now, factor

    def suspend(number: int, frame: Any) -> None:
        nonlocal last_time
        faulthandler.cancel_dump_traceback_later()
        os.kill(os.getpid(), signal.SIGSTOP)  # continues here
        if last_factor:
            last_time = float("-inf")
            heartbeat(last_factor)

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTSTP, suspend) if in_main_thread else None
    try:
        yield heartbeat
    finally:
        last_factor = 0.0  # a handler that outlives this block restarts nothing
        faulthandler.cancel_dump_traceback_later()
        if in_main_thread:
            signal.signal(signal.SIGTSTP, previous or signal.SIG_DFL)
