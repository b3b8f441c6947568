"""Compilation in tests: fast, and into one cache folder that all processes share."""

import atexit
import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_rename = os.rename  # the original: some tests count the program's calls, or make them fail

QUICK = (
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
"""XLA flags for fast compilation: most of a test's time goes to compiling, and most of that to LLVM."""

MODELS = 16
"""Number of models whose traces are kept: each keeps its executables, and the memory maps of a process are limited."""

NAME = "JAXSTAGES_TEST_COMPILED"
"""Environment variable with the folder, for workers and child processes."""


def folder() -> Path:
    """Return the session's cache folder. The first process to call this makes it, and removes it at exit."""
    if NAME not in os.environ:
        os.environ[NAME] = tempfile.mkdtemp(prefix="jaxstages-compiled-")
        atexit.register(shutil.rmtree, os.environ[NAME], ignore_errors=True)
    return Path(os.environ[NAME])


def environment() -> dict[str, str]:
    """Return the environment variables of a child process that has one device and compiles as the tests do.

    The child should call `write_whole_files` as well.
    """
    return {
        "XLA_FLAGS": QUICK,
        "JAX_COMPILATION_CACHE_DIR": str(folder()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def use_folder() -> None:
    """Configure JAX as `environment` does, in a process that has imported it."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def write_whole_files() -> None:
    """Make JAX write cache entries atomically: a reader could get half of an entry that is being written, and warn."""
    from jax._src.lru_cache import LRUCache

    def put(self: LRUCache, key: str, value: bytes) -> None:
        entry = Path(str(self.path)) / f"{key}-cache"
        if not entry.exists():
            part = entry.with_name(f"{key}.{os.getpid()}")
            part.write_bytes(value)
            _rename(part, entry)

    LRUCache.put = put


def traced_once(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """Make runs with equal models share the model and its traces: with a warm cache, most of a run is tracing."""
    import jax

    made: list[tuple[Any, Any]] = []  # not a dict: meshes and functions compare by `==`

    def make(config: Any, vocab: int, **settings: Any) -> Any:
        key = (str(config), vocab, settings)
        for known, model in made:
            if known == key:
                return model
        model = make_model(config, vocab, **settings)
        model = model._replace(init=jax.jit(model.init), hidden=jax.jit(model.hidden))
        made.append((key, model))
        del made[:-MODELS]
        return model

    return make


def made_once(make: Callable[..., Any], key: Callable[..., Any] = lambda *arguments: arguments) -> Callable[..., Any]:
    """Make calls with equal keys share the result, and so its executables."""
    results: list[tuple[Any, Any]] = []  # not a dict: models and recipes can't be hashed

    def make_or_share(*arguments: Any) -> Any:
        new = key(*arguments)
        for earlier, result in results:
            if earlier == new:
                return result
        result = make(*arguments)
        results.append((new, result))
        del results[:-MODELS]
        return result

    return make_or_share


def step_key(program: Any, remat: str) -> Any:
    """Return everything that `jit_step` depends on: model, mesh and recipe determine the rest of the program.

    The recipe is copied, because tests change theirs between runs, and without `stop_after`, which the step ignores.
    """
    import jax

    config = copy.deepcopy(program.config)
    config.loop.stop_after = 0
    debug = jax.config.values["jax_debug_nans"]
    return program.model, program.mesh, program.rules, program.seed, program.context, config, program.name, remat, debug
