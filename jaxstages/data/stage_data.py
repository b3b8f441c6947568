"""The data of a stage: the rows that it trains on, and the held-out sets that it is measured on."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jaxstages import config as recipes
from jaxstages.config import DataConfig, EvaluationConfig, LoopConfig, Recipe, StageConfig
from jaxstages.data.mixture import Dataset, Mixed, mix, steps_for
from jaxstages.data.prepare import Engine, Prepared, prepare, rows_folder
from jaxstages.data.run_tokenizer import cache_folder, open_tokenizer
from jaxstages.data.sources import open_source
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.runtime.workdir import result_file

WATCH = "watch/"
"""Prefix of the metrics of watched stages."""


class EvaluationSet(NamedTuple):
    """Held-out data that a stage is measured on.

    prefix: of its metrics: "" for the stage's own set, "pairs/" for `mixture["pairs"]`, "watch/pretrain/" for a watched
        stage.
    task, config: what is scored, and on how much.
    train: training rows, whose labels count as classes too.
    """

    prefix: str
    task: str
    config: EvaluationConfig
    train: list[Prepared]
    held_out: list[Prepared]

    @property
    def is_watched(self) -> bool:
        """Whether it belongs to an earlier stage, and so judges no step."""
        return self.prefix.startswith(WATCH)


class StageData(NamedTuple):
    """Everything that a stage reads.

    datasets: the training rows, the stage's own first. Empty where the stage is opened to generate only.
    evaluation_sets: the held-out sets, the stage's own first.
    """

    tokenizer: Tokenizer
    datasets: list[Dataset]
    evaluation_sets: list[EvaluationSet]

    @property
    def train(self) -> list[Prepared]:
        """The stage's own training rows."""
        return self.datasets[0].train

    @property
    def held_out(self) -> list[Prepared]:
        """The stage's own held-out rows."""
        return self.evaluation_sets[0].held_out

    @property
    def all_rows(self) -> list[Prepared]:
        """Training and held-out rows of every data set."""
        rows = [source for dataset in self.datasets for source in dataset.train]
        return rows + [source for each in self.evaluation_sets for source in each.held_out]

    def mix(self, loop: LoopConfig, late_from: float) -> Mixed:
        """All training rows, with the weights by which they are mixed."""
        return mix(self.datasets, round(late_from * loop.steps) * loop.batch_size)

    @property
    def fingerprints(self) -> dict[str, list[str]]:
        """Fingerprints of the rows that a checkpoint was trained on, and judged by.

        Watched sets judge no step, and may come and go.
        """
        judged = [each for each in self.evaluation_sets if not each.is_watched]
        return {
            "train": [source.folder.name for dataset in self.datasets for source in dataset.train],
            "held_out": [source.folder.name for each in judged for source in each.held_out],
        }


def _rows(
    data: DataConfig, part: str, tokenizer: Tokenizer, context: int, cache: Path, engine: Engine | None = None
) -> list[Prepared]:
    """The rows of a data set, a cache for each source, made where they are not there yet."""
    names = data.train if part == "train" else data.validation or data.train
    return [prepare(open_source(name, cache), part, data, tokenizer, context, cache, engine) for name in names]


def data_names(
    recipe: Recipe, name: str, stage: StageConfig, tokenizer: Tokenizer, workdir: Path
) -> dict[str, list[str]]:
    """Fingerprints of the rows that a stage is trained on, and judged by, in the form of a checkpoint's metadata; no
    rows are made."""
    context, cache = recipe.model.context, cache_folder(recipe, workdir)

    def names(data: DataConfig, part: str, sources: tuple[str, ...]) -> list[str]:
        return [
            rows_folder(open_source(source, cache), part, data, tokenizer, context, cache).name for source in sources
        ]

    judged = (stage.data, *(part.data for part in stage.mixture.values()))
    trained = [data for data, _, _ in shares_of(recipe, name, stage).values()]
    return {
        "train": [each for data in trained for each in names(data, "train", data.train)],
        "held_out": [each for data in judged for each in names(data, "validation", data.validation or data.train)],
    }


