"""One stage of one run, ready to train or to generate: its data and its program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxstages import config as recipes
from jaxstages.config import (
    AnchorConfig,
    DataConfig,
    EvaluationConfig,
    LoopConfig,
    LoraConfig,
    Recipe,
    StageConfig,
)
from jaxstages.data.choices import open_choices
from jaxstages.data.run_tokenizer import cache_folder, open_tokenizer
from jaxstages.data.stage_data import EvaluationSet, StageData, prepare_stage, with_steps
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.generation.choices import make_choice_scorer
from jaxstages.generation.evaluate import Evaluate, TextModel, make_evaluate
from jaxstages.models.sharding import make_mesh
from jaxstages.runtime.cpu import check_sums
from jaxstages.runtime.files import parse_path
from jaxstages.training.compile import make_loss
from jaxstages.training.handoff import Contract, contract_of
from jaxstages.training.program import Program, check_fit, choose_attention, make_program
from jaxstages.types import Params, Report


@dataclass(frozen=True)
class StageSetup:
    """A stage of a run: where it lives, its data, its program, and its contract with the other stages."""

    recipe: Recipe
    workdir: Path
    data: StageData
    program: Program
    contract: Contract

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def config(self) -> StageConfig:
        return self.program.config

    @property
    def folder(self) -> Path:
        return self.workdir / self.name

    @property
    def text_model(self) -> TextModel:
        """What generates and evaluates with the stage's parameters."""
        program = self.program
        loss = make_loss(program, program.model) if self.config.loss is not None else None
        return TextModel(program.model, self.data.tokenizer, program.context, program.row_sharding, loss)


def make_stage_evaluate(
    setup: StageSetup,
    sets: Sequence[EvaluationSet] | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluate:
    """Return the `make_evaluate` of a stage, with its multiple-choice questions.

    Args:
        sets: by default all of the stage's, and the questions of `evaluation.choice`.
        before_batch: called before each batch; an exception in it ends the evaluation.
    """
    config, tile = setup.config.evaluation, setup.config.loop.loss_tile
    on_sets = make_evaluate(
        setup.text_model, setup.data.evaluation_sets if sets is None else sets, config, tile, before_batch
    )
    if sets is not None or not config.choice:
        return on_sets

    context, cache = setup.program.context, cache_folder(setup.recipe, setup.workdir)
    questions = [
        open_choices(source, setup.data.tokenizer, context, config.choice_max_questions, cache)
        for source in config.choice
    ]
    score = make_choice_scorer(setup.text_model, questions, config.batch_size, tile, before_batch)

    def evaluate(params: Params, scores: bool) -> Report:
        report = on_sets(params, scores)
        return report._replace(metrics=report.metrics | score(params))

    return evaluate


def setup_stage(
    recipe: Recipe,
    name: str,
    workdir: Path | str,
    with_data: bool = True,
    devices: Sequence[Any] | None = None,
) -> StageSetup:
    """Set up stage `name`, all but its initial state.

    Args:
        workdir: folder of the run, as a Path. Its tokenizer is trained if there is none.
        with_data: prepare the rows too; without them the stage can generate, and `program.abstract_state` is complete,
            but it can neither train nor evaluate.
        devices: the devices of the mesh; None for all.

    Raises:
        ValueError: the recipe has no such stage, or a part of it does not fit the mesh or the data.
    """
    workdir = parse_path(workdir, "workdir") if isinstance(workdir, str) else workdir
    stages = recipes.stages(recipe)
    if name == recipes.IMPORT:
        stages = {recipes.IMPORT: _import_stage(stages, open_tokenizer(recipe, workdir), with_data)}
    if name not in stages:
        raise ValueError(f"recipe {recipe.name!r} has no stage {name}; it has {', '.join(stages)}")
    config = stages[name]
    check_sums()
    mesh = make_mesh(recipe.mesh, devices)
    check_fit(recipe, name, config, mesh)
    tokenizer = open_tokenizer(recipe, workdir)
    datasets, sets = prepare_stage(recipe, name, config, tokenizer, workdir) if with_data else ([], [])
    data = StageData(tokenizer, datasets, sets)
    attend = choose_attention(recipe.model, mesh.shape["context"], data.all_rows)
    program = make_program(recipe, name, with_steps(config, datasets), mesh, tokenizer.vocab_size, attend)
    return StageSetup(recipe, workdir, data, program, contract_of(recipe, tokenizer))


def _import_stage(stages: dict[str, StageConfig], tokenizer: Tokenizer, with_data: bool) -> StageConfig:
    """Return the stage that imported weights are evaluated as: the recipe's first one. A recipe without stages can only
    generate: chat if the tokenizer has a chat template, else text."""
    if stages:
        first = next(iter(stages.values()))
        return replace(first, lora=LoraConfig(), anchor=AnchorConfig(), replay=(), mixture={})
    if with_data:
        raise ValueError("the recipe has no stage, and so no data; name a recipe that has with --config=FILE")
    devices = jax.device_count()
    return StageConfig(
        data=DataConfig(task="chat" if tokenizer.template else "lm"),
        loop=LoopConfig(batch_size=devices),
        evaluation=EvaluationConfig(batch_size=devices),
    )
