"""The command line as a user meets it: exit codes, one-line errors, help, generate, inspect, a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxstages import config as recipes
from jaxstages.main import FLAGS_OF, main
from jaxstages.validate import validate
from jaxstages.workdir import read_json
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
    return found
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("door")
    write_data(root / "data")
    names = {"root": str(Path(__file__).parents[1]), "data": str(root / "data"), "cache": str(root / "cache")}
    (root / "tiny.py").write_text(CONFIG.format(**names))
    less = "\n\nwhole = get_config\n\ndef get_config():\n    found = whole()\n    found.pretrain = None\n    return found\n"
    (root / "less.py").write_text((root / "tiny.py").read_text() + less)
    (root / "broken.py").write_text("def get_config(:\n")
    assert main(["jaxstages", "run", f"--config={root}/tiny.py", f"--workdir={root}/work"]) == 0
    return root


def call(*words: str) -> int:
    return main(["jaxstages", *words])


NEW = ("run", "--workdir=new", "--config={}/tiny.py")
OPTIM = "--config.pretrain.optim"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("trian",), "unknown command 'trian'; did you mean"),
        (("run",), "run needs --workdir=DIR"),
        (("run", "--workdir=new"), "new has no recipe.json; name a recipe with --config="),
        (("run", "--workdir=new", "--config=nowhere.py"), "nowhere.py"),
        ((*NEW, f"{OPTIM}.clip_nrom=1"), f"unknown field {OPTIM}.clip_nrom; did you mean {OPTIM}.clip_norm?"),
        ((*NEW, f"{OPTIM}.schedule.peek_lr=1"), f"did you mean {OPTIM}.schedule.peak_lr?"),
        ((*NEW, f"{OPTIM}.schedule.peak_lr=nan"), "peak_lr=nan must be a finite number"),
        ((*NEW, f"{OPTIM}.schedule.peak_lr=-1"), "peak_lr=-1.0 must be larger than 0"),
        ((*NEW, f"{OPTIM}.name=adam"), "did you mean 'adamw'?"),
        ((*NEW, "--config.pretrain.loop.steps=many"), "many"),
        ((*NEW, "--config.pretrain.loop.batch_size=9"), "batch_size=9 must be divisible by 8"),
        ((*NEW, "--config.pretrain.data.train=gone/*.jsonl"), "no file matches 'gone/*.jsonl'"),
        ((*NEW, "--config.instruct.early_stopping.metric=blue"), "metric='blue' is not evaluated here"),
        ((*NEW, "--config.pretrain.early_stopping.mode=max"), 'loss is better when lower; set mode="min"'),
        ((*NEW, "--stage=pretrain"), "--stage does not apply to run"),
        (("run", "--workdir=new", "stray"), "'stray' is no flag"),
        (("generate", "--workdir={}/work"), "generate needs --prompt=TEXT or --prompts=FILE.jsonl"),
        (("generate", "--workdir={}/work", "--prompts=none.jsonl"), "none.jsonl: no such file"),
        (("generate", "--workdir={}/work", "--prompt=x", "--temperature=-1"), "must not be negative"),
        (("generate", "--workdir={}/work", "--prompt=x", "--max_new_tokens=99"), "must be less than the context, 64"),
        (("evaluate", "--workdir={}/work", "--stage=chess"), "chess"),
        (("run", "--workdir={}/work", "--config={}/tiny.py", "--config.model.layers=3"), "config.model.layers: 2 -> 3"),
        (("run", "--workdir={}/work", "--config={}/less.py"), "config.pretrain: StageConfig("),
        (("run", "--workdir=new", "--config={}/broken.py"), "the recipe's file can't be loaded: SyntaxError"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*(word.replace("{}", str(home)) for word in words)) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1 and "Traceback" not in err


def test_help_names_every_command_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    out = capsys.readouterr().out
    for name in (*FLAGS_OF, *(f"--{flag}" for names in FLAGS_OF.values() for flag in names), "--workdir", "--config"):
        assert name in out
    assert call("run", "--help") == 0


def test_the_flags_are_frozen() -> None:
    """A new flag needs an argument in review, and a line here."""
    from absl import flags

    from jaxstages.main import define_flags

    values = flags.FlagValues()
    define_flags(values, [])
    assert set(values) == {
        *("workdir", "config", "stage", "prompt", "prompts", "max_new_tokens", "temperature", "seed", "out")
    }


def test_generate_writes_json_lines_and_seeds_reproduce(home: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "say red"}\n{"prompt": "say blue and a longer one than before"}\n')
    texts = []
    for seed in (1, 1, 2):
        out = tmp_path / "out.jsonl"
        words = ["generate", f"--workdir={home}/work", f"--prompts={prompts}", "--temperature=2", f"--seed={seed}"]
        assert call(*words, "--max_new_tokens=12", f"--out={out}") == 0
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [set(line) for line in lines] == [{"prompt", "text", "tokens"}] * 2
        texts.append([line["text"] for line in lines])
    assert texts[0] == texts[1] != texts[2]


def test_inspect_marks_what_is_trained_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", f"--workdir={home}/work", "--stage=instruct") == 0
    out = capsys.readouterr().out
    assert "⟦" in out and "<|end|>⟧" in out and "<|user|>say " in out
    assert "% filled" in out and "examples cut" in out and "masked" in out


def test_evaluate_prints_one_json_object(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", f"--workdir={home}/work", "--stage=finetune") == 0
    found = json.loads(capsys.readouterr().out)
    best = read_json(home / "work" / "finetune" / "result.json")["best"]
    assert found["bleu"] == pytest.approx(best["bleu"]) and found["loss"] == pytest.approx(best["loss"], rel=1e-6)


def test_prepare_then_run_uses_the_cache(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prepare", f"--config={home}/tiny.py", f"--workdir={tmp_path}/w") == 0
    out = capsys.readouterr().out
    assert "trained on" in out and "text.jsonl" in out
    assert (tmp_path / "w" / "recipe.json").exists()


def test_recipe_json_is_the_recipe(home: Path) -> None:
    kept = read_json(home / "work" / "recipe.json")
    assert recipes.from_dict(kept["recipe"]).pretrain.loop.steps == 6
    assert {"jax", "orbax-checkpoint"} <= set(kept["versions"])
    with pytest.raises(ValueError, match="unknown field recipe.modle; did you mean model"):
        recipes.from_dict({"name": "x", "modle": {}})


def start(home: Path, work: Path, steps: int) -> subprocess.Popen:
    words = [sys.executable, "-m", "jaxstages", "pretrain", f"--config={home}/tiny.py:{steps}", f"--workdir={work}"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_checkpoint(process: subprocess.Popen, work: Path) -> None:
    for _ in range(1200):
        folder = work / "pretrain" / "checkpoints"
        if folder.exists() and any(p.name.isdecimal() and int(p.name) >= 20 for p in folder.iterdir()):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("no checkpoint in a minute")


def test_sigkill_and_sigterm_in_mid_run_end_in_the_same_bits(home: Path, tmp_path: Path) -> None:
    steps = 120
    whole = start(home, tmp_path / "whole", steps)
    killed = start(home, tmp_path / "killed", steps)
    wait_for_checkpoint(killed, tmp_path / "killed")
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "pretrain" / "result.json").exists(), "the kill came too late to test anything"
    stopped = start(home, tmp_path / "killed", steps)
    line = ""
    while "resumes at step" not in line:
        line = stopped.stdout.readline()
        assert line, "it did not resume"
    time.sleep(1.0)
    stopped.send_signal(signal.SIGTERM)
    out = stopped.communicate()[0]
    assert stopped.returncode in (75, 0), out
    again = start(home, tmp_path / "killed", steps)
    assert again.communicate() and again.returncode == 0
    assert whole.communicate() and whole.returncode == 0
    one, two = (read_json(tmp_path / name / "pretrain" / "result.json") for name in ("whole", "killed"))
    for name in ("params_sha256", "last_params_sha256", "best", "tokens"):
        assert one[name] == two[name], name


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
