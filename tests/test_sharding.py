"""The same numbers on one device and on eight, a contract under each mesh, and no exchange that theory has not."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstages.checkpoint.fingerprint import fingerprint
from jaxstages.checkpoint.manager import Checkpoints
from jaxstages.checkpoint.metadata import META
from jaxstages.config import (
    AttentionConfig,
    ExpertsConfig,
    LoopConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    StageConfig,
)
from jaxstages.models.losses import cross_entropy_loss
from jaxstages.models.select import global_norm
from jaxstages.models.sharding import (
    _arranged,
    check_batch,
    make_mesh,
    param_shardings,
    shardings_of,
)
from jaxstages.models.transformer import make_model
from jaxstages.plan.collectives import SMALL, collectives_of, total
from jaxstages.plan.theory import expected_traffic
from jaxstages.training.early_stopping import early_stopping
from jaxstages.training.program import make_program
from jaxstages.training.saved_items import from_items, to_items
from jaxstages.training.step import init_state, make_train_step
from jaxstages.types import Batch
from tests.tiny import VOCAB, model_config

STEPS, WINDOW = 20, OptimConfig().spike_window

MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 8": MeshConfig(data=1, tensor=8),
    "data 2 x fsdp 2 x tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "context 4 x data 2": MeshConfig(data=2, context=4),
    "context 2 x fsdp 2 x tensor 2": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}

MODEL = ModelConfig(
    layers=2, width=64, ff_width=128, context=32, attention=AttentionConfig(heads=8, kv_heads=8, head_dim=8)
)
MIXTURE = dataclasses.replace(MODEL, experts=ExpertsConfig(count=8, per_token=2))
MIXED = (MeshConfig(data=2, expert=4), MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
WORDS, BATCH = 128, 16


class Run:
    """A step of a model on a mesh, with what it needs."""

    def __init__(self, config: ModelConfig, mesh_config: MeshConfig, devices: list[Any] | None = None) -> None:
        self.mesh = make_mesh(mesh_config, devices)
        recipe, stage = Recipe(name="mesh", model=config, mesh=mesh_config), StageConfig(loop=LoopConfig(steps=STEPS))
        program = make_program(recipe, "pretrain", stage, self.mesh, WORDS)
        self.hooks, self.model, self.tx = program.hooks, program.model, program.tx
        self.rows, self.shapes = program.row_sharding, program.abstract_state
        self.shardings = shardings_of(self.shapes)

    def jitted(self, accumulate: int = 1, tile: int = 0) -> Any:
        loss = cross_entropy_loss(self.model.outputs, tile=tile, hooks=self.hooks)
        step = make_train_step(loss, self.tx, accumulate=accumulate, norm=global_norm)
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))

    def losses(self, accumulate: int = 1, tile: int = 0) -> list[float]:
        step = self.jitted(accumulate, tile)
        state = jax.jit(lambda key: init_state(self.model.init(key), self.tx, WINDOW), out_shardings=self.shardings)(
            jax.random.key(0)
        )
        batch = jax.device_put(rows_of_words(), self.rows)
        losses = []
        for _ in range(STEPS):
            state, sums = step(state, batch)
            losses.append(float(sums["nll"]) / float(sums["weight"]))
        assert step._cache_size() == 1, "the step must compile once"
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(self.shardings), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        return losses

    def exchanges(self, tile: int = 0) -> dict[str, int]:
        fields = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
        shape = (BATCH, MODEL.context)
        batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=self.rows) for dtype in fields))
        return total(collectives_of(self.jitted(tile=tile).lower(self.shapes, batch).compile().as_text()))


def rows_of_words() -> Batch:
    """Packed rows of two or three examples, some with padding."""
    rng = np.random.default_rng(0)
    shape = (BATCH, MODEL.context)
    cuts = np.sort(rng.integers(1, MODEL.context, (BATCH, 2)), axis=1)
    segments = 1 + (np.arange(MODEL.context)[None] >= cuts[:, :1]) + (np.arange(MODEL.context)[None] >= cuts[:, 1:])
    segments = np.where((segments == 3) & (np.arange(BATCH) % 2 == 0)[:, None], 0, segments)
    starts = np.stack([np.concatenate([[0], row]) for row in cuts])
    positions = np.arange(MODEL.context)[None] - np.take_along_axis(starts, np.maximum(segments, 1) - 1, axis=1)
    weights = (segments > 0) * rng.integers(0, 2, shape)
    tokens = rng.integers(0, WORDS, (2, *shape))
    return Batch(*map(jnp.int32, tokens), jnp.float32(weights), jnp.int32(segments), jnp.int32(positions))


@pytest.fixture(scope="module")
def one_device() -> list[float]:
    losses = Run(MODEL, MeshConfig(), jax.devices()[:1]).losses()
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize("name", MESHES)
def test_losses_do_not_depend_on_the_mesh(name: str, one_device: list[float]) -> None:
    np.testing.assert_allclose(Run(MODEL, MESHES[name]).losses(), one_device, rtol=1e-5)


def test_losses_do_not_depend_on_accumulation_under_a_mesh(one_device: list[float]) -> None:
    np.testing.assert_allclose(Run(MODEL, MeshConfig(data=8)).losses(2), one_device, rtol=1e-5)


@pytest.mark.parametrize("name", ["data 2 x fsdp 2 x tensor 2", "context 2 x fsdp 2 x tensor 2"])
def test_losses_do_not_depend_on_tiles_of_the_loss_under_a_mesh(name: str, one_device: list[float]) -> None:
    run = Run(MODEL, MESHES[name])
    np.testing.assert_allclose(run.losses(tile=8), one_device, rtol=1e-5)


@pytest.mark.parametrize("name", ["data 8", "fsdp 8", "data 2 x fsdp 2 x tensor 2"])
def test_a_tiled_loss_sends_no_more_bytes(name: str) -> None:
    """The head's gradient is summed once, and not for each of four tiles."""
    check_exchanges(MODEL, MESHES[name], tile=8)


