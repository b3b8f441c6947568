"""The same numbers on one device and on eight, and a contract under each mesh."""

import jax
import numpy as np
import optax
import pytest

from jaxstages.config import LoopConfig, MeshConfig, OptimConfig, StageConfig
from jaxstages.models.transformer import make_model
from jaxstages.optim import make_optimizer
from jaxstages.sharding import batch_sharding, check_batch_size, make_mesh, param_shardings
from jaxstages.step import init_state, make_train_step
from jaxstages.workbench import state_shapes
from tests.tiny import VOCAB, mixed_batch, model_config

MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2 x fsdp 2 x tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def losses_after(mesh_config: MeshConfig, devices: list[jax.Device], accumulate: int = 1) -> list[float]:
    mesh = make_mesh(mesh_config, devices)
    model = make_model(model_config(), VOCAB + 3)  # 32 tokens: the vocabulary can be split
    tx = make_optimizer(OptimConfig(), 10, model.axes)
    shapes = state_shapes(model, tx, StageConfig(loop=LoopConfig(steps=10)), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = jax.jit(lambda key: init_state(model.init(key), tx), out_shardings=shardings)(jax.random.key(0))
    step = jax.jit(
        make_train_step(model.apply, tx, accumulate=accumulate), donate_argnums=0, out_shardings=(shardings, None)
    )
    batch = jax.device_put(mixed_batch(16), batch_sharding(mesh))
    losses = []
    for _ in range(4):
        state, sums = step(state, batch)
        losses.append(float(sums["nll"]) / float(sums["weight"]))
    assert step._cache_size() == 1, "the step must compile once"
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return losses


@pytest.fixture(scope="module")
def one_device() -> list[float]:
    losses = losses_after(MeshConfig(), jax.devices()[:1])
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize("name", MESHES)
def test_losses_do_not_depend_on_the_mesh(name: str, one_device: list[float]) -> None:
    np.testing.assert_allclose(losses_after(MESHES[name], jax.devices()), one_device, rtol=2e-5)


def test_nor_on_accumulation_under_a_mesh(one_device: list[float]) -> None:
    np.testing.assert_allclose(losses_after(MeshConfig(data=8), jax.devices(), 2), one_device, rtol=2e-5)


def test_fsdp_holds_an_eighth_of_each_matrix_and_of_its_moments() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    model = make_model(model_config(), VOCAB + 3)
    tx = make_optimizer(OptimConfig(), 10, model.axes)
    shapes = state_shapes(model, tx, StageConfig(), mesh)
    kernel = shapes.params["layers"]["ff"]["up"]["kernel"]
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) * 8 == kernel.size
    moments = optax.tree.get(shapes.opt_state, "mu")["layers"]["ff"]["up"]["kernel"]
    assert moments.sharding == kernel.sharding


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(data=3))
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    model = make_model(model_config(), VOCAB)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"embedding: its dim vocab=29 can't be split over mesh.tensor=8"):
        param_shardings(params, model.axes, mesh)
    with pytest.raises(ValueError, match="batch_size=12 must be divisible by 16"):
        check_batch_size("batch_size", 12, 2, make_mesh(MeshConfig(data=8)))
