"""A row of the suite as a recipe with data of its own, for what is measured of whole stages."""

from pathlib import Path

import numpy as np
from contender_jaxstages import optim_config
from rows import Row
from weights import model_config

from jaxstages.config import DataConfig, EvaluationConfig, LoopConfig, Recipe, StageConfig, TokenizerConfig
from jaxstages.data.tokenizer import SPECIAL_TOKENS

CHARACTERS = 1_115_394
"""Of Tiny Shakespeare, which nanoGPT's CPU setting trains on: how many rows there are to shuffle shows in the loop."""

FIRST_LETTER = 0x4E00
"""Letters without case or spaces; there are 20,000 of them."""


def write_text(path: Path, row: Row) -> Path:
    """A text whose characters, with our control tokens and that for unknown ones, make the row's vocabulary."""
    letters = row.vocab - len(SPECIAL_TOKENS) - 1
    draw = np.random.default_rng(0).zipf(1.5, CHARACTERS) % letters
    draw[:letters] = np.arange(letters)  # so that all are there
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(chr(FIRST_LETTER + i) for i in np.cumsum(draw) % letters), encoding="utf-8")
    return path


def pretrain_recipe(row: Row, folder: Path, steps: int, save_every: int) -> Recipe:
    """The row's model trained for so many steps, evaluated on one batch at both ends."""
    text = write_text(folder / f"{row.name}.txt", row)
    return Recipe(
        name=row.name,
        tokenizer=TokenizerConfig(kind="characters"),
        model=model_config(row),
        cache=str(folder / "cache"),
        pretrain=StageConfig(
            data=DataConfig(task="lm", train=(str(text),), holdout=0.1),
            optim=optim_config(row),
            loop=LoopConfig(steps=steps, batch_size=row.batch, eval_every=steps, save_every=save_every, log_every=10),
            evaluation=EvaluationConfig(batch_size=row.batch, max_rows=row.batch),
        ),
    )