def shares_of(recipe: Recipe, name: str, stage: StageConfig) -> dict[str, tuple[DataConfig, float, float]]:
    """Name -> data, share and late share of each data set that a stage trains on: its own, which fills the rest of the
    rows, then `mixture` and `replay`."""
    others = {key: (part.data, part.share[0], part.share[-1]) for key, part in stage.mixture.items()}
    others |= {earlier: (recipes.stages(recipe)[earlier].data, share, share) for earlier, share in stage.replay}
    early = 1 - sum(share for _, share, _ in others.values())
    late = 1 - sum(share for _, _, share in others.values())
    return {name: (stage.data, early, late)} | others


def watched(recipe: Recipe, name: str, stage: StageConfig, workdir: Path) -> list[str]:
    """The earlier stages that this one is measured on too, in the recipe's order."""
    names = list(recipes.stages(recipe))
    earlier = names[: names.index(name)] if name in names else []
    descends = stage.init_from != "scratch"
    there = [each for each in earlier if descends and result_file(workdir / each).exists()]
    asked = stage.evaluation.watch
    return [each for each in earlier if each in asked or (recipes.EARLIER in asked and each in there)]


def prepare_stage(
    recipe: Recipe, name: str, stage: StageConfig, tokenizer: Tokenizer, workdir: Path, engine: Engine | None = None
) -> tuple[list[Dataset], list[EvaluationSet]]:
    """What a stage is trained on and measured on, from the cache where it is there."""
    context, cache = recipe.model.context, cache_folder(recipe, workdir)
    datasets = []
    for key, (data, share, late) in shares_of(recipe, name, stage).items():
        train = _rows(data, "train", tokenizer, context, cache, engine)
        weights = data.weights or tuple(source.index["rows"] for source in train)
        datasets.append(Dataset(key, train, weights, share, late))

    def held_out(prefix: str, data: DataConfig, config: EvaluationConfig, train: list[Prepared]) -> EvaluationSet:
        return EvaluationSet(
            prefix, data.task, config, train, _rows(data, "validation", tokenizer, context, cache, engine)
        )

    sets = [held_out("", stage.data, stage.evaluation, datasets[0].train)]
    sets += [
        held_out(f"{key}/", stage.mixture[key].data, stage.mixture[key].evaluation, dataset.train)
        for key, dataset in zip(stage.mixture, datasets[1:], strict=False)
    ]
    limits = {"max_rows": stage.evaluation.watch_max_rows, "max_examples": stage.evaluation.watch_max_examples}
    for earlier in watched(recipe, name, stage, workdir):
        other = recipes.stages(recipe)[earlier]
        train = _rows(other.data, "train", tokenizer, context, cache, engine) if other.data.task == "classify" else []
        sets.append(held_out(f"{WATCH}{earlier}/", other.data, replace(other.evaluation, **limits), train))
    return datasets, sets


def prepare_stages(
    recipe: Recipe, workdir: Path, names: Iterable[str], engine: Engine | None = None
) -> dict[str, list[Prepared]]:
    """The tokenizer, and all rows of each stage, made where they are not there yet.

    Args:
        engine: who makes the rows; by default this process.
    """
    tokenizer, stages = open_tokenizer(recipe, workdir, engine), recipes.stages(recipe)
    rows = {}
    for name in names:
        datasets, sets = prepare_stage(recipe, name, stages[name], tokenizer, workdir, engine)
        parts = [source for dataset in datasets for source in dataset.train]
        rows[name] = parts + [source for each in sets for source in each.held_out]
    return rows


def with_steps(stage: StageConfig, datasets: list[Dataset]) -> StageConfig:
    """The stage with its length in steps, where the recipe has it in epochs or tokens. Without data it has none."""
    loop = stage.loop
    if loop.steps or not datasets:
        return stage
    steps = steps_for(datasets, loop.batch_size, stage.late_from, epochs=loop.epochs, tokens=loop.tokens)
    return replace(stage, loop=replace(loop, steps=steps))
