"""How tests compile: quickly, and into one folder for all processes; what one has compiled, the others load."""

import atexit
import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_rename = os.rename  # that of before the tests which count, or fail, the program's calls

QUICK = (
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
"""Flags of XLA. Tests are about values, not speed: most of their time goes to compiling, and of that most to LLVM."""

MODELS = 16
"""The most that share a trace at a time: each holds what was compiled of it, and a process may have so many maps."""

NAME = "JAXSTAGES_TEST_COMPILED"
"""The environment variable that tells workers and child processes of the folder."""


def folder() -> Path:
    """The session's; made, and removed at the end, by the process that asks first."""
    if NAME not in os.environ:
        os.environ[NAME] = tempfile.mkdtemp(prefix="jaxstages-compiled-")
        atexit.register(shutil.rmtree, os.environ[NAME], ignore_errors=True)
    return Path(os.environ[NAME])


def environment() -> dict[str, str]:
    """The variables of a child process that has one device and compiles as the tests do.

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
    """The same, but runs with one model share it, and its trace: tracing is most of a run that compiles nothing."""
    import jax

    made: list[tuple[Any, Any]] = []  # not a dict: a mesh and a function are told apart by `==`, not by their text

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
    """The same, but calls with equal keys share the result, and so what was compiled of it."""
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
    """All that `jit_step` depends on: model, mesh and recipe determine the rest of the program.

    The recipe is copied, since tests change theirs between runs; where a run stops is no part of its step.
    """
    import jax

    config = copy.deepcopy(program.config)
    config.loop.stop_after = 0
    debug = jax.config.values["jax_debug_nans"]
    return program.model, program.mesh, program.rules, program.seed, program.context, config, program.name, remat, debug
