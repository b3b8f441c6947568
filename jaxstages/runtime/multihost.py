"""Several processes as one program: who writes, who waits, how all of them agree to stop, and how one's end is all's.

What they say to each other outside of computations goes through the key-value store of JAX's coordination service,
which process 0 keeps.
"""

import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from jaxstages.runtime.cluster import Place
from jaxstages.runtime.signals import INTERRUPTED, end_at_once
from jaxstages.types import Interrupted

PATIENCE = 5
"""Seconds that a signal waits for a process to have joined the others."""

LOST_AFTER = 30
"""Seconds without a sign of life after which a host counts as lost, and the others end."""

JOIN_WITHIN = 300
"""Seconds that all have to come once process 0 listens."""

NAMED_WITHIN = 60
"""Seconds until the name of process 0's host must be known to it."""

TOLD_WITHIN = 10
"""Seconds that a process which ends by a fault of its own waits until all have heard of it."""

ANSWERS_WITHIN = 2
"""Seconds that JAX's client has to answer, where it can."""

ASKED_EVERY = 3600
"""Seconds for which a process asks once whether another has ended by a fault; it hears of that at once."""

_END, _ENDED = "jaxstages/end", "jaxstages/ended"

_questions, _polls = itertools.count(1), itertools.count(1)
"""Every process asks the others the same questions, in the same order, and so has the same numbers for them."""


def join(place: Place) -> None:
    """Become one of several processes; process 0 listens at the coordinator's address, and nowhere else.

    From here on JAX takes SIGTERM, and `preemption_poll` tells of it. When one of the others ends, this one does: at
    once with the same exit code where the other could tell why, and else with 75. What the others would say a second
    time is not shown.

    Raises:
        Interrupted: the others did not come.
        ValueError: process 0 can't listen at its address.
    """
    if place.process_id:
        _wait_for(place.coordinator)
    else:
        _check_address(place.coordinator)
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
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.process_count,
            place.process_id,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",  # it would choose devices of its own
            initialization_timeout=JOIN_WITHIN,
            heartbeat_timeout_seconds=LOST_AFTER,
            coordinator_bind_address=None if place.process_id else place.coordinator,
        )
    except jax.errors.JaxRuntimeError as error:
        _leaving.set()
        why = str(error).splitlines()[0]
        raise Interrupted(f"{place}; it could not join the others: {why}; start all of them again") from None
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as of `nohup`
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.set_wakeup_fd(-1)
    joined.set()
    os.close(writer)
    threading.Thread(target=_end_with_the_others, name="end", daemon=True).start()
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _C_HANDLER)
    if place.process_id:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  it stays open to the end


def _check_address(coordinator: str) -> None:
    """That process 0 can listen there; a pod's own name is known a while after it has begun."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + NAMED_WITHIN
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
    """Until process 0, which prepares the data first, listens."""
    host, _, port = coordinator.rpartition(":")
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return
        time.sleep(0.2)


def is_process_zero() -> bool:
    """Does this process write what is written once?"""
    return jax.process_index() == 0


def is_multiprocess() -> bool:
    return jax.process_count() > 1


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if is_multiprocess():
        multihost_utils.sync_global_devices(name)


def broadcast_from_zero(value: int) -> int:
    """The leader's value, in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value))) if is_multiprocess() else value


def assert_same_on_all_hosts(said: Mapping[str, str]) -> None:
    """All processes say what must be the same in all of them; each must call this as often as the others.

    Raises:
        ValueError: they differ; it has the first name with both values, and comes in every process.
    """
    if not is_multiprocess():
        return
    client, key, wait = _client(), f"jaxstages/question {next(_questions)}", 1000 * JOIN_WITHIN
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(dict(said)))
    if is_process_zero():
        others = range(1, jax.process_count())
        told = [json.loads(client.blocking_key_value_get(f"{key}/{number}", wait)) for number in others]
        client.key_value_set(f"{key}/verdict", json.dumps(first_difference(said, told)))
    if found := json.loads(client.blocking_key_value_get(f"{key}/verdict", wait)):
        raise ValueError(f"the hosts differ: {found}; give all of them the same, and start all of them again")


