"""What hangs is ended with the stacks of all threads, what is slow is not; and each signal ends a run as it should."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jaxstages.runtime.workdir import steps_of
from tests import compiled
from tests.reliability.harness import ROOT, Home, free_port, outcome

SCRIPT = """
import hashlib
import os
import sys
import time

from jaxstages import __main__ as door
from jaxstages.runtime.workdir import steps_of
from jaxstages.runtime.signals import stop_signals


def mark(text):
    os.write(1, f"<{text}>".encode())


def busy_in_c():
    # For minutes, without the GIL, and no signal cuts it short: as a compilation, or a step that waits for the device.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


def sleeps_for_ever():
    while True:
        time.sleep(1)


with stop_signals(owns_process=True):  # as the door itself does, before the slow imports
    from jax._src import compiler

    import jaxstages.training.loop as loop
    import jaxstages.training.stage as stage
    import jaxstages.cli.main
    from tests import compiled as shared

    shared.write_whole_files()

    make_batches, read, compile_any = stage._batches, loop.Loop._read_sums, compiler.compile_or_get_cached

    def batches(setup, initial):
        batches = make_batches(setup, initial)

        def load(k):
            LOAD
            return batches.load(k)

        return batches._replace(load=load)

    def noted(self, step, *more):
        read(self, step, *more)
        READ

    def compiled(backend, computation, *more, **named):
        if "jit_step" in str(computation.operation.attributes["sym_name"]):
            COMPILE
        return compile_any(backend, computation, *more, **named)

    stage._batches, loop.Loop._read_sums, compiler.compile_or_get_cached = batches, noted, compiled
    door.cli()
