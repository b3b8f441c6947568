"""What may change, move or be missing between two starts of a run, and what it goes on from."""

import copy
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jaxstages import config as recipes
from jaxstages.checkpoint import manager
from jaxstages.cli.main import main
from jaxstages.cli.resolve import keep_recipe, resolve_recipe
from jaxstages.cli.train import run_stages, train
from jaxstages.config import Recipe
from jaxstages.runtime import manifest
from jaxstages.runtime.files import read_json
from jaxstages.runtime.workdir import checkpoint_folder, checkpoints_folder, quarantine_folder, steps_of, tokenizer_file
from jaxstages.training.metric_writer import read_metrics
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data

SAVED = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A finished pretraining, and a fine-tuning that was stopped after four of six steps."""
    root = tmp_path_factory.mktemp("goes-on")
    write_data(root / "data")
    recipe = tiny_recipe(root / "data")
    recipe.cache, recipe.instruct = str(root / "cache"), None
    for stage in recipes.stages(recipe).values():
        stage.loop.eval_every, stage.loop.save_every, stage.loop.keep = 2, 1, 3
        stage.evaluation.metrics, stage.optim.schedule.name = (), "constant"
    work = root / "work"
    train(recipe, work, "pretrain")
    assert recipe.finetune
    recipe.finetune.loop.stop_after = SAVED
    train(recipe, work, "finetune")
    return recipe, work


@pytest.fixture
def run(made: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    shutil.copytree(made[1], tmp_path / "work", ignore=shutil.ignore_patterns("tensorboard"))
    keep_recipe(made[0], tmp_path / "work")
    return copy.deepcopy(made[0]), tmp_path / "work"


def call(*words: str) -> int:
    return main(["jaxstages", *words])


# What changes nothing that was learned.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("loop.accumulate", 2), ("loop.remat", "full"), ("loop.loss_tile", 16), ("loop.hang_seconds", 50.0)),
        *(("loop.save_every", 3), ("loop.keep", 1), ("loop.log_every", 1), ("optim.max_bad_steps", 3)),
    ],
)
def test_what_makes_no_other_model_may_change(run: tuple[Recipe, Path], field: str, value: Any) -> None:
    recipe, work = run
    part, name = field.split(".")
    setattr(getattr(recipe.finetune, part), name, value)
    assert resolve_recipe(recipe, work) == recipe


def test_a_run_goes_on_with_other_memory_settings(run: tuple[Recipe, Path]) -> None:
    recipe, work = run
    assert recipe.finetune
    recipe.finetune.loop.stop_after, recipe.finetune.loop.loss_tile, recipe.finetune.loop.accumulate = 0, 16, 2
    recipe.model.unroll = True
    assert train(resolve_recipe(recipe, work), work, "finetune")
    assert read_json(work / "finetune" / "result.json")["steps"] == 6


def test_what_makes_another_model_may_not(run: tuple[Recipe, Path]) -> None:
    recipe, work = run
    recipe.model.dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout: 0.0 -> 0.1; set it back, or finish finetune first"):
        resolve_recipe(recipe, work)
    shutil.rmtree(work / "finetune")
    assert train(resolve_recipe(recipe, work), work, "finetune") is False, "a child may have a dropout of its own"


def test_data_may_be_moved_but_not_changed(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, work = run
    assert recipe.finetune
    recipe.finetune.loop.stop_after = 0
    shutil.copytree(Path(recipe.finetune.data.train[0]).parent, tmp_path / "moved")
    for stage in recipes.stages(recipe).values():
        stage.data.train = tuple(str(tmp_path / "moved" / Path(name).name) for name in stage.data.train)
    assert train(resolve_recipe(recipe, work), work, "finetune")
    with (tmp_path / "moved" / "text.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    keep_recipe(with_another_name(recipe, work), work)
    with pytest.raises(ValueError, match="pretrain was begun with other data: .* name the same files"):
        resolve_recipe(recipe, work)


def with_another_name(recipe: Recipe, work: Path) -> Recipe:
    other = copy.deepcopy(recipe)
    assert other.pretrain
    other.pretrain.data.train = (str(work / "elsewhere.jsonl"),)
    return other


# What was never saved binds to nothing.


def test_a_start_that_saved_nothing_binds_to_nothing(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, work = copy.deepcopy(made[0]), tmp_path / "work"
    assert recipe.pretrain
    keep_recipe(recipe, work)
    checkpoints_folder(work / "pretrain").mkdir(parents=True)  # as a run leaves it that ran out of memory
    recipe.pretrain.loop.batch_size, recipe.pretrain.optim.schedule.peak_lr, recipe.model.width = 4, 1e-4, 32
    recipe.tokenizer.vocab_size = 280
    assert resolve_recipe(recipe, work) == recipe


def test_a_tokenizer_is_made_again_when_its_inputs_change(
    made: tuple[Recipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, work = copy.deepcopy(made[0]), tmp_path / "work"
    assert recipe.pretrain
    recipe.tokenizer.kind, recipe.finetune = "characters", None
    (tmp_path / "few.jsonl").write_text('{"text": "ab"}\n' * 50)
    recipe.pretrain.data.train, recipe.pretrain.data.text = (str(tmp_path / "few.jsonl"),), "{txet}"
    with pytest.raises(ValueError, match="no record has a text to make a tokenizer from; the first: .*few.jsonl:"):
        train(recipe, work, "pretrain")
    assert not tokenizer_file(work).exists()
    recipe.pretrain.data.text = "{text}"
    with pytest.raises(ValueError, match="no example is left|is left"):
        train(recipe, work, "pretrain")  # all records ask the same, and none is held out
    assert tokenizer_file(work).exists()
    recipe.pretrain.data.train = made[0].pretrain.data.train
    recipe.pretrain.loop.stop_after = 1
    train(recipe, work, "pretrain")
    assert "tokenizer: made again" in capsys.readouterr().out
    letters = tokenizer_file(work).read_text()
    assert '"k"' in letters and read_json(work / "tokenizer" / "made_from.json")["inputs"]
    recipe.tokenizer.max_bytes = 1000
    recipe.pretrain.loop.stop_after = 2
    train(recipe, work, "pretrain")
    assert tokenizer_file(work).read_text() == letters, "what something was trained with stays"


def test_a_run_that_starts_from_another_takes_its_tokenizer(
    made: tuple[Recipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, work = copy.deepcopy(made[0]), tmp_path / "work"
    assert recipe.finetune
    recipe.pretrain, recipe.finetune.init_from, recipe.model.dropout = None, str(made[1] / "pretrain"), 0.1
    recipe.finetune.loop.stop_after = 1
    train(recipe, work, "finetune")
    assert "tokenizer: that of the run which this one starts from" in capsys.readouterr().out
    assert tokenizer_file(work).read_bytes() == tokenizer_file(made[1]).read_bytes()


# What lies beside, or is missing.


def test_stray_files_of_the_system_condemn_nothing(run: tuple[Recipe, Path]) -> None:
    recipe, work = run
    for folder in (work, work / "finetune", *checkpoints_folder(work / "finetune").rglob("*"), work / "tokenizer"):
        if folder.is_dir():
            (folder / ".DS_Store").write_bytes(b"Bud1")
            (folder / "._x").write_bytes(b"")
    quarantine_folder(work / "finetune").mkdir()
    (quarantine_folder(work / "finetune") / "Thumbs.db").write_bytes(b"")
    recipe.finetune.loop.stop_after = 0
    assert train(recipe, work, "finetune")
    assert read_json(work / "finetune" / "result.json")["steps"] == 6
    assert call("checkpoints", "verify", f"--workdir={work}") == 0


@pytest.mark.parametrize("how", ["removed", "damaged"])
def test_without_its_best_a_run_goes_on_from_what_is_whole(
    run: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str], how: str
) -> None:
    recipe, work = run
    assert recipe.finetune
    stage_dir = work / "finetune"
    assert steps_of(stage_dir) == [2, 3, 4]
    for step in (3, 4):  # step 2 is the best so far
        file = checkpoint_folder(stage_dir, step) / "meta" / "metadata"
        meta = read_json(file)
        meta["best_step"] = 2
        file.write_text(json.dumps(meta))
        manifest.write_manifest(checkpoint_folder(stage_dir, step))
    if how == "removed":
        shutil.rmtree(checkpoint_folder(stage_dir, 2))
    else:
        (checkpoint_folder(stage_dir, 2) / "params" / "_METADATA").write_text("{}")
    recipe.finetune.loop.stop_after = 0
    assert train(recipe, work, "finetune")
    out = capsys.readouterr().out
    assert "its best step so far, 2, is lost" in out and "resumes at step 4 of 6" in out
    result = read_json(stage_dir / "result.json")
    assert result["status"] == "completed" and result["best_step"] in (4, 6)


def test_an_older_checkpoint_that_was_removed_is_not_missed(run: tuple[Recipe, Path]) -> None:
    recipe, work = run
    assert recipe.finetune
    shutil.rmtree(checkpoint_folder(work / "finetune", 3))
    recipe.finetune.loop.stop_after = 0
    assert train(recipe, work, "finetune")


# A run that was copied.


def test_the_lineage_of_a_copy_is_its_own(
    run: tuple[Recipe, Path], made: tuple[Recipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original at the recorded path says nothing of it, whatever happens there."""
    recipe, work = run
    assert recipe.finetune and recipe.pretrain
    original, copied = work, tmp_path / "copy"
    recipe.finetune.loop.stop_after = 0
    train(recipe, original, "finetune")
    shutil.copytree(original, copied)
    shutil.rmtree(copied / "pretrain")
    recipe.seed = 1
    train(recipe, copied, "pretrain")
    with pytest.raises(ValueError, match=r"copy/finetune began from .* which is now"):
        train(recipe, copied, "finetune")
    recipe.seed = 0
    train(recipe, original, "finetune")  # its parent is what it was
    capsys.readouterr()
    for words in (("evaluate", "--stage=finetune"), ("generate", "--prompt=Ann likes red", "--max_new_tokens=2")):
        assert call(*words, f"--workdir={copied}") == 0
        assert "copy/finetune began from" in capsys.readouterr().err
        assert call(*words, f"--workdir={original}") == 0
        assert capsys.readouterr().err == ""


