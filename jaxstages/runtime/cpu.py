"""Work-arounds for XLA on CPU: wrong sums, memory that the allocator returns too early, and threads that compete.

Functions without an effect on other platforms may be called there. `jaxstages/__init__.py` calls the first one before
it imports anything else, so the module itself imports no JAX.
"""

import collections
import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FUSION_FLAG, NO_REDUCTIONS = "--xla_cpu_experimental_ynn_fusion_type", "-reduce"

PROGRAMS_IN_FLIGHT = 16
"""Small programs that may be in flight at once. With 32 and several devices, jaxlib 0.10.2 deadlocks: some devices wait
to start the next program, and others wait for them in the one before."""

ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")
"""Device files of NVIDIA and AMD GPUs, and of TPUs."""

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER, _TWO_GIB = -1, 2**31 - 1


def avoid_wrong_sums() -> None:
    """Add a flag to XLA_FLAGS without which jaxlib 0.10 and 0.11 can return wrong values from fused reductions
    (jax#39103).

    XLA reads the flags once, when the backend starts. The user's own flags are kept.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")) and FUSION_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FUSION_FLAG}={NO_REDUCTIONS}".strip()


def check_sums() -> None:
    """Raise ValueError if this jaxlib returns wrong sums all the same, as where the backend started before the flag."""
    import jax
    import jax.numpy as jnp

    rows = jnp.stack((jnp.arange(32769.0), jnp.zeros(32769), jnp.zeros(32769)), axis=1)
    square = jax.vmap(lambda row: jnp.sum(jnp.square(jnp.eye(3) @ row)))
    if float(jax.jit(square)(rows)[-1]) != 32768.0**2:
        raise ValueError(f"this jaxlib computes wrong sums here; add {FUSION_FLAG}={NO_REDUCTIONS} to XLA_FLAGS")


def limit_programs_in_flight(number: int, result: Any) -> None:
    """Wait for the `number`-th (from 1) of many small programs before more than PROGRAMS_IN_FLIGHT are in flight."""
    import jax

    if number % PROGRAMS_IN_FLIGHT == 0 and jax.default_backend() == "cpu":
        jax.block_until_ready(result)


def disable_malloc_trim() -> bool:
    """Make glibc keep freed memory in the process, for the next step to use.

    XLA:CPU allocates the temporary buffer of a step with malloc, and glibc maps large blocks anew each time: fresh
    pages, and a page fault for each 4 KiB, took a fifth of a step's CPU time in nanoGPT's CPU setting.

    Call it before other threads start: blocks above 64 MiB come from the heap only in malloc's first arena.

    Returns whether it took effect: not on a machine with an accelerator, nor where malloc isn't glibc's.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(os.path.exists, ACCELERATORS)):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, _TWO_GIB))
    return [mallopt(name, value) for name, value in settings] == [1, 1, 1]


def freeze_gc_and_trim_heap() -> None:
    """Freeze the garbage collector's view of all live objects, and return free memory to the system once.

    The collector then need not traverse them between steps; objects that an earlier run in this process froze are
    collected first. Free memory goes back because the temporary memory of a step is one block: what loading and
    compiling left free is too small for it, and would stay unused beside it.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
        _empty_free_lists(libc)
        libc.malloc_trim(0)


def _empty_free_lists(libc: Any) -> None:
    """Allocate the small blocks in malloc's free lists, and never free them.

    A compilation leaves some 25,000 of them, which malloc walks over for each array of a step. They cost addresses
    only: their memory was returned. Larger blocks are set aside meanwhile.
    """
    libc.sbrk.restype, libc.malloc.restype, libc.free.argtypes = ctypes.c_size_t, ctypes.c_size_t, (ctypes.c_void_p,)
    end_of_heap = libc.sbrk(0)

    def allocate(powers: range) -> Iterator[int]:
        for size in (2**k for k in powers):
            address = 1
            while 0 < address < end_of_heap:
                yield (address := libc.malloc(size))

    larger = list(allocate(range(26, 16, -1)))
    collections.deque(allocate(range(16, 6, -1)), maxlen=0)
    for address in larger:
        libc.free(address)


def lower_thread_priority() -> None:
    """Lower the priority of this thread, and of those that it starts (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def processor_digest() -> str:
    """Return a short name of the processor's instruction sets: machine code for another one may not run here."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(" ".join([os.uname().machine, *sorted(flags.split())]).encode()).hexdigest()[:8]
