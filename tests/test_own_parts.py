"""A recipe of a user's own parts, in one file outside the package: it trains, resumes, hands over and is evaluated."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from jaxstages import api
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.config import EvaluationConfig, Metric
from jaxstages.config.parts import Part, source_sha256
from jaxstages.config.serialize import differences
from jaxstages.runtime.workdir import has_begun

SOURCE = Path(__file__).with_name("own_parts.py")


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", ["", "nnx"], ids=["linen", "nnx"])
def test_own_parts_train_resume_to_the_bit_and_hand_over(variant: str, tmp_path: Path) -> None:
    module = load(SOURCE)
    whole = api.train(module.get_config(variant), tmp_path / "whole")
    assert list(whole) == ["pretrain", "finetune", "polish"]
    assert whole["polish"]["parent"]["params_sha256"] == whole["finetune"]["params_sha256"]
    assert "first_letter" in whole["finetune"]["best"]

    stopped = module.get_config(variant)
    stopped.finetune.loop.stop_after = 3
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped", ignore=shutil.ignore_patterns("finetune", "polish"))
    api.train(stopped, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "finetune" / "result.json").exists()
    resumed = api.train(module.get_config(variant), tmp_path / "stopped")
    assert {name: result["params_sha256"] for name, result in resumed.items()} == {
        name: result["params_sha256"] for name, result in whole.items()
    }

    recipe = module.get_config(variant)
    metrics = api.evaluate(tmp_path / "whole", "finetune", recipe=recipe)
    assert metrics["loss"] == pytest.approx(whole["finetune"]["best"]["loss"])
    assert len(api.generate(tmp_path / "whole", ["amber birch "], recipe=recipe, max_new_tokens=4)) == 1
    with pytest.raises(ValueError, match=r"config.model is own_parts:Mean, a part .* name its file with --config="):
        api.load_params(tmp_path / "whole")


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir whose pretraining is finished, and whose fine-tuning has begun."""
    folder = tmp_path_factory.mktemp("half") / "work"
    recipe = load(SOURCE).get_config()
    recipe.finetune.loop.stop_after = 3
    api.train(recipe, folder)
    assert has_begun(folder / "finetune")
    return folder


@pytest.mark.parametrize(
    ("field", "old", "new"),
    [
        ("config.model", "nn.gelu(x_BLD)", "nn.relu(x_BLD)"),
        ("config.model", "jnp.tri(x_BLD.shape[1], dtype=bool)", "jnp.tri(x_BLD.shape[1], k=0, dtype=bool)"),
        ("config.pretrain.loss", "** 2)", "** 3)"),
        ("config.finetune.evaluation.metrics", "p[:1] == r[:1]", "p[:2] == r[:2]"),
        ("config.finetune.data.own", 'record[self.field] + " "', 'record[self.field] + ", "'),
        ("config.pretrain.optim.own", "jnp.sign", "jnp.tanh"),
        ("config.pretrain.optim.schedule.own", "{steps // 2: 0.5}", "{steps // 3: 0.5}"),
    ],
)
def test_a_changed_source_is_refused_on_resume(
    field: str, old: str, new: str, half_trained: Path, tmp_path: Path
) -> None:
    text = SOURCE.read_text()
    assert text.count(old) == 1
    changed = tmp_path / SOURCE.name
    changed.write_text(text.replace(old, new))
    recipe = load(changed).get_config()
    with pytest.raises(ValueError, match=rf"was begun with another recipe: {re.escape(field)}.*set it back"):
        resolve_recipe(recipe, half_trained)


def test_records_that_change_are_refused_on_resume(half_trained: Path, tmp_path: Path) -> None:
    changed = tmp_path / SOURCE.name
    changed.write_text(SOURCE.read_text().replace('"jetty")', '"kayak")'))
    work = tmp_path / "work"
    shutil.copytree(half_trained, work)
    with pytest.raises(ValueError, match="was begun with other data"):
        api.train(load(changed).get_config(), work)


def test_comments_and_what_a_part_does_not_use_may_change(half_trained: Path, tmp_path: Path) -> None:
    changed = tmp_path / SOURCE.name
    text = SOURCE.read_text().replace("def halving", "# A comment.\ndef halving")
    changed.write_text(text + "\n\nUNUSED = 3\n")
    recipe = load(changed).get_config()
    recipe.finetune.loop.stop_after = 3
    resolve_recipe(recipe, half_trained)


@pytest.mark.parametrize("opening", ["if True:", "try:"])
def test_a_definition_in_a_compound_statement_is_part_of_the_source(tmp_path: Path, opening: str) -> None:
    file, end = tmp_path / "parts.py", "except ImportError:\n    pass\n" if opening == "try:" else ""
    digests = []
    for value in (1, 2):
        helper = f"{opening}\n    def helper():\n        return {value}\n{end}"
        file.write_text(f"{helper}\n\ndef score(predictions, references):\n    return helper()\n")
        digests.append(source_sha256(file, "score"))
    assert digests[0] != digests[1]


def test_a_changed_metric_is_named_with_both_digests() -> None:
    """Metrics stand in a tuple beside built-in ones."""
    old, new = (Part("mine:score", {}, digest * 64) for digest in "ab")
    (line,) = differences(
        EvaluationConfig(metrics=("bleu", Metric(old))), EvaluationConfig(metrics=("bleu", Metric(new))), "evaluation"
    )
    assert line.startswith(
        "evaluation.metrics[1].score: mine:score(), source aaaaaaaaaaaa… -> mine:score(), source bbbb"
    )
