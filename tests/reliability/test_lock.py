"""One run at a time in a folder: the second is turned away at once, and names the first, which does not notice."""

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxstages.runtime.workdir import lock
from tests.reliability.harness import Child, Home, outcome, print_table, unlike

LIMIT = 3.0
"""Seconds that a refusal may take beside the import of the program's libraries."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("lock"), command=("pretrain",), more=("--config.pretrain.loop.steps=8",))


@pytest.fixture(scope="module")
def whole(home: Home) -> dict:
    assert home.run(home.folder / "whole") == 0
    return outcome(home.folder / "whole")


@pytest.fixture(scope="module")
def imports() -> float:
    """Seconds from the start of a process to the end of the program's imports."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import jaxstages.cli.main, jaxstages.cli.train"], check=True)
    return time.monotonic() - began


def start(home: Home, work: Path, name: str) -> Child:
    """A run in `work`, by another name of that folder: so it has its own log, and no name gets round the lock."""
    work.mkdir(exist_ok=True)
    (work.parent / name).symlink_to(work.name)
    return home.start(work.parent / name)


def held(child: Child) -> None:
    """Until the child has the lock."""
    file, end = child.work / "LOCK", time.monotonic() + 60
    while not (file.exists() and file.read_text().endswith(f" pid {child.process.pid}")):
        assert child.process.poll() is None and time.monotonic() < end, child.log()
        time.sleep(0.002)


def refused(child: Child, holder: Child) -> None:
    """It ended with code 2 and one line more, which names the holder."""
    line = child.log().strip().splitlines()[-1]
    assert child.process.returncode == 2 and "Traceback" not in child.log(), child.log()
    assert re.search(rf"is in use by \S+ pid {holder.process.pid}; wait for it, or take another --workdir", line), line


def test_the_second_is_turned_away_and_the_first_does_not_notice(
    home: Home, whole: dict, imports: float, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    first = start(home, work, "first")
    held(first)
    began = time.monotonic()
    second = start(home, work, "second")
    second.wait()
    seconds = time.monotonic() - began
    print_table("refusal, s", {"from spawn": round(seconds, 2), "bare imports": round(imports, 2)})
    assert first.process.poll() is None, "the first ended too early to test anything"
    refused(second, first)
    assert seconds - imports < LIMIT
    assert first.wait() == 0
    assert unlike(outcome(work), whole) == []


def test_a_kill_frees_it_at_once(home: Home, whole: dict, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = start(home, work, "first")
    held(first)
    with pytest.raises(ValueError, match=f"pid {first.process.pid};"):
        lock(work)
    first.kill(signal.SIGKILL)
    began = time.monotonic()
    lock(work).close()
    assert time.monotonic() - began < 0.05, "it is the kernel that frees it, nobody waits for anything"
    assert start(home, work, "second").wait() == 0
    assert unlike(outcome(work), whole) == []


def test_races(home: Home, whole: dict, imports: float, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Pairs of runs, started at any distance: one of them does the work, the other one is refused, or comes too late
    and finds it done. Half of the pairs start together, so that either may win."""
    count, seed = request.config.getoption("--races"), request.config.getoption("--seed")
    dice, ends, slowest = random.Random(seed), {"first": 0, "second": 0, "too late": 0}, 0.0
    for number in range(count):
        work = tmp_path / f"work{number}"
        children = [start(home, work, f"first{number}")]
        time.sleep(dice.uniform(0, 0.05) if number % 2 else dice.uniform(0, 4.0))
        children.append(start(home, work, f"second{number}"))
        began = time.monotonic()
        while children[0].process.poll() is None and children[1].process.poll() is None:
            time.sleep(0.002)
        seconds = time.monotonic() - began
        done = [child for child in children if child.wait() == 0]
        if len(done) == 1:
            (late,) = (child for child in children if child not in done)
            refused(late, done[0])
            ends["first" if done[0] is children[0] else "second"] += 1
            slowest = max(slowest, seconds)
            assert seconds - 2 * imports < LIMIT, "two of them import at once here"
        else:
            assert "pretrain: already completed" in children[1].log()
            ends["too late"] += 1
        assert unlike(outcome(work), whole) == [], f"pair {number} of seed {seed}"
    print_table(f"{count} races", {"seed": seed, "done by": ends, "slowest refusal, s": round(slowest, 2)})
