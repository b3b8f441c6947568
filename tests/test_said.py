"""What a person is told, and when: where a run lives, what is lost of the data, what is uncertain, what comes next."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxstages import api
from jaxstages.cli.main import main
from jaxstages.cli.plan import size_text, time_text
from jaxstages.cli.train import _warn_of_positions, train
from jaxstages.config import DataConfig, Recipe
from jaxstages.data.prepare import prepare
from jaxstages.data.sources import open_source
from jaxstages.data.tokenizer import load_tokenizer
from jaxstages.experiments.stage_matrix import show_matrix
from jaxstages.runtime.console import Progress, say
from jaxstages.runtime.files import local_path, write_json
from jaxstages.runtime.signals import stop_signals
from jaxstages.runtime.workdir import tokenizer_file
from jaxstages.training.loop import Loop, with_error
from jaxstages.training.metric_writer import MetricsWriter
from jaxstages.types import Interrupted
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data


def test_texts_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Answers and paths may contain what rich takes for markup or for an emoji."""
    text = "[/INST] [b]data/[ab]*.txt :smile:"
    matrix = {"checkpoints": ["pretrain"], "columns": [], "values": [[]], "signatures": []}
    show_matrix(matrix | {"prompts": [{"prompt": text, "answers": {"pretrain": text}}]})
    say(text)
    assert capsys.readouterr().out.count(text) == 3


# Paths.


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "az://bucket/run",
            "--workdir: az://bucket/run is no local path, and no folder in a bucket",
        ),
        ("file:///tmp/run", "file:///tmp/run is no local path"),
        ("hdfs:/run", "name one, or a mounted path"),
        ("gs://bucket", "names no folder in a bucket"),
        ("", "--workdir is empty; name a path"),
        ("~no-such-user-at-all/run", "--workdir=~no-such-user-at-all/run: "),
        ("runs/a [1]", "has [ in its path, and checkpoints could not be read back from there"),
        ("runs/what?", "has ? in its path"),
        ("runs/a*b", "has * in its path"),
    ],
)
@pytest.mark.parametrize("command", ["run", "prepare", "evaluate", "import"])
def test_a_path_where_no_run_can_live_is_refused_before_anything_is_written(
    text: str,
    complaint: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--from=x"] if command == "import" else []
    assert main(["jaxstages", command, f"--workdir={text}", *words]) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_python_refuses_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    for path, words in (
        (Path("gs://bucket/run"), "gs:/bucket/run is no local path"),
        (tmp_path / "a [1]", "has \\[ in its path"),
    ):
        with pytest.raises(ValueError, match=words):
            train(tiny_recipe(tmp_path / "data"), path, "pretrain")
    recipe = tiny_recipe(tmp_path / "data")
    recipe.cache = "az://bucket/cache"
    with pytest.raises(ValueError, match="config.cache: az://bucket/cache is no local path"):
        train(recipe, tmp_path / "work", "pretrain")
    recipe.cache, recipe.pretrain, recipe.finetune.init_from = "", None, "az://bucket/run/pretrain"
    with pytest.raises(ValueError, match="init_from: az://bucket/run/pretrain is no local path"):
        train(recipe, tmp_path / "work", "finetune")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "work"]


def test_the_home_folder_is_meant_by_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/runs/x", "--workdir") == tmp_path / "runs" / "x"
    assert main(["jaxstages", "run", "--workdir=~/none"]) == 2
    assert f"{tmp_path}/none has no recipe.json" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("a")
    assert open_source("~/a.txt", tmp_path).records == 1


def test_a_file_that_has_a_patterns_name_is_meant_itself(tmp_path: Path) -> None:
    for name in ("notes [2024].txt", "notes 2.txt", "what?.txt"):
        (tmp_path / name).write_text(name)
    (item,) = open_source(f"{tmp_path}/notes [2024].txt", tmp_path).read()
    assert item.record == {"text": "notes [2024].txt"}
    assert len(list(open_source(f"{tmp_path}/notes *.txt", tmp_path).read())) == 2
    (item,) = open_source(f"{tmp_path}/notes [1-3].txt", tmp_path).read()
    assert item.record == {"text": "notes 2.txt"}


