"""The command line as a user meets it: exit codes, one-line errors, help, generate, inspect."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxstages import api
from jaxstages import config as recipes
from jaxstages.cli.main import main
from jaxstages.config.checks import validate
from jaxstages.runtime.files import read_json
from jaxstages.runtime.workdir import checkpoint_folder, steps_of
from tests import compiled
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data

CONFIG = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.tiny import recipe

def get_config(variant=""):
    found = recipe(Path({data!r}), steps=int(variant or 6))
    found.cache = {cache!r}
    for stage in (found.pretrain, found.finetune, found.instruct):
        stage.loop.eval_every = 3 if not variant else 30
    return found
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("door")
    write_data(root / "data")
    names = {"root": str(Path(__file__).parents[1]), "data": str(root / "data"), "cache": str(root / "cache")}
    (root / "tiny.py").write_text(CONFIG.format(**names))
    less = "\n\nwhole = get_config\n\ndef get_config():\n    found = whole()\n    found.pretrain = None\n"
    less += "    return found\n"
    (root / "less.py").write_text((root / "tiny.py").read_text() + less)
    (root / "broken.py").write_text("def get_config(:\n")
    (root / "wrong.py").write_text("def get_config():\n    return {}['model']\n")
    assert main(["jaxstages", "run", f"--config={root}/tiny.py", f"--workdir={root}/work"]) == 0
    return root


def call(*words: str) -> int:
    return main(["jaxstages", *words])


NEW = ("run", "--workdir=new", "--config={}/tiny.py")
OPTIM = "--config.pretrain.optim"
GENERATE = ("generate", "--workdir={}/work")
LONG = "--prompt=" + "red " * 60


def test_python_has_the_errors_of_the_commands(home: Path, tmp_path: Path) -> None:
    recipe = recipes.from_dict(read_json(home / "work" / "recipe.json")["recipe"])
    for call_with_stage in (
        lambda stage: api.train(recipe, tmp_path, stage=stage),
        lambda stage: api.evaluate(home / "work", stage=stage),
        lambda stage: api.generate(home / "work", ["red"], stage=stage),
        lambda stage: api.load_params(home / "work", stage=stage),
    ):
        with pytest.raises(ValueError, match="has no stage pretrian; did you mean pretrain"):
            call_with_stage("pretrian")
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens"):
        api.generate(home / "work", ["red " * 60])


@pytest.mark.usefixtures("all_devices")
@pytest.mark.parametrize(
    ("words", "named"),
    [
        # The command and its flags.
        (("train", "--workdir={}/work", "--stage=import"), ["no stage import", "pretrain"]),
        (("trian",), ["'trian'", "train"]),
        (("trian", "--help"), ["'trian'", "train"]),
        (("run",), ["run", "--workdir=DIR"]),
        (("train", "--workdir={}/work"), ["train", "--stage=NAME"]),
        (("run", f"--workdir={'9' * 3000}", "--config={}/tiny.py"), ["999", "too long", "another folder"]),
        (("run", "--workdir={}/tiny.py/x", "--config={}/tiny.py"), ["tiny.py", "no folder"]),
        (("run", "--workdir=new"), ["new", "recipe.json", "--config="]),
        (("run", "--workdir=new", "stray"), ["'stray'", "flag"]),
        ((*NEW, "--stage=pretrain"), ["--stage", "run"]),
        # The recipe's file.
        (("run", "--workdir=new", "--config=nowhere.py"), ["--config=nowhere.py", "no such file", "demo"]),
        (("run", "--workdir=new", "--config=dmo"), ["--config=dmo", "--config=demo?"]),
        (("run", "--workdir=new", "--config=demo:contrl"), ["variant", "'contrl'"]),
        (("run", "--workdir=new", "--config={}/broken.py"), ["can't be loaded", "SyntaxError"]),
        (("run", "--workdir=new", "--config={}/tiny.py:x"), ["tiny.py:x", "'x'", "({}/tiny.py:8)"]),
        (("run", "--workdir=new", "--config={}/wrong.py"), ["KeyError: 'model'", "({}/wrong.py:2)"]),
        # Its fields.
        (("run", "--workdir=new", f"{OPTIM}.clip_norm=1"), ["clip_norm=1", "name the recipe"]),
        ((*NEW, f"{OPTIM}.clip_nrom=1"), [f"{OPTIM}.clip_nrom", f"{OPTIM}.clip_norm?"]),
        ((*NEW, f"{OPTIM}.schedule.peek_lr=1"), ["peek_lr", f"{OPTIM}.schedule.peak_lr?"]),
        ((*NEW, "--config.model.layrs=3"), ["--config.model.layrs", "--config.model.layers?"]),
        ((*NEW, "--config.extra_stages.more.seed=3"), ["--config.extra_stages.more.seed", "unknown"]),
        ((*NEW, "--config.extra_stages.more.late_from=0.5"), ["extra stage", "'more'", "add it"]),
        ((*NEW, f"{OPTIM}.schedule.peak_lr=nan"), ["peak_lr=nan", "finite"]),
        ((*NEW, f"{OPTIM}.schedule.peak_lr=-1"), ["peak_lr=-1.0", "larger than 0"]),
        ((*NEW, f"{OPTIM}.name=adam"), ["optim.name", "adam", "'adamw'?"]),
        ((*NEW, "--config.pretrain.loop.steps=many"), ["many"]),
        ((*NEW, "--config.pretrain.loop.batch_size=9"), ["batch_size=9", "divisible by 8"]),
        ((*NEW, "--config.pretrain.data.train=gone/*.jsonl"), ["no file", "'gone/*.jsonl'"]),
        ((*NEW, "--config.instruct.early_stopping.metric=blue"), ["early_stopping.metric='blue'", "not evaluated"]),
        ((*NEW, "--config.pretrain.early_stopping.mode=max"), ["config.pretrain.early_stopping", "loss", 'mode="min"']),
        ((*NEW, "--config.finetune=None", "--config.finetune.loop.steps=3"), ["finetune.loop.steps=3", "no finetune"]),
        (
            ("run", "--workdir={}/work", "--config={}/tiny.py", "--config.model.layers=3"),
            ["config.model.layers: 2 -> 3"],
        ),
        (("run", "--workdir={}/work", "--config={}/less.py"), ["config.pretrain", "StageConfig("]),
        # Generation and evaluation.
        (GENERATE, ["--prompt=TEXT", "--prompts=FILE.jsonl"]),
        ((*GENERATE, "--prompts=none.jsonl"), ["none.jsonl", "no such file"]),
        ((*GENERATE, "--prompt=x", "--temperature=-1"), ["temperature=-1", "negative"]),
        ((*GENERATE, "--prompt=x", "--max_new_tokens=99"), ["max_new_tokens=99", "less than", "64"]),
        ((*GENERATE, "--prompt=x", "--max_new_tokens=0"), ["--max_new_tokens=0", "at least 1"]),
        ((*GENERATE, "--prompt=x", "--out={}/tiny.py"), ["tiny.py", "already", "remove it"]),
        ((*GENERATE, "--stage=pretrain", LONG, "--max_new_tokens=60"), ["max_new_tokens=60", "64", "room for 4"]),
        (("evaluate", "--workdir={}/work", "--stage=fintune"), ["fintune", "finetune?"]),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    named: list[str],
) -> None:
    """The line names the value, the field or file, and the remedy."""
    monkeypatch.chdir(tmp_path)
    assert call(*(word.replace("{}", str(home)) for word in words)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert [text for text in named if text.replace("{}", str(home)) not in err] == [], err


def test_the_flags_are_frozen() -> None:
    """A new flag needs an argument in review, and a line here."""
    from absl import flags

    from jaxstages.cli.flags import define_flags

    values = flags.FlagValues()
    define_flags(values)
    assert set(values) == {
        *("workdir", "stage", "prompt", "prompts", "max_new_tokens", "temperature", "seed", "out"),
        *("top_k", "top_p", "min_p", "repetition_penalty", "stop", "from", "to", "dtype", "adapter", "lengthen"),
        *("debug_nans", "coordinator", "process_count", "process_id", "beam_options", "topology"),
        *("step", "data", "finish", "profile", "batch"),
        *("host", "port", "slots", "queue", "drafts", "timeout"),
        *("parallel", "index", "halving", "first_rung", "hours", "metric", "plot", "together"),
    }


def test_generate_writes_json_lines_and_seeds_reproduce(home: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "say red"}\n{"prompt": "say blue and a longer one than before"}\n')
    texts = []
    for seed in (1, 1, 2):
        out = tmp_path / f"out{len(texts)}.jsonl"
        words = ["generate", f"--workdir={home}/work", f"--prompts={prompts}", "--temperature=2", f"--seed={seed}"]
        assert call(*words, "--max_new_tokens=12", f"--out={out}") == 0
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [set(line) for line in lines] == [{"prompt", "text", "tokens"}] * 2
        texts.append([line["text"] for line in lines])
    assert texts[0] == texts[1] != texts[2]


def test_generate_counts_the_tokens_that_were_made(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not those of the text read again, which may be more, nor those after a stop text."""
    words = ["generate", f"--workdir={home}/work", "--stage=pretrain", "--prompt=say", "--max_new_tokens=20"]
    assert call(*words, "--temperature=3") == 0
    free = json.loads(capsys.readouterr().out)
    assert free["tokens"] == 20
    stop = free["text"][4:7]
    assert call(*words, "--temperature=3", f"--stop={stop}") == 0
    cut = json.loads(capsys.readouterr().out)
    assert cut["text"] == free["text"].partition(stop)[0] and 0 < cut["tokens"] < 20


