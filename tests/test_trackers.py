"""Trackers have the numbers of `metrics.jsonl`, each once, however often a run is killed."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxstages import config as recipes
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.cli.train import run_stages
from jaxstages.config import Recipe
from jaxstages.config.checks import validate
from jaxstages.training import tracking
from jaxstages.training.metric_writer import MetricsWriter, read_metrics
from jaxstages.training.tracking import Tracking
from jaxstages.types import Interrupted, TrackedStage, Tracker
from tests import compiled, emulator
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data

ROOT = Path(__file__).parents[1]


def jsonl_tracker(stage: TrackedStage) -> Tracker:
    """An own tracker: the lines as they come, in a file beside the workdir."""
    file = stage.workdir.with_name(f"{stage.workdir.name}-{stage.stage}.tracked").open("a")

    def log(step: int, kind: str, values: dict[str, Any]) -> None:
        print(json.dumps({"step": step, "kind": kind} | values), file=file, flush=True)

    def close(status: str) -> None:
        print(json.dumps({"closed": status, "run_id": stage.run_id}), file=file, flush=True)
        file.close()

    return Tracker(log, close)


def failing_tracker(stage: TrackedStage) -> Tracker:
    def log(step: int, kind: str, values: dict[str, Any]) -> None:
        raise ConnectionError("no route to host")

    return Tracker(log)


def unreachable_tracker(stage: TrackedStage) -> Tracker:
    raise ConnectionError("no route to host")


def tracked(file: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, file.read_text().splitlines()) if "closed" not in line]


def pretrain_recipe(folder: Path, *trackers: Any) -> Recipe:
    write_data(folder / "data")
    recipe = tiny_recipe(folder / "data")
    recipe.finetune = recipe.instruct = None
    recipe.prompts, recipe.trackers = (), trackers
    return recipe


def test_an_own_tracker_has_every_line_of_a_run(tmp_path: Path) -> None:
    recipe = pretrain_recipe(tmp_path, jsonl_tracker)
    run_stages(recipe, tmp_path / "work")
    lines = read_metrics(tmp_path / "work" / "pretrain" / "metrics.jsonl")
    assert tracked(tmp_path / "work-pretrain.tracked") == lines
    assert {line["kind"] for line in lines} >= {"train", "eval", "event"}
    assert json.loads((tmp_path / "work-pretrain.tracked").read_text().splitlines()[-1])["closed"] == "finished"

    kept = resolve_recipe(None, tmp_path / "work")  # only training needs the code of a tracker
    with pytest.raises(ValueError, match=r"config\.trackers\[0\] is jsonl_tracker.*--config=test_trackers\.py"):
        run_stages(kept, tmp_path / "work")


def test_a_tracker_that_fails_is_reported_once_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = pretrain_recipe(tmp_path, failing_tracker, unreachable_tracker, jsonl_tracker)
    run_stages(recipe, tmp_path / "work")
    out = capsys.readouterr().out
    for name in ("failing_tracker", "unreachable_tracker"):
        assert out.count(f"tracker {name} failed: no route to host") == 1
    assert tracked(tmp_path / "work-pretrain.tracked") == read_metrics(tmp_path / "work/pretrain/metrics.jsonl")


def test_a_tracker_does_not_change_a_run_and_can_be_switched(tmp_path: Path) -> None:
    recipe = pretrain_recipe(tmp_path)
    recipe.pretrain.loop.stop_after = 4
    run_stages(recipe, tmp_path / "work")

    recipe = pretrain_recipe(tmp_path, jsonl_tracker)
    run_stages(resolve_recipe(recipe, tmp_path / "work"), tmp_path / "work")
    lines = read_metrics(tmp_path / "work" / "pretrain" / "metrics.jsonl")
    assert tracked(tmp_path / "work-pretrain.tracked") == lines  # those before the switch, too
    assert lines[-1]["step"] == 6


@pytest.mark.parametrize(
    ("trackers", "words"),
    [
        (("wandbb",), "did you mean 'wandb'"),
        (("wandb", "wandb"), "'wandb' is there twice"),
        ((3,), r"config\.trackers=\(3,\)"),
    ],
)
def test_a_wrong_tracker_is_refused(tmp_path: Path, trackers: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        validate(pretrain_recipe(tmp_path, *trackers))


def test_a_missing_package_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"config\.trackers\[0\]='wandb'.*pip install '\.\[wandb\]'"):
        run_stages(pretrain_recipe(tmp_path, "wandb"), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_trackers_survive_recipe_json(tmp_path: Path) -> None:
    recipe = pretrain_recipe(tmp_path, "wandb", jsonl_tracker)
    again = recipes.from_dict(recipes.to_dict(recipe))
    assert again.trackers[0] == "wandb" and again.trackers[1].part == "test_trackers:jsonl_tracker"


# When lines are sent.


class Memory:
    """A tracker in memory, and the step that is saved."""

    def __init__(self, folder: Path, buffers: bool = False) -> None:
        self.folder, self.buffers, self.saved = folder, buffers, -1
        self.lines: list[tuple[int, str]] = []
        self.ids: list[str] = []
        self.statuses: list[str] = []

    def make(self, stage: TrackedStage) -> Tracker:
        self.ids.append(stage.run_id)

        def log(step: int, kind: str, values: dict[str, Any]) -> None:
            self.lines.append((step, kind))

        return Tracker(log, self.statuses.append, self.buffers)

    def start(self) -> Tracking:
        stage = TrackedStage("tiny", self.folder.parent, self.folder.name, {})
        return Tracking(self.folder, stage, {"memory": self.make}, lambda: self.saved)


def test_lines_are_sent_once_their_checkpoint_is_on_disk(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "pretrain")
    with pytest.raises(Interrupted), MetricsWriter(memory.folder, -1) as writer, memory.start() as tracking:
        for step in range(6):
            writer.write(step, "train", {"loss": math.nan})
        tracking.poll()
        memory.saved = 3
        tracking.poll()
        writer.write(6, "train", {})
        raise Interrupted("now")
    assert memory.lines == [(step, "train") for step in range(4)]

    with MetricsWriter(memory.folder, 3) as writer, memory.start() as tracking:
        writer.write(3, "eval", {})  # the evaluation that the signal had interrupted
        writer.write(4, "train", {})
        memory.saved = 4
    assert memory.lines == [*((step, "train") for step in range(4)), (3, "eval"), (4, "train")]
    assert memory.statuses == ["interrupted", "finished"] and len(set(memory.ids)) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_in_a_bucket_goes_on_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator.start()
    work: Any = emulator.folder(tmp_path)
    memory = Memory(work / "pretrain")
    for machine, step in (("first", 1), ("second", 2)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        with MetricsWriter(memory.folder, memory.saved) as writer, memory.start():
            writer.write(step, "train", {})
            writer.sync()
            memory.saved = step
    assert memory.lines == [(1, "train"), (2, "train")] and len(set(memory.ids)) == 1
    assert json.loads((work / "pretrain" / "trackers" / "memory.json").read_text())["sent"] == 2


@pytest.mark.parametrize("buffers", [False, True])
def test_a_tracker_that_buffers_gets_its_lines_again_after_a_kill(tmp_path: Path, buffers: bool) -> None:
    memory = Memory(tmp_path / "pretrain", buffers)
    with MetricsWriter(memory.folder, -1) as writer:
        writer.write(1, "train", {})
        memory.saved = 1
        killed = memory.start()
        killed.poll()
        while not memory.lines:
            pass
        killed._senders[0].queue.put(1)
        while not killed._senders[0].queue.empty():
            pass
        with memory.start():
            pass
    assert memory.lines == [(1, "train")] * (1 + buffers)


def test_a_tracker_that_fails_once_gets_the_other_lines_at_the_next_start(tmp_path: Path) -> None:
    sent: list[int] = []

    def make(stage: TrackedStage) -> Tracker:
        def log(step: int, kind: str, values: dict[str, Any]) -> None:
            if step == 3 and not stage.sent:
                raise ConnectionError("no route to host")
            sent.append(step)

        return Tracker(log)

    stage = TrackedStage("tiny", tmp_path, "pretrain", {})
    with MetricsWriter(tmp_path / "pretrain", -1) as writer:
        for step in range(5):
            writer.write(step, "train", {})
    for _ in range(2):
        with Tracking(tmp_path / "pretrain", stage, {"flaky": make}, lambda: 4):
            pass
    assert sent == [0, 1, 2, 3, 4]


def test_a_tracker_that_hangs_does_not_hold_the_end_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    hang = threading.Event()

    def make(stage: TrackedStage) -> Tracker:
        return Tracker(lambda *_: None, lambda _status: (hang.wait(60), None)[1])

    stage = TrackedStage("tiny", tmp_path, "pretrain", {})
    with Tracking(tmp_path / "pretrain", stage, {"slow": make}, lambda: -1):
        pass
    hang.set()
    assert "tracker slow failed: it has not taken the last lines" in capsys.readouterr().out


# Weights & Biases and MLflow.

CHILD = """
import os, signal, sys
from pathlib import Path
from tests.test_trackers import pretrain_recipe
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.cli.train import run_stages
from jaxstages.checkpoint.manager import Checkpoints
from jaxstages.training.metric_writer import MetricsWriter

