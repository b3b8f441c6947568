"""The first rows that a stage was trained on, decoded, with the tokens that its loss scores."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import finished, read_meta
from jaxstages.config import Recipe
from jaxstages.data.batches import batches_by_step
from jaxstages.data.mixture import describe, mix
from jaxstages.data.row_text import Span, spans_of
from jaxstages.data.stage_data import open_recorded, with_steps
from jaxstages.data.tokenizer import load_tokenizer
from jaxstages.runtime.workdir import checkpoint_folder, result_file, steps_of, tokenizer_file

ROWS = 4
"""Rows to show."""


class TrainingRows(NamedTuple):
    """Rows of batch 0 of a stage.

    rows: the first ones, in spans.
    batch_size: rows of the whole batch.
    context_share: share of the batch's tokens that are read but not trained on.
    uses: a line for each data set, with its shares and passes.
    """

    rows: list[list[Span]]
    batch_size: int
    context_share: float
    uses: list[str]


def checkpoint_meta(workdir: Path, name: str) -> dict[str, Any]:
    """Read the metadata of a stage's best checkpoint, or of the latest one if the stage is not finished.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    folder = workdir / name
    steps = steps_of(folder)
    if not steps:
        raise ValueError(f"{folder} has no checkpoint")
    step = finished(folder)["best_step"] if result_file(folder).exists() else steps[-1]
    return read_meta(checkpoint_folder(folder, step))


def read_training_rows(recipe: Recipe, workdir: Path, name: str) -> TrainingRows:
    """Decode the first rows of batch 0 of a stage that has begun, from the prepared rows that its checkpoint names.

    Sources are not opened, so they may have moved.

    Raises:
        ValueError: the checkpoint or the prepared rows are no longer there.
    """
    stage, tokenizer = recipes.stages(recipe)[name], load_tokenizer(tokenizer_file(workdir))
    datasets, _ = open_recorded(recipe, name, stage, checkpoint_meta(workdir, name)["data"], workdir)
    loop = with_steps(stage, datasets).loop
    mixed = mix(datasets, round(stage.late_from * loop.steps) * loop.batch_size)
    batches = batches_by_step(
        mixed.sources, batch_size=loop.batch_size, seed=recipe.seed, weights=mixed.weights, late=mixed.late
    )
    batch = batches.batch(0)
    return TrainingRows(
        rows=[spans_of(batch, row, tokenizer) for row in range(min(ROWS, loop.batch_size))],
        batch_size=loop.batch_size,
        context_share=1 - float(np.sum(batch.weights_BL > 0)) / float(np.sum(batch.segments_BL > 0)),
        uses=describe(datasets, loop.steps, loop.batch_size, stage.late_from),
    )