# Words at the start and at the end of a stage.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, str]:
    """A fine-tuning from scratch of two steps, most of whose prompts do not fit the context, and what it printed."""
    root = tmp_path_factory.mktemp("said")
    write_data(root / "data")
    recipe = tiny_recipe(root / "data", steps=2)
    recipe.cache, recipe.pretrain, recipe.model.context = str(root / "cache"), None, 20
    pairs = [{"prompt": "Ann " * (1 + n % 6), "target": f"red {n}"} for n in range(60)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe.finetune.data.train = (str(root / "pairs.jsonl"),)
    recipe.finetune.init_from = "scratch"
    recipe.tokenizer.kind, recipe.tokenizer.sources = "characters", ()
    recipe.finetune.evaluation.max_new_tokens = recipe.instruct.evaluation.max_new_tokens = 4
    recipe.finetune.evaluation.metrics = ()
    out, before = io.StringIO(), sys.stdout
    sys.stdout = out
    try:
        train(recipe, root / "work", "finetune")
    finally:
        sys.stdout = before
    return recipe, root / "work", out.getvalue()


def test_what_the_context_cuts_off_is_said_at_the_start(made: tuple[Recipe, Path, str]) -> None:
    _, _, out = made
    (line,) = [line for line in out.splitlines() if "pairs.jsonl (train)" in line and "are lost" in line]
    assert "% of its tokens, " in line and "are lost to config.model.context=20: " in line and "are longer" in line
    assert out.index(line) < out.index("eval at step 0")


def test_held_out_data_that_decide_nothing_are_named_with_their_tokens(made: tuple[Recipe, Path, str]) -> None:
    _, _, out = made
    (line,) = [line for line in out.splitlines() if "held-out data of finetune" in line]
    assert "scored tokens are too few to decide anything" in line and "nats may be chance" in line


def test_a_score_stands_beside_its_standard_error(made: tuple[Recipe, Path, str]) -> None:
    (line,) = [line for line in made[2].splitlines() if "eval at step 2" in line]
    assert all(f"{name} " in line for name in ("loss", "perplexity", "bits_per_byte")) and line.count(" ± ") == 4
    assert "_se" not in line


def test_the_end_of_a_stage_says_how_long_where_and_what_next(made: tuple[Recipe, Path, str]) -> None:
    _, work, out = made
    last = out.splitlines()[-1]
    assert "finetune: took " in last and f"{work}/finetune/result.json" in last and "metrics.jsonl" in last
    assert f"next: `jaxstages instruct --workdir={work}`" in last


def test_where_nothing_fits_the_context_it_is_named(made: tuple[Recipe, Path, str], tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text('{"prompt": "' + "Ann " * 30 + '", "target": "red"}\n')
    source, data = open_source(f"{tmp_path}/long.jsonl", tmp_path), DataConfig(task="seq2seq", train=("x",))
    with pytest.raises(ValueError, match="no example is left of 1 records; 1 do not fit config.model.context=20"):
        prepare(source, "train", data, load_tokenizer(tokenizer_file(made[1])), 20, tmp_path / "cache")


def test_a_context_beyond_the_positions_of_an_import_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path)
    write_json(tmp_path / "work" / "import" / "result.json", {"source": {"folder": "some/model", "positions": 32}})
    _warn_of_positions(recipe, tmp_path / "work")
    assert "config.model.context=64 is more than the 32 positions that some/model was trained on" in (
        capsys.readouterr().out
    )
    recipe.model.context = 32
    _warn_of_positions(recipe, tmp_path / "work")
    _warn_of_positions(recipe, tmp_path / "none")
    assert capsys.readouterr().out == ""


# Progress.


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [io.StringIO, _Terminal])
def test_progress_whose_total_was_too_large_ends_its_line(kind: type[io.StringIO]) -> None:
    """Of 100 records a fifth is held out."""
    to = kind()
    progress = Progress("records", 100, to=to)
    progress.update(40)
    progress.end(80)
    lines = to.getvalue().replace("\r", "\n").split("\n")
    assert lines[-1] == "" and lines[-2].startswith("records 80/80  in ")
    exact = kind()
    progress = Progress("records", 80, to=exact)
    progress.update(80)
    progress.end(80)
    assert exact.getvalue().count("80/80") == 1 and exact.getvalue().endswith("\n")


