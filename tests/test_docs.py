"""What the documentation shows can be run, and what it says about files and fields is up to date."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import jaxstages
from jaxstages import testing
from tests import compiled

ROOT = Path(__file__).parents[1]
VARIANTS = ("linen", "nnx", "loss", "metric", "task", "optimizer")


def python_blocks(page: str) -> list[str]:
    """Return the blocks of a page that are marked as Python."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The file that `docs/extending.md` consists of."""
    file = tmp_path_factory.mktemp("docs") / "mine.py"
    file.write_text("\n\n".join(python_blocks("docs/extending.md")))
    return load(file)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_recipe_of_the_page_about_own_parts_trains(mine: ModuleType, variant: str, tmp_path: Path) -> None:
    recipe = mine.get_config(variant)
    results = jaxstages.train(recipe, tmp_path)
    assert all(result["status"] == "completed" for result in results.values())
    assert set(results) == {"pretrain"} | {"metric": {"finetune"}, "task": {"finetune"}, "optimizer": {"polish"}}.get(
        variant, set()
    )
    if variant in ("metric", "task"):
        assert {"first_letter", "first_letter_se"} <= results["finetune"]["best"].keys()


@pytest.mark.parametrize("name", ["Mean", "NnxMean"])
def test_the_models_of_the_page_about_own_parts_pass_the_property_checks(mine: ModuleType, name: str) -> None:
    testing.check_model(getattr(mine, name)().make(vocab_size=32), vocab_size=32)


def test_the_reference_of_recipe_fields_is_up_to_date() -> None:
    made = load(ROOT / "docs" / "make_recipe.py")
    assert made.PAGE.read_text() == made.page(), "run `python docs/make_recipe.py`"


def test_the_architecture_page_lists_every_file() -> None:
    tree = re.findall(r"^(?:([\w/]+)/|  (\w+\.py)) ", file_tree(), flags=re.MULTILINE)
    listed, folder = set(), ""
    for package, file in tree:
        folder = package or folder
        listed |= {f"{folder}/{file}".lstrip("/")} if file else set()

    package = ROOT / "jaxstages"
    files = {str(file.relative_to(package)) for file in package.rglob("*.py") if file.read_text().strip()}
    files = {file for file in files if not file.endswith("/__init__.py")}
    assert files - listed == set(), "add them to docs/architecture.md"
    assert listed - files == set(), "remove them from docs/architecture.md"


def file_tree() -> str:
    """The tree of `docs/architecture.md`: its last block."""
    return (ROOT / "docs" / "architecture.md").read_text().split("```\n")[-2]


def test_every_link_of_the_documentation_leads_to_a_file() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_every_anchor_of_the_documentation_is_a_heading() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = []
    for page in pages:
        for target, anchor in re.findall(r"\]\(([^):]*)#([^)]+)\)", page.read_text()):
            other = page.parent / target if target else page
            headings = re.findall(r"^#+ (.*)$", other.read_text(), flags=re.MULTILINE)
            if anchor not in [
                re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            ]:
                broken.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
    assert not broken


def test_every_message_that_troubleshooting_explains_is_one_of_the_program() -> None:
    """Whoever searches the page for what a run printed has to find it."""
    texts = []
    for file in (ROOT / "jaxstages").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                texts.append("".join(map(str, parts)).replace("…", ""))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    headings = re.findall(r"^### (.*)", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [text for heading in headings for text in re.findall(r'"([^"]+)"', heading)]
    missing = [each for each in quoted if not any(each in text for text in texts)]
    assert len(quoted) > 10 and missing == []


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def run_python(code: str, folder: Path) -> str:
    """Run code in a process of its own, as a user would, and return what it prints."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    setup = "import jaxstages\nfrom tests import compiled\ncompiled.write_whole_files()\n"
    command = [sys.executable, "-c", setup + code]
    env = os.environ | compiled.environment() | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def shortened(code: str, old: str, new: str) -> str:
    """Return the code with fewer steps, so that it takes seconds."""
    assert code.count(old) == 1, f"{old!r} is not in the code; adapt the test"
    return code.replace(old, new)


def test_the_python_of_the_readme_trains_and_generates(tmp_path: Path) -> None:
    (block,) = python_blocks("README.md")
    block = shortened(block, "steps=200, batch_size=8, eval_every=50", "steps=4, batch_size=8")
    block = shortened(block, "loop=", "evaluation=js.EvaluationConfig(max_rows=16), loop=")
    output = run_python(block, tmp_path)
    perplexity, answers = output.strip().splitlines()[-2:]
    assert float(perplexity) > 1.0
    assert answers.startswith("['")


@pytest.mark.skipif(not os.environ.get("JAXSTAGES_TEST_NOTEBOOK"), reason="four minutes; set JAXSTAGES_TEST_NOTEBOOK=1")
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "docs" / "three_stages.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = shortened(code, '{"pretrain": 300, "finetune": 100, "instruct": 300}', "dict.fromkeys(stages, 4)")
    output = run_python('stages = ("pretrain", "finetune", "instruct")\n' + code, tmp_path)
    assert "parameters" in output
    assert all(f"{stage}: held-out loss" in output for stage in ("pretrain", "finetune", "instruct"))


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads((ROOT / "docs" / "three_stages.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
