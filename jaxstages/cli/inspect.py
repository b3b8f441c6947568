"""`inspect`: show a batch as text, with the trained-on tokens in colour, and statistics of the data."""

import contextlib
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxstages import config as recipes
from jaxstages.cli.resolve import keep_recipe
from jaxstages.config import Recipe
from jaxstages.data.batches import batches_by_step
from jaxstages.data.mixture import describe
from jaxstages.data.row_text import spans_of
from jaxstages.runtime.workdir import begun_stages, lock, writable
from jaxstages.training.setup import StageSetup, setup_stage
from jaxstages.types import Batch

ROWS = 4
"""Rows to show."""


def inspect(recipe: Recipe, workdir: Path, stage: str | None, number: int = 0) -> None:
    """Print rows of a batch, and statistics of packing, truncation and masking, for a stage (by default the first).

    Batch k is what step k + 1 of the log trains on.

    A token is green if the model is trained to produce it, and dim if it is only context. Without colour (in a file),
    trained-on spans stand in ⟦double brackets⟧. `¦` begins a new example, `·` is padding.
    """
    with contextlib.ExitStack() as stack:
        # A run that has begun can be inspected while it runs, and in a read-only folder: nothing is written then.
        if not begun_stages(workdir) and writable(workdir):
            stack.enter_context(lock(workdir))
            keep_recipe(recipe, workdir)
        setup = setup_stage(recipe, stage or next(iter(recipes.stages(recipe)), recipes.IMPORT), workdir)
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    mixed, loop = setup.data.mix(setup.config.loop, setup.config.late_from), setup.config.loop
    batches = batches_by_step(
        mixed.sources, batch_size=loop.batch_size, seed=recipe.seed, weights=mixed.weights, late=mixed.late
    )
    batch = batches.batch(number)
    total = len(batch.tokens_BL)
    console.print(f"{setup.name}: batch {number}, {min(ROWS, total)} of its {total} rows", style="bold")
    for row in range(min(ROWS, total)):
        console.print(_row(setup, batch, row, console.is_terminal))
    masked = 100 * (1 - float(np.sum(batch.weights_BL > 0)) / float(np.sum(batch.segments_BL > 0)))
    console.print(f"  batch {number}: {masked:.1f} % of its tokens are masked (read, not trained on)")
    records = batches.where(number)
    console.print(
        f"  its records: {', '.join(records[:ROWS])}" + (f" and {len(records) - ROWS} more" * (len(records) > ROWS))
    )
    for line in describe(setup.data.datasets, loop.steps, loop.batch_size, setup.config.late_from):
        console.print(f"  {line}")
    held_out = [source for each in setup.data.evaluation_sets for source in each.held_out]
    for prepared in (*mixed.sources, *held_out):
        index = prepared.index
        slots = index["rows"] * index["context"]
        console.print(
            f"  {index['source']} ({index['part']}): {index['records']:,} records, {index['bad']:,} malformed; "
            f"{index['rows']:,} rows, {100 * index['tokens'] / slots:.1f} % filled; "
            f"{100 * (1 - index['scored'] / index['tokens']):.1f} % of tokens masked; "
            f"{index['cut_examples']:,} examples cut, {index['cut_tokens']:,} tokens lost"
        )


def _row(setup: StageSetup, batch: Batch, row: int, colour: bool) -> Text:
    """Format one row, each token in the colour of its own loss weight."""
    text = Text()
    for span in spans_of(batch, row, setup.data.tokenizer):
        piece = f"¦{span.text}" if span.begins else span.text
        marked = f"⟦{piece}⟧" if span.trained and not colour else piece
        text.append(marked, style="bold green" if span.trained else "dim")
    padded = not batch.segments_BL[row, -1]
    return text.append("·", style="dim") if padded else text
