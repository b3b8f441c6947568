"""Killed or asked to stop at random instants, the run ends in the same bits."""

import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import multihost_utils

from jaxstages.checkpoint import manager
from jaxstages.checkpoint.fingerprint import fingerprint
from jaxstages.checkpoint.manager import Checkpoints, _Manager
from jaxstages.checkpoint.metadata import META
from jaxstages.runtime.workdir import steps_of
from jaxstages.training.early_stopping import early_stopping
from jaxstages.training.saved_items import from_items, to_items
from jaxstages.training.step import init_state
from tests.reliability.harness import (
    SAVE_EVERY,
    Child,
    Home,
    Tally,
    free_port,
    garbage,
    outcome,
    print_table,
    torment,
    unlike,
    wait_for,
)


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
        actual = outcome(work)
        assert unlike(actual, whole) == [], f"run {runs} of seed {seed} ended otherwise; see {work}"
        assert garbage(work) == []
        runs += 1
    print_table(
        f"{name}: {sent} signals in {runs} runs",
        {
            "phases": dict(tally.hits),
            "codes": dict(tally.codes),
            "steps redone, at most": max(tally.redone, default=0),
            "of these before the last save that was begun": max(tally.unsaved, default=0),
            "longest until the end, s": max(tally.seconds, default=0),
        },
    )
    return tally


