"""Checkpoints that were written once, and must be read by every later version.

`golden/` has the data and the run of `make_golden`: pretrain and finetune finished, instruct stopped after one step of
two. When the format (or `VERSION` of the prepared rows) changes on purpose, `python -m tests.reliability.test_golden`
makes it anew.
"""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import pytest

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import params_sha256
from jaxstages.checkpoint.manager import Checkpoints
from jaxstages.checkpoint.metadata import FORMAT, read_meta
from jaxstages.cli.resolve import keep_recipe, resolve_recipe
from jaxstages.cli.train import train
from jaxstages.config import (
    AttentionConfig,
    DataConfig,
    EvaluationConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ScheduleConfig,
    StageConfig,
    TokenizerConfig,
)
from jaxstages.runtime import manifest
from jaxstages.runtime.files import read_json, write_json
from jaxstages.runtime.workdir import checkpoint_folder, steps_of
from jaxstages.training.early_stopping import early_stopping
from jaxstages.training.handoff import read_parent
from jaxstages.training.initial_state import InitialState, restore_or_init
from jaxstages.training.setup import setup_stage

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden")
DATA, RUN = Path("data"), Path("run")
"""Relative to `golden/`, or to a copy of it: nothing in a run may depend on where it lies."""

MOST = 250_000
"""Bytes of all files together."""


def golden_recipe() -> Recipe:
    def stage(name: str, task: str, optimizer: str = "sgd") -> StageConfig:
        return StageConfig(
            data=DataConfig(task=task, train=(str(DATA / f"{name}.jsonl"),), holdout=0.3),
            optim=OptimConfig(name=optimizer, schedule=ScheduleConfig(peak_lr=3e-3, warmup_steps=1)),
            loop=LoopConfig(steps=2, batch_size=8, eval_every=2, save_every=1, log_every=1, keep=1),
            evaluation=EvaluationConfig(batch_size=8, max_new_tokens=4),
        )

    return Recipe(
        name="golden",
        tokenizer=TokenizerConfig(kind="characters"),
        model=ModelConfig(
            context=16, layers=1, width=8, ff_width=8, attention=AttentionConfig(heads=2, kv_heads=1, head_dim=4)
        ),
        pretrain=stage("text", "lm"),
        finetune=stage("pairs", "seq2seq"),
        instruct=stage("chats", "chat", "adamw"),
    )


def write_golden_data() -> None:
    words = ("red", "blue", "grey", "black", "white", "green", "brown", "pink")
    text = [{"text": f"{first} and {second}"} for first in words for second in words]
    pairs = [{"prompt": word, "target": word[::-1]} for word in words]
    chats = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word[0]}]} for word in words
    ]
    DATA.mkdir()
    for name, records in {"text": text, "pairs": pairs, "chats": chats}.items():
        (DATA / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def make_golden(folder: Path) -> None:
    """Write `folder` anew, without what names a machine or can be made again."""
    recipe = golden_recipe()
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):  # Orbax writes down where it wrote
        write_golden_data()
        train(recipe, RUN, "pretrain")
        train(recipe, RUN, "finetune")
        recipe.instruct.loop.stop_after = 1
        train(recipe, RUN, "instruct")
        recipe.instruct.loop.stop_after = 0
        keep_recipe(recipe, RUN)
        (RUN / "LOCK").unlink()
        for left in (RUN / "cache", *RUN.glob("*/tensorboard")):
            shutil.rmtree(left)
        files = [path for path in Path().rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        assert size < MOST, size
        assert all(any(path.iterdir()) for path in Path().rglob("*") if path.is_dir()), "git keeps no empty folder"
        for word in (str(ROOT), str(Path.home())):
            assert not any(word.encode() in path.read_bytes() for path in files), f"{word} names this machine"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(".", folder)
    print(f"{folder}: {len(files)} files, {size:,} bytes")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, which is the current folder."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return RUN


def start_of(run: Path, name: str) -> InitialState:
    setup = setup_stage(resolve_recipe(None, run), name, run)
    with Checkpoints(setup.folder, setup.config.loop.keep) as checkpoints:
        return restore_or_init(setup, checkpoints, early_stopping())


def test_the_recipe_is_still_read(run: Path) -> None:
    assert resolve_recipe(None, run) == golden_recipe()


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_finished_stages_are_read_as_they_were_written(run: Path, name: str) -> None:
    setup = setup_stage(resolve_recipe(None, run), name, run)
    result = read_json(setup.folder / "result.json")
    params, lineage = read_parent(setup.folder, setup.program, setup.contract)
    assert params_sha256(params) == result["params_sha256"] == lineage["params_sha256"]
    assert lineage["step"] == result["best_step"]


def test_every_checkpoint_is_whole(run: Path) -> None:
    """Git, too, must have kept each byte and each file."""
    results = {name: steps_of(run / name) for name in recipes.STAGES}
    assert results["instruct"] == [1] and results["pretrain"][-1] == results["finetune"][-1] == 2
    for name, steps in results.items():
        for step in steps:
            manifest.check(checkpoint_folder(run / name, step))
            assert read_meta(checkpoint_folder(run / name, step))["format"] == 1 <= FORMAT


def test_a_stopped_stage_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(resolve_recipe(None, run), run, "instruct")
    assert "instruct: resumes at step 1 of 2" in capsys.readouterr().out
    result = read_json(run / "instruct" / "result.json")
    assert (result["status"], result["steps"], result["best_step"]) == ("completed", 2, 2)
    parent = read_json(run / "finetune" / "result.json")
    assert result["parent"]["params_sha256"] == parent["params_sha256"]


def test_a_new_stage_starts_from_it(run: Path) -> None:
    shutil.rmtree(run / "instruct")
    start = start_of(run, "instruct")
    parent = read_json(run / "finetune" / "result.json")
    assert int(start.state.step) == 0 and params_sha256(start.state.params) == parent["params_sha256"]
    assert start.parent is not None and start.parent["path"] == str(run / "finetune")


@pytest.mark.parametrize(("name", "step"), [("finetune", 2), ("instruct", 1)])
def test_a_later_format_is_refused_and_left_alone(run: Path, name: str, step: int) -> None:
    """As a parent, and in a stage that goes on."""
    if name == "finetune":
        shutil.rmtree(run / "instruct")
    checkpoint = checkpoint_folder(run / name, step)
    write_json(checkpoint / "meta" / "metadata", read_meta(checkpoint) | {"format": 2})
    manifest.write_manifest(checkpoint)
    with pytest.raises(ValueError, match=rf"{name}/checkpoints/{step} has format 2, .* install a newer jaxstages"):
        start_of(run, "instruct")
    assert checkpoint.is_dir() and not (run / name / "quarantine").exists()


if __name__ == "__main__":
    make_golden(GOLDEN)
