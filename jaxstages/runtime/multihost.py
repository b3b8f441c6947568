"""Several processes as one program: join and leave, barrier, broadcast, and agreement on when to stop.

`lost_host.py` ends all of them together when one fails.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from jaxstages.runtime import lost_host
from jaxstages.runtime.cluster import ProcessInfo
from jaxstages.runtime.signals import end_at_once
from jaxstages.types import Interrupted

STOP_DURING_JOIN_SECONDS = 5
"""A stop signal during `join` waits this long for the join to complete."""

JOIN_SECONDS = 300
"""Time for all processes to arrive once process 0 listens."""

HOSTNAME_SECONDS = 60
"""Time until process 0 must be able to resolve its own host name."""

_comparisons, _polls = itertools.count(1), itertools.count(1)
"""Numbers of collective calls. All processes make the same calls in the same order, and so have the same numbers."""


def join(info: ProcessInfo) -> None:
    """Become one of several processes; process 0 listens at the coordinator's address, and nowhere else.

    From then on JAX handles SIGTERM, and `preemption_poll` reports it. When another process ends, this one ends too:
    at once with the same exit code where the other announced it, else with 75. Only process 0 writes to standard
    output.

    Raises:
        Interrupted: the others did not arrive.
        ValueError: process 0 can't listen at its address.
    """
    if info.process_id:
        _wait_for(info.coordinator)
    else:
        _check_address(info.coordinator)

    # A process that ends while joining leaves the others with an error, so a stop signal waits for the join.
    joined = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def delay_stop() -> None:
        if not os.read(reader, 1):
            return
        if joined.wait(STOP_DURING_JOIN_SECONDS):
            os.kill(os.getpid(), signal.SIGTERM)  # JAX handles it now, and tells all processes
        else:
            end_at_once("asked to stop before the others were there")

    threading.Thread(target=delay_stop, name="join", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            info.coordinator,
            info.process_count,
            info.process_id,
            local_device_ids=info.devices,
            cluster_detection_method="deactivate",  # it would choose other devices
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=lost_host.LOST_AFTER_SECONDS,
            coordinator_bind_address=None if info.process_id else info.coordinator,
        )
    except jax.errors.JaxRuntimeError as error:
        lost_host.mark_leaving()
        reason = str(error).splitlines()[0]
        raise Interrupted(f"{info}; it could not join the others: {reason}; start all of them again") from None

    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.set_wakeup_fd(-1)
    joined.set()
    os.close(writer)

    lost_host.watch_peers()
    if info.process_id:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  it stays open to the end


def _check_address(coordinator: str) -> None:
    """Raises ValueError unless process 0 can listen there. A pod's own name resolves only some time after its start."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + HOSTNAME_SECONDS
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
            return
        except OSError as error:
            if not isinstance(error, socket.gaierror) or time.monotonic() > end:
                raise ValueError(
                    f"process 0 can't listen at {coordinator}: {error}; name an address of this host, and a free port"
                ) from error
        time.sleep(1)


def _wait_for(coordinator: str) -> None:
    """Wait until process 0, which prepares the data first, listens."""
    host, _, port = coordinator.rpartition(":")
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return
        time.sleep(0.2)


def leave() -> None:
    """Leave together: other processes may still be reading, so no process leaves before all are done.

    This is not jax.distributed.shutdown(), which first ends the agreement on where to stop. After a signal in the last
    second, a process would then wait for peers that have left already, for three minutes or forever.
    """
    if is_multiprocess():
        lost_host.client().shutdown()
        lost_host.mark_leaving()
        if distributed.global_state.service is not None:
            distributed.global_state.service.shutdown()  # answers pending requests of the others


def is_process_zero() -> bool:
    """Return whether this is process 0, the only one that writes shared files."""
    return jax.process_index() == 0


def is_multiprocess() -> bool:
    return jax.process_count() > 1


def barrier(name: str) -> None:
    """Wait until every process has reached this call. `docs/hosts.md` lists the callers."""
    if is_multiprocess():
        multihost_utils.sync_global_devices(name)


def broadcast_from_zero(value: int) -> int:
    """Return process 0's value in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value))) if is_multiprocess() else value


def assert_same_on_all_hosts(values: Mapping[str, str]) -> None:
    """Compare values that must be the same in all processes. Each process must call this equally often.

    Raises:
        ValueError: they differ; the message has the first name with both values, and every process raises it.
    """
    if not is_multiprocess():
        return
    client, timeout_ms = lost_host.client(), 1000 * JOIN_SECONDS
    key = f"jaxstages/question {next(_comparisons)}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(dict(values)))

    if is_process_zero():
        numbers = range(1, jax.process_count())
        others = [json.loads(client.blocking_key_value_get(f"{key}/{number}", timeout_ms)) for number in numbers]
        client.key_value_set(f"{key}/verdict", json.dumps(first_difference(values, others)))

    if difference := json.loads(client.blocking_key_value_get(f"{key}/verdict", timeout_ms)):
        raise ValueError(f"the hosts disagree: {difference}; use the same value on all hosts, and restart them")


def first_difference(values: Mapping[str, str], others: list[dict[str, str]]) -> str:
    """Describe the first difference of processes 1, 2, ... from process 0's values; "" if there is none."""
    for number, other in enumerate(others, start=1):
        names = [name for name in [*values, *(other.keys() - values)] if values.get(name) != other.get(name)]
        if names:
            first, second = values.get(names[0], "nothing"), other.get(names[0], "nothing")
            more = f" (and {len(names) - 1} more)" if names[1:] else ""
            return f"{names[0]} is {first} in process 0, {second} in process {number}{more}"
    return ""


def gather_floats(values: dict[str, float]) -> dict[str, list[float]]:
    """Map each name to its values in all processes, in their order. The names are the same in all of them."""
    own = np.asarray([*values.values()])
    rows = multihost_utils.process_allgather(own) if is_multiprocess() else own[None]
    return {name: [float(value) for value in column] for name, column in zip(values, rows.T, strict=True)}


def gather_to_host(array: jax.Array) -> np.ndarray:
    """Return the whole array as numpy, wherever its shards are."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(jax.device_get(array))


def preemption_poll() -> Callable[[], bool] | None:
    """Return a function that tells whether any process got a stop signal; None in a single process.

    Each process must call it equally often; the same call gets the same answer in all of them.
    """
    return (lambda: multihost_utils.reached_preemption_sync_point(next(_polls))) if is_multiprocess() else None