def test_killed_at_random_instants(home: Home, whole: dict, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count, seed = request.config.getoption("--kills"), request.config.getoption("--seed")
    tally = stopped(home, whole, "kill", signal.SIGKILL, count, tmp_path, seed)
    if count >= 500:
        phases = ("import", "prepare", "restore", "hand-off", "compile", "step", "save", "commit", "cleanup")
        assert min(tally.hits[phase] for phase in phases) >= 5, "a phase was hardly hit; take more --kills"
    # A save begins when the one before is on disk: lost are a save that was under way, which is one interval, and the
    # steps since it was begun, fewer than another.
    assert max(tally.unsaved, default=0) <= SAVE_EVERY
    since = [redone - unsaved for redone, unsaved in zip(tally.redone, tally.unsaved, strict=True)]
    assert max(since, default=0) <= SAVE_EVERY


def test_asked_to_stop_at_random_instants(
    home: Home, whole: dict, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count, seed = request.config.getoption("--terms"), request.config.getoption("--seed")
    tally = stopped(home, whole, "term", signal.SIGTERM, count, tmp_path, seed)
    assert max(tally.redone, default=0) <= 1 and max(tally.seconds) < 25


def test_a_save_does_not_ask_whether_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax would, by its own numbers: processes that ask by others would then be told to stop at different places."""
    request: list[int] = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", request.append)
    state = init_state({"table": jnp.ones(3)}, optax.sgd(0.1))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, to_items(state, early_stopping().init()), {}, 1)
    assert steps_of(tmp_path) == [1] and request == []


@pytest.mark.parametrize("most", [2**28, 0])
def test_a_state_that_is_being_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A small one may be overwritten before Orbax has looked at it; of any size, an error is told."""
    gate, save = threading.Event(), _Manager.save

    def slow(self: _Manager, *args: Any, **named: Any) -> bool:
        assert gate.wait(30)
        return save(self, *args, **named)

    monkeypatch.setattr(manager, "MAX_COPY_BYTES", most)
    monkeypatch.setattr(_Manager, "save", slow)
    state = init_state({"table": jnp.arange(1000.0)}, optax.adam(0.1))
    stopping, meta = early_stopping().init(), {name: types[0]() for name, types in META.items()}
    expected = fingerprint(state).digests
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        if not most:
            gate.set()
        checkpoints.save(1, to_items(state, stopping), meta, 1)
        checkpoints.poll()
        jax.jit(lambda old: jax.tree.map(lambda x: x * 0 + 7, old), donate_argnums=0)(state)
        gate.set()
        checkpoints.check_last(1)
        restored = checkpoints.restore_newest(to_items(target, stopping))
        assert restored is not None and fingerprint(from_items(restored.items)[0]).digests == expected
        monkeypatch.setattr(_Manager, "save", lambda *args, **named: False)
        with pytest.raises(OSError, match="saving step 2 failed: checkpoint 2 was not taken"):
            checkpoints.save(2, restored.items, meta, 2)
            checkpoints.wait()
    assert steps_of(tmp_path) == [1]


def start_pair(home: Home, work: Path) -> list[Child]:
    port = free_port()
    return [start_one(home, work, process, port) for process in range(2)]


def start_one(home: Home, work: Path, process: int, port: int) -> Child:
    more = (f"--coordinator=127.0.0.1:{port}", "--process_count=2", f"--process_id={process}")
    return home.start(work, more=more)


def ends_of(home: Home, work: Path, pair: list[Child]) -> list[int]:
    """Exit codes of both. One that got its signal before it had joined ends alone; the other waits for it to be started
    again, as a supervisor does."""
    end = time.monotonic() + 120
    while any(child.running() for child in pair):
        if time.monotonic() > end:
            phases = [child.phases for child in pair]
            for child in pair:  # both, before one of them hears of the other's end
                child.kill(signal.SIGABRT)  # prints the stacks of all threads
            for child in pair:
                child.wait()
            pytest.fail(f"hangs in {phases[0]} and {phases[1]}:\n{pair[0].log()}")
        time.sleep(0.05)
        for process, child in enumerate(pair):
            if child.process.poll() == 75 and "nothing is unsaved" in child.log() and pair[1 - process].running():
                port = int(child.words[-3].rpartition(":")[2])
                pair[process] = start_one(home, work, process, port)
    return [child.wait() for child in pair]


def test_two_processes_asked_to_stop(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A signal to one of them, or to both: both save the same step and end with code 75."""
    if not request.config.getoption("--pairs"):
        pytest.skip(
            "it takes minutes: `make soak`, or --pairs=1; of two processes, test_hosts_lost.py has the short tests"
        )
    home, dice = Home(tmp_path / "home", command=("pretrain",)), random.Random(request.config.getoption("--seed"))
    assert ends_of(home, home.folder / "whole", start_pair(home, home.folder / "whole")) == [0, 0]
    whole = outcome(home.folder / "whole")
    count, sent, runs, codes, took, hits = request.config.getoption("--pairs"), 0, 0, Counter(), [], Counter()
    work = tmp_path / "work0"
    while sent < count:
        pair = start_pair(home, work)
        for child in pair:  # before that, Python is starting, and nothing of ours could know of a signal
            while child.running() and not child.phases:
                time.sleep(0.0005)
        phase = dice.choice(("prepare", "restore", "compile", "step", "evaluate", "save", "commit", None))
        if wait_for(pair[0], phase, dice.expovariate(20) if phase else dice.uniform(0, 6)):
            hit = pair[0].phases
            hits.update(hit)
            began, victims = time.monotonic(), dice.choice(((0,), (1,), (0, 1)))
            for victim in victims:
                pair[victim].kill(signal.SIGTERM)
            while pair[victims[0]].running() and time.monotonic() < began + 25:
                time.sleep(0.02)
            took.append((time.monotonic() - began, f"process 0 in {hit}, signals to {victims}"))
            sent += 1
        ends = ends_of(home, work, pair)
        codes[str(ends)] += 1
        assert ends in ([75, 75], [0, 0]), f"{ends} in {hits}:\n{pair[0].log()}"
        if ends == [0, 0]:
            assert unlike(outcome(work), whole) == []
            runs, work = runs + 1, tmp_path / f"work{runs + 1}"
    assert ends_of(home, work, start_pair(home, work)) == [0, 0] and unlike(outcome(work), whole) == []
    print_table(f"two processes: {sent} signals", {"codes": codes, "phases": hits, "longest, s": max(took)})
    assert max(took)[0] < 25, f"{max(took)} in {work}"
