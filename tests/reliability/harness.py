"""Runs of a tiny recipe in child processes, how they ended, and what makes two of them the same."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import read_meta
from jaxstages.config import AnchorConfig, EarlyStoppingConfig, Recipe
from jaxstages.runtime.bucket import is_bucket
from jaxstages.runtime.files import read_json
from jaxstages.runtime.workdir import checkpoint_folder, checkpoints_folder, steps_of
from jaxstages.training.metric_writer import read_metrics
from tests import compiled
from tests.reliability.child import PHASES, SLOTS, shared
from tests.reliability.forked import Forked
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data

ROOT = Path(__file__).parents[2]

SAME = ("params_sha256", "last_params_sha256", "best", "best_step", "status", "steps", "tokens", "skipped")
"""Of result.json: what must not depend on how often a run was stopped."""

SAVE_EVERY = 3


def make_recipe(home: Path) -> Recipe:
    """Three stages with accumulation, a mixture, packing, several epochs, and early stopping on its way; the second
    with an anchor, the third with an average, both with replay."""
    if not (home / "data").exists():
        write_data(home / "data")
        text = (home / "data" / "text.jsonl").read_text().replace("colour", "color")
        (home / "data" / "text2.jsonl").write_text(text)
    recipe = tiny_recipe(home / "data", steps=12)
    recipe.cache = str(home / "cache")
    for stage in recipes.stages(recipe).values():
        stage.loop.accumulate, stage.loop.log_every, stage.loop.batch_size = 2, 1, 16
        stage.loop.save_every, stage.loop.eval_every = SAVE_EVERY, 4
        stage.evaluation.metrics = ()
    recipe.pretrain.data.train = (*recipe.pretrain.data.train, str(home / "data" / "text2.jsonl"))
    recipe.pretrain.data.weights = (0.7, 0.3)
    recipe.finetune.replay = (("pretrain", 0.2),)
    recipe.finetune.anchor = AnchorConfig(weight=0.5, texts=6, batch_size=16)
    recipe.instruct.replay = (("pretrain", 0.1), ("finetune", 0.2))
    recipe.instruct.optim.average = 0.9
    # The best of the first evaluation stays the best: the stage stops at step 12, its third.
    recipe.instruct.early_stopping = EarlyStoppingConfig(metric="loss", patience=2, min_delta=1e6)
    recipe.instruct.loop.steps = 20
    return recipe


CONFIG = """
from pathlib import Path
from tests.reliability.harness import make_recipe

def get_config(variant=""):
    return make_recipe(Path(__file__).parent)
"""


@dataclass
class Home:
    """A folder with data, recipe and prepared rows, which all runs in it share. All runs share compiled functions."""

    folder: Path
    command: tuple[str, ...] = ("run",)
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        make_recipe(self.folder)
        (self.folder / "recipe.py").write_text(CONFIG)

    def start(
        self,
        work: Path,
        prefix: tuple[str, ...] = (),
        more: tuple[str, ...] = (),
        log: Path | None = None,
        fork: bool = True,
        **environment: str,
    ) -> "Child":
        """Start a run in a child process.

        Args:
            prefix: words of a command that starts it, such as strace.
            log: file for its output, by default beside the workdir.
            fork: take a process that has imported the program, see `forked.py`.
        """
        log = log or (self.folder if is_bucket(work) else work.parent) / f"{work.name}.log"
        phases = self.folder / f"{work.name}{'.'.join(more[2:])}.phases"
        phases.write_bytes(bytes(SLOTS))
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAXSTAGES_TEST_PHASES": str(phases),
            "COLUMNS": "300",
            "PYTHONFAULTHANDLER": "1",
        }
        env |= compiled.environment()
        words = (*self.command, f"--config={self.folder}/recipe.py", f"--workdir={work}", *self.more, *more)
        if fork and not prefix:
            return Child(Forked(words, env | environment, log), work, log, shared(str(phases)), words)
        output = log.open("ab")
        process = subprocess.Popen(
            [*prefix, sys.executable, str(ROOT / "tests" / "reliability" / "child.py"), *words],
            env=env | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        output.close()
        return Child(process, work, log, shared(str(phases)), words)

    def run(self, work: Path, **environment: str) -> int:
        return self.start(work, **environment).wait()


@dataclass
class Child:
    process: subprocess.Popen | Forked
    work: Path
    output: Path
    slots: Any
    words: tuple[str, ...]

    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def phases(self) -> list[str]:
        """What the main thread does, and what a background thread does, if it does anything."""
        return [PHASES[slot] for slot in self.slots[:2] if slot]

    @property
    def step(self) -> int:
        return self.slots[2] + 256 * self.slots[3]

    @property
    def begun(self) -> int:
        """The step of the stage's last save that was begun, 0 where none was since the process started."""
        return self.slots[4]

    def wait(self, seconds: float = 300) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"hangs in {self.phases}; the log ends:\n{self.log()}") from None

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    def log(self) -> str:
        return self.output.read_text(errors="replace")[-3000:]


def outcome(work: Path) -> dict[str, Any]:
    """All that must be equal, bit for bit, between two runs: results, losses of each step, optimizers, decisions."""
    results: dict[str, Any] = {}
    for stage in recipes.STAGES:
        if not (work / stage / "result.json").exists():
            continue
        result = read_json(work / stage / "result.json")
        last = steps_of(work / stage)[-1]
        lines = read_metrics(work / stage / "metrics.jsonl")
        results[stage] = {name: result[name] for name in SAME} | {
            # Not early stopping's state: of a run that was interrupted in its last evaluation, the result has it.
            "fingerprint": {
                path: text
                for path, text in read_meta(checkpoint_folder(work / stage, last))["fingerprint"].items()
                if not path.startswith("train/early_stopping")
            },
            "lines": [
                {k: v for k, v in line.items() if k != "tokens_per_second"}
                for line in lines
                if line.get("event") != "peak memory"
            ],
        }
    return results


