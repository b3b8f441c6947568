"""One folder of compiled functions for all processes of a test session: what one has compiled, the others load."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def traced_once(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but stages with one model share it, and its trace: tracing is most of a run that compiles nothing."""
    import jax

    made: dict[str, Any] = {}

    def make(config: Any, vocab: int, **settings: Any) -> Any:
        key = f"{config} {vocab} {settings}"
        if key not in made:
            model = make_model(config, vocab, **settings)
            made[key] = model._replace(init=jax.jit(model.init), headless=jax.jit(model.headless))
        return made[key]

    return make
