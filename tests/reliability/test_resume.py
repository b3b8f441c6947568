"""A run that was stopped, however often and wherever, ends as one that was not: the same bits, lines and decisions."""

import contextlib
import copy
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxstages.checkpoint.fingerprint import fingerprint
from jaxstages.checkpoint.manager import Checkpoints
from jaxstages.checkpoint.metadata import read_meta
from jaxstages.cli.train import train
from jaxstages.config import EarlyStoppingConfig, Recipe, ScheduleConfig
from jaxstages.generation.evaluate import Report
from jaxstages.runtime.signals import Stop
from jaxstages.runtime.workdir import checkpoint_folder, steps_of
from jaxstages.training import program, stage
from jaxstages.training.setup import make_stage_evaluate
from jaxstages.types import Batch, Interrupted, Params
from tests.reliability.harness import make_recipe, outcome
from tests.reliability.test_nonfinite import small_model


def dropout(x_BLD: jax.Array, batch: Batch, key: jax.Array | None) -> jax.Array:
    if key is None:
        return x_BLD
    return x_BLD * jax.random.bernoulli(key, 0.9, x_BLD.shape).astype(x_BLD.dtype)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, prepared rows and compiled functions, for a small model with dropout."""
    folder = tmp_path_factory.mktemp("home")
    model = functools.cache(lambda vocab: small_model(vocab, dropout))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_model", lambda config, vocab, **_: model(vocab))
        yield folder


def base(home: Path) -> Recipe:
    recipe = make_recipe(home)
    recipe.finetune = recipe.instruct = None
    recipe.pretrain.loop.batch_size, recipe.pretrain.evaluation.batch_size = 4, 2
    return recipe


def result_of(work: Path) -> dict[str, Any]:
    """What must be the same; which checkpoints there are besides the last and the best depends on the stops."""
    actual = outcome(work)["pretrain"]
    kept = steps_of(work / "pretrain")
    assert {actual["steps"], actual["best_step"]} <= set(kept)
    carried = read_meta(checkpoint_folder(work / "pretrain", kept[-1]))["carried"]
    carried.pop("seconds")
    return actual | {"carried": carried}


def start(recipe: Recipe, work: Path, stop: int = 0) -> bool:
    recipe = copy.deepcopy(recipe)
    recipe.pretrain.loop.stop_after = stop
    return train(recipe, work, "pretrain")


def stopped(recipe: Recipe, work: Path, stops: tuple[int, ...]) -> dict[str, Any]:
    for stop in stops:
        assert start(recipe, work, stop) is False
        assert steps_of(work / "pretrain")[-1] == stop
    assert start(recipe, work) is True
    return result_of(work)


# Each makes of the tiny recipe one in which more is under way when a run stops.


def several_epochs(recipe: Recipe) -> None:
    """One source of 23 rows, two rows a step: an epoch ends in the middle of step 12, another with step 23."""
    recipe.pretrain.data.train, recipe.pretrain.data.weights = recipe.pretrain.data.train[:1], ()
    loop = recipe.pretrain.loop
    loop.batch_size, loop.steps, loop.save_every, loop.eval_every = 2, 26, 10, 13


def mixture(recipe: Recipe) -> None:
    """Two sources, of which each goes through its epochs at its own pace; log lines that average over three steps."""
    recipe.pretrain.loop.log_every = 3


def plateau_and_spikes(recipe: Recipe) -> None:
    """The learning rate falls by what was seen, and steps are skipped by what was seen."""
    optim = recipe.pretrain.optim
    optim.schedule = ScheduleConfig(
        name="plateau", peak_lr=3.0, warmup_steps=0, plateau_factor=0.5, plateau_patience=1, plateau_window=2
    )
    optim.spike_sigma, optim.spike_window = 1.5, 3


def patience(recipe: Recipe) -> None:
    """Late steps are too small to be improvements: early stopping acts after three evaluations without one."""
    recipe.pretrain.loop.steps, recipe.pretrain.loop.eval_every, recipe.pretrain.loop.save_every = 40, 2, 7
    recipe.pretrain.optim.schedule = ScheduleConfig(name="rsqrt", peak_lr=0.1, warmup_steps=1)
    recipe.pretrain.early_stopping = EarlyStoppingConfig(metric="loss", patience=3, min_delta=1.0)


CASES = {case.__name__: case for case in (several_epochs, mixture, plateau_and_spikes, patience)}


Wholes = Callable[[str], tuple[Recipe, dict[str, Any]]]


@pytest.fixture(scope="module")
def wholes(home: Path) -> Wholes:
    """The recipe of a case, and what comes of it without a stop; made when first asked for."""
    made: dict[str, tuple[Recipe, dict[str, Any]]] = {}

    def get(name: str) -> tuple[Recipe, dict[str, Any]]:
        if name not in made:
            recipe = base(home)
            CASES[name](recipe)
            made[name] = recipe, stopped(recipe, home / name, ())
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("several_epochs", (2, 5, 8)),  # three times within an epoch
        ("several_epochs", (12, 13, 23, 25)),  # where one ends, and soon after
        ("mixture", (1, 4, 5, 11)),  # before the first save, at an evaluation, after it, and before the last step
        ("plateau_and_spikes", (5, 6, 7, 10)),  # before, in and after steps that are skipped
        ("patience", (14, 16)),  # at the best, and with one evaluation since that was none
        ("patience", (15, 18, 19)),  # soon after the best, and with one evaluation left
    ],
    ids=str,
)
def test_stopped_several_times(wholes: Wholes, tmp_path: Path, name: str, stops: tuple[int, ...]) -> None:
    recipe, whole = wholes(name)
    assert stopped(recipe, tmp_path / "work", stops) == whole


def test_the_cases_are_what_they_are_called(wholes: Wholes) -> None:
    """Otherwise nothing would be under way when they are stopped."""
    _, whole = wholes("plateau_and_spikes")
    assert [line["step"] for line in whole["lines"] if line.get("why") == "a spike"] == [6, 7, 10]
    assert whole["fingerprint"]["train/opt_state/2/scale"] != fingerprint({"": jnp.float32(1.0)}).digests[""], (
        "it was cut"
    )
    _, whole = wholes("patience")
    assert (whole["status"], whole["best_step"], whole["steps"]) == ("early_stopped", 14, 20)
    assert wholes("several_epochs")[1] != wholes("mixture")[1]


@pytest.mark.parametrize("name", ["mixture", "patience"])
def test_killed_before_the_result_was_written(wholes: Wholes, home: Path, tmp_path: Path, name: str) -> None:
    """All steps are done, the last checkpoint is there: the result is written, and nothing else changes."""
    recipe, whole = wholes(name)
    shutil.copytree(home / name, tmp_path / "work")
    (tmp_path / "work" / "pretrain" / "result.json").unlink()
    assert stopped(recipe, tmp_path / "work", ()) == whole


# Asked to stop by a signal while an evaluation is under way: it is left, and made when the run goes on.


class Signals:
    """Stands for the signals of the loop: they come in the middle of chosen evaluations."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._at: tuple[int, int] = (-1, -1)
        self._stop = Stop()
        patch.setattr(stage, "stop_signals", self._signals)
        patch.setattr(stage, "make_stage_evaluate", self._make_evaluate)

    def come(self, evaluation: int, batch: int) -> None:
        """In the next run: before the given batch of its given evaluation, both counted from 0; never if negative."""
        self._at = evaluation, batch

    @contextlib.contextmanager
    def _signals(self, *_: Any) -> Iterator[Stop]:
        self._stop = Stop()
        yield self._stop

    def _make_evaluate(self, setup: Any, *, before_batch: Callable[[], None]) -> Any:
        evaluation, batch = -1, 0

        def counted() -> None:
            nonlocal batch
            self._stop.requested |= (evaluation, batch) == self._at
            batch += 1
            before_batch()

        evaluate = make_stage_evaluate(setup, before_batch=counted)

        def one(params: Params, scores: bool) -> Report:
            nonlocal evaluation, batch
            evaluation, batch = evaluation + 1, 0
            return evaluate(params, scores)

        return one


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("mixture", [(1, 0)]),  # step 4, the first evaluation that counts; no save was due
        ("mixture", [(1, 3), (0, 2), (1, 1)]),  # in it again, and in the one at step 8
        ("mixture", [(3, 1)]),  # the last
        ("patience", [(7, 2)]),  # step 14, which becomes the best
        ("patience", [(10, 1)]),  # step 20, where early stopping acts
    ],
    ids=str,
)
def test_asked_to_stop_in_the_middle_of_an_evaluation(
    wholes: Wholes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, times: list[tuple[int, int]]
) -> None:
    recipe, whole = wholes(name)
    signals = Signals(monkeypatch)
    for evaluation, batch in times:
        signals.come(evaluation, batch)
        with pytest.raises(Interrupted, match=r"interrupted; saved at step \d+, start it again to go on"):
            start(recipe, tmp_path / "work")
    signals.come(-1, -1)
    assert start(recipe, tmp_path / "work") is True
    actual = result_of(tmp_path / "work")
    if actual["carried"]["evaluated"] < actual["steps"]:
        # In the last evaluation: the last checkpoint stays as it was saved, before that. All else is the same.
        actual, whole = without_evaluation(actual), without_evaluation(whole)
    assert actual == whole


def without_evaluation(result: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what the last checkpoint says of evaluations; the result and the lines say it too."""
    prints = {path: text for path, text in result["fingerprint"].items() if "early_stopping" not in path}
    carried = {name: value for name, value in result["carried"].items() if name not in ("evaluated", "best")}
    return result | {"fingerprint": prints, "carried": carried}


def test_killed_after_an_evaluation_that_was_made_up_for(
    wholes: Wholes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the evaluation at step 4; it is made after the next start, which is killed before a save: made
    once more, its line must not stand there twice."""
    recipe, whole = wholes("mixture")
    signals = Signals(monkeypatch)
    signals.come(1, 1)
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "work")
    signals.come(-1, -1)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(RuntimeError, match="killed"):
            start(recipe, tmp_path / "work")
    assert start(recipe, tmp_path / "work") is True
    assert result_of(tmp_path / "work") == whole


def killed(*_: Any) -> None:
    raise RuntimeError("killed")
