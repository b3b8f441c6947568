"""Several data sets in one stage: shares, replay, length in epochs or tokens, and what a stage says of them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from jaxstages import config as recipes
from jaxstages.cli.train import run_stages
from jaxstages.config import DatasetConfig, EvaluationConfig, Recipe
from jaxstages.config.checks import validate
from jaxstages.data.batches import WeightChange, batches_by_step, interleave
from jaxstages.data.mixture import Dataset, dataset_usage, describe, mix, steps_for
from jaxstages.runtime.files import read_json
from jaxstages.training.metric_writer import read_metrics
from jaxstages.training.setup import open_tokenizer, prepare_stage, setup_stage
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.15, 0.2, 0.65), (0.01, 0.99), (5.0,), (0.0, 3.0, 1.0)])
def test_after_any_number_of_rows_each_source_has_its_share(weights: tuple[float, ...]) -> None:
    position = interleave(weights)
    counts = np.zeros(len(weights))
    for i in range(1000):
        number, n = position(i)
        assert n == counts[number], "a source's rows come in their order, none left out"
        counts[number] += 1
        np.testing.assert_allclose(counts, (i + 1) * np.asarray(weights) / sum(weights), atol=len(weights))


@pytest.mark.parametrize(
    ("early", "late"),
    [((1.0, 2.0), (1.0, 0.0)), ((1.0, 0.0), (0.5, 0.5)), ((0.2, 0.3, 0.5), (0.6, 0.3, 0.1)), ((0.0, 1.0), (1.0, 0.0))],
)
def test_sources_go_on_where_they_were_when_the_weights_change(
    early: tuple[float, ...], late: tuple[float, ...]
) -> None:
    change = 300
    position = interleave(early, WeightChange(change, late))
    counts: Counter[int] = Counter()
    at_change: Counter[int] = Counter()
    for i in range(900):
        if i == change:
            at_change = counts.copy()
        number, n = position(i)
        assert n == counts[number]
        counts[number] += 1
    for number, (before, after) in enumerate(zip(early, late, strict=True)):
        assert at_change[number] == pytest.approx(change * before / sum(early), abs=1.5)
        assert counts[number] - at_change[number] == pytest.approx(600 * after / sum(late), abs=1.5)


class Rows:
    """Stands for prepared rows of which only the counts are asked."""

    def __init__(self, rows: int, tokens: int, scored: int) -> None:
        self.index = {"rows": rows, "tokens": tokens, "scored": scored}


def dataset(name: str, sources: list[Rows], share: float, late: float | None = None, weights: Any = None) -> Dataset:
    rows: Any = sources
    counts = weights or tuple(source.index["rows"] for source in sources)
    return Dataset(name, rows, counts, share, share if late is None else late)


def test_shares_of_rows_tokens_and_passes() -> None:
    """Chats that score half of what text scores have a smaller share of the loss than of the rows."""
    chats = dataset("instruct", [Rows(100, 1000, 500)], 0.75)
    text = dataset("pretrain", [Rows(40, 400, 400), Rows(10, 100, 100)], 0.25)
    actual = dataset_usage([chats, text], rows=400, late_from=1.0)
    assert [use.rows for use in actual] == [0.75, 0.25]
    assert actual[0].scored == pytest.approx(0.75 * 5 / (0.75 * 5 + 0.25 * 10))
    assert [use.passes for use in actual] == [pytest.approx(3.0), pytest.approx(2.0)]
    lines = describe([chats, text], steps=100, batch_size=4, late_from=1.0)
    assert "75.0% of the rows, 60.0% of the scored tokens, 3.00 passes" in lines[0]
    assert lines[1].startswith("pretrain: 25.0% of the rows")


def test_length_in_epochs_and_in_tokens() -> None:
    alone, own = (dataset("finetune", [Rows(100, 1000, 500)], share) for share in (1.0, 0.5))
    text = dataset("pretrain", [Rows(1000, 20_000, 20_000)], 0.5)
    assert steps_for([alone], 8, 1.0, epochs=2) == 25
    assert steps_for([own, text], 8, 1.0, epochs=2) == 50, "own rows are only every second"
    assert steps_for([alone], 8, 1.0, tokens=8000) == 100
    assert steps_for([own, text], 8, 1.0, tokens=12_000) == 100
    assert steps_for([alone], 8, 1.0, tokens=1) == 1


def test_one_data_set_is_mixed_as_before_there_were_several() -> None:
    """The weights go to Grain unscaled, so that runs from before go on with the same batches."""
    sources = [Rows(37, 1, 1), Rows(1001, 1, 1)]
    mixed = mix([dataset("pretrain", sources, 1.0)], late_row=0)
    assert mixed.weights == [37, 1001] and mixed.late is None
    streams = [
        grain.MapDataset.range(size).map(lambda i, j=j: (j, int(i))).shuffle(seed=3 + j).repeat()
        for j, size in enumerate(mixed.weights)
    ]
    old = grain.MapDataset.mix(streams, weights=[37.0, 1001.0])
    position = interleave(mixed.weights)
    order = [grain.MapDataset.range(size).shuffle(seed=3 + j).repeat() for j, size in enumerate(mixed.weights)]
    assert [(j, int(order[j][n])) for j, n in map(position, range(500))] == [old[i] for i in range(500)]


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """Three stages: pretraining takes in pairs late, the others replay what came before."""
    root = tmp_path_factory.mktemp("replay")
    write_data(root / "data")
    recipe = tiny_recipe(root / "data")
    assert recipe.pretrain and recipe.finetune and recipe.instruct
    recipe.pretrain.mixture = {
        "pairs": DatasetConfig(
            data=recipe.finetune.data,
            share=(0.0, 0.5),
            evaluation=EvaluationConfig(metrics=("exact_match",), max_new_tokens=4, max_examples=2),
        )
    }
    recipe.pretrain.late_from = 0.5
    recipe.finetune.replay = (("pretrain", 0.25),)
    recipe.instruct.replay = (("pretrain", 0.125), ("finetune", 0.25))
    validate(recipe)
    run_stages(recipe, root / "work")
    return recipe, root / "work"


def sources_of(recipe: Recipe, work: Path, stage: str, steps: int) -> Counter[str]:
    """Rows of each source in the first steps of a stage, as the records say that they hold."""
    setup = setup_stage(recipe, stage, work)
    mixed, size = setup.data.mix(setup.config.loop, setup.config.late_from), setup.config.loop.batch_size
    batches = batches_by_step(mixed.sources, batch_size=1, seed=0, weights=mixed.weights, late=mixed.late)
    return Counter(Path(batches.where(i)[0].split(":")[0]).stem for i in range(steps * size))


def test_replay_takes_the_rows_of_earlier_stages_in_its_shares(replayed: tuple[Recipe, Path]) -> None:
    recipe, work = replayed
    counts = sources_of(recipe, work, "instruct", 25)
    assert {name: count / 200 for name, count in counts.items()} == pytest.approx(
        {"chats": 0.625, "text": 0.125, "pairs": 0.25}, abs=0.01
    )
    early, all_rows = (sources_of(recipe, work, "pretrain", steps) for steps in (3, 6))
    assert early == {"text": 24}
    assert all_rows["pairs"] == 12, "half of the rows of the last three steps"


def test_replayed_rows_are_those_that_the_earlier_stage_prepared(replayed: tuple[Recipe, Path]) -> None:
    recipe, work = replayed
    tokenizer = open_tokenizer(recipe, work)
    folders = {}
    for name, stage in recipes.stages(recipe).items():
        datasets, _ = prepare_stage(recipe, name, stage, tokenizer, work)
        folders[name] = {each.name: [source.folder for source in each.train] for each in datasets}
    assert folders["instruct"]["pretrain"] == folders["pretrain"]["pretrain"]
    assert folders["instruct"]["finetune"] == folders["finetune"]["finetune"]


def test_earlier_stages_are_watched_at_each_evaluation(replayed: tuple[Recipe, Path]) -> None:
    recipe, work = replayed
    lines = [line for line in read_metrics(work / "instruct" / "metrics.jsonl") if line["kind"] == "eval"]
    for line in lines:
        assert {"watch/pretrain/perplexity", "watch/finetune/bleu", "watch/finetune/loss"} <= set(line)
    result = read_json(work / "instruct" / "result.json")
    parent = read_json(work / "finetune" / "result.json")
    assert result["watch"]["watch/finetune/loss"] == {
        "start": lines[0]["watch/finetune/loss"],
        "best": result["best"]["watch/finetune/loss"],
    }
    assert lines[0]["watch/finetune/loss"] == pytest.approx(parent["best"]["loss"], rel=1e-5)
    assert lines[0]["watch/finetune/bleu"] == pytest.approx(parent["best"]["bleu"], abs=1e-6)
    first = [line for line in read_metrics(work / "pretrain" / "metrics.jsonl") if line["kind"] == "eval"][-1]
    assert "pairs/loss" in first and "pairs/exact_match" in first and not any("watch" in name for name in first)


def prefixes(recipe: Recipe, work: Path) -> list[str]:
    return [each.prefix for each in setup_stage(recipe, "instruct", work).data.evaluation_sets]


def test_nothing_is_watched_where_the_recipe_says_so(replayed: tuple[Recipe, Path]) -> None:
    recipe, work = replayed
    assert recipe.instruct
    recipe.instruct.evaluation.watch = ()
    try:
        assert prefixes(recipe, work) == [""]
        recipe.instruct.evaluation.watch = ("finetune",)
        assert prefixes(recipe, work) == [
            "",
            "watch/finetune/",
        ]
    finally:
        recipe.instruct.evaluation.watch = (recipes.EARLIER,)


def test_the_recipe_is_read_back_with_its_data_sets(replayed: tuple[Recipe, Path]) -> None:
    recipe, _ = replayed
    assert recipes.from_dict(json.loads(json.dumps(recipes.to_dict(recipe)))) == recipe


def pairs(folder: Path) -> DatasetConfig:
    stage = tiny_recipe(folder).finetune
    assert stage
    return DatasetConfig(data=stage.data)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"finetune.replay": (("instruct", 0.1),)}, r"'instruct' is not a stage of this recipe before finetune"),
        ({"pretrain.replay": (("finetune", 0.1),)}, r"before pretrain; known: none"),
        ({"instruct.replay": (("import", 0.1),)}, r"come without their data; set config.instruct.anchor.weight"),
        ({"instruct.replay": (("pretrain", 0.6), ("finetune", 0.4))}, r"take 100% of the rows, and leave none"),
        ({"instruct.replay": (("pretrain", 0.1), ("pretrain", 0.1))}, r"names pretrain twice"),
        ({"instruct.replay": (("pretrain", 1.0),)}, r"is 1.0; it must be at least 0, and below 1"),
        ({"instruct.replay": ("pretrain", 0.1)}, r"must be a tuple of pairs, such as \(\('name', 0.5\),\)"),
        ({"instruct.late_from": 0.5}, r"late_from=0.5 .* set both or neither"),
        ({"instruct.evaluation.watch": ("later",)}, r"'later' is not a stage .* known: earlier, pretrain, finetune"),
        ({"instruct.loop.epochs": 1.0}, r"steps=6, epochs=1.0, tokens=0; set one of them, and the others to 0"),
        ({"instruct.loop.steps": 0}, r"steps=0, epochs=0.0, tokens=0; set one of them"),
        ({"pretrain.anchor.weight": 1.0}, r"an anchor needs a parent, and pretrain starts from scratch"),
        ({"instruct.anchor.texts": 5}, r"texts: 256 -> 5 does not apply to .*weight=0"),
        ({"instruct.optim.average": 1.0}, r"average=1.0 must be less than 1"),
    ],
    ids=str,
)
def test_what_can_not_be_mixed_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    recipe = tiny_recipe(tmp_path)
    for path, value in change.items():
        owner: Any = recipe
        *owners, field = path.split(".")
        for name in owners:
            owner = getattr(owner, name)
        setattr(owner, field, value)
    with pytest.raises(ValueError, match=complaint):
        validate(recipe)


@pytest.mark.parametrize(
    ("key", "part", "complaint"),
    [
        ("a/b", {}, r"'a/b' can't be the name of a data set"),
        ("watch", {}, r"'watch' can't be the name"),
        ("pairs", {"share": (0.1, 0.2, 0.3)}, r"must be one share, or two"),
        ("pairs", {"share": (0.1, 0.2)}, r"late_from=1.0 .* set both or neither"),
        ("pairs", {"evaluation": EvaluationConfig(metrics=("accuracy",))}, r"does not apply to task 'seq2seq'"),
    ],
    ids=str,
)
def test_a_further_data_set_is_checked_as_the_first(
    tmp_path: Path, key: str, part: dict[str, Any], complaint: str
) -> None:
    recipe = tiny_recipe(tmp_path)
    assert recipe.pretrain
    further = pairs(tmp_path)
    for name, value in part.items():
        setattr(further, name, value)
    recipe.pretrain.mixture = {key: further}
    with pytest.raises(ValueError, match=complaint):
        validate(recipe)


def test_a_stage_as_long_as_its_tokens(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    recipe = tiny_recipe(tmp_path / "data")
    recipe.finetune = recipe.instruct = None
    assert recipe.pretrain
    recipe.pretrain.loop.steps, recipe.pretrain.loop.epochs = 0, 1.5
    validate(recipe)
    setup = setup_stage(recipe, "pretrain", tmp_path / "work")
    rows = setup.data.train[0].index["rows"]
    assert setup.config.loop.steps == -(-3 * rows // 16) and recipe.pretrain.loop.steps == 0
    recipe.pretrain.loop.epochs, recipe.pretrain.loop.tokens = 0.0, 2000
    steps = setup_stage(recipe, "pretrain", tmp_path / "work").config.loop.steps
    index = setup.data.train[0].index
    assert (steps - 1) * 8 * index["tokens"] / rows < 2000 <= steps * 8 * index["tokens"] / rows