home, name, kill_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
write, save = MetricsWriter.write, Checkpoints.save

def write_or_die(self, step, kind, values):
    write(self, step, kind, values)
    if step == kill_at:
        import time
        time.sleep(2)  # the tracker gets what the checkpoint before has made final
        os.kill(os.getpid(), signal.SIGKILL)

def save_and_wait(self, *arguments):
    save(self, *arguments)
    self.wait()

MetricsWriter.write, Checkpoints.save = write_or_die, save_and_wait
recipe = pretrain_recipe(home, name)
recipe.pretrain.loop.steps, recipe.pretrain.loop.log_every = 8, 1
run_stages(resolve_recipe(recipe, home / "work"), home / "work")
"""


def run_killed(home: Path, name: str, **environment: str) -> list[dict[str, Any]]:
    """Run a stage that is killed at step 5, to its end. Returns the lines of its `metrics.jsonl`."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | compiled.environment() | environment
    for kill_at in (5, 0):
        command = [sys.executable, "-c", CHILD, str(home), name, str(kill_at or 99)]
        done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stdout + done.stderr
        assert "failed" not in done.stdout, done.stdout
    return read_metrics(home / "work" / "pretrain" / "metrics.jsonl")


def numbers_of(line: dict[str, Any]) -> dict[str, float]:
    values = {f"{line['kind']}/{name}": value for name, value in line.items() if name not in ("step", "kind")}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def wandb_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read the history of an offline run: a log of protocol buffers in LevelDB's format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, pending = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if not kind:
            break
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, pending = Record.FromString(pending), b""
            if record.WhichOneof("record_type") == "history":
                yield {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }


def test_wandb_has_the_numbers_of_a_run_that_was_killed(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    lines = run_killed(tmp_path, "wandb", WANDB_MODE="offline")
    folder = tmp_path / "work" / "pretrain" / "trackers" / "wandb"
    runs = sorted(folder.glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in runs}) == 1, "one id"
    assert len(list(folder.glob("incomplete-*"))) == 1
    rows = [row for file in runs for row in wandb_rows(file)]
    assert [row["_step"] for row in rows] == list(range(len(lines)))
    for line, row in zip(lines, rows, strict=True):
        numbers = {name: value for name, value in row.items() if "/" in name and isinstance(value, int | float)}
        assert row["step"] == line["step"] and numbers == numbers_of(line)


def test_mlflow_has_the_numbers_of_a_run_that_was_killed(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    uri = f"file:{tmp_path / 'store'}"
    lines = run_killed(tmp_path, "mlflow", MLFLOW_TRACKING_URI=uri, MLFLOW_ALLOW_FILE_STORE="true")
    logged: dict[tuple[str, int], list[float]] = {}
    (run,) = [path for path in (tmp_path / "store").glob("*/*") if (path / "metrics").is_dir()]
    for file in (run / "metrics").rglob("*"):
        for row in file.read_text().splitlines() if file.is_file() else ():
            _, value, step = row.split()
            logged.setdefault((str(file.relative_to(run / "metrics")), int(step)), []).append(float(value))
    expected: dict[tuple[str, int], list[float]] = {}
    for number, line in enumerate(lines):
        for name, value in (numbers_of(line) | {"line": number}).items():
            expected.setdefault((name, line["step"]), []).append(value)
    assert logged == expected
    assert json.loads((run / "artifacts" / "recipe.json").read_text())["name"] == "tiny"
