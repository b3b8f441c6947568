"""Several processes as one program: who writes, who waits, and how all of them agree to stop."""

import contextlib
import functools
import hashlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from jaxstages.signals import end_at_once

PATIENCE = 5
"""Seconds that a signal waits for a process to have joined the others."""

LOST_AFTER = 30
"""Seconds without a sign of life after which a host counts as lost, and the others end."""


def join(coordinator: str, processes: int, process: int) -> None:
    """Become process `process` of `processes`; process 0 listens at `coordinator` (HOST:PORT), and nowhere else.

    From here on JAX takes SIGTERM, and `asked_together` tells of it. What the others would say a second time is not
    shown.
    """
    if process:
        _wait_for(coordinator)
    # An end between the first word to the others and the last would leave them with an error: a signal waits so long.
    joined = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        if not os.read(reader, 1):
            return
        if joined.wait(PATIENCE):
            os.kill(os.getpid(), signal.SIGTERM)  # JAX has it now, and all will know
        else:
            end_at_once("asked to stop before the others were there")

    threading.Thread(target=watch, name="join", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        heartbeat_timeout_seconds=LOST_AFTER,
        coordinator_bind_address=coordinator if process == 0 else None,
    )
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.set_wakeup_fd(-1)
    joined.set()
    os.close(writer)
    if process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123


def _wait_for(coordinator: str) -> None:
    """Until process 0, which prepares the data first, listens."""
    host, _, port = coordinator.rpartition(":")
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return
        time.sleep(0.2)


def leads() -> bool:
    """Does this process write what is written once?"""
    return jax.process_index() == 0


def several() -> bool:
    return jax.process_count() > 1


def meet(name: str) -> None:
    """Wait until every process is here."""
    if several():
        multihost_utils.sync_global_devices(name)


def from_leader(value: int) -> int:
    """The leader's value, in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value))) if several() else value


def agree(said: str) -> bool:
    """Is it the same in every process?"""
    mine = int.from_bytes(hashlib.sha256(said.encode()).digest()[:4], "big") >> 1
    return from_leader(mine) == mine


def whole(array: jax.Array) -> np.ndarray:
    """All of an array, wherever its parts lie."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(jax.device_get(array))


@functools.cache
def _polls() -> Iterator[int]:
    """JAX wants a number that grows with each question, and the same one in every process."""
    return itertools.count(1)


def asked_together() -> Callable[[], bool] | None:
    """`asked()`, for several processes, each of which must ask as often as the others: has one of them got a signal?
    All get the same answer to the same question. None where there is one process."""
    return (lambda: multihost_utils.reached_preemption_sync_point(next(_polls()))) if several() else None


def leave() -> None:
    """The others may still be reading: nobody goes before all are done.

    Not by jax.distributed.shutdown(): that first ends the agreement on where to stop. One that a signal began in the
    last second would be waited for by a process whose peers have left it already: for three minutes, or for ever.
    """
    if several():
        state = distributed.global_state
        assert state.client is not None, "several processes have joined"
        state.client.shutdown()
        if state.service is not None:
            state.service.shutdown()  # answers what the others still have to hear
