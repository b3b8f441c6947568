"""Every change of the file system is a place to be killed at, or to fail: each state restores to the same end.

The run is made once with Python's file calls wrapped; before each of them the tree is copied as a kill would leave it.
Calls inside TensorStore are killed, or fail, by strace.
"""

import contextlib
import errno
import gc
import hashlib
import itertools
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxstages.cli.train import run_stages
from jaxstages.config import Recipe
from tests.reliability.harness import Home, garbage, make_recipe, outcome, print_table, unlike

CALLS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "fsync")


@contextlib.contextmanager
def before_each_call(hook: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """`hook(name, arguments)` runs before every change that Python makes to the file system, one at a time."""
    one_at_a_time, inside = threading.RLock(), threading.local()

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            with one_at_a_time:
                if not getattr(inside, "hook", False):  # the hook's own calls are not the program's
                    inside.hook = True
                    try:
                        hook(name, args)
                    finally:
                        inside.hook = False
            return function(*args, **named)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield


def short(home: Path) -> Recipe:
    """Two stages of four steps with two saves each, one kept: a first save, a deletion, a hand-off."""
    recipe = make_recipe(home)
    recipe.instruct = None
    recipe.prompts = ()
    for stage in (recipe.pretrain, recipe.finetune):
        stage.loop.steps, stage.loop.save_every, stage.loop.eval_every, stage.loop.keep = 4, 2, 4, 1
    return recipe


def copy_if_there(source: str, target: str) -> None:
    """Native threads go on while the tree is copied: a file of theirs may be gone meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        shutil.copy2(source, target)


def digest(folder: Path) -> str:
    actual = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if "tensorboard" not in path.parts:
            actual.update(str(path).encode())
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                actual.update(path.read_bytes())
    return actual.hexdigest()


def test_a_kill_at_each_call_of_python(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    home, states = tmp_path / "home", tmp_path / "states"
    recipe, work = short(home), home / "work"
    every = request.config.getoption("--every")
    seen: set[str] = set()
    chosen: list[tuple[str, Path]] = []
    calls = Counter()

    def keep(name: str, args: tuple[Any, ...]) -> None:
        calls[name] += 1
        before = digest(home)
        if before in seen:
            return
        if len(seen) % every == 0:
            folder = states / str(len(seen))
            shutil.copytree(home, folder, symlinks=True, copy_function=copy_if_there)
            chosen.append((f"{name} {' '.join(map(str, args))}", folder))
        seen.add(before)

    with before_each_call(keep):
        run_stages(recipe, work)
    expected = outcome(work)
    for what, folder in chosen:
        shutil.rmtree(home)
        shutil.copytree(folder, home, symlinks=True)
        run_stages(recipe, work)
        assert unlike(outcome(work), expected) == [], f"killed before {what}"
        assert garbage(work) == [], f"killed before {what}"
        assert [p for p in (home / "cache").rglob("*.tmp*") if p.is_file()] == [], f"killed before {what}"
    print_table(f"{sum(calls.values())} calls, {len(seen)} different states, {len(chosen)} gone on from", dict(calls))


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, dict[str, Any]]:
    """A folder, how many calls a run in it makes, and what the run comes to."""
    home = tmp_path_factory.mktemp("errors") / "home"
    recipe, count = short(home), itertools.count()
    with before_each_call(lambda name, args: next(count)):
        run_stages(recipe, home / "work")
    return home, next(count), outcome(home / "work")


# Orbax's own threads find their event loop closed after some errors; what becomes of the run is asserted below.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_at_each_call_of_python(
    counted: tuple[Path, int, dict[str, Any]], request: pytest.FixtureRequest, number: int
) -> None:
    """An OSError (code 74) or, in what Orbax does on its own account, success; the same bits when it is gone."""
    home, total, expected = counted
    recipe, work = short(home), home / "work"
    ends, every = Counter(), request.config.getoption("--errors")
    first = 1 + (number + request.config.getoption("--seed")) % every  # so that all can be had in parts
    for chosen in range(first, total + 1, every):
        shutil.rmtree(home)
        make_recipe(home)
        count, failed = 0, ""

        def fail(name: str, args: tuple[Any, ...], at: int = chosen) -> None:
            nonlocal count, failed
            count += 1
            if count >= at and not failed:
                failed = f"{name} {' '.join(map(str, args))}"
                raise OSError(number, os.strerror(number), str(args[0]))

        with before_each_call(fail):
            try:
                run_stages(recipe, work)
                ends["not needed"] += 1
            except OSError:
                ends["code 74"] += 1
        run_stages(recipe, work)
        assert unlike(outcome(work), expected) == [], f"failed at {failed}"
        assert garbage(work) == [], f"failed at {failed}"
        gc.collect()  # an error holds what was compiled; hundreds of them, more maps than a process may have
    print_table(f"{errno.errorcode[number]} at {sum(ends.values())} of {total} calls", dict(ends))
    assert ends["code 74"] > sum(ends.values()) // 2


STRACE = shutil.which("strace")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, dict[str, Any]]:
    """A recipe of one stage, and what comes of it."""
    home = Home(tmp_path_factory.mktemp("native"), command=("pretrain",), more=("--config.pretrain.loop.steps=6",))
    assert home.run(home.folder / "whole") == 0
    return home, outcome(home.folder / "whole")


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC", "error=EIO"])
def test_native_calls(
    whole: tuple[Home, dict[str, Any]], tmp_path: Path, request: pytest.FixtureRequest, fault: str
) -> None:
    """The K-th fsync, write or rename of a thread, whoever makes it, kills the run or fails."""
    (home, expected), ends = whole, Counter()
    points = [(call, k) for call in ("fsync", "writev", "rename") for k in range(1, 41)]
    chosen = points[:: max(1, len(points) * 3 // request.config.getoption("--native"))]
    for call, k in chosen:
        work = tmp_path / f"{call}{k}"
        trace = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}")
        # With it strace is faster, and sends no signals.
        trace += () if "KILL" in fault else ("--seccomp-bpf",)
        code = home.start(work, (*trace, "-e", f"inject={call}:{fault}:when={k}")).wait()
        ends[f"{call}: {code}"] += 1
        assert code in ((0, -signal.SIGKILL, 128 + signal.SIGKILL) if "KILL" in fault else (0, 74)), (call, k, code)
        if code:
            assert home.run(work) == 0
        assert unlike(outcome(work), expected) == [], (call, k)
        assert garbage(work) == []
        shutil.rmtree(work)
    print_table(f"{fault} at {len(chosen)} native calls", dict(ends))
    assert sum(count for end, count in ends.items() if not end.endswith(" 0")) * 2 > len(chosen), "hardly one was hit"
