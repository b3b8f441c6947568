"""Child processes of a server that has imported the program: they start at once, instead of after seconds of imports.

A child is a process in a session of its own, and can be killed as any other. It differs from one that `python` starts
in that nothing can happen to it while it imports, and that variables which JAX reads at its import have the values of
the server. Tests that kill at any instant start theirs by `python`.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxstages.runtime import lease
from jaxstages.runtime.cpu import avoid_wrong_sums
from tests import compiled

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["grain", "orbax.checkpoint", "jaxstages.cli.main", "jaxstages.cli.train", "jaxstages.generation.decode", __name__]
)


class Forked:
    """A child with those parts of `subprocess.Popen` that tests use."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._process = CONTEXT.Process(target=_run, args=(list(words), dict(environment), str(log)))
        self._process.start()
        self.pid = self._process.pid or 0
        with contextlib.suppress(ProcessLookupError):
            while os.getpgid(self.pid) != self.pid:  # `killpg` would miss it
                time.sleep(0.001)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code


def _run(words: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    null, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ |= environment
    # As the package does at its import, which is over here.
    avoid_wrong_sums()
    lease.LEASE_SECONDS = float(os.environ.get("JAXSTAGES_LEASE_SECONDS", lease.LEASE_SECONDS))
    compiled.use_folder()
    sys.argv = ["child.py", *words]
    faulthandler.enable()

    from tests.reliability.child import main

    main()
