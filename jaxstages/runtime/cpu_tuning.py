"""What the process keeps: freed memory, compiled functions, and objects that the collector leaves alone; and which of
its threads stand back."""

import collections
import contextlib
import ctypes
import gc
import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER, _TWO_GIB = -1, 2**31 - 1


def disable_malloc_trim() -> bool:
    """From now on freed memory stays in the process, for the next step to use; False where malloc is not glibc's.

    XLA:CPU takes the temporary buffer of a step from malloc, and glibc gets what is large from the kernel each time:
    fresh pages, a fault for each 4 KiB of them, which took a fifth of a step's CPU time in nanoGPT's CPU setting.

    To be called before other threads start: blocks above 64 MiB come from the heap only in malloc's first arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, _TWO_GIB))
    return [mallopt(name, value) for name, value in settings] == [1, 1, 1]


def enable_compilation_cache() -> str:
    """Compiled functions are kept in the user's cache folder, and found there by the next process: what to say, if they
    can't be. `JAX_COMPILATION_CACHE_DIR` names another folder, or, empty, none.

    What lies in such a folder is run, so it must be the user's alone. It has a name of its own for each kind of
    processor, for machine code of one may not run on another, and home folders are shared.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return ""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "jaxstages" / f"compiled-{_processor()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError) as error:
        return f"compiled functions are not kept: {error}; set JAX_COMPILATION_CACHE_DIR to a folder of yours"
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        return f"compiled functions are not kept: others may write to {folder}; remove it, or chmod 700"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default only what took a second is kept: a start has a hundred smaller ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return ""


def _processor() -> str:
    """A short name of what the processor can do."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    told = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(" ".join([os.uname().machine, *sorted(told.split())]).encode()).hexdigest()[:8]


def freeze_gc_and_trim_heap() -> None:
    """Before the first step: what is alive stays, the collector need not look at it between steps (what an earlier run
    in this process had frozen, or left, goes). What is free goes back to the system, once: a step's memory is one
    piece, for which what loading and compiling left free is too small, and it would lie beside it."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
        _empty_lists(libc)
        libc.malloc_trim(0)


def _empty_lists(libc: Any) -> None:
    """A compilation leaves some 25,000 small pieces in malloc's lists, which it walks over for each array of a step.
    They are taken, and never freed: addresses, the memory has gone back. What is larger is set aside meanwhile."""
    libc.sbrk.restype, libc.malloc.restype, libc.free.argtypes = ctypes.c_size_t, ctypes.c_size_t, (ctypes.c_void_p,)
    end_of_heap = libc.sbrk(0)

    def take(powers: range) -> Iterator[int]:
        for size in (2**k for k in powers):
            at = 1
            while 0 < at < end_of_heap:
                yield (at := libc.malloc(size))

    larger = list(take(range(26, 16, -1)))
    collections.deque(take(range(16, 6, -1)), maxlen=0)
    for at in larger:
        libc.free(at)


def lower_thread_priority() -> None:
    """From now on this thread, and those that it starts, leave most of the CPU time to others, not all (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
