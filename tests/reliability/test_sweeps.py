"""A sweep that is killed, stopped, or runs out of disk: its trials end in the bits of their runs alone."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import compiled
from tests.reliability.harness import ROOT, Child, Home, garbage, outcome, print_table, unlike

RATES = ("0.001", "0.003")
PEAK_LR = "finetune.optim.schedule.peak_lr"
NO_INSTRUCT = "--config.instruct=None"
KNOWN = {"parents", "cache", "tokenizer", "sweep.json", "LOCK", "report.html", "tensorboard"}
"""What a sweep leaves in its folder, beside the trials and their logs."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    sweep = (f"--sweep.{PEAK_LR}={','.join(RATES)}", "--parallel=2", NO_INSTRUCT)
    return Home(tmp_path_factory.mktemp("home"), ("sweep",), sweep)


@pytest.fixture(scope="module")
def alone(home: Home) -> dict[str, Any]:
    """What each trial ends in as a run of its own, by the same command: traces that are shared, as in other tests,
    compile to other bits."""
    outcomes = {}
    for rate in RATES:
        work = home.folder / f"alone-{rate}"
        flags = [f"--config={home.folder}/recipe.py", f"--workdir={work}", NO_INSTRUCT, f"--config.{PEAK_LR}={rate}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | compiled.environment()
        subprocess.run([sys.executable, "-m", "jaxstages", "run", *flags], env=environment, check=True)
        outcomes[f"peak_lr={rate}"] = outcome(work)
    return outcomes


def trials_of(driver: Child) -> list[int]:
    """PIDs of the processes that a driver has started."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        if int(parent) == driver.process.pid and state != "Z":
            children.append(int(stat.parent.name))
    return children


def check(sweep: Path, alone: dict[str, Any]) -> None:
    """The trials are as alone, and the folder has nothing else."""
    for name, expected in alone.items():
        assert unlike(outcome(sweep / name), expected) == [] and garbage(sweep / name) == []
    left = {path.name for path in sweep.iterdir()} - KNOWN - alone.keys()
    assert {name for name in left if not name.endswith(".log")} == set()


def strike(driver: Child, number: int, victim: str, dice: random.Random) -> bool:
    """Send a signal to the driver, one of its trials, or both. Returns whether anything was hit."""
    trials = trials_of(driver)
    pids = [driver.process.pid] if victim != "trial" else []
    if trials and victim != "driver":
        pids.append(dice.choice(trials))
    hit = False
    for pid in pids:
        try:
            os.kill(pid, number)
            hit = True
        except ProcessLookupError:
            pass
    return hit


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_at_random_instants(
    home: Home, alone: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest, number: int
) -> None:
    count = request.config.getoption("strikes")
    if number == signal.SIGTERM and count < 10:
        pytest.skip("`make soak` has it; a fake sweep is stopped in test_experiments.py")
    dice, hits, codes, sweeps = random.Random(number), Counter(), Counter(), 0
    while hits.total() < count:
        sweep, begun = tmp_path / f"sweep{sweeps}", hits.total()
        most, code = min(count - begun, dice.randint(2, 8)), None
        while code != 0:
            driver = home.start(sweep, fork=False)
            time.sleep(dice.uniform(0, 12))
            victim = dice.choice(("driver", "trial", "both"))
            aims = hits.total() - begun < most and driver.running()
            if aims and strike(driver, number, victim, dice):
                hits[victim] += 1
            code = driver.wait()
            codes[code] += 1
            assert code in (0, 2, 75, -signal.SIGKILL) and "Traceback" not in driver.log(), driver.log()
        check(sweep, alone)
        sweeps += 1
    print_table(f"signal {number} to sweeps, {sweeps} of them", {"hits": dict(hits), "codes": dict(codes)})


def test_a_disk_that_is_full(
    home: Home, alone: dict[str, Any], small_disk: Path, request: pytest.FixtureRequest
) -> None:
    """The trials end with code 74, the sweep names them, and with more room it goes on."""
    if request.config.getoption("strikes") < 10:
        pytest.skip("`make soak` has it; a run alone fills its disk in test_disk_full.py")
    sweep, log = small_disk / "sweep", home.folder / "full.log"
    cache = f"--config.cache={home.folder / 'cache'}"
    codes = Counter()
    for kilobytes in (300, 900, 64_000):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(small_disk)], check=True)
        driver = home.start(sweep, more=(cache,), log=log)
        codes[code := driver.wait()] += 1
        assert code in (0, 2, 74) and "Traceback" not in driver.log(), driver.log()
    assert code == 0 and codes[0] < 3
    check(sweep, alone)
    shutil.rmtree(sweep)
