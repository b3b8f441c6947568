"""The data of a stage: the rows that it trains on, and the held-out sets that it is measured on."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jaxstages import config as recipes
from jaxstages.config import DataConfig, EvaluationConfig, LoopConfig, Recipe, StageConfig
from jaxstages.data.mixture import Dataset, Mixed, mix, steps_for
from jaxstages.data.prepare import Engine, Prepared, open_prepared, prepare, rows_folder
from jaxstages.data.run_tokenizer import cache_folder, open_tokenizer
from jaxstages.data.sources import open_source
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.runtime.bucket import local_copy
from jaxstages.runtime.workdir import result_file

WATCH = "watch/"
"""Prefix of the metrics of watched stages."""


class EvaluationSet(NamedTuple):
    """Held-out data that a stage is measured on.

    prefix: prefix of its metrics: "" for the stage's own set, "pairs/" for `mixture["pairs"]`, "watch/pretrain/" for a
        watched stage.
    task, config: task, and which metrics are computed on how many rows and examples.
    train: training rows, whose labels are classes too.
    """

    prefix: str
    task: str
    config: EvaluationConfig
    train: list[Prepared]
    held_out: list[Prepared]

    @property
    def is_watched(self) -> bool:
        """Whether the set belongs to an earlier stage. Such sets do not decide which step is the best."""
        return self.prefix.startswith(WATCH)


class StageData(NamedTuple):
    """Everything that a stage reads.

    datasets: the training rows, the stage's own first. Empty if the stage is opened for generation only.
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
        """Return all training rows with their mixing weights."""
        return mix(self.datasets, round(late_from * loop.steps) * loop.batch_size)

    @property
    def fingerprints(self) -> dict[str, list[str]]:
        """Fingerprints of the rows that a checkpoint was trained on, and selected by.

        Watched sets select no step, and may change.
        """
        selecting = [each for each in self.evaluation_sets if not each.is_watched]
        return {
            "train": [source.folder.name for dataset in self.datasets for source in dataset.train],
            "held_out": [source.folder.name for each in selecting for source in each.held_out],
        }


def _rows(
    data: DataConfig, part: str, tokenizer: Tokenizer, context: int, cache: Path, engine: Engine | None = None
) -> list[Prepared]:
    """Return the rows of a data set, a cache for each source, and prepare those that are missing."""
    names = data.train if part == "train" else data.validation or data.train
    return [prepare(open_source(name, cache), part, data, tokenizer, context, cache, engine) for name in names]


def _check_held_out_files(recipe: Recipe, name: str, stage: StageConfig, cache: Path) -> None:
    """Raises ValueError if a file of a held-out source is also a training source's: patterns may overlap."""
    trained: dict[bytes, str] = {}
    for data, _, _ in shares_of(recipe, name, stage).values():
        for source in data.train:
            trained |= dict.fromkeys(open_source(source, cache).files, str(source))
    for data in (stage.data, *(part.data for part in stage.mixture.values())):
        for source in data.validation:
            if common := open_source(source, cache).files & trained.keys():
                raise ValueError(
                    f"config.{name}: held-out source {str(source)!r} and training source {trained[min(common)]!r} "
                    "have a file in common; narrow the pattern, or use data.holdout"
                )


def data_names(
    recipe: Recipe, name: str, stage: StageConfig, tokenizer: Tokenizer, workdir: Path
) -> dict[str, list[str]]:
    """Return `StageData.fingerprints` without preparing any rows."""
    context, cache = recipe.model.context, cache_folder(recipe, workdir)

    def names(data: DataConfig, part: str, sources: Sequence[str | Callable]) -> list[str]:
        return [
            rows_folder(open_source(source, cache), part, data, tokenizer, context, cache).name for source in sources
        ]

    trained = [data for data, _, _ in shares_of(recipe, name, stage).values()]
    selecting = (stage.data, *(part.data for part in stage.mixture.values()))
    return {
        "train": [each for data in trained for each in names(data, "train", data.train)],
        "held_out": [each for data in selecting for each in names(data, "validation", data.validation or data.train)],
    }


