"""`inspect`: what a stage is really trained on: a decoded batch, trained-on tokens in colour, and the data's shares."""

import contextlib
import itertools
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxstages import config as recipes
from jaxstages.cli.resolve import keep_recipe
from jaxstages.config import Recipe
from jaxstages.data.batches import batches_by_step
from jaxstages.data.mixture import describe
from jaxstages.runtime.workdir import begun_stages, lock, writable
from jaxstages.train.setup import StageSetup, setup_stage
from jaxstages.types import Batch

ROWS = 4
"""Rows that are shown."""


def inspect(recipe: Recipe, workdir: Path, stage: str | None) -> None:
    """Print for one stage (by default the first): rows of batch 0, packing, what was cut, shares of masked tokens.

    A token is green where the model is trained to produce it and dim where it is only read; where there is no colour
    (a file), trained-on stretches stand in ⟦double brackets⟧. `¦` begins a new example, `·` is padding.
    """
    with contextlib.ExitStack() as held:
        # What a run has begun with stays as it is: it can be looked at while it runs, and where nobody may write.
        if not begun_stages(workdir) and writable(workdir):
            held.enter_context(lock(workdir))
            keep_recipe(recipe, workdir)
        setup = setup_stage(recipe, stage or next(iter(recipes.stages(recipe)), recipes.IMPORT), workdir)
    console = Console(soft_wrap=True, highlight=False)
    mixed, loop = setup.data.mix(setup.config.loop, setup.config.late_from), setup.config.loop
    batches = batches_by_step(
        mixed.sources, batch_size=loop.batch_size, seed=recipe.seed, weights=mixed.weights, late=mixed.late
    )
    batch = batches.batch(0)
    total = len(batch.tokens_BL)
    console.print(f"{setup.name}: batch 0, {min(ROWS, total)} of its {total} rows", style="bold")
    for row in range(min(ROWS, total)):
        console.print(_row(setup, batch, row, console.is_terminal))
    masked = 100 * (1 - float(np.sum(batch.weights_BL > 0)) / float(np.sum(batch.segments_BL > 0)))
    console.print(f"  batch 0: {masked:.1f} % of its tokens are masked (read, not trained on)")
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
    """One row as text. A slot is shown by its target, and the first token of an example, which nothing predicts, by
    itself: so every id is shown once, in the colour of its own weight."""
    slots: list[tuple[int, bool, str]] = []  # id, trained on, and a mark that stands before it
    for slot in range(batch.tokens_BL.shape[1]):
        if not batch.segments_BL[row, slot]:
            break
        if batch.positions_BL[row, slot] == 0:
            slots.append((int(batch.tokens_BL[row, slot]), False, "¦"))
        slots.append((int(batch.targets_BL[row, slot]), bool(batch.weights_BL[row, slot] > 0), ""))
    text = Text()
    for (trained, _), group in itertools.groupby(slots, key=lambda entry: (entry[1], entry[2])):
        entries = list(group)
        piece = entries[0][2] + setup.data.tokenizer.show([token for token, _, _ in entries])
        marked = f"⟦{piece}⟧" if trained and not colour else piece
        text.append(marked, style="bold green" if trained else "dim")
    padded = not batch.segments_BL[row, -1]
    return text.append("·", style="dim") if padded else text
