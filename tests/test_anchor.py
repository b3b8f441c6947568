"""The anchor: rows that the parent generates once, and a penalty that is 0 where the stage starts."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxstages.cli.train import train
from jaxstages.config import AnchorConfig, LoraConfig, Recipe
from jaxstages.training import anchor
from jaxstages.training.anchor import generate_texts, open_anchor
from jaxstages.training.handoff import read_parent
from jaxstages.training.metric_writer import read_metrics
from jaxstages.training.setup import setup_stage
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    root = tmp_path_factory.mktemp("anchor")
    write_data(root / "data")
    recipe = tiny_recipe(root / "data", steps=4)
    recipe.instruct = None
    assert recipe.finetune
    recipe.finetune.anchor = AnchorConfig(weight=2.0, batch_size=8, texts=5)
    recipe.finetune.loop.log_every, recipe.finetune.evaluation.metrics = 1, ()
    train(recipe, root / "work", "pretrain")
    return recipe, root / "work"


def penalties(work: Path) -> list[float]:
    lines = read_metrics(work / "finetune" / "metrics.jsonl")
    return [line["anchor"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=2), LoraConfig(rank=2, base="int8")], ids=str)
def test_the_penalty_is_0_at_the_start_and_grows(
    pretrained: tuple[Recipe, Path], tmp_path: Path, lora: LoraConfig
) -> None:
    """The parent is the model's start: with all parameters a copy of them, with adapters their base."""
    recipe, work = copy.deepcopy(pretrained[0]), tmp_path / "work"
    assert recipe.finetune
    shutil.copytree(pretrained[1], work)
    recipe.finetune.lora = lora
    recipe.finetune.optim.schedule.peak_lr = 3e-2
    train(recipe, work, "finetune")
    first, *_, last = penalties(work)
    assert first == pytest.approx(0.0, abs=1e-6) and last > 1e-5


def test_a_heavy_anchor_keeps_the_model_nearer_to_its_parent(pretrained: tuple[Recipe, Path], tmp_path: Path) -> None:
    ends = []
    for weight in (1e-6, 100.0):
        recipe, work = copy.deepcopy(pretrained[0]), tmp_path / str(weight)
        assert recipe.finetune
        shutil.copytree(pretrained[1], work)
        recipe.finetune.anchor.weight = weight
        recipe.finetune.optim.schedule.peak_lr = 3e-2
        train(recipe, work, "finetune")
        ends.append(penalties(work)[-1])
    assert ends[1] < 0.5 * ends[0]


def test_texts_begin_and_end_as_texts_do_and_are_generated_once(
    pretrained: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, work = pretrained
    setup = setup_stage(recipe, "finetune", work)
    params, lineage = read_parent(work / "pretrain", setup.program, setup.contract)
    examples = generate_texts(setup, params)
    end, context = setup.data.tokenizer.specials.end_of_text, recipe.model.context
    assert len(examples) == 5
    for example in examples:
        assert example.ids[:1].tolist() == list(setup.data.tokenizer.begin)
        assert len(example.ids) <= context and (len(example.ids) == context or example.ids[-1] == end)
        assert example.weights.tolist() == [0.0, *[1.0] * (len(example.ids) - 1)]
    assert len({tuple(example.ids) for example in examples}) > 1, "they are sampled, each by its own key"
    rows = open_anchor(setup, params, lineage["params_sha256"])
    assert rows.index["tokens"] == sum(len(example.ids) - 1 for example in examples)
    monkeypatch.setattr(anchor, "generate_texts", None)  # not called again
    assert open_anchor(setup, params, lineage["params_sha256"]).folder == rows.folder
    with pytest.raises(TypeError):
        open_anchor(setup, params, "another parent")
    np.testing.assert_array_equal(rows.target_counts().sum(), rows.index["tokens"])
