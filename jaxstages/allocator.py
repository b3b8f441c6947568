"""Memory that the process keeps: on CPU, a step's buffers are given back to the kernel and faulted in again each time.

XLA:CPU takes the temporary buffer of a step from malloc, and glibc serves what is large by mmap: fresh pages, one fault
for each 4 KiB, in every step (a fifth of a step's CPU time in nanoGPT's CPU setting).
"""

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER, _TWO_GIB = -1, 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on freed memory stays in the process, for the next step to use; False where malloc is not glibc's.

    To be called before other threads start: blocks above 64 MiB come from the heap only in malloc's first arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, _TWO_GIB))
    return [mallopt(name, value) for name, value in settings] == [1, 1, 1]