@pytest.mark.parametrize("config", MIXED)
def test_losses_of_a_mixture_of_experts_do_not_depend_on_the_mesh(config: MeshConfig) -> None:
    """Experts on several devices, and each split over tensor."""
    alone = Run(MIXTURE, MeshConfig(), jax.devices()[:1]).losses()
    np.testing.assert_allclose(Run(MIXTURE, config).losses(), alone, rtol=1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_a_step_sends_the_bytes_that_theory_predicts(name: str) -> None:
    """Of each kind within 5 %, nothing of a kind that theory does not have; XLA for CPU sums each projection's gradient
    by its input alone."""
    check_exchanges(MODEL, MESHES[name])


@pytest.mark.parametrize("config", [*MIXED, MeshConfig(data=1, expert=8), MeshConfig(data=1, context=2, expert=4)])
def test_a_step_with_experts_sends_the_bytes_that_theory_predicts(config: MeshConfig) -> None:
    check_exchanges(MIXTURE, config)


def check_exchanges(model: ModelConfig, config: MeshConfig, tile: int = 0) -> None:
    run = Run(model, config)
    actual, expected = (
        run.exchanges(tile),
        dict.fromkeys(("all-gather", "all-reduce", "reduce-scatter", "all-to-all"), 0),
    )
    small = actual.pop(SMALL)
    for _, kind, size in expected_traffic(model, WORDS, run.mesh, BATCH, merges=False):
        expected[kind] += size
    assert actual.keys() <= expected.keys()
    for kind, size in expected.items():
        assert actual.get(kind, 0) == pytest.approx(size, rel=0.05), (kind, actual, expected)
    assert small < 16 * model.layers * model.width * 4


def test_fsdp_stores_an_eighth_of_parameters_and_optimizer_on_each_device() -> None:
    """Within 2 %: norms' scales are whole on each."""
    shapes = Run(dataclasses.replace(MODEL, width=512, ff_width=1024), MeshConfig(data=1, fsdp=8)).shapes
    for tree in (shapes.params, shapes.opt_state):
        leaves = jax.tree.leaves(tree)
        per_device = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        assert per_device / sum(leaf.size for leaf in leaves) == pytest.approx(1 / 8, rel=0.02)


def test_a_checkpoint_of_any_mesh_restores_on_any_other(tmp_path: Path) -> None:
    """1 -> 8 -> 2 -> 4 x 2 -> 1 devices, by a save on each: the same digests of parameters and optimizer."""
    chain = (
        (MeshConfig(), 1),
        (MeshConfig(data=1, fsdp=8), 8),
        (MeshConfig(data=1, tensor=2), 2),
        (MeshConfig(data=4, fsdp=2), 8),
        (MeshConfig(), 1),
    )
    first = Run(MODEL, MeshConfig(), jax.devices()[:1])
    state = jax.jit(lambda key: init_state(first.model.init(key), first.tx, WINDOW))(jax.random.key(0))
    state, _ = first.jitted()(state, rows_of_words())
    digests = fingerprint(state).digests
    stopping, meta = early_stopping().init(), {name: types[0]() for name, types in META.items()}
    for step, (config, devices) in enumerate(chain):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            if step:
                shapes = Run(MODEL, config, jax.devices()[:devices]).shapes
                restored = checkpoints.restore_newest(to_items(shapes, stopping))
                assert restored is not None
                state, _ = from_items(restored.items)
                assert len(state.params["embedding"].sharding.device_set) == devices
            assert fingerprint(state).digests == digests
            checkpoints.save(step + 1, to_items(state, stopping), meta, step + 1)
            checkpoints.check_last(step + 1)


def test_a_mesh_that_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(data=3))
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    model = make_model(model_config(), VOCAB)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"embedding: its dim vocab=29 can't be split over mesh.tensor=8"):
        param_shardings(params, model.axes, mesh)
    with pytest.raises(ValueError, match="batch_size=12 must be divisible by 16"):
        check_batch("batch_size", 12, 2, make_mesh(MeshConfig(data=8)))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What of a TPU the arrangement of a mesh looks at."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def test_only_the_data_axis_crosses_from_slice_to_slice() -> None:
    """Two slices of 2x4 chips; what talks most lies within one."""
    chips = [Chip(8 * part + 4 * x + y, part, (x, y, 0)) for part in range(2) for x in range(2) for y in range(4)]
    arranged = _arranged((4, 2, 1, 1, 2), chips[::-1])
    for half, block in enumerate(np.split(arranged, 2)):
        assert {chip.slice_index for chip in block.flat} == {half}
    assert {chip.id for chip in arranged.flat} == set(range(16))
    with pytest.raises(ValueError, match=r"mesh.data=1 must be a multiple of the 2 slices"):
        _arranged((1, 16, 1, 1, 1), chips)
