"""Several hosts train as one process with as many devices does; one that dies ends all, and others may go on."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jaxstages.runtime.files import read_json
from tests.compiled import QUICK
from tests.reliability.harness import ROOT, Child, Home, free_port, outcome, print_table, unlike, wait_for

PHASES = ("restore", "hand-off", "compile", "step", "evaluate", "save", "commit", "finish")
"""What a host that dies may be doing; before them it has not joined the others."""

SHORT = {"JAXSTAGES_TEST_LOST_AFTER": "6"}
"""Seconds until a host counts as lost, where a test does not measure that time itself."""


@pytest.fixture(scope="module")
def count(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--hosts")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Home:
    """All three stages and the matrix with `--stages=3`; the first alone costs a third."""
    command = "run" if request.config.getoption("--stages") == 3 else "pretrain"
    return Home(tmp_path_factory.mktemp("home"), command=(command,))


@pytest.fixture(scope="module")
def whole(home: Home, count: int) -> dict[str, Any]:
    """What one process with as many devices as there are hosts comes to."""
    work = home.folder / "whole"
    assert home.run(work, XLA_FLAGS=f"{QUICK} --xla_force_host_platform_device_count={count}") == 0
    return told_by(work)


def told_by(work: Path) -> dict[str, Any]:
    """The outcome of a run, with the matrix where it got so far."""
    matrix = work / "stage_matrix.json"
    return outcome(work) | ({"matrix": read_json(matrix)} if matrix.exists() else {})


def start_all(home: Home, work: Path, count: int, **environment: str) -> list[Child]:
    """One process is started as one that has no others."""
    port = free_port()
    places = [
        (f"--coordinator=127.0.0.1:{port}", f"--process_count={count}", f"--process_id={number}")
        for number in range(count)
    ]
    logs = [work.with_name(f"{work.name}.{number}.log") for number in range(count)]
    for log in logs:
        log.unlink(missing_ok=True)  # of the start before
    return [
        home.start(work, more=place if count > 1 else (), log=log, **environment)
        for place, log in zip(places, logs, strict=True)
    ]


def test_hosts_train_as_one_process_does(home: Home, whole: dict[str, Any], count: int, tmp_path: Path) -> None:
    """Training, evaluation and the matrix. A sum over two has one order; over more, each way of adding them up has its
    own, and with it other last bits."""
    work = tmp_path / "work"
    children = start_all(home, work, count)
    codes = [child.wait(300) for child in children]
    assert codes == [0] * count, "\n".join(child.log() for child in children)
    actual = told_by(work)
    differences = unlike(actual, whole)
    print_table(f"{count} hosts against one process", {"differences": len(differences), "first": differences[:1]})
    if count == 2:
        assert differences == []
    else:
        assert_close(actual, whole)
    for number, child in enumerate(children):
        place = f"process {number} of {count}, as the command line says; process 0 is at 127.0.0.1:"
        assert child.output.read_text().count(place) == 1


def assert_close(actual: dict[str, Any], expected: dict[str, Any], stages: tuple[str, ...] = ()) -> None:
    """The same batches in the same order, and losses within 1e-5."""
    for stage in stages or [name for name in expected if name != "matrix"]:
        ours, theirs = actual[stage], expected[stage]
        assert {n: ours[n] for n in ("status", "steps", "tokens", "best_step")} == {
            n: theirs[n] for n in ("status", "steps", "tokens", "best_step")
        }
        for left, right in zip(ours["lines"], theirs["lines"], strict=True):
            assert (left["step"], left["kind"], left.get("tokens")) == (
                right["step"],
                right["kind"],
                right.get("tokens"),
            )
            assert ("loss" in left) == ("loss" in right)
            if "loss" in left:
                assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


def test_a_host_that_dies_ends_all_and_others_go_on(
    home: Home, whole: dict[str, Any], count: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whichever it is, whatever it does. The run goes on with as many hosts, then with half of them."""
    kills, dice = request.config.getoption("--lost"), random.Random(request.config.getoption("--seed"))
    first = Home(home.folder, command=("pretrain",))
    seconds, hits, victims, runs, sent = [], Counter(), Counter(), 0, 0
    environment = SHORT if kills == 1 else {}
    while sent < kills:
        work, size = tmp_path / f"work{runs}", count
        for size in (count, count, max(count // 2, 2)):
            children = start_all(first, work, size, **environment)
            joined = wait_for(children[0], dice.choice(PHASES), dice.expovariate(20))
            if sent >= kills or not joined:
                break
            victim, number = dice.randrange(size), signal.SIGKILL
            if kills > 1 and not dice.randrange(4):
                number = signal.SIGSTOP  # as one whose network is cut: nobody hears of it
            phases, took = children[victim].phases, survive(children, victim, number)
            if took is None:
                break
            hits.update(phases)
            victims[f"process {victim} of {size}, {number.name}"] += 1
            seconds.append(took)
            sent += 1
        for child in children:
            child.kill() if child.running() else None
        left = start_all(first, work, max(size // 2, 1))
        assert [child.wait() for child in left] == [0] * len(left), "\n".join(child.log() for child in left)
        assert_close(outcome(work), whole, ("pretrain",))
        runs += 1
    print_table(
        f"{sent} hosts lost in {runs} runs",
        {"longest until all had ended, s": max(seconds), "phases": hits, "victims": victims},
    )
    assert max(seconds) < 60


def survive(children: list[Child], victim: int, number: int) -> float | None:
    """Seconds until all but the victim have ended, each with code 75 and one line that says why. None where the run was
    over already, so that they ended well."""
    began = time.monotonic()
    children[victim].kill(number)
    others = [child for place, child in enumerate(children) if place != victim]
    codes = [child.wait(90) for child in others]
    took = time.monotonic() - began
    if number == signal.SIGSTOP:
        children[victim].kill()
    logs = [child.log() for child in others]
    if set(codes) == {0}:
        assert (children[0].work / "pretrain" / "result.json").exists()
        return None
    assert codes == [75] * len(others), "\n".join(logs)
    for log in logs:
        (line,) = [line for line in log.splitlines() if re.match("jaxstages: .*(lost contact|again to go on)", line)]
        assert "restart all hosts to resume" in line and "Traceback" not in log, log
    return took


def test_hosts_with_different_recipes_do_not_begin(home: Home, tmp_path: Path) -> None:
    port = free_port()
    places = [(f"--coordinator=127.0.0.1:{port}", "--process_count=2", f"--process_id={i}") for i in range(2)]
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    pair = [
        home.start(tmp_path / "work", more=(*places[0],), log=logs[0]),
        home.start(tmp_path / "work", more=(*places[1], "--config.seed=7"), log=logs[1]),
    ]
    assert [child.wait() for child in pair] == [2, 2]
    for child in pair:
        assert "the hosts disagree: config.seed is 0 in process 0, 7 in process 1; use" in child.log(), child.log()
        assert "Traceback" not in child.log()


FAULT = """
import os, sys, time
from jaxstages.runtime import lost_host, multihost
from jaxstages.runtime.cluster import ProcessInfo

process, port, faulty = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
multihost.join(ProcessInfo(f"127.0.0.1:{port}", 2, process))
multihost.barrier("both are here")
if process == faulty:
    lost_host.announce_exit(70, "three steps in a row are not finite")
    os._exit(70)
multihost.barrier("nobody else comes here")
"""


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_fault_of_one_is_told_to_the_others(tmp_path: Path, faulty: int) -> None:
    """They end with its code, at once."""
    script, port = tmp_path / "fault.py", str(free_port())
    script.write_text(FAULT)
    pair = [
        subprocess.Popen(
            [sys.executable, str(script), str(process), port, str(faulty)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in pair]
        assert [process.returncode for process in pair] == [70, 70], errors
        line = f"jaxstages: process {faulty} ended: three steps in a row are not finite\n"
        assert errors[1 - faulty].count(line) == 1
    finally:
        for process in pair:
            process.kill()
            process.wait()
