"""Help, and recipes by name: what a user reads and types first."""

import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxstages.cli.flags import COMMANDS, FLAGS, flags_of
from jaxstages.cli.main import main
from jaxstages.cli.parse import parse
from jaxstages.cli.recipe_files import recipe_path, shipped_recipes
from jaxstages.cli.sweep_flags import parse_sweep

ROOT = Path(__file__).parents[1]


def output(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["jaxstages", *words]) == code
    return capsys.readouterr().out


def test_the_overview_fits_one_screen_and_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--help")
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert text.count("\n") <= 40 and max(map(len, text.splitlines())) <= 100
    assert output(capsys, "help") == text and output(capsys, code=2) == text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_its_flags_and_shows_an_example(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, command, "--help")
    assert output(capsys, "help", command) == text
    others = [flag for flag in FLAGS if command not in flag.commands]
    assert all(f"  --{flag.name}" in text for flag in flags_of(command))
    assert not any(f"  --{flag.name}=" in text or f"  --{flag.name} " in text for flag in others)
    assert (ROOT / COMMANDS[command].docs).is_file()
    assert max(map(len, text.splitlines())) <= 110

    monkeypatch.chdir(tmp_path)
    words = shlex.split(COMMANDS[command].example)
    if not any(word.startswith("--config=") for word in words):
        words.insert(2, "--config=demo")  # the example takes the recipe of a workdir, and there is no workdir here
    parse_sweep(words) if command == "sweep" else parse(command, words)


def test_a_shipped_recipe_has_a_name_unless_a_file_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["jaxstages", "run", "--config=text_to_chat:control", "--config.seed=3"]
    recipe = parse("run", words).recipe
    assert recipe is not None and recipe.name == "text_to_chat" and recipe.pretrain is None and recipe.seed == 3
    assert parse("run", ["jaxstages", "run", "--config", "demo"]).recipe is not None

    Path("demo").write_text("")
    assert recipe_path("demo:x") == "demo:x"
    with pytest.raises(ValueError, match="--config=nowhere.py: no such file; shipped recipes: classify, demo"):
        recipe_path("nowhere.py")


def test_a_wheel_contains_the_recipes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("jaxstages", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "."]
    subprocess.run([*build, f"--wheel-dir={tmp_path}"], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        assert {f"jaxstages/recipes/{name}.py" for name in shipped_recipes()} <= set(names)
        assert {name.split("/")[0] for name in names} == {"jaxstages", wheel.name.rsplit("-py3", 1)[0] + ".dist-info"}
        assert {"jaxstages/py.typed", "jaxstages/experiments/report.css"} <= set(names)
        assert set(names) >= {str(path.relative_to(ROOT)) for path in (ROOT / "jaxstages").rglob("*.py")}
        page = (ROOT / "jaxstages/generation/serving/page").iterdir()
        assert set(names) >= {str(path.relative_to(ROOT)) for path in page}
        file.extractall(tmp_path / "installed")

    program = (
        "import jaxstages.cli.recipe_files as r; print(r.shipped_recipes()['demo'], r.recipe_path('demo:control'))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": "installed"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == str(tmp_path / "installed" / "jaxstages" / "recipes" / "demo.py")