def open_recorded(
    recipe: Recipe, name: str, stage: StageConfig, names: Mapping[str, list[str]], workdir: Path
) -> tuple[list[Dataset], list[Prepared]]:
    """Open the rows that a checkpoint records: the data sets it was trained on, and the stage's own held-out rows.

    No source is opened. Nothing is prepared or downloaded.

    Args:
        names: "data" of the checkpoint's metadata, as of `data_names`.

    Raises:
        ValueError: the cache on this machine does not have them.
    """
    shares = shares_of(recipe, name, stage)
    if sum(len(data.train) for data, _, _ in shares.values()) != len(names["train"]):
        raise ValueError(f"the recipe names other data than the checkpoint of {name}")

    cache = local_copy(cache_folder(recipe, workdir))

    def opened(rows_name: str) -> Prepared:
        prepared = open_prepared(cache / rows_name)
        if prepared is None:
            raise ValueError(f"the prepared rows of {name}, {cache / rows_name}, are not on this machine")
        return prepared

    trained = iter([opened(rows_name) for rows_name in names["train"]])
    datasets = []
    for key, (data, share, late) in shares.items():
        train = list(itertools.islice(trained, len(data.train)))
        weights = data.weights or tuple(source.index["rows"] for source in train)
        datasets.append(Dataset(key, train, weights, share, late))
    own_held_out = names["held_out"][: len(stage.data.validation or stage.data.train)]
    return datasets, [opened(rows_name) for rows_name in own_held_out]


def shares_of(recipe: Recipe, name: str, stage: StageConfig) -> dict[str, tuple[DataConfig, float, float]]:
    """Map the name of each data set that a stage trains on to data, share and late share.

    The stage's own data comes first and gets the share that `mixture` and `replay` leave.
    """
    added = {key: (part.data, part.share[0], part.share[-1]) for key, part in stage.mixture.items()}
    added |= {earlier: (recipes.stages(recipe)[earlier].data, share, share) for earlier, share in stage.replay}
    own_share = 1 - sum(share for _, share, _ in added.values())
    own_late_share = 1 - sum(late_share for _, _, late_share in added.values())
    return {name: (stage.data, own_share, own_late_share)} | added


def watched(recipe: Recipe, name: str, stage: StageConfig, workdir: Path) -> list[str]:
    """List the earlier stages that this one is also measured on, in the recipe's order."""
    names = list(recipes.stages(recipe))
    earlier = names[: names.index(name)] if name in names else []
    is_descendant = stage.init_from != "scratch"
    finished = [each for each in earlier if is_descendant and result_file(workdir / each).exists()]
    watch = stage.evaluation.watch
    return [each for each in earlier if each in watch or (recipes.EARLIER in watch and each in finished)]


def prepare_stage(
    recipe: Recipe, name: str, stage: StageConfig, tokenizer: Tokenizer, workdir: Path, engine: Engine | None = None
) -> tuple[list[Dataset], list[EvaluationSet]]:
    """Return the data sets and evaluation sets of a stage, and prepare the rows that are missing in the cache."""
    context, cache = recipe.model.context, cache_folder(recipe, workdir)
    _check_held_out_files(recipe, name, stage, cache)

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
        data, evaluation = recipes.stages(recipe)[earlier].data, recipes.stages(recipe)[earlier].evaluation
        train = _rows(data, "train", tokenizer, context, cache, engine) if data.task == "classify" else []
        sets.append(held_out(f"{WATCH}{earlier}/", data, replace(evaluation, **limits), train))
    return datasets, sets


def prepare_stages(
    recipe: Recipe, workdir: Path, names: Iterable[str], engine: Engine | None = None
) -> dict[str, list[Prepared]]:
    """Prepare the tokenizer and all rows of the stages, and return the rows of each.

    Args:
        engine: by default this process.
    """
    tokenizer, stages = open_tokenizer(recipe, workdir, engine), recipes.stages(recipe)
    rows = {}
    for name in names:
        datasets, sets = prepare_stage(recipe, name, stages[name], tokenizer, workdir, engine)
        parts = [source for dataset in datasets for source in dataset.train]
        rows[name] = parts + [source for each in sets for source in each.held_out]
    return rows


def with_steps(stage: StageConfig, datasets: list[Dataset]) -> StageConfig:
    """Return the stage with its length in steps, if the recipe gives it in epochs or tokens. Without data it has
    none."""
    loop = stage.loop
    if loop.steps or not datasets:
        return stage
    steps = steps_for(datasets, loop.batch_size, stage.late_from, epochs=loop.epochs, tokens=loop.tokens)
    return replace(stage, loop=replace(loop, steps=steps))
