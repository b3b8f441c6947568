"""End all hosts of a run together when one of them fails or is lost.

A process that fails announces its exit code and reason to the others through the key-value store of JAX's coordination
service, which process 0 keeps; they end with the same code. A process that dies without a word is noticed by JAX's
heartbeats; then JAX aborts the others, and they end with code 75.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed

from jaxstages.runtime.signals import INTERRUPTED

LOST_AFTER_SECONDS = 30
"""Time without a heartbeat after which a host counts as lost."""

ANNOUNCE_SECONDS = 10
"""A failing process waits this long for the others to hear of it."""

CLIENT_ANSWER_SECONDS = 2
"""JAX's client answers within this time, if it can."""

LISTEN_SECONDS = 3600
"""Timeout of one request for an announced exit. An announcement is received at once; after a timeout it is requested
again."""

_EXIT_KEY, _EXIT_BARRIER = "jaxstages/end", "jaxstages/ended"

_leaving = threading.Event()
"""Set when this process has decided how it ends: the end of another then changes nothing."""

_announced_codes: list[int] = []
"""Exit code of this process after a failure, once it is announced."""


def client() -> Any:
    """Return the client of JAX's coordination service."""
    client = distributed.global_state.client
    assert client is not None, "several processes have joined"
    return client


def watch_peers() -> None:
    """From now on, end this process when another one fails or is lost."""
    threading.Thread(target=_end_with_failing_peer, name="end", daemon=True).start()
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _C_HANDLER)


def mark_leaving() -> None:
    """Stop reacting to the end of other processes."""
    _leaving.set()


def announce_exit(code: int, text: str) -> None:
    """Announce that this process fails, so that the others end at once with the same code and reason.

    Does nothing where the process is alone, or has left the others.

    Args:
        text: the reason, which this process has printed.
    """
    if not distributed.is_initialized() or _leaving.is_set():
        return
    _leaving.set()
    _announced_codes.append(code)
    announcement = {"process": distributed.global_state.process_id, "code": code, "text": text}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or the service is gone
        client().key_value_set(_EXIT_KEY, json.dumps(announcement))
    _wait_until_all_have_heard()


def wait_for_lost_peer(error: BaseException) -> None:
    """Block until the loss of a host would have been detected. Returns only if no host was lost.

    When a host is lost, its peers get connection errors in whatever they compute, save or wait for, long before the
    heartbeats time out. So an error from outside this package is raised only if no loss is reported in the meantime.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).parents[1]
    if not Path(frames[-1].filename).is_relative_to(package):
        time.sleep(1.5 * LOST_AFTER_SECONDS)


def _end_with_failing_peer() -> None:
    """Wait for another process to announce its failure, as long as this one lives, and end with its code."""
    while True:
        try:
            announcement = json.loads(client().blocking_key_value_get(_EXIT_KEY, 1000 * LISTEN_SECONDS))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # this process has left, or process 0 is gone
                return
    if _leaving.is_set():
        return
    _leaving.set()
    _print(f"process {announcement['process']} ended: {announcement['text']}")
    _announced_codes.append(announcement["code"])
    _wait_until_all_have_heard()
    os._exit(announcement["code"])


def _wait_until_all_have_heard() -> None:
    """If process 0 left first, the others would lose its store before they know the reason."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client().wait_at_barrier(_EXIT_BARRIER, 1000 * ANNOUNCE_SECONDS)


def _handle_abort(_: int) -> None:
    """Handle SIGABRT, by which JAX's client ends the process when a host is lost.

    The client has a callback for a lost host, but jaxlib 0.10.2 can't call one (std::bad_cast). Python's own signal
    handlers would never run in an aborting process, so this is installed by C. The client holds its lock during its
    abort and answers no requests: if it does answer, the abort has another cause and continues.
    """
    if _announced_codes:  # process 0 left before its last answer arrived
        os._exit(_announced_codes[0])
    if _leaving.is_set():
        time.sleep(2 * ANNOUNCE_SECONDS)  # the process is about to end with its own code
    if _client_answers():
        faulthandler.dump_traceback(all_threads=True)
        return
    _leaving.set()
    _print("lost contact with a host; the last checkpoint is intact: restart all hosts to resume")
    os._exit(INTERRUPTED)


_C_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)(_handle_abort)


def _client_answers() -> bool:
    answered = threading.Event()

    def request() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no such key
            client().key_value_try_get("jaxstages/nothing")
        answered.set()

    threading.Thread(target=request, name="ask", daemon=True).start()
    return answered.wait(CLIENT_ANSWER_SECONDS)


def _print(text: str) -> None:
    print(f"jaxstages: {text}", file=sys.stderr, flush=True)
