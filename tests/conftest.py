"""Strict numerics for every test: eight virtual devices, dtype and rank promotion raise, warnings are errors."""

import atexit
import itertools
import os
import re

from tests import compiled

# Before jax starts its backend.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {compiled.QUICK}"

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

ROOT = Path(__file__).parents[1]
SHAPES = re.compile(r"from jaxtyping import .*\b(Bool|Float|Int)\b")
SHAPED = [file for file in (ROOT / "jaxstages").rglob("*.py") if SHAPES.search(file.read_text())]
# Check shapes and dtypes at each call, in the modules that annotate them. In other modules the check would find nothing
# that pyright does not, and would slow loops of small calls down by a factor of 10 to 40.
jaxtyping.install_import_hook(
    [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in SHAPED], "beartype.beartype"
)

import jaxstages  # noqa: E402, F401  (sets the XLA flags that it needs)
from jaxstages.generation import decode  # noqa: E402
from jaxstages.models.sharding import make_mesh  # noqa: E402
from jaxstages.training import compile as compilation  # noqa: E402
from jaxstages.training import loop, program, setup  # noqa: E402

# The torch models are small, and the threads of two workers would compete.
os.environ["OMP_NUM_THREADS"] = "1"

# Runs sync hundreds of small files, which is free in memory; no test depends on the file system.
MEMORY, ROOM = Path("/dev/shm"), 6 * 2**30
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
    tempfile.tempdir = os.environ["TMPDIR"] = str(MEMORY)

# Child processes cache what they compile here, not in the user's home.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxstages-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# Without a shared cache, each worker would compile the same small models again.
compiled.write_whole_files()
compiled.use_folder()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

program.make_model = compiled.traced_once(program.make_model)
decode.compile_decode = compiled.made_once(decode.compile_decode)
compilation.jit_step = compiled.made_once(compilation.jit_step, compiled.step_key)

# A full garbage collection of the tests' heap takes half a second: one stage in eight is often enough.
collect, stages = loop.freeze_gc_and_trim_heap, itertools.count()
loop.freeze_gc_and_trim_heap = lambda: None if next(stages) % 8 else collect()

# The same examples in every run, and no deadline: a slow machine is not a failure.
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def _single_device() -> Iterator[None]:
    """Train stages on the first of the eight devices: programs for all of them take several times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda config, devices=None: make_mesh(config, devices or jax.devices()[:1]))
        yield


@pytest.fixture
def all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train stages on all eight devices, laid out as `recipe.mesh` says."""
    monkeypatch.setattr(setup, "make_mesh", make_mesh)


@pytest.fixture(autouse=True)
def _no_terminal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


LONGEST = (
    *("reliability/test_buckets.py", "test_together.py", "test_stages.py", "test_sharding.py", "test_lora.py"),
    *("interop/test_parity.py", "reliability/test_crash_points.py", "test_interop.py", "reliability/test_stops.py"),
    *("reliability/test_hang.py", "reliability/test_disk_full.py", "reliability/test_goes_on.py", "test_docs.py"),
    *("reliability/test_nonfinite.py", "reliability/test_sweeps.py", "interop/test_folders.py", "test_serve.py"),
    "reliability/test_resume.py",
    *("test_primitives.py", "reliability/test_hosts_lost.py", "test_own_parts.py", "test_chat.py"),
    *("reliability/test_server.py", "test_anchor.py", "reliability/test_lock.py", "test_door.py", "test_model.py"),
    *("reliability/test_fuzz.py", "test_generate.py", "reliability/test_durability.py"),
    *("reliability/test_corruption.py", "test_engine.py", "test_compilation.py", "test_report.py", "test_optim.py"),
    *("interop/test_gguf.py", "reliability/test_security.py", "test_world.py", "test_losses.py"),
    *("test_experiments.py", "test_mixture.py", "test_kernels.py"),
)
"""The slowest files, slowest first: if one started last, the other worker would wait for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    order = {tests / name: place for place, name in enumerate(LONGEST)}
    assert all(file.exists() for file in order)
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that scale the tests under `reliability/`: the defaults are for `make test`, `make soak` sets more."""
    for name, count, what in (
        ("kills", 3, "SIGKILLs at random instants"),
        ("terms", 2, "SIGTERMs at random instants"),
        ("faults", 40, "random faults in checkpoints"),
        ("every", 200, "resume from every Nth crash point"),
        ("errors", 1000, "fail every Nth call"),
        ("native", 1, "crash points inside native code"),
        ("races", 1, "pairs of runs in one directory"),
        ("pairs", 0, "SIGTERMs to two processes"),
        ("hosts", 2, "processes that train as one run"),
        ("stages", 1, "stages that they train, 1 or 3"),
        ("lost", 1, "number of them that die at random instants"),
        ("strikes", 2, "SIGKILLs to sweeps, and as many SIGTERMs in `make soak`"),
        ("disks", 2, "sizes of a disk that is too small"),
        ("fuzz", 200, "random recipes, and as many data files"),
        ("seed", 0, "random seed"),
    ):
        parser.addoption(f"--{name}", type=int, default=count, help=what)