def test_inspect_shows_any_batch(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for number in (0, 1000, 1000):
        assert call("inspect", f"--workdir={home}/work", "--stage=pretrain", f"--batch={number}") == 0
        shown.append(capsys.readouterr().out)
    assert "pretrain: batch 1000, 4 of its 8 rows" in shown[1] and "its records: " in shown[1]
    assert shown[0] != shown[1] == shown[2]


def test_inspect_marks_what_is_trained_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", f"--workdir={home}/work", "--stage=instruct") == 0
    out = capsys.readouterr().out
    assert "⟦" in out and "<|end|>⟧" in out and "<|user|>say " in out
    assert "% filled" in out and "examples cut" in out and "masked" in out


def test_evaluate_prints_one_json_object(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", f"--workdir={home}/work", "--stage=finetune") == 0
    actual = json.loads(capsys.readouterr().out)
    best = read_json(home / "work" / "finetune" / "result.json")["best"]
    assert actual["bleu"] == pytest.approx(best["bleu"]) and actual["loss"] == pytest.approx(best["loss"], rel=1e-6)


def test_checkpoints_are_listed_verified_and_compared(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = f"--workdir={tmp_path / 'work'}"
    shutil.copytree(home / "work", tmp_path / "work")
    stage_dir = tmp_path / "work" / "finetune"
    left, right = (f"finetune/{step}" for step in steps_of(stage_dir)[-2:])
    assert call("checkpoints", "list", work) == 0
    out = capsys.readouterr().out
    assert out.count("latest") == 3 and out.count("best, handed on") == 3
    steps, best = steps_of(stage_dir), read_json(stage_dir / "result.json")["best_step"]
    (stage_dir / "result.json").unlink()
    assert call("checkpoints", "list", work, "--stage=finetune") == 0
    kept = dict(re.findall(r"finetune │ +(\d+) │ ([a-z, ]+) │", capsys.readouterr().out))
    marks = {step: ["best"] * (step == best) + ["latest"] * (step == steps[-1]) for step in steps}
    assert {int(step): mark.strip() for step, mark in kept.items()} == {
        step: ", ".join(actual) or "recent" for step, actual in marks.items()
    }

    assert call("checkpoints", "diff", left, right, work) == 0
    out = capsys.readouterr().out
    assert re.search(r"params/embedding +│ +\d+\.\d+%", out) and re.search(r"train/step +│ +differs", out)
    assert call("checkpoints", "diff", left, left, work) == 0
    out = capsys.readouterr().out
    assert out.count("same") > 10 and "differs" not in out and "%" not in out

    assert call("checkpoints", "verify", work) == 0
    assert f"{right}: every file is as it was written" in capsys.readouterr().out
    file = next((checkpoint_folder(stage_dir, int(right.split("/")[1])) / "params").rglob("d/*"))
    file.write_bytes(b"0" * file.stat().st_size)
    assert call("checkpoints", "verify", "--stage=finetune", work) == 2
    said = capsys.readouterr()
    assert f"{right}: {file.resolve()} is damaged" in said.out.replace("\n", "") and "1 of" in said.err
    assert call("checkpoints", "diff", left, right, work) == 2
    assert "is damaged" in capsys.readouterr().err
    assert call("checkpoints", "list", f"--workdir={tmp_path}/none") == 2
    assert "has no checkpoint; is it a run's --workdir?" in capsys.readouterr().err
    assert call("checkpoints", "diff", left, "finetune/77", work) == 2
    assert "no checkpoint 'finetune/77'" in capsys.readouterr().err


def test_prepare_then_run_uses_the_cache(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prepare", f"--config={home}/tiny.py", f"--workdir={tmp_path}/w") == 0
    out = capsys.readouterr().out
    assert "prepared rows of 64 slots" in out and "trained on" in out and out.count("validation") >= 3
    assert (tmp_path / "w" / "recipe.json").exists()
    stamps = {file: file.stat().st_mtime_ns for file in (home / "cache").rglob("index.json")}
    first = ["pretrain", f"--workdir={tmp_path}/w", f"--config={home}/tiny.py", "--config.pretrain.loop.stop_after=1"]
    assert call(*first) == 0
    assert {file: file.stat().st_mtime_ns for file in (home / "cache").rglob("index.json")} == stamps


def test_recipe_json_is_the_recipe(home: Path) -> None:
    kept = read_json(home / "work" / "recipe.json")
    assert recipes.from_dict(kept["recipe"]).pretrain.loop.steps == 6
    assert {"jax", "orbax-checkpoint"} <= set(kept["versions"])
    with pytest.raises(ValueError, match="unknown field recipe.modle; did you mean model"):
        recipes.from_dict({"name": "x", "modle": {}})


def test_the_second_process_finds_what_the_first_has_compiled(home: Path, tmp_path: Path) -> None:
    def call_door(command: str, work: str) -> str:
        words = (command, f"--config={home}/tiny.py:2", f"--workdir={tmp_path / work}")
        env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XLA_FLAGS": compiled.QUICK}
        door = [sys.executable, "-m", "jaxstages", *words]
        return subprocess.run(door, env=env, stderr=subprocess.PIPE, text=True, check=True).stderr

    def kept() -> set[Path]:
        return {*(tmp_path / "cache").rglob("*-cache")}

    assert "not kept" not in call_door("pretrain", "one")
    first = kept()
    call_door("pretrain", "two")
    assert len(first) > 20 and kept() == first, "the same run compiles nothing again"
    (folder,) = (tmp_path / "cache" / "jaxstages").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert f"compiled functions are not kept: others may write to {folder}" in call_door("prepare", "one")


def test_the_recipes_of_the_project_are_valid() -> None:
    import importlib.util

    from ml_collections import config_flags  # noqa: F401

    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        validate(module.get_config())
        assert "jaxstages run --config=" in module.__doc__ and "Expect" in module.__doc__
        with pytest.raises(ValueError, match="no variant 'nonsense'"):
            module.get_config("nonsense")


def test_tiny_recipe_is_valid(tmp_path: Path) -> None:
    validate(tiny_recipe(tmp_path))
