"""Numbers that are not finite: exactly the steps that have them are skipped, and nothing of them stays anywhere."""

import copy
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstages.checkpoint.fingerprint import params_sha256
from jaxstages.checkpoint.manager import Checkpoints, read_params
from jaxstages.checkpoint.metadata import META
from jaxstages.cli import main as door
from jaxstages.cli.resolve import keep_recipe
from jaxstages.cli.train import train
from jaxstages.config import MeshConfig, OptimConfig, Recipe, ScheduleConfig
from jaxstages.data.batches import Batches, batches_by_step
from jaxstages.models.losses import cross_entropy_loss
from jaxstages.models.select import global_norm
from jaxstages.models.sharding import batch_sharding, make_mesh, place_batch
from jaxstages.runtime.files import read_json
from jaxstages.runtime.workdir import checkpoints_folder, steps_of
from jaxstages.training import program
from jaxstages.training.early_stopping import early_stopping
from jaxstages.training.guard import init_guard, should_apply
from jaxstages.training.metric_writer import read_metrics
from jaxstages.training.optimizer import make_optimizer
from jaxstages.training.saved_items import from_items, to_items
from jaxstages.training.setup import setup_stage
from jaxstages.training.step import init_state, make_train_step
from jaxstages.types import Batch, Diverged, Model, Params, TrainState
from tests.reliability.harness import make_recipe, outcome, unlike
from tests.tiny import VOCAB, mixed_batch

# The step alone: two parameters, and faults that a token brings about.

FAULTS = ("nan loss", "inf loss", "nan behind the mask", "nan", "inf", "-inf", "square overflows", "infinite update")
"""A token VOCAB + i gives fault i. The last five are in the gradient of one parameter; the loss is fine."""

FACTORS = {"nan": jnp.nan, "inf": jnp.inf, "-inf": -jnp.inf, "square overflows": 1e22, "infinite update": 1e6}