# A run that is not finished, or not to be written to.


@contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    """No Python code may write there; that it tries is an error, as on a read-only file system."""
    on, access = [True], os.access

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        writes |= event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if on and writes and str(arguments[0]).startswith(tuple(map(str, folders))):
            raise OSError(30, "Read-only file system", str(arguments[0]))

    sys.addaudithook(refuse)
    with pytest.MonkeyPatch.context() as patch:
        inside = tuple(map(str, folders))
        patch.setattr(os, "access", lambda path, mode: not str(path).startswith(inside) and access(path, mode))
        try:
            yield
        finally:
            on.clear()


def test_a_read_only_run_is_looked_at(
    run: tuple[Recipe, Path], made: tuple[Recipe, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, work = run
    (tmp_path / "other.jsonl").write_text('{"prompt": "Ann likes red", "target": "red Ann"}\n' * 3)
    flag = f"--workdir={work}"
    with read_only(work, Path(recipe.cache)):
        for stage in ("pretrain", "finetune"):
            assert call("inspect", flag, f"--stage={stage}") == 0
        capsys.readouterr()
        assert call("evaluate", flag, "--stage=pretrain") == 0
        assert json.loads(capsys.readouterr().out)["loss_se"] > 0
        assert call("evaluate", flag, "--stage=finetune") == 0
        said = capsys.readouterr()
        assert "finetune is not finished, at step 4: this is its best so far" in said.err
        assert json.loads(said.out)["step"] in (2, 4)
        assert call("evaluate", flag, "--stage=finetune", "--step=3") == 0
        said = capsys.readouterr()
        assert "this is step 3, not the one" in said.err and json.loads(said.out)["step"] == 3
        assert call("evaluate", flag, "--stage=finetune", f"--data={tmp_path}/other.jsonl") == 0
        other = json.loads(capsys.readouterr().out)
        assert other["data"] == [f"{tmp_path}/other.jsonl"] and other["loss"] > 0
        assert call("evaluate", flag, "--stage=finetune", "--step=7") == 2
        assert "keeps no step 7; --step can be 2, 3, 4" in capsys.readouterr().err
        words = ("generate", flag, "--stage=finetune", "--step=4", "--prompt=Ann likes red", "--max_new_tokens=2")
        assert call(*words) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] <= 2
        assert call("export", flag, "--stage=finetune", "--step=4", f"--to={tmp_path}/out") == 0
    assert (tmp_path / "out" / "model.safetensors").exists() or list((tmp_path / "out").glob("*.safetensors"))


def test_a_stage_is_finished_early_on_purpose_and_handed_on(
    run: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, work = run
    assert call("finetune", f"--workdir={work}", "--finish") == 0
    result = read_json(work / "finetune" / "result.json")
    assert (result["status"], result["steps"]) == ("ended", 4) and result["best_step"] in (2, 4)
    assert "already ended at step 4" in (call("run", f"--workdir={work}"), capsys.readouterr().out)[1]
    assert call("finetune", f"--workdir={work}", "--lengthen", "--config.finetune.loop.stop_after=0") == 0
    assert read_json(work / "finetune" / "result.json")["steps"] == 6
    assert read_json(work / "finetune" / "result-4.json") == result


def test_an_unfinished_stage_is_lengthened_where_its_steps_stay_the_same(run: tuple[Recipe, Path]) -> None:
    recipe, work = run
    assert recipe.finetune
    longer = copy.deepcopy(recipe)
    assert longer.finetune
    longer.finetune.loop.steps = 20
    assert resolve_recipe(longer, work) == longer, "a constant rate does not depend on the length"
    for name, share, allowed in (("cosine", 0.2, False), ("wsd", 0.2, True), ("wsd", 0.5, False), ("rsqrt", 0.2, True)):
        for each in (recipe, longer):
            assert each.finetune
            each.finetune.optim.schedule.name, each.finetune.optim.schedule.decay_share = name, share
        keep_recipe(recipe, work)
        if allowed:
            assert resolve_recipe(longer, work) == longer
            continue
        with pytest.raises(ValueError, match=r"loop.steps: 6 -> 20; set it back \(or add --lengthen, .* schedule of"):
            resolve_recipe(longer, work)


def test_one_field_is_changed_without_saying_all_again(
    run: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, work = run
    assert call("finetune", f"--workdir={work}", "--config.finetune.loop.stop_after=5") == 0
    assert "the workdir's recipe with config.finetune.loop.stop_after: 4 -> 5" in capsys.readouterr().err
    assert steps_of(work / "finetune")[-1] == 5
    kept = read_json(work / "recipe.json")["recipe"]
    assert kept["finetune"]["loop"]["stop_after"] == 5
    assert call("finetune", f"--workdir={work}", "--config.finetune.optim.clip_norm=2") == 2
    assert "config.finetune.optim.clip_norm: 1.0 -> 2.0; set it back" in capsys.readouterr().err
    assert call("finetune", f"--workdir={work}", "--config.instruct.loop.steps=3") == 2
    assert "--config.instruct.loop.steps=3 sets a field of an absent stage" in capsys.readouterr().err


def test_a_save_that_can_not_be_read_back_is_no_save(
    made: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: the first one of a run is restored and compared."""
    recipe, work = copy.deepcopy(made[0]), tmp_path / "work"
    assert recipe.pretrain
    shutil.copytree(made[1] / "tokenizer", work / "tokenizer")
    reads = []
    read = manager.read_in_parts
    monkeypatch.setattr(manager, "read_in_parts", lambda *words: reads.append(words) or read(*words))
    recipe.pretrain.loop.stop_after = 3
    train(recipe, work, "pretrain")
    assert len(reads) == 1, "once in a run"
    shutil.rmtree(work / "pretrain")

    def unreadable(folder: Path, *_: Any) -> None:
        raise manifest.Damaged(f"{folder} is damaged, Orbax can't read it")

    monkeypatch.setattr(manager, "read_in_parts", unreadable)
    with pytest.raises(OSError, match="saving step 1 failed: .*Orbax can't read it"):
        train(recipe, work, "pretrain")


def test_python_validates_as_the_command_does(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe = copy.deepcopy(made[0])
    assert recipe.pretrain
    recipe.pretrain.optim.schedule.peak_lr = -1.0
    with pytest.raises(ValueError, match="peak_lr=-1.0 must be larger than 0"):
        run_stages(recipe, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_source_is_read_once_by_a_command(
    run: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often its rows are asked for: a resume hashes each file once."""
    recipe, work = run
    assert recipe.finetune
    shutil.copytree(Path(recipe.finetune.data.train[0]).parent, tmp_path / "data")
    for stage in recipes.stages(recipe).values():
        stage.data.train = tuple(str(tmp_path / "data" / Path(name).name) for name in stage.data.train)
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    recipe.finetune.loop.stop_after = 5
    train(resolve_recipe(recipe, work), work, "finetune")
    assert sorted(Path(name).name for name in map(str, hashed) if str(tmp_path / "data") in name) == [
        "pairs.jsonl",
        "text.jsonl",
    ]
    lines = read_metrics(work / "finetune" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] != "event"][-1] == 4