def unlike(actual: Any, expected: Any, path: str = "") -> list[str]:
    """Where two outcomes differ."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        return [
            line
            for key in sorted(actual.keys() | expected.keys())
            for line in unlike(actual.get(key), expected.get(key), f"{path}/{key}")
        ]
    if isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        return unlike(dict(enumerate(actual)), dict(enumerate(expected)), path)
    return [] if actual == expected else [f"{path}: {actual} and not {expected}"]


def garbage(work: Path) -> list[str]:
    """What a finished run must not leave: anything but what the design lists."""
    known = {
        "recipe.json",
        "LOCK",
        "LEASE",
        "stage_matrix.json",
        "report.html",
        "tensorboard",
        "tokenizer",
        "tokenizer.json",
        "cache",
        *recipes.STAGES,
    }
    inner = {"checkpoints", "metrics.jsonl", "result.json", "tensorboard"}
    left = [str(path) for path in work.iterdir() if path.name not in known]
    left += [str(path) for path in (work / "tokenizer").iterdir() if path.name not in {*known, "made_from.json"}]
    for stage in recipes.STAGES:
        if (work / stage).exists():
            left += [str(path) for path in (work / stage).iterdir() if path.name not in inner]
            complete = {str(step) for step in steps_of(work / stage)}
            left += [str(p) for p in checkpoints_folder(work / stage).iterdir() if p.name not in complete]
    return left


@dataclass
class Tally:
    """Hits of signals by phase; steps that were done again, and of these those before the last save that was begun."""

    hits: Counter = field(default_factory=Counter)
    unsaved: list[int] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    codes: Counter = field(default_factory=Counter)


def stage_and_step(work: Path) -> tuple[int, int]:
    """Where a run stands on disk: how many stages have a result, and the newest checkpoint of the one after."""
    done = [stage for stage in recipes.STAGES if (work / stage / "result.json").exists()]
    if len(done) == len(recipes.STAGES):
        return len(done), 0
    return len(done), max([0, *steps_of(work / recipes.STAGES[len(done)])])


def wait_for(child: Child, phase: str | None, delay: float) -> bool:
    """Until the child is in `phase` (None: whatever it does), and `delay` seconds more; False if it ended before."""
    end = time.monotonic() + 60
    while phase is not None and phase not in child.phases and time.monotonic() < end:
        if child.process.poll() is not None:
            return False
        time.sleep(0.0005)
    time.sleep(delay)
    return child.process.poll() is None


def torment(home: Home, work: Path, number: int, dice: random.Random, tally: Tally, most: int) -> int:
    """Send signal `number` at random instants, at most `most` times, and start again, until the run ends.

    A third of the instants is uniform over the time of a run, the rest over phases, so that short ones are hit too.
    """
    sent = 0
    while True:
        child = home.start(work, fork=False)
        if sent < most:
            phase = dice.choice([None, *PHASES[1:]])
            delay = dice.uniform(0, 6.0) if phase is None else dice.expovariate(1 / 0.02)
            if wait_for(child, phase, delay):
                hit, step, begun, began = child.phases, child.step, child.begun, time.monotonic()
                stage, _ = stage_and_step(work)
                child.kill(number)
                code = child.wait()
                tally.codes[code] += 1
                tally.seconds.append(time.monotonic() - began)
                sent += 1
                tally.hits.update(hit)
                now, saved = stage_and_step(work)
                if now == stage and {"step", "evaluate", "save"} & {*hit}:  # else it was the last step of its stage
                    tally.redone.append(max(step - saved, 0))
                    tally.unsaved.append(max(begun - saved, 0))
                expected = {signal.SIGKILL: (-9,), signal.SIGTERM: (75, 0)}[number]
                assert code in expected, f"code {code} after signal {number} in {hit}:\n{child.log()}"
                if code == 0:
                    return sent
                continue
        code = child.wait()
        assert code == 0, f"code {code} without a signal:\n{child.log()}"
        return sent


def free_port() -> int:
    """One that nobody on this machine listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def damage(file: Path, kind: str, dice: random.Random, other: Path | None = None) -> None:
    """Flip a bit, truncate, zero, delete, or take another step's file of the same name."""
    content = bytearray(file.read_bytes())
    match kind:
        case "flip":
            if content:
                content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            file.write_bytes(content)
        case "truncate":
            file.write_bytes(content[: dice.randrange(len(content))] if content else content)
        case "zero":
            start = dice.randrange(len(content)) if content else 0
            file.write_bytes(content[:start] + bytes(len(content) - start))
        case "delete":
            file.unlink()
        case "swap":
            assert other is not None
            file.write_bytes(other.read_bytes())
        case _:
            raise ValueError(kind)


def print_table(title: str, values: dict[str, Any]) -> None:
    """A figure of a test: shown with `-s`, and kept in the file that `JAXSTAGES_TEST_FIGURES` names."""
    line = f"{title}: {json.dumps(values, default=str)}"
    print(f"\n{line}")
    if kept := os.environ.get("JAXSTAGES_TEST_FIGURES"):
        with Path(kept).open("a") as file:
            file.write(f"{line}\n")
