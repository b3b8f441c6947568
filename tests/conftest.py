"""Strict numbers for every test: eight virtual devices, dtype and rank promotion raise, warnings are errors."""

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
# Shapes and dtypes are checked at each call of the modules that tell them. Elsewhere it would find nothing that pyright
# does not, and cost a loop of small calls 10 to 40 times its time.
jaxtyping.install_import_hook(
    [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in SHAPED], "beartype.beartype"
)

import jaxstages  # noqa: E402, F401  (sets the XLA flags that it needs)
from jaxstages.generation import decode  # noqa: E402
from jaxstages.models.sharding import make_mesh  # noqa: E402
from jaxstages.training import compile as compilation  # noqa: E402
from jaxstages.training import loop, program, setup  # noqa: E402

# Models of torch are small here, and the threads of two workers would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# Runs sync hundreds of small files: in memory that costs nothing, and no test depends on what is under a folder.
MEMORY, ROOM = Path("/dev/shm"), 6 * 2**30
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
    tempfile.tempdir = os.environ["TMPDIR"] = str(MEMORY)

# Child processes keep what they compile here, not in the home of who runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxstages-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# Else most of the time goes to compiling the same small models again: in another test, or in the other worker.
compiled.write_whole_files()
compiled.use_folder()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

program.make_model = compiled.traced_once(program.make_model)
decode.compile_decode = compiled.made_once(decode.compile_decode)
compilation.jit_step = compiled.made_once(compilation.jit_step, compiled.step_key)

# A full collection of the heap that the tests share takes half a second: at one stage in eight it is soon enough.
collect, stages = loop.freeze_gc_and_trim_heap, itertools.count()
loop.freeze_gc_and_trim_heap = lambda: None if next(stages) % 8 else collect()

# The same examples each time, and no deadline: a slow machine is no failure.
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
"""The files that take long, in about this order: were one begun last, a worker would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    order = {tests / name: place for place, name in enumerate(LONGEST)}
    assert all(file.exists() for file in order)
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much the tests under `reliability/` do: the defaults are for `make test`, `make soak` gives more."""
    for name, count, what in (
        ("kills", 3, "SIGKILLs at random instants"),
        ("terms", 2, "SIGTERMs at random instants"),
        ("faults", 40, "random faults in checkpoints"),
        ("every", 200, "each how many-th crash point is gone on from"),
        ("errors", 1000, "each how many-th call fails"),
        ("native", 1, "crash points inside native code"),
        ("races", 1, "pairs of runs in one directory"),
        ("pairs", 0, "SIGTERMs to two processes"),
        ("hosts", 2, "processes that train as one run"),
        ("stages", 1, "that they train, 1 or 3"),
        ("lost", 1, "of them that die at random instants"),
        ("strikes", 2, "SIGKILLs to sweeps, and as many SIGTERMs in `make soak`"),
        ("disks", 2, "sizes of a disk that is too small"),
        ("fuzz", 200, "random recipes, and as many data files"),
        ("seed", 0, "of what is random"),
    ):
        parser.addoption(f"--{name}", type=int, default=count, help=what)