def first_difference(said: Mapping[str, str], told: list[dict[str, str]]) -> str:
    """Where the others, processes 1, 2, ..., first say something else than process 0; empty where they do not."""
    for number, other in enumerate(told, start=1):
        names = [name for name in [*said, *(other.keys() - said)] if said.get(name) != other.get(name)]
        if names:
            ours, theirs = (one.get(names[0], "nothing") for one in (said, other))
            more = f" (and {len(names) - 1} more)" if names[1:] else ""
            return f"{names[0]} is {ours} in process 0, {theirs} in process {number}{more}"
    return ""


def gather_to_host(array: jax.Array) -> np.ndarray:
    """All of an array, wherever its parts lie."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(jax.device_get(array))


def preemption_poll() -> Callable[[], bool] | None:
    """`asked()`, for several processes, each of which must ask as often as the others: has one of them got a signal?
    All get the same answer to the same question. None where there is one process."""
    return (lambda: multihost_utils.reached_preemption_sync_point(next(_polls))) if is_multiprocess() else None


def leave() -> None:
    """The others may still be reading: nobody goes before all are done.

    Not by jax.distributed.shutdown(): that first ends the agreement on where to stop. One that a signal began in the
    last second would be waited for by a process whose peers have left it already: for three minutes, or for ever.
    """
    if is_multiprocess():
        _client().shutdown()
        _leaving.set()
        if distributed.global_state.service is not None:
            distributed.global_state.service.shutdown()  # answers what the others still have to hear


_leaving = threading.Event()
"""This process knows how it ends: the end of another changes nothing."""

_ends_with: list[int] = []
"""The code of its end by a fault, once it is told."""


def _client() -> Any:
    client = distributed.global_state.client
    assert client is not None, "several processes have joined"
    return client


def _by_abort(_: int) -> None:
    """JAX's client aborts the process where process 0 is gone, or says that another is. It has a callback for that, but
    jaxlib 0.10.2 can't call one (std::bad_cast). So SIGABRT is taken here, by C: Python's own handlers would never run.
    The client holds its lock then, and answers no more: an abort in which it does answer is one of another kind, and
    goes on as it would have."""
    if _ends_with:  # all have heard, and process 0 was gone before its last answer was here
        os._exit(_ends_with[0])
    if _leaving.is_set():
        time.sleep(2 * TOLD_WITHIN)  # the process ends just now, and knows its code
    if _answers():
        faulthandler.dump_traceback(all_threads=True)
        return
    _leaving.set()
    _say("a host is lost, and so the run ends here too; the last checkpoint stands, start all of them again to go on")
    os._exit(INTERRUPTED)


_C_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)(_by_abort)


def _answers() -> bool:
    """Does JAX's client answer any question?"""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no such key
            _client().key_value_try_get("jaxstages/nothing")
        answered.set()

    threading.Thread(target=ask, name="ask", daemon=True).start()
    return answered.wait(ANSWERS_WITHIN)


def _end_with_the_others() -> None:
    """Wait for the word of another that ends by a fault, for as long as this process lives, and end as it does."""
    while True:
        try:
            told = json.loads(_client().blocking_key_value_get(_END, 1000 * ASKED_EVERY))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # this process has left, or process 0 is gone
                return
    if _leaving.is_set():
        return
    _leaving.set()
    _say(f"process {told['process']} ended: {told['text']}")
    _ends_with.append(told["code"])
    _until_all_have_heard()
    os._exit(told["code"])


def announce_exit(code: int, text: str) -> None:
    """This process is about to end by a fault, which it has printed: the others do so too, at once and for the same
    reason. Nothing happens where it is alone, or has left them."""
    if not distributed.is_initialized() or _leaving.is_set():
        return
    _leaving.set()
    _ends_with.append(code)
    number = distributed.global_state.process_id
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or nobody is there any more
        _client().key_value_set(_END, json.dumps({"process": number, "code": code, "text": text}))
    _until_all_have_heard()


def _until_all_have_heard() -> None:
    """Were process 0 to go first, the others would lose its store before they know why."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier(_ENDED, 1000 * TOLD_WITHIN)


def wait_for_lost_peer(error: BaseException) -> None:
    """Where a host is lost, its peers get some error of a connection, in whatever they compute, save or wait for, long
    before the heartbeats tell. So an error that is not our own is believed only when no loss was told of meanwhile; if
    there is one, this does not return."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    if not Path(frames[-1].filename).is_relative_to(Path(__file__).parent):
        time.sleep(1.5 * LOST_AFTER)


def _say(text: str) -> None:
    print(f"jaxstages: {text}", file=sys.stderr, flush=True)
