"""One folder of compiled functions for all processes of a test session: what one has compiled, the others load."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_rename = os.rename  # that of before the tests which count, or fail, the program's calls

NAME = "JAXSTAGES_TEST_COMPILED"
"""The environment variable that tells workers and child processes of the folder."""


def folder() -> Path:
    """The session's; made, and removed at the end, by the process that asks first."""
    if NAME not in os.environ:
        os.environ[NAME] = tempfile.mkdtemp(prefix="jaxstages-compiled-")
        atexit.register(shutil.rmtree, os.environ[NAME], ignore_errors=True)
    return Path(os.environ[NAME])


def write_whole_files() -> None:
    """JAX writes an entry in place: a process that reads meanwhile, or after a kill, would get half of it, and warn."""
    from jax._src.lru_cache import LRUCache

    def put(self: LRUCache, key: str, value: bytes) -> None:
        entry = Path(str(self.path)) / f"{key}-cache"
        if not entry.exists():
            part = entry.with_name(f"{key}.{os.getpid()}")
            part.write_bytes(value)
            _rename(part, entry)

    LRUCache.put = put