@jax.custom_vjp
def harmed(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x, whose gradient is multiplied by `factor`."""
    return x


harmed.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor)))


def faulty(params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    def hit_BL(name: str) -> jax.Array:
        return batch.tokens_BL == VOCAB + FAULTS.index(name)

    factor = jnp.float32(1.0)
    for name, value in FACTORS.items():
        factor = jnp.where(jnp.any(hit_BL(name)), value, factor)
    logits_BLV = harmed(params["table"], factor)[batch.tokens_BL] + params["bias"][None, None]
    nan_BL = hit_BL("nan loss") | hit_BL("nan behind the mask")
    logits_BLV *= jnp.where(nan_BL, jnp.nan, 1.0)[..., None]
    on_target_BLV = jax.nn.one_hot(batch.targets_BL, VOCAB) > 0
    return jnp.where(hit_BL("inf loss")[..., None] & on_target_BLV, -jnp.inf, logits_BLV)


def noisy(params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    """With noise for dropout: a step that runs with another step's key gives other bits."""
    assert key is not None
    return faulty(params, batch, key) + 0.1 * jax.random.normal(key, (*batch.tokens_BL.shape, VOCAB))


rows = functools.cache(mixed_batch)


def batch_of(dice: np.random.Generator, fault: str = "") -> Batch:
    """Random tokens; the fault's token stands in one slot of row 1 (one device's, or the second part's)."""
    batch = rows()
    tokens, weights = dice.integers(0, VOCAB, batch.tokens_BL.shape), np.asarray(batch.weights_BL)
    if fault:
        tokens[1, np.argmax(weights[1] == 0 if fault == "nan behind the mask" else weights[1] > 0)] = (
            VOCAB + FAULTS.index(fault)
        )
    return batch._replace(tokens_BL=tokens.astype(np.int32))


def frail_optimizer() -> optax.GradientTransformationExtraArgs:
    """Warm-up, clipping, moments; and an update that a large, finite gradient makes infinite."""
    config = OptimConfig(schedule=ScheduleConfig(peak_lr=0.1, warmup_steps=5), no_decay=("bias",))
    return optax.chain(
        optax.stateless(lambda grads, _: jax.tree.map(jnp.expm1, grads)), make_optimizer(config, 30, {"table": ()})
    )


def fresh_state(tx: optax.GradientTransformation) -> TrainState:
    table = 0.1 * jax.random.normal(jax.random.key(0), (VOCAB + len(FAULTS), VOCAB))
    return init_state({"table": table, "bias": jnp.zeros(VOCAB)}, tx, spike_window=8)


class Layout(NamedTuple):
    """One way to run the step. noise: the gaps that skipped steps leave in the keys are seen."""

    apply: Callable[[Params, Batch, jax.Array | None], jax.Array]
    noise: bool
    accumulate: int
    devices: int


LAYOUTS = {
    "one device": Layout(noisy, True, 1, 1),
    "four parts": Layout(noisy, True, 4, 1),
    "eight devices": Layout(noisy, True, 1, 8),
    "no noise": Layout(faulty, False, 1, 1),
}


def same_bits(one: Any, two: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_exactly_the_bad_steps_are_skipped(layout: Layout) -> None:
    """Each fault at step 0, in the warm-up, later and in streaks. The other run never sees a bad batch: it is given the
    good ones, with their step's number for the noise (without noise it simply counts on)."""
    tx, dice = frail_optimizer(), np.random.default_rng(0)
    train_step = jax.jit(
        make_train_step(cross_entropy_loss(layout.apply), tx, accumulate=layout.accumulate), donate_argnums=0
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[: layout.devices])
    orders = [[fault, *"..", fault, *"...", fault, fault, fault, *".."] for fault in FAULTS]
    orders += [["." if good else str(dice.choice(FAULTS)) for good in dice.random(24) < 0.6] for _ in range(2)]
    for order in orders:
        state, clean = fresh_state(tx), fresh_state(tx)
        skipped = streak = 0
        for k, fault in enumerate(order):
            rows = batch_of(dice, fault.strip("."))
            batch = place_batch(rows, len(rows.tokens_BL), batch_sharding(mesh))
            before = jax.device_get((state.params, state.opt_state))
            state, sums = train_step(state, batch)
            good = fault == "."
            assert bool(sums["applied"]) == good, (fault, k)
            streak = 0 if good else streak + 1
            skipped += not good
            assert (int(state.step), int(sums["streak"]), int(state.guard.skipped)) == (k + 1, streak, skipped)
            if good:
                clean, _ = train_step(clean._replace(step=jnp.int32(k)) if layout.noise else clean, batch)
            else:
                assert same_bits((state.params, state.opt_state), before), (fault, k)
        assert same_bits((state.params, state.opt_state), (clean.params, clean.opt_state)), order
        assert same_bits(state.guard[2:], clean.guard[2:]), "only finite steps are in the window"
        assert not same_bits(state.params, fresh_state(tx).params)


@functools.cache
def faulty_step() -> Callable[[TrainState, Batch], Any]:
    return jax.jit(make_train_step(cross_entropy_loss(faulty), frail_optimizer()))


@jax.jit
@jax.grad
def faulty_gradient(params: Params, batch: Batch) -> jax.Array:
    nll = optax.softmax_cross_entropy_with_integer_labels(faulty(params, batch, None), batch.targets_BL)
    return jnp.sum(jnp.where(batch.weights_BL > 0, nll, 0.0))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_faults_are_what_they_are_called(fault: str) -> None:
    """Otherwise the test above would prove less than it says."""
    tx, batch = frail_optimizer(), batch_of(np.random.default_rng(0), fault)
    _, sums = faulty_step()(fresh_state(tx), batch)
    results = {name: bool(np.isfinite(sums[name])) for name in ("nll", "grad_norm", "update_norm")}
    only = {"inf loss": "nll", "infinite update": "update_norm"}
    if fault in only:  # each of the three numbers is the only bad one once
        assert [name for name, finite in results.items() if not finite] == [only[fault]]
    else:
        assert results == {"nll": fault != "nan loss", "grad_norm": False, "update_norm": False}

    if fault in FACTORS:
        grads = faulty_gradient(fresh_state(tx).params, batch)
        finite = {name: bool(np.all(np.isfinite(leaf))) for name, leaf in grads.items()}
        assert finite == {"bias": True, "table": fault in ("square overflows", "infinite update")}


# The guard alone, against plain loops in numpy.


def judged(window: int, sigma: float, rows: np.ndarray) -> tuple[list[bool], list[int], int]:
    """applied and streak of each step, and skipped at the end; in the slowest and plainest way."""
    past: list[np.ndarray] = []
    applied, streaks = [], []
    for row in rows:
        finite = bool(np.all(np.isfinite(row)))
        last = np.asarray(past[-window:])[:, :2] if past else np.zeros((0, 2))
        spike = len(past) >= window and bool(np.any(row[:2] > last.mean(axis=0) + sigma * last.std(axis=0)))
        applied.append(finite and not (sigma and spike))
        streaks.append(0 if finite else (streaks[-1] if streaks else 0) + 1)
        if finite:
            past.append(row)
    return applied, streaks, applied.count(False)


@pytest.mark.parametrize("sigma", [0.0, 4.0])
@pytest.mark.parametrize("window", [1, 5, 32])
def test_the_guard_is_the_plain_rule(window: int, sigma: float) -> None:
    def one(state: Any, row: jax.Array) -> Any:
        applied, state = should_apply(state, row[0], row[1], row[2], sigma)
        return state, (applied, state.streak)

    run = jax.jit(lambda rows: jax.lax.scan(one, init_guard(window), rows))
    kinds = set()
    for seed in range(20):
        dice = np.random.default_rng(seed)
        rows = dice.normal([3.0, 0.5, 0.1], [0.3, 0.05, 0.01], (150, 3)).astype(np.float32)
        for column in range(3):  # spikes of loss and of norm, and a large update, which is none
            rows[dice.random(150) < 0.04, column] *= 50
            rows[dice.random(150) < 0.04, column] = dice.choice([np.nan, np.inf, -np.inf])
        rows[: dice.integers(4)] = np.nan  # before the window has anything
        state, (applied, streaks) = run(rows)
        expected = judged(window, sigma, rows.astype(np.float64))
        assert (applied.tolist(), streaks.tolist(), int(state.skipped)) == expected
        finite = rows[np.isfinite(rows).all(axis=1)]
        assert int(state.seen) == len(finite)
        assert sorted(np.asarray(state.losses_W)) == sorted(finite[-window:, 0])
        assert sorted(np.asarray(state.norms_W)) == sorted(finite[-window:, 1])
        kinds |= {(bool(ok), bool(np.isfinite(row).all())) for ok, row in zip(applied, rows, strict=True)}
    assert ((False, True) in kinds) == bool(sigma), "finite steps are skipped as spikes, or else never"


Spoil = Callable[[jax.Array, Batch, jax.Array | None], jax.Array]

# The loop, with a small model that gives NaN for chosen batches.


def small_model(vocab: int, spoil: Spoil) -> Model:
    """A bigram model of low rank; `spoil(x_BLD, batch, key)` is applied to its hidden layer."""

    def init(key: jax.Array) -> Params:
        one, two = jax.random.split(key)
        return {"embedding": jax.random.normal(one, (vocab, 8)), "head": jax.random.normal(two, (8, vocab))}

    def apply(params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
        x_BLD = spoil(params["embedding"][batch.tokens_BL], batch, key)
        return jnp.einsum("BLD,DV->BLV", x_BLD, params["head"])

    axes = {"embedding": ("vocab", "embed"), "head": ("embed", "vocab")}
    return Model(init, apply, axes)


def nan_for(bad: np.ndarray) -> Spoil:
    """NaN where the batch is one of `bad` [N, B, L], which it is recognised by."""

    def spoil(x_BLD: jax.Array, batch: Batch, key: jax.Array | None) -> jax.Array:
        hit = jnp.any(jnp.all(batch.tokens_BL[None] == bad, axis=(1, 2)))
        return x_BLD if key is None else x_BLD * jnp.where(hit, jnp.nan, 1.0)

    return spoil


STEPS = 12


class Lab:
    """A recipe whose batches are known beforehand, and runs of it in which some of them are bad."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, patch
        self.recipe = make_recipe(folder)
        self.recipe.finetune = self.recipe.instruct = None
        loop = self.recipe.pretrain.loop
        loop.accumulate, loop.batch_size, loop.keep, loop.eval_every = 1, 8, 100, 6
        setup = setup_stage(self.recipe, "pretrain", folder / "setup")
        self.vocab, self.tokenizer, self.shapes = (
            setup.data.tokenizer.vocab_size,
            setup.data.tokenizer,
            setup.program.abstract_state,
        )
        self.batches: Batches = batches_by_step(
            setup.data.train, batch_size=loop.batch_size, seed=0, weights=self.recipe.pretrain.data.weights
        )
        self.tokens_NBL = np.stack([self.batches.batch(k).tokens_BL for k in range(STEPS)])
        assert len(np.unique(self.tokens_NBL, axis=0)) == STEPS, "each batch must be known from the others"

    def model(self, bad: set[int]) -> Model:
        return small_model(self.vocab, nan_for(self.tokens_NBL[sorted(bad)]))

    def ready(self, name: str, bad: set[int], most: int = 10) -> tuple[Recipe, Path]:
        """A recipe and a new workdir in which the batches `bad` give NaN, and `most` of them in a row are too many."""
        model = self.model(bad)
        self._patch.setattr(program, "make_model", lambda config, vocab, **_: model)
        recipe, work = copy.deepcopy(self.recipe), self.folder / name
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / "setup" / "tokenizer", work / "tokenizer")
        recipe.pretrain.optim.max_bad_steps = most
        return recipe, work

    def run(self, name: str, bad: set[int], most: int = 10, stops: tuple[int, ...] = ()) -> Path:
        """Train to the end, with a new start after each of `stops`; raises as the loop does."""
        recipe, work = self.ready(name, bad, most)
        for stop in (*stops, 0):
            recipe.pretrain.loop.stop_after = stop
            assert train(recipe, work, "pretrain") is (stop == 0)
        return work


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, pytest.MonkeyPatch]]:
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        yield folder, patch


@pytest.fixture(scope="module")
def lab(shared: tuple[Path, pytest.MonkeyPatch]) -> Lab:
    folder, patch = shared
    with pytest.MonkeyPatch.context() as for_now:
        for_now.setattr(program, "make_model", lambda config, vocab, **_: small_model(vocab, lambda x, batch, key: x))
        return Lab(folder, patch)


def events_of(work: Path) -> list[dict[str, Any]]:
    lines = read_metrics(work / "pretrain" / "metrics.jsonl")
    return [line for line in lines if line["kind"] == "event" and line["event"] == "step skipped"]


def assert_all_finite(lab: Lab, work: Path) -> list[int]:
    """The steps that there are checkpoints of; each of them holds finite parameters only."""
    steps = steps_of(work / "pretrain")
    for step in steps:
        params = read_params(work / "pretrain", step, lab.shapes.params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(params))), step
    return steps


SCATTERED = {0, 3, 4, 8, 11}
"""Step 0, in the warm-up (2 steps have to be applied) and after it, before and after a save, and the last."""


@pytest.fixture(scope="module")
def scattered(lab: Lab) -> Path:
    return lab.run("scattered", SCATTERED)


def test_the_loop_skips_the_bad_batches_and_no_other(lab: Lab, scattered: Path) -> None:
    result = read_json(scattered / "pretrain" / "result.json")
    assert (result["skipped"], result["steps"], result["status"]) == (len(SCATTERED), STEPS, "completed")
    assert assert_all_finite(lab, scattered) == [3, 6, 9, 12]
    losses = {
        line["step"]: line["loss"]
        for line in read_metrics(scattered / "pretrain" / "metrics.jsonl")
        if line["kind"] == "train"
    }
    assert {step - 1 for step, loss in losses.items() if loss is None} == SCATTERED

    # By hand, without the loop: only the good batches, each with its step's number.
    setup = setup_stage(lab.recipe, "pretrain", lab.folder / "setup")
    model = lab.model(SCATTERED)
    params = jax.jit(model.init)(jax.random.key(lab.recipe.seed))
    state = init_state(params, setup.program.tx, setup.config.optim.spike_window)
    loss = cross_entropy_loss(model.apply)
    train_step = jax.jit(make_train_step(loss, setup.program.tx, seed=lab.recipe.seed, norm=global_norm))
    for k in sorted(set(range(STEPS)) - SCATTERED):
        state, _ = train_step(
            state._replace(step=jnp.int32(k)),
            place_batch(lab.batches.batch(k), setup.config.loop.batch_size, setup.program.row_sharding),
        )
    assert result["last_params_sha256"] == params_sha256(state.params)


def test_the_learning_rate_in_the_log_is_the_one_that_was_used(lab: Lab, scattered: Path) -> None:
    """The optimizer's own count stands still in a skipped step."""
    schedule = ScheduleConfig(peak_lr=3e-3, warmup_steps=2)
    assert lab.recipe.pretrain.optim.schedule == schedule
    lines = read_metrics(scattered / "pretrain" / "metrics.jsonl")
    rates = {line["step"] - 1: line["learning_rate"] for line in lines if line["kind"] == "train"}
    assert rates[1] == pytest.approx(0.5 * 3e-3), "the first step that is applied is the first of the warm-up"
    assert rates[2] == pytest.approx(3e-3)


def test_an_event_names_the_records_of_its_batch(lab: Lab, scattered: Path) -> None:
    events = events_of(scattered)
    assert [event["step"] - 1 for event in events] == sorted(SCATTERED)
    streaks = {0: 1, 3: 1, 4: 2, 8: 1, 11: 1}
    for event in events:
        k = event["step"] - 1
        assert event["why"] == f"not finite, {streaks[k]} in a row" and event["loss"] is None
        batch, texts = lab.batches.batch(k), []
        for tokens, segments in zip(batch.tokens_BL, batch.segments_BL, strict=True):
            for segment in range(1, segments.max() + 1):
                texts.append(lab.tokenizer.decode(tokens[segments == segment].tolist()))
        named = []
        for record in event["records"]:
            path, _, line = record.rpartition(":")
            named.append(json.loads(Path(path).read_text().splitlines()[int(line) - 1])["text"])
        assert sorted(named) == sorted(texts)


STREAK = {5, 6, 7}


@pytest.fixture(scope="module")
def unbroken(lab: Lab) -> dict[str, Any]:
    return outcome(lab.run("unbroken", STREAK, most=4))


@pytest.mark.parametrize("stops", [(5,), (6, 7), (8,)], ids=["before the streak", "in it, twice", "after it"])
def test_a_run_that_is_stopped_at_a_streak_goes_on_to_the_same(
    lab: Lab, unbroken: dict[str, Any], stops: tuple[int, ...]
) -> None:
    work = lab.run("stopped", STREAK, 4, stops)
    assert steps_of(work / "pretrain") == sorted({3, 6, 9, 12, *stops})
    actual = outcome(work)
    assert unlike(actual, unbroken) == []
    assert actual["pretrain"]["skipped"] == len(STREAK)


@pytest.mark.parametrize("stops", [(), (6,), (6, 7)], ids=["unbroken", "stopped", "stopped twice"])
def test_too_many_in_a_row_end_the_run_also_across_a_new_start(lab: Lab, stops: tuple[int, ...]) -> None:
    with pytest.raises(Diverged, match=r"3 steps in a row, up to step 8, are not finite .*the checkpoint at step"):
        lab.run("ended", STREAK, 3, stops)
    work = lab.folder / "ended"
    assert not (work / "pretrain" / "result.json").exists()
    assert [event["step"] - 1 for event in events_of(work)] == sorted(STREAK)
    assert assert_all_finite(lab, work) == sorted({3, 6, *stops}), "what was saved before stands"


def test_the_exit_code_is_70_and_stays_so(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, work = lab.ready("code", STREAK, most=2)
    keep_recipe(recipe, work)
    for _ in range(2):
        assert door.main(["jaxstages", "pretrain", f"--workdir={work}"]) == 70
        assert "2 steps in a row, up to step 7, are not finite" in capsys.readouterr().err
    assert assert_all_finite(lab, work) == [3, 6]


def test_parameters_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    """However they came about: the guard is not the only one who looks."""
    tx = frail_optimizer()
    good, stopping = fresh_state(tx), early_stopping().init()
    meta = {name: types[0]() for name, types in META.items()}  # of the right form, and empty
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, to_items(good, stopping), meta, 1)
        checkpoints.check_last(1)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        params = good.params | {"bias": good.params["bias"].at[3].set(bad)}
        with (
            Checkpoints(tmp_path, keep=2) as checkpoints,
            pytest.raises(Diverged, match=r"step 2 is not saved: .*bias is not finite; the .* before it stands"),
        ):
            checkpoints.save(2, to_items(good._replace(params=params), stopping), meta, 2)
            checkpoints.wait()
    assert [path.name for path in checkpoints_folder(tmp_path).iterdir()] == ["1"]
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), good)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore_newest(to_items(target, stopping))
    assert restored is not None and same_bits(from_items(restored.items)[0], good)


# --debug_nans: the operation that made the first NaN.


def in_the_open(x_BLD: jax.Array) -> jax.Array:
    return jnp.log(-1.0 - jnp.square(x_BLD))


def in_a_scan(x_BLD: jax.Array) -> jax.Array:
    def layer(x_BLD: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return jnp.sqrt(-1.0 - jnp.square(x_BLD)), None

    return jax.lax.scan(layer, x_BLD, None, length=3)[0]


def in_remat(x_BLD: jax.Array) -> jax.Array:
    return jax.checkpoint(lambda x: jnp.arccosh(x * 0.0))(x_BLD)


def in_the_gradient_of_a_scan(x_BLD: jax.Array) -> jax.Array:
    def layer(x_BLD: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return x_BLD + jnp.sqrt(x_BLD * 0.0), None

    return jax.lax.scan(layer, x_BLD, None, length=3)[0]


NAN_MAKERS = {
    in_the_open: ("log", "return jnp.log("),
    in_a_scan: ("sqrt", "return jnp.sqrt("),
    in_remat: ("acosh", "return jax.checkpoint("),
    in_the_gradient_of_a_scan: ("mul", "return x_BLD + jnp.sqrt("),
}
"""Who makes a NaN, the primitive that gives it (of a square root's gradient, inf * 0), and how its line begins."""


@pytest.mark.parametrize(
    ("maker", "trains"),
    [*((maker, True) for maker in NAN_MAKERS), (in_a_scan, False)],
    ids=[*(maker.__name__ for maker in NAN_MAKERS), "in_a_scan of an evaluation"],
)
def test_debug_nans_names_the_operation_and_its_line(
    shared: tuple[Path, pytest.MonkeyPatch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    maker: Callable[[jax.Array], jax.Array],
    trains: bool,
) -> None:
    def spoil(x_BLD: jax.Array, batch: Batch, key: jax.Array | None) -> jax.Array:
        return maker(x_BLD) if (key is not None) == trains else x_BLD

    monkeypatch.setattr(program, "make_model", lambda config, vocab, **_: small_model(vocab, spoil))
    recipe, work = make_recipe(shared[0]), tmp_path / "work"
    recipe.finetune = recipe.instruct = None
    recipe.pretrain.loop.batch_size = recipe.pretrain.evaluation.batch_size = 4
    work.mkdir()
    keep_recipe(recipe, work)
    try:
        code = door.main(["jaxstages", "pretrain", f"--workdir={work}", "--debug_nans"])
    finally:
        jax.config.update("jax_debug_nans", False)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    primitive, line = NAN_MAKERS[maker]
    first = maker.__code__.co_firstlineno
    assert code == 70
    assert f"--debug_nans: invalid value (nan) encountered in {primitive} at {__file__}:" in said
    number, _, text = said.partition(f"{__file__}:")[2].partition(": ")
    assert first < int(number) <= first + 4 and text.startswith(line)
