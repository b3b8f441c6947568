"""A lease on a workdir in a bucket: one run at a time, and a killed run's lease ends by itself.

A lease is a sequence of numbered objects, `LEASE/00000017`, each created only if absent. The creator of the highest
number owns the lease. To renew, to take over and to release is to create the next number, which only one process can
do; then the numbers before it are deleted. A process that was suspended meanwhile may still create a number that was
deleted, so it looks again afterwards: if there is a higher one, another process owns the lease.

Clocks are not compared. A process that finds a lease watches it: if the number rises, the owner is alive; if it stays
for LEASE_SECONDS, the owner is dead.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxstages.runtime import bucket
from jaxstages.runtime.console import say

LEASE_SECONDS = float(os.environ.get("JAXSTAGES_LEASE_SECONDS", "60"))
"""Time without renewal after which a lease is dead."""

RENEWALS = 6
"""Renewals in that time."""

STORAGE_FAILED = 74
"""Exit code of a process that has lost its lease."""

RELEASED: dict[str, Any] = {}


class Lease:
    """A lease that is renewed until `close`."""

    def __init__(self, workdir: Path) -> None:
        """Acquire the lease of a workdir.

        Raises:
            ValueError: another process, named in the message, renews it.
        """
        self._workdir, self._folder = workdir, workdir / "LEASE"
        self._owner = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._renewed = 0.0
        """Time at which the last successful renewal was sent: the object is not older."""
        self._number = self._acquire()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _acquire(self) -> int:
        while True:
            number = self._highest()
            owner = self._read(number) if number else RELEASED
            if owner is None:  # renewed between the two requests
                continue
            if owner != RELEASED and not self._is_dead(number, owner):
                raise ValueError(f"{self._workdir} is in use by {_name(owner)}; wait for it, or take another --workdir")
            self._renewed = time.monotonic()
            if self._create(number + 1, self._owner):
                return number + 1

    def _highest(self) -> int:
        return max((int(name) for name in bucket.list_objects(self._folder) if name.isdecimal()), default=0)

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            return json.loads((self._folder / f"{number:08}").read_bytes())
        except FileNotFoundError:
            return None

    def _is_dead(self, number: int, owner: dict[str, Any]) -> bool:
        """Return whether a lease has ended, after watching it for as long as that takes to tell."""
        if owner.get("machine") == machine() and not runs_here(owner["pid"]):
            say(f"{self._workdir}: {_name(owner)} was killed; this process takes over its lease", "yellow")
            return True
        say(
            f"{self._workdir} is held by {_name(owner)}; waits up to {LEASE_SECONDS:.0f} s to see whether the lease is "
            "renewed",
            "yellow",
        )
        end = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(LEASE_SECONDS / RENEWALS / 4, 2.0))
            if (highest := self._highest()) > number:
                return self._read(highest) == RELEASED
        say(f"{self._workdir}: the lease of {_name(owner)} was not renewed; this process takes it over", "yellow")
        return True

    def _create(self, number: int, owner: dict[str, Any]) -> bool:
        """Create a number. Returns whether it is the highest, which makes its creator the owner."""
        path = self._folder / f"{number:08}"
        if not bucket.create(path, json.dumps(owner).encode()):
            return False
        names = [name for name in bucket.list_objects(self._folder) if name.isdecimal()]
        if any(int(name) > number for name in names):
            path.unlink(missing_ok=True)
            return False
        for name in names:
            if int(name) < number:
                (self._folder / name).unlink(missing_ok=True)
        return True

    def _renew(self) -> None:
        """Renew the lease. End the process if that does not succeed in time: another one may write to the workdir."""
        interval, reason = LEASE_SECONDS / RENEWALS, f"the lease of {self._workdir} can't be renewed"
        while not self._closed.wait(interval):
            sent = time.monotonic()
            deadline = self._renewed + LEASE_SECONDS - interval
            # A request that hangs must not delay the end. After a suspension, which may have been longer, the request
            # itself tells whether another process has taken over.
            timer = threading.Timer(max(deadline - sent, interval), _end, [f"{reason} in time"])
            timer.daemon = True
            timer.start()
            try:
                if not self._create(self._number + 1, self._owner):
                    _end(f"another process has taken over the lease of {self._workdir}")
                self._number, self._renewed = self._number + 1, sent
            except Exception as error:
                if time.monotonic() > deadline:
                    _end(f"{reason}: {bucket.explain(error) or error}")
            finally:
                timer.cancel()

    def close(self) -> None:
        """Release the lease."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # it ends by itself
            self._create(self._number + 1, RELEASED)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _end(reason: str) -> None:
    print(f"jaxstages: {reason}; nothing that was saved before is lost", file=sys.stderr, flush=True)
    os._exit(STORAGE_FAILED)


def _name(owner: dict[str, Any]) -> str:
    return f"{owner['host']} pid {owner['pid']}"


@functools.cache
def machine() -> str:
    """Return a name of the PID namespace of this process: elsewhere, such as in another container, a PID means
    nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not on Linux
        return socket.gethostname()


def runs_here(pid: int) -> bool:
    """Return whether a process of this PID namespace is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True
