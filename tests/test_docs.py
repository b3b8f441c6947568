"""What the documentation shows can be run, and what it says about files and fields is up to date."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import jaxstages
from jaxstages import testing

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
