"""Runs that are trained together: the same numbers as alone, and workdirs like any other."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxstages.config import EarlyStoppingConfig, ModelConfig, Recipe
from jaxstages.runtime.signals import Stop
from jaxstages.training.metric_writer import read_metrics
from jaxstages.training.setup import StageSetup, setup_stage
from jaxstages.training.stage import train_stage
from jaxstages.training.together import check_together, train_together
from jaxstages.types import Diverged, Interrupted
from tests.tiny import recipe as tiny_recipe
from tests.tiny import write_data

STEPS = 200


def changed(folder: Path, seed: int = 0, rate: float = 3e-3, steps: int = STEPS, **optim: float) -> Recipe:
    """The tiny recipe with its pretraining only."""
    recipe = tiny_recipe(folder / "data", steps)
    recipe.seed, recipe.finetune, recipe.instruct, recipe.cache = seed, None, None, str(folder / "cache")
    assert recipe.pretrain is not None and isinstance(recipe.model, ModelConfig)
    recipe.model = dataclasses.replace(recipe.model, layers=1)
    stage = recipe.pretrain
    stage.optim = dataclasses.replace(stage.optim, **optim)
    stage.optim.schedule.peak_lr = rate
    stage.loop = dataclasses.replace(stage.loop, eval_every=50, save_every=100, log_every=10)
    return recipe


def setups_of(folder: Path, recipes: list[Recipe]) -> list[StageSetup]:
    write_data(folder.parent / "data")
    return [setup_stage(recipe, "pretrain", folder / str(index)) for index, recipe in enumerate(recipes)]


def curve(setup: StageSetup, kind: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(setup.folder / "metrics.jsonl") if line["kind"] == kind}


@pytest.mark.parametrize(("seeds", "steps"), [((0, 1), STEPS), ((0, 0), 60)])
def test_losses_and_best_steps_are_those_of_each_run_alone(seeds: tuple[int, ...], steps: int, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"rate": 3e-3}, {"rate": 2e-3, "weight_decay": 0.0, "beta2": 0.99}]
    recipes = [changed(tmp_path, seed, steps=steps, **change) for seed, change in zip(seeds, changes, strict=True)]
    alone = setups_of(tmp_path / "alone", recipes)
    expected = [train_stage(setup) for setup in alone]

    together = setups_of(tmp_path / "together", recipes)
    results = train_together(together, Stop())
    for setup, reference, result, desired in zip(together, alone, results, expected, strict=True):
        assert isinstance(result, dict) and desired is not None
        assert result["best_step"] == desired["best_step"] and result["tokens"] == desired["tokens"]
        assert json.loads((setup.folder / "result.json").read_text())["steps"] == steps
        for kind in ("train", "eval"):
            ours, theirs = curve(setup, kind), curve(reference, kind)
            assert ours.keys() == theirs.keys()
            np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-5)


def test_a_run_that_ends_early_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    """One stops early, one diverges, one goes on; and the last is resumed at another step."""
    recipes = [changed(tmp_path, rate=rate, steps=40) for rate in (1e-9, 1e30, 1e-2, 1e-2)]
    for recipe in recipes:
        assert recipe.pretrain is not None
        recipe.pretrain.loop.eval_every, recipe.pretrain.optim.max_bad_steps = 10, 3
    assert recipes[0].pretrain is not None and recipes[3].pretrain is not None
    recipes[0].pretrain.early_stopping = EarlyStoppingConfig(patience=1, min_delta=0.05)
    recipes[3].pretrain.loop.stop_after = 10
    with pytest.raises(ValueError, match=r"early_stopping.* can't be trained together"):
        train_together(setups_of(tmp_path / "refused", recipes), Stop())
    for recipe in recipes:
        assert recipe.pretrain is not None
        recipe.pretrain.early_stopping = EarlyStoppingConfig(patience=1, min_delta=0.05)

    setups = setups_of(tmp_path / "together", recipes)
    assert train_stage(setups[3]) is None
    recipes[3].pretrain.loop.stop_after = 0
    setups[3] = setup_stage(recipes[3], "pretrain", setups[3].workdir)
    stopped, diverged, whole, resumed = train_together(setups, Stop())
    assert isinstance(stopped, dict) and (stopped["status"], stopped["steps"]) == ("early_stopped", 20)
    assert isinstance(diverged, Diverged)
    assert isinstance(whole, dict) and isinstance(resumed, dict) and resumed["steps"] == whole["steps"] > 20
    assert resumed["best"]["loss"] == pytest.approx(whole["best"]["loss"], abs=1e-5)


def test_a_shared_batch_is_that_of_the_runs_that_go_on(tmp_path: Path) -> None:
    """The first of three runs with one seed stops early; its last batch is not trained on again by the others."""
    recipes = [changed(tmp_path, rate=rate, steps=40) for rate in (1e-9, 3e-3, 2e-3)]
    for recipe in recipes:
        assert recipe.pretrain is not None
        recipe.pretrain.loop.eval_every = 10
        recipe.pretrain.early_stopping = EarlyStoppingConfig(patience=1, min_delta=0.05)
    alone, together = (setups_of(tmp_path / name, recipes) for name in ("alone", "together"))
    expected = [train_stage(setup) for setup in alone]
    results = train_together(together, Stop())
    for setup, reference, result, desired in zip(together, alone, results, expected, strict=True):
        assert isinstance(result, dict) and desired is not None and result["steps"] == desired["steps"]
        assert curve(setup, "eval") == pytest.approx(curve(reference, "eval"), abs=1e-5)


def test_runs_are_spread_over_devices(tmp_path: Path) -> None:
    """Five runs on two devices: three share one, two the other, and one of these stops early."""
    rates = (3e-3, 2e-3, 1e-3, 1e-9, 5e-4)
    recipes = [changed(tmp_path, seed, rate, steps=40) for seed, rate in enumerate(rates)]
    for recipe in recipes:
        assert recipe.pretrain is not None
        recipe.pretrain.loop.eval_every = 10
        recipe.pretrain.early_stopping = EarlyStoppingConfig(patience=1, min_delta=0.02)
    alone = setups_of(tmp_path / "alone", recipes)
    expected = [train_stage(setup) for setup in alone]
    together = [
        setup_stage(recipe, "pretrain", tmp_path / "together" / str(index), devices=[jax.devices()[index % 2]])
        for index, recipe in enumerate(recipes)
    ]
    results = train_together(together, Stop())
    for setup, reference, result, desired in zip(together, alone, results, expected, strict=True):
        assert isinstance(result, dict) and desired is not None and result["steps"] == desired["steps"]
        assert curve(setup, "eval") == pytest.approx(curve(reference, "eval"), abs=1e-5), setup.folder
    assert len({result["steps"] for result in results if isinstance(result, dict)}) > 1, "one stops early"


def test_an_interrupted_run_is_resumed_alone(tmp_path: Path) -> None:
    recipes = [changed(tmp_path, seed, steps=20) for seed in (0, 1)]
    expected = train_stage(setups_of(tmp_path / "alone", recipes)[1])
    setups = setups_of(tmp_path / "together", recipes)
    signals = Stop()
    polls = iter(range(10**6))
    signals.poll = lambda: next(polls) > 20  # type: ignore[method-assign]
    assert all(isinstance(outcome, Interrupted) for outcome in train_together(setups, signals))
    result = train_stage(setup_stage(recipes[1], "pretrain", setups[1].workdir))
    assert result is not None and expected is not None
    assert result["best"]["loss"] == pytest.approx(expected["best"]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("config.pretrain.loop.batch_size: 8 -> 4", lambda recipe: setattr(recipe.pretrain.loop, "batch_size", 4)),
        (
            "config.pretrain.optim.clip_norm: 1.0 -> 0.0",
            lambda recipe: setattr(recipe.pretrain.optim, "clip_norm", 0.0),
        ),
        ("config.model.width: 16 -> 32", lambda recipe: setattr(recipe.model, "width", 32)),
        ("config.seed=2147483648", lambda recipe: setattr(recipe, "seed", 2**31)),
    ],
)
def test_runs_that_need_another_program_are_refused(field: str, change: Any, tmp_path: Path) -> None:
    other = changed(tmp_path, rate=1e-2)
    check_together([changed(tmp_path), other], "pretrain")
    change(other)
    with pytest.raises(ValueError, match=re.escape(field)):
        check_together([changed(tmp_path), other], "pretrain")
