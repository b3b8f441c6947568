"""`jaxstages check`: run the property checks of `jaxstages.testing` that apply to a recipe."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxstages import config as recipes
from jaxstages import testing
from jaxstages.config import Recipe
from jaxstages.data.run_tokenizer import cache_folder
from jaxstages.data.sources import open_source
from jaxstages.data.tasks import make_task
from jaxstages.runtime.console import say
from jaxstages.training.compile import make_loss
from jaxstages.training.setup import StageSetup, setup_stage
from jaxstages.training.step import init_state, make_train_step
from jaxstages.types import Batch

RECORDS = 20
"""Records of each training source that a task is checked on."""

LENGTH = 16
"""Tokens of a row in the checks of a model."""


def check(recipe: Recipe, workdir: Path) -> None:
    """Check a recipe's model, and of each stage the task, the loss and the step.

    Args:
        workdir: for the tokenizer and the prepared rows.

    Raises:
        ValueError: a check has failed; the others were run too.
    """
    failures = []
    setups = {name: setup_stage(recipe, name, workdir, with_data=False) for name in recipes.stages(recipe)}
    first = next(iter(setups.values()))
    vocab_size, length = first.data.tokenizer.vocab_size, min(LENGTH, recipe.model.context)
    if length < 8:
        raise ValueError(f"config.model.context={recipe.model.context} is too short to check; it must be at least 8")

    checks: list[tuple[str, Callable[[], None]]] = [
        ("model", lambda: testing.check_model(first.program.model, vocab_size, length))
    ]
    for name, setup in setups.items():
        checks.append((f"{name}: task", lambda setup=setup: _check_task(setup, workdir)))
        checks.append((f"{name}: loss", lambda setup=setup: _check_loss(setup, length)))
        checks.append((f"{name}: step", lambda setup=setup: _check_step(setup, length)))
    for name, run in checks:
        try:
            run()
        except AssertionError as error:
            say(f"  failed  {name}: {error}", "red")
            failures.append(name)
        else:
            say(f"  passed  {name}", "green")
    if failures:
        raise ValueError(f"{len(failures)} of {len(checks)} checks failed: {', '.join(failures)}")
    say(f"all {len(checks)} checks passed", "bold")


def _check_task(setup: StageSetup, workdir: Path) -> None:
    data, context = setup.config.data, setup.program.context
    task = make_task(data, setup.data.tokenizer, context)
    for name in data.train:
        source = open_source(name, cache_folder(setup.recipe, workdir))
        items = (item.record for item in source.read() if item.record is not None)
        records = list(itertools.islice(items, RECORDS))
        testing.check_task(lambda record: task.finish([task.draft(record)])[0], records, context)


def _batch(setup: StageSetup, length: int) -> Batch:
    first = length // 3
    return testing.documents(setup.data.tokenizer.vocab_size, (first, length - first - 2), padding=2)


def _check_loss(setup: StageSetup, length: int) -> None:
    params = jax.jit(setup.program.model.init)(jax.random.key(0))
    testing.check_loss(make_loss(setup.program, setup.program.model), params, _batch(setup, length))


def _check_step(setup: StageSetup, length: int) -> None:
    loss, tx = make_loss(setup.program, setup.program.model), optax.sgd(0.1)
    state = init_state(jax.jit(setup.program.model.init)(jax.random.key(0)), tx)

    def make_step(accumulate: int) -> Callable[[Any, Batch], Any]:
        # Without dropout, whose keys depend on the part.
        return make_train_step(lambda params, batch, _key: loss(params, batch, None), tx, accumulate=accumulate)

    batch = _batch(setup, length)
    testing.check_accumulation(make_step, state, batch)
    other = batch._replace(tokens_BL=jnp.roll(batch.tokens_BL, 1, axis=0))
    testing.check_compiles_once(make_step(1), [(state, batch), (state, other)])
