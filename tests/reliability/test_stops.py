"""Killed or asked to stop at random instants, the run ends in the same bits."""

import random
import signal
from pathlib import Path

import pytest

from tests.reliability.harness import SAVE_EVERY, Home, Tally, garbage, outcome, print_table, torment


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def whole(home: Home) -> dict:
    """What a run that nobody stopped ends in."""
    work = home.folder / "whole"
    assert home.run(work) == 0
    assert garbage(work) == []
    return outcome(work)


def stopped(home: Home, whole: dict, name: str, number: int, count: int, tmp_path: Path, seed: int) -> Tally:
    tally, dice, sent, runs = Tally(), random.Random(seed), 0, 0
    while sent < count:
        work = tmp_path / f"{name}{runs}"
        sent += torment(home, work, number, dice, tally, min(count - sent, dice.randint(3, 12)))
        found = outcome(work)
        assert found == whole, f"run {runs} of seed {seed} ended otherwise; see {work}"
        assert garbage(work) == []
        runs += 1
    print_table(
        f"{name}: {sent} signals in {runs} runs",
        {
            "phases": dict(tally.hits),
            "codes": dict(tally.codes),
            "steps redone, at most": max(tally.redone, default=0),
            "longest until the end, s": max(tally.seconds, default=0),
        },
    )
    return tally


def test_killed_at_random_instants(home: Home, whole: dict, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count, seed = request.config.getoption("--kills"), request.config.getoption("--seed")
    tally = stopped(home, whole, "kill", signal.SIGKILL, count, tmp_path, seed)
    # A save begins when the one before is on disk: two intervals are lost only where a kill hits the second of them.
    assert max(tally.redone, default=0) <= 2 * SAVE_EVERY


def test_asked_to_stop_at_random_instants(
    home: Home, whole: dict, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count, seed = request.config.getoption("--terms"), request.config.getoption("--seed")
    tally = stopped(home, whole, "term", signal.SIGTERM, count, tmp_path, seed)
    assert max(tally.redone, default=0) <= 1 and max(tally.seconds) < 25