"""
"""The program; before a batch is made, after a step is read, and before the step or the evaluation is compiled it does
what a test puts there."""


@dataclass
class Run:
    process: subprocess.Popen
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, mark: str) -> None:
        end = time.monotonic() + 60
        while f"<{mark}>" not in self.text():
            assert self.process.poll() is None and time.monotonic() < end, f"no <{mark}>:\n{self.text()}"
            time.sleep(0.01)

    def ends(self, seconds: float = 90) -> int:
        """The exit code; fails if there is none within `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still there after {seconds} s:\n{self.text()}") from None

    def signal(self, number: int, seconds: float = 90) -> int:
        self.process.send_signal(number)
        return self.ends(seconds)


class Lab:
    """Runs of the first stage of one recipe, which share data and compiled functions."""

    def __init__(self, folder: Path) -> None:
        Home(folder)
        self.folder = folder

    def start(self, name: str, hang: float = 600, load: str = "pass", read: str = "pass", comp: str = "pass") -> Run:
        """In workdir `name`; the statements are put where SCRIPT says."""
        script, log = self.folder / f"{name}.py", self.folder / f"{name}.log"
        script.write_text(SCRIPT.replace("LOAD", load).replace("READ", read).replace("COMPILE", comp))
        environment = os.environ | compiled.environment() | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
        words = (f"--config={self.folder}/recipe.py", f"--workdir={self.folder / name}")
        more = f"--config.pretrain.loop.hang_seconds={hang}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(script), "pretrain", *words, more],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Run(process, log)

    def newest(self, name: str) -> int:
        return steps_of(self.folder / name / "pretrain")[-1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("hang"))


@pytest.fixture(scope="module")
def slow(lab: Lab) -> dict[str, Any]:
    """What a run comes to whose compilations take longer than the watchdog's seconds, and so do its steps in all."""
    run = lab.start("slow", hang=3, load="time.sleep(0.35 if k else 0)", comp="time.sleep(3.5)")
    assert run.ends() == 0, run.text()
    return outcome(lab.folder / "slow")


def test_a_slow_run_is_not_ended(slow: dict[str, Any]) -> None:
    assert slow["pretrain"]["status"] == "completed" and slow["pretrain"]["steps"] * 0.35 > 3


@pytest.mark.usefixtures("slow")  # for what it has compiled
def test_a_hang_is_ended_with_the_stacks_of_all_threads(lab: Lab) -> None:
    run = lab.start("hang", hang=3, load='if k == 7:\n                mark("hangs")\n                sleeps_for_ever()')
    run.wait_for("hangs")
    assert run.ends(13) == 1
    text = run.text()
    assert "Timeout (0:00:03)!" in text and text.count("hread 0x") > 2
    assert "in sleeps_for_ever" in text and "in prefetch" in text and "in train_stage" in text
    assert lab.newest("hang") in (3, 6), "what was saved before stands"


ASKED = """if step == {step}:
            mark('there')
            while not self._training.signals.requested: time.sleep(0.01)"""


SUSPENDED = """
import time
from jaxstages.runtime.signals import watchdog

with watchdog(1.0) as heartbeat:
    heartbeat()
    print("begun", flush=True)
    for _ in range(20):
        time.sleep(0.1)
        heartbeat()
    print("suspended", flush=True)
    time.sleep(5)
"""


def test_the_time_in_which_ctrl_z_suspends_a_run_does_not_count() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signal.SIGTSTP)
    time.sleep(1.5)
    child.send_signal(signal.SIGCONT)
    out, err = child.communicate(timeout=30)
    assert out == "suspended\n" and child.returncode == 1 and "Timeout" in err, "a hang still ends it"


def test_each_signal_ends_a_run_as_it_should_and_it_goes_on_to_the_same(lab: Lab, slow: dict[str, Any]) -> None:
    for number, step in ((signal.SIGINT, 4), (signal.SIGUSR1, 7)):
        run = lab.start("signals", read=ASKED.format(step=step))
        run.wait_for("there")
        assert run.signal(number) == 75, run.text()
        assert f"{signal.Signals(number).name}: saves after this step" in run.text()
        assert f"pretrain: interrupted; saved at step {lab.newest('signals')}, start it again to go on" in run.text()
        assert lab.newest("signals") - step in (0, 1)
    saved = lab.newest("signals")

    run = lab.start("signals", comp="mark('there'); busy_in_c()")
    run.wait_for("there")
    assert run.signal(signal.SIGTERM, 2) == 75, run.text()
    assert "SIGTERM: nothing is unsaved; start it again to go on" in run.text()

    run = lab.start("signals", read=f"if step == {saved + 2}: mark('there'); busy_in_c()")
    run.wait_for("there")
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    run.process.send_signal(signal.SIGTERM)  # as launchers forward what the whole group got already
    time.sleep(1.2)
    assert run.process.poll() is None, run.text()
    assert run.signal(signal.SIGTERM, 2) == 1, run.text()
    assert "SIGTERM again: ends without saving, the last checkpoint stands" in run.text()

    run = lab.start("signals")
    assert run.ends() == 0, run.text()
    assert outcome(lab.folder / "signals") == slow


LEAVES = """
import os, signal, sys, time
import jax
from jaxstages.runtime import multihost
from jaxstages.runtime.cluster import ProcessInfo

process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_enable_preemption_service", process == 0)  # 1 will never hear that 0 was asked to stop
multihost.join(ProcessInfo(f"127.0.0.1:{port}", 2, process))
multihost.barrier("both are here")
if process == 0:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)  # JAX looks once a second, and begins to agree with the others
multihost.barrier("both are done")
multihost.leave()
os._exit(75)
"""


def test_an_agreement_that_the_others_never_join_keeps_nobody(tmp_path: Path) -> None:
    """As a signal in the last second of a run begins one, while the others leave."""
    script, port = tmp_path / "leaves.py", str(free_port())
    script.write_text(LEAVES)
    with (tmp_path / "log").open("wb") as log:
        pair = [
            subprocess.Popen(
                [sys.executable, str(script), str(process), port],
                env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for process in range(2)
        ]
    try:
        assert [Run(process, tmp_path / "log").ends(60) for process in pair] == [75, 75]
    finally:
        for process in pair:
            process.kill()
            process.wait()
