"""What `validate` refuses beyond the command line's tests: wrong types from a recipe's file, and leaks."""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxstages.config import DatasetConfig, ModelConfig, Recipe, StageConfig
from jaxstages.config.checks import validate
from jaxstages.config.setting import rules_of
from jaxstages.data.stage_data import prepare_stages
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data


def changed(tmp_path: Path, path: str, value: object) -> Recipe:
    recipe = tiny_recipe(tmp_path)
    *owners, field = path.split(".")
    owner = recipe
    for name in owners:
        owner = getattr(owner, name)
    setattr(owner, field, value)
    return recipe


def same_length(predictions: list[str], references: list[str]) -> float:
    return 100.0 * sum(map(len, predictions)) / sum(map(len, references))


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("pretrain.optim.freeze", "embedding", r"must be a tuple, such as"),
        ("pretrain.data.train", "x.jsonl", r"must be a tuple, such as"),
        ("pretrain.loop.steps", "100", r"is of type str; it must be int"),
        ("pretrain.loop.steps", 1e3, r"is of type float; it must be int"),
        ("pretrain.loop.steps", True, r"is of type bool; it must be int"),
        ("model.attention", None, r"it must be AttentionConfig"),
        ("pretrain.data.validation", ("a.jsonl",), r"set either validation \(held-out sources\) or holdout"),
        ("pretrain.data.weights", (0.5, 0.5), r"has 2 shares for 1 training sources"),
        ("pretrain.data.task", "chat", r"this stage's tasks: lm"),
        ("finetune.evaluation.metrics", ("accuracy",), r"does not apply to task 'seq2seq'"),
        ("pretrain.evaluation.metrics", (same_length,), r"'same_length' scores answers, and task 'lm' has none"),
        ("finetune.evaluation.max_new_tokens", 64, r"max_new_tokens=64 must be less than config.model.context=64"),
        ("model.attention.kv_heads", 3, r"heads=4 must be divisible by kv_heads=3"),
        ("model.attention.head_dim", 7, r"must be even for rope"),
        (
            "model.attention.pattern",
            ("global", "locale"),
            r"pattern='locale': did you mean 'local'\? known: global, local, nope",
        ),
        ("model.attention.pattern", ("global", "local"), r"set config.model.attention.window to the number of keys"),
        ("model.attention.local_rope_theta", 1e4, r"does not apply without local layers"),
        ("model.attention.qk_norm_over", "heads", r"does not apply to qk_norm=False"),
        ("model.attention.rope_scaling.factor", 2.0, r"does not apply to kind='none'"),
        ("model.norm_place", "behind", r"known: before, after, both"),
        ("model.experts.count", 1, r"per_token=2 must be at most count=1"),
        ("model.dropout", 1.5, r"must be between 0 and 1"),
        ("pretrain.loop.accumulate", 3, r"batch_size=8 must be divisible by accumulate=3"),
        ("pretrain.data.clean.unicode", "nfd", r"did you mean 'nfc'\? known: none, nfc, nfkc"),
        ("pretrain.data.clean.control_characters", "drop", r"known: keep, remove"),
        ("pretrain.data.clean.min_characters", -1, r"min_characters=-1 must not be negative"),
        ("pretrain.data.duplicates.threshold", 1.5, r"threshold=1.5 must be between 0 and 1"),
        ("pretrain.data.duplicates.bands", 10, r"bands: 20 -> 10 does not apply to .*duplicates.threshold=0"),
        ("pretrain.data.duplicates.permutations", 0, r"permutations=0 must be at least 1"),
        ("pretrain.data.duplicates.permutations", 5000, r"permutations=5000 must be at most 4096"),
        ("pretrain.data.duplicates.shingle", "letters", r"known: words, characters"),
        ("tokenizer.kind", "file", r"needs the path of a tokenizer.json"),
    ],
)
def test_refused(tmp_path: Path, path: str, value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        validate(changed(tmp_path, path, value))
    assert path.split(".")[-1] in str(caught.value) and "\n" not in str(caught.value)


def test_held_out_data_that_is_training_data_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe.pretrain.data.holdout, recipe.pretrain.data.validation = 0.0, recipe.pretrain.data.train
    with pytest.raises(ValueError, match="is in train and in validation"):
        validate(recipe)


def test_a_pattern_that_includes_the_held_out_file_is_refused(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "text2.jsonl").write_text((tmp_path / "text.jsonl").read_text().replace("colour", "color"))
    recipe = tiny_recipe(tmp_path)
    data = recipe.pretrain.data
    data.holdout, data.train, data.validation = 0.0, (f"{tmp_path}/text*.jsonl",), (f"{tmp_path}/text2.jsonl",)
    validate(recipe)
    with pytest.raises(
        ValueError, match=r"held-out source '\S+text2.jsonl' and training source '\S+text\*.jsonl' have"
    ):
        prepare_stages(recipe, tmp_path / "work", ["pretrain"])
    data.train = (f"{tmp_path}/text.jsonl",)
    prepare_stages(recipe, tmp_path / "work", ["pretrain"])


def focal(model: Any, params: Any, batch: Any, key: Any) -> dict[str, Any]:
    raise NotImplementedError


def test_what_has_no_effect_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe.finetune.loss, recipe.finetune.optim.label_smoothing = focal, 0.1
    with pytest.raises(ValueError, match="label_smoothing=0.1 does not apply to config.finetune.loss; set it to 0"):
        validate(recipe)
    recipe = tiny_recipe(tmp_path)
    recipe.finetune.evaluation.choice = ("piqa/test.jsonl", "arc/test.jsonl")
    with pytest.raises(ValueError, match="two files are named 'test'"):
        validate(recipe)


def test_a_data_set_with_the_name_of_a_stage_is_refused(tmp_path: Path) -> None:
    """It would replace that stage's data where both are mixed."""
    recipe = tiny_recipe(tmp_path)
    recipe.extra_stages = {"law": recipe.instruct}
    recipe.pretrain.mixture = {"law": DatasetConfig(data=recipe.finetune.data, share=(0.1,))}
    with pytest.raises(ValueError, match="'law' can't be the name of a data set"):
        validate(recipe)


def test_the_direction_of_an_own_metric_holds_where_it_is_watched(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe.finetune.evaluation.metrics = (same_length,)
    recipe.instruct.early_stopping.metric, recipe.instruct.early_stopping.mode = "watch/finetune/same_length", "max"
    validate(recipe)
    recipe.instruct.early_stopping.mode = "min"
    with pytest.raises(ValueError, match='is better when higher; set mode="max"'):
        validate(recipe)


def test_cleaning_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    recipe = changed(tmp_path, "pretrain.data.duplicates.threshold", 0.8)
    validate(recipe)
    recipe.pretrain.data.duplicates.bands = 7
    with pytest.raises(ValueError, match="permutations=120 must be divisible by bands=7"):
        validate(recipe)
    recipe = changed(tmp_path, "pretrain.data.clean.max_characters", 10)
    recipe.pretrain.data.clean.min_characters = 20
    with pytest.raises(ValueError, match="max_characters=10 must be at least min_characters=20, or 0"):
        validate(recipe)


def test_integers_are_accepted_as_floats(tmp_path: Path) -> None:
    validate(changed(tmp_path, "pretrain.optim.weight_decay", 0))


def config_classes(*roots: type) -> Iterator[type]:
    for root in roots:
        yield root
        hints = typing.get_type_hints(root).values()
        yield from config_classes(*(hint for hint in hints if dataclasses.is_dataclass(hint)))


CLASSES = list(dict.fromkeys(config_classes(Recipe, ModelConfig, StageConfig, DatasetConfig)))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_number_has_a_lower_bound_and_every_condition_names_a_neighbour(cls: type) -> None:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        rules = rules_of(field)
        if field.name != "within" and any(name in str(hints[field.name]) for name in ("int", "float")):
            assert (rules.at_least is None) != (rules.above is None), f"{cls.__name__}.{field.name}"
        assert rules.only_for.keys() <= hints.keys(), f"{cls.__name__}.{field.name}"