def test_preparing_with_a_holdout_says_so_in_a_pipe(
    made: tuple[Recipe, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, work, _ = made
    source = open_source(recipe.instruct.data.train[0], tmp_path)
    prepare(source, "train", recipe.instruct.data, load_tokenizer(tokenizer_file(work)), 64, tmp_path / "cache")
    out = capsys.readouterr().out
    assert "(train): records " in out and "  in " in out and out.endswith("\n")


# Plans of small models.


def test_sizes_and_times_of_small_models_are_not_nothing() -> None:
    assert [size_text(size) for size in (0, 900, 5_000, 3 * 2**20, 2**31)] == [
        *("0 B", "900 B", "4.88 KiB", "3.00 MiB", "2.00 GiB")
    ]
    assert [time_text(seconds) for seconds in (2e-5, 0.0123, 1.5, 185)] == ["20.00 us", "12.30 ms", "1.50 s", "3:05"]


def test_a_plan_of_a_small_model_has_no_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jaxstages.cli.plan import plan

    write_data(tmp_path / "data")
    plan(tiny_recipe(tmp_path / "data"), "pretrain", "local")
    out = capsys.readouterr().out
    assert "KiB" in out and " 0.00 " not in out and " in 0s" not in out and "0.000" not in out


# Signals and files of curves.


def test_a_terminal_that_is_closed_saves_like_sigterm() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with stop_signals() as stop:
            stop.unsaved = True
            os.kill(os.getpid(), signal.SIGHUP)
            end = time.monotonic() + 10
            while not stop.requested and time.monotonic() < end:
                time.sleep(0.01)
            assert stop.requested
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)  # under nohup: nothing ends, nothing is noted
            time.sleep(0.2)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_no_process_that_is_not_ours() -> None:
    """Such as a notebook's: its variables would be lost."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert signal.getsignal(signal.SIGINT) is before
    with stop_signals() as stop:
        stop.unsaved = True
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.requested
    thread = threading.Thread(target=lambda: stop_signals().__enter__())
    thread.start()
    thread.join()


def test_training_that_is_interrupted_before_its_first_step_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path / "data")
    recipe = tiny_recipe(tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="train again to resume"):
        patch.setattr(Loop, "run", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(10))
        api.train(recipe, tmp_path / "work", stage="pretrain")
    assert api.train(recipe, tmp_path / "work", stage="pretrain")["pretrain"]["status"] == "completed"


WRITER = """
import os, signal, sys
from pathlib import Path
from jaxstages.training.metric_writer import MetricsWriter
writer = MetricsWriter(Path(sys.argv[1]), -1)
for step in range(1, 31):
    writer.write(step, "train", {"loss": float(step)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def events(folder: Path) -> dict[int, float]:
    results = {}
    for file in sorted(folder.glob("events.*")):
        content, at = file.read_bytes(), 0
        while at + 12 <= len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            assert at + 16 + length <= len(content), "an event is cut short"
            event = Event.FromString(content[at + 12 : at + 12 + length])
            for value in event.summary.value:
                results[event.step] = value.simple_value
            at += 16 + length
    return results


def test_a_kill_loses_no_event_of_tensorboard(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    assert events(tmp_path / "tensorboard") == {step: float(step) for step in range(1, 31)}
    with MetricsWriter(tmp_path, 20) as writer:
        writer.write(21, "train", {"loss": 0.5})
    assert events(tmp_path / "tensorboard")[21] == 0.5


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"loss": 1.25}, "loss 1.25"),
        ({"loss": 1.25, "loss_se": 0.0123}, "loss 1.25 ± 0.012"),
        ({"loss": 672.3, "loss_se": 103.7}, "loss 672.3 ± 104"),
    ],
)
def test_a_score_with_its_error(metrics: dict[str, float], said: str) -> None:
    assert with_error(metrics, "loss") == said
