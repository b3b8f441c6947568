"""Schedules at their corners, decay and freezing by path, and each optimizer learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxstages.checkpoint.fingerprint import named_leaves
from jaxstages.config import MeshConfig, OptimConfig, ScheduleConfig
from jaxstages.models.losses import cross_entropy_loss
from jaxstages.models.select import global_norm
from jaxstages.models.sharding import make_mesh
from jaxstages.models.transformer import make_model
from jaxstages.training.optimizer import check_optimizer_paths, make_optimizer, make_schedule, path_matches
from jaxstages.training.step import init_state, make_train_step, plateau_factor
from tests.tiny import VOCAB, mixed_batch, model_config


def at(name: str, step: int, steps: int = 100, **changes: float) -> float:
    options = {"peak_lr": 1.0, "warmup_steps": 10, "end_factor": 0.1} | changes
    return float(make_schedule(ScheduleConfig(name=name, **options), steps)(step))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd", "rsqrt", "plateau"])
def test_warm_up_is_linear_and_its_last_step_is_at_the_peak(name: str) -> None:
    np.testing.assert_allclose([at(name, k) for k in range(10)], np.arange(1, 11) / 10, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("constant", 99, 1.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.55),
        ("linear", 100, 0.1),
        ("cosine", 55, 0.55),
        ("cosine", 100, 0.1),
        ("wsd", 79, 1.0),
        ("wsd", 90, 0.55),
        ("wsd", 100, 0.1),
        ("rsqrt", 40, 0.5),
    ],
)
def test_schedule_corners(name: str, step: int, expected: float) -> None:
    assert at(name, step) == pytest.approx(expected, rel=1e-4)


def test_no_warm_up() -> None:
    assert at("cosine", 0, warmup_steps=0) == 1.0


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_each_optimizer_learns_the_transformer(name: str) -> None:
    model = make_model(model_config(), VOCAB)
    peak = {"sgd": 0.3, "lion": 3e-3, "adafactor": 0.5}.get(name, 1e-2)
    factor = 2.0 if name == "muon" else 20.0
    config = OptimConfig(name=name, schedule=ScheduleConfig(peak_lr=peak, warmup_steps=2), muon_lr_factor=factor)
    tx = make_optimizer(config, 40, model.axes)
    state = init_state(jax.jit(model.init)(jax.random.key(0)), tx)
    step = jax.jit(make_train_step(cross_entropy_loss(model.apply), tx))
    losses = []
    for _ in range(30):
        state, sums = step(state, mixed_batch())
        losses.append(float(sums["nll"] / sums["weight"]))
    assert losses[-1] < 0.8 * losses[0], losses


def test_frozen_paths_stay_bit_for_bit_and_others_move() -> None:
    model = make_model(model_config(), VOCAB)
    tx = make_optimizer(OptimConfig(freeze=("embedding", "layers/ff/")), 10, model.axes)
    before = jax.jit(model.init)(jax.random.key(0))
    after, _ = jax.jit(make_train_step(cross_entropy_loss(model.apply), tx))(init_state(before, tx), mixed_batch())
    for path, leaf in jax.tree_util.tree_leaves_with_path(before):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        new = after.params
        for key in path:
            new = new[key.key]
        assert bool(jnp.array_equal(leaf, new)) == ("embedding" in name or "layers/ff/" in name), name


NAMES = ("adamw", "adafactor", "lion", "muon", "sgd")
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {"query": {"kernel": ("layers", "embed", "heads", "head_dim")}, "norm": {"scale": ("layers", "norm")}},
}
LR, DECAY, MUON = 0.01, 0.3, 5.0


def small_params(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"embedding": (7, 6), "layers": {"query": {"kernel": (2, 6, 2, 4)}, "norm": {"scale": (2, 6)}}}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), "float32")  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))


def one_update(params: dict, grads: dict, **fields: object) -> dict[str, np.ndarray]:
    """The update of step 0 by path, float64."""
    schedule = ScheduleConfig(name="constant", peak_lr=LR, warmup_steps=0)
    settings = {"schedule": schedule, "clip_norm": 0.0, "muon_lr_factor": MUON, "weight_decay": DECAY} | fields
    tx = make_optimizer(OptimConfig(**settings), 10, AXES)
    updates, _ = jax.jit(lambda: tx.update(grads, tx.init(params), params, value=jnp.float32(1.0)))()
    return {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(updates).items()}


def expected_direction(name: str, path: str, g: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The first direction of each optimizer, from its paper, in float64."""
    in_layers = path == "layers/query/kernel"
    if name == "sgd":
        return g
    if name == "lion":
        return np.sign(g)
    if name == "adafactor":
        matrices = g.reshape(2, 6, 8) if in_layers else g.T[None] if path == "embedding" else g[:, None]
        weights = p.reshape(2, 6, 8) if in_layers else p.T[None] if path == "embedding" else p[:, None]
        made = []
        for G, P in zip(matrices, weights, strict=True):
            square = G**2
            if path != "layers/norm/scale":
                square = np.outer(square.mean(1), square.mean(0)) / square.mean()
            U = G / np.sqrt(square)
            made.append(U / max(1.0, np.sqrt(np.mean(U**2))) * max(1e-3, np.sqrt(np.mean(P**2))))
        stacked = np.stack(made)
        return stacked[0].T if path == "embedding" else stacked.reshape(g.shape)
    if name == "muon" and in_layers:
        made = []
        for G in g.reshape(2, 6, 8):  # six rows for eight columns: no transposition
            X = G / np.linalg.norm(G)
            for _ in range(5):
                A = X @ X.T
                X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
            made.append(X * np.sqrt(8 / 6) * MUON)
        return np.stack(made).reshape(g.shape)
    return g / (np.abs(g) + 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_update_is_the_papers(name: str) -> None:
    """With decay, without, with `no_decay`, `rates` and `freeze`: `-lr * rate * (direction + decay * param)`."""
    params, grads = small_params(0), small_params(1)
    flat_params, flat_grads = (
        {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(tree).items()} for tree in (params, grads)
    )
    kernel, scale = "layers/query/kernel", "layers/norm/scale"
    cases = [
        ({}, {kernel}, {}, set()),
        ({"weight_decay": 0.0}, set(), {}, set()),
        ({"no_decay": ()}, set(flat_params), {}, set()),
        ({"no_decay": ("kernel",)}, {"embedding", scale}, {}, set()),
        ({"rates": (("query", 0.25), ("layers", 4.0))}, {kernel}, {kernel: 0.25, scale: 4.0}, set()),
        ({"freeze": ("embedding",)}, {kernel}, {}, {"embedding"}),
    ]
    for fields, decayed, rates, frozen in cases:
        updates = one_update(params, grads, name=name, **fields)
        for path, update in updates.items():
            direction = expected_direction(name, path, flat_grads[path], flat_params[path])
            decay = DECAY if path in decayed else 0.0
            expected = -LR * rates.get(path, 1.0) * (direction + decay * flat_params[path]) * (path not in frozen)
            np.testing.assert_allclose(update, expected, rtol=2e-4, atol=2e-7, err_msg=f"{name} {fields} {path}")


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient_only_decay_moves_and_by_the_same_share(name: str) -> None:
    """A step shrinks a decayed parameter by `lr * weight_decay`, whatever the optimizer, and leaves the others."""
    params = small_params(0)
    updates = one_update(params, jax.tree.map(jnp.zeros_like, params), name=name)
    kernel = updates.pop("layers/query/kernel")
    np.testing.assert_allclose(kernel, -LR * DECAY * np.asarray(params["layers"]["query"]["kernel"]), rtol=1e-5)
    for path, update in updates.items():
        assert not update.any(), path


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_never_enters_a_moment(name: str) -> None:
    """Ten steps without a gradient shrink by `(1 - lr * decay)**10`; with decay in the momentum it is more."""
    config = OptimConfig(
        name=name, weight_decay=0.5, no_decay=(), schedule=ScheduleConfig(name="constant", peak_lr=0.1, warmup_steps=0)
    )
    tx = make_optimizer(config, 10, {"w": ("norm",)})
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(10):
        updates, state = tx.update({"w": jnp.zeros(3)}, state, params, value=jnp.float32(1.0))
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], 0.95**10, rtol=1e-5)


def test_adafactor_keeps_a_row_and_a_column_of_each_matrix() -> None:
    """Layers are a batch of matrices and heads belong to the columns, as in T5X; `optax.adafactor` would keep all."""
    tx = make_optimizer(OptimConfig(name="adafactor"), 10, AXES)
    sizes = [leaf.size for leaf in jax.tree.leaves(tx.init(small_params(0))) if leaf.dtype == jnp.float32]
    kernel, embedding, scale = 2 * (6 + 8), 6 + 7, 2 * 6
    placeholders = sum(size for size in sizes if size <= 2)  # optax keeps arrays of one number for what it doesn't use
    assert sum(sizes) - placeholders == kernel + embedding + scale


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_first_moments_in_bfloat16_take_half_of_their_bytes(name: str) -> None:
    def moments(dtype: str) -> dict[str, int]:
        state = make_optimizer(OptimConfig(name=name, moment_dtype=dtype), 10, AXES).init(small_params(0))
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 3]
        return {kind: sum(leaf.size for leaf in leaves if leaf.dtype == kind) for kind in ("float32", "bfloat16")}

    whole, half = moments("float32"), moments("bfloat16")
    params = sum(leaf.size for leaf in jax.tree.leaves(small_params(0)))
    assert half["bfloat16"] == params and whole["bfloat16"] == 0
    assert whole["float32"] - half["float32"] == params


def test_a_pattern_without_a_parameter_is_an_error() -> None:
    params = jax.eval_shape(make_model(model_config(), VOCAB).init, jax.random.key(0))
    for field, value in (("freeze", ("layer/ff",)), ("no_decay", ("layer/ff",)), ("rates", (("layer/ff", 0.5),))):
        with pytest.raises(ValueError, match=rf"optim.{field}: 'layer/ff' matches no parameter; there are embedding"):
            check_optimizer_paths(OptimConfig(**{field: value}), params)
    check_optimizer_paths(OptimConfig(), params)  # no biases: the defaults of no_decay need not all match


def test_plateau_cuts_the_learning_rate_when_the_loss_stays() -> None:
    config = OptimConfig(
        name="sgd",
        beta1=0.0,
        weight_decay=0.0,
        clip_norm=0.0,
        schedule=ScheduleConfig(name="plateau", warmup_steps=0, peak_lr=1.0, plateau_patience=1, plateau_window=2),
    )
    tx = make_optimizer(config, 100, {"w": ("norm",)})
    params = {"w": jnp.ones(3)}
    state, sizes = tx.init(params), []
    for _ in range(12):
        updates, state = tx.update({"w": jnp.ones(3)}, state, params, value=jnp.float32(2.0))
        sizes.append(float(-updates["w"][0]))
        factor = plateau_factor(state)
        assert factor is not None and float(factor) == pytest.approx(sizes[-1]), "what is logged is what was applied"
    assert sizes[0] == 1.0 and sizes[-1] <= 0.25, sizes
    assert plateau_factor(make_optimizer(OptimConfig(), 10, AXES).init(small_params(0))) is None


def test_clipping_bounds_the_global_norm() -> None:
    config = OptimConfig(
        name="sgd",
        beta1=0.0,
        weight_decay=0.0,
        clip_norm=0.5,
        schedule=ScheduleConfig(name="constant", warmup_steps=0, peak_lr=1.0),
    )
    tx = make_optimizer(config, 10, {"w": ("norm",)})
    params = {"w": jnp.ones(4)}
    for grads, norm in ((jnp.full(4, 10.0), 0.5), (jnp.full(4, 0.1), 0.2), (jnp.zeros(4), 0.0)):
        for known in ({}, {"grad_norm": jnp.sqrt(jnp.sum(grads**2))}):
            updates, _ = tx.update({"w": grads}, tx.init(params), params, value=jnp.float32(0.0), **known)
            assert float(optax.tree.norm(updates)) == pytest.approx(norm)
    updates, _ = tx.update({"w": jnp.full(4, jnp.inf)}, tx.init(params), params, value=jnp.float32(0.0))
    assert not np.isfinite(updates["w"]).any(), "a gradient that is not finite must stay so, for the guard to see"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_global_norm_is_that_of_float64(dtype: str) -> None:
    rng = np.random.default_rng(0)
    tree = {str(shape): jnp.asarray(rng.normal(size=shape), dtype) for shape in ((), (7,), (30, 5), (3, 200, 41))}
    exact = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in tree.values()))
    assert float(jax.jit(global_norm)(tree)) == pytest.approx(exact, rel=2e-6)


def test_the_global_norm_of_what_is_split_over_devices_gathers_nothing() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    leaf = jax.ShapeDtypeStruct((3, 64, 8), "float32", sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    program = jax.jit(global_norm).lower({"w": leaf}).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program


def test_the_global_norm_keeps_no_squares() -> None:
    """Of a sum to a single number XLA:CPU makes a scalar loop, over squares that it writes out first: seven times as
    long, in 38 million numbers, as when rows are added up before."""
    leaf = jax.ShapeDtypeStruct((1024, 512), "float32")
    as_users = {"xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT"}
    compiled = jax.jit(global_norm).lower({"w": leaf}).compile(as_users)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 1024 * 512 / 16


def test_muon_takes_each_expert_for_itself_and_leaves_the_router_to_adamw() -> None:
    """One update of two experts side by side is that of each alone; a router's is AdamW's."""
    axes = {"up": ("layers", "expert", "embed", "ff"), "router": ("layers", "embed", "expert")}
    params = {"up": jax.random.normal(jax.random.key(0), (1, 2, 6, 4)), "router": jnp.ones((1, 6, 2))}
    grads = {"up": jax.random.normal(jax.random.key(1), (1, 2, 6, 4)), "router": jnp.ones((1, 6, 2))}

    def update(axes: dict, params: dict, grads: dict) -> dict:
        tx = make_optimizer(OptimConfig(name="muon", schedule=ScheduleConfig(warmup_steps=1), clip_norm=0.0), 10, axes)
        return jax.jit(lambda: tx.update(grads, tx.init(params), params, value=jnp.float32(1.0))[0])()

    both = update(axes, params, grads)
    for expert in range(2):
        alone = update({"up": ("layers", "embed", "ff")}, *({"up": tree["up"][:, expert]} for tree in (params, grads)))
        np.testing.assert_allclose(both["up"][:, expert], alone["up"], rtol=1e-5)
    outside = {"router": ("vocab", "embed", "expert")}
    alone = update(outside, {"router": params["router"]}, {"router": grads["router"]})
    np.testing.assert_allclose(both["router"], alone["router"], rtol=1e-6)


def test_an_adapter_goes_by_the_path_of_its_matrix_too() -> None:
    params = {"query": {"lora_a": 0.0, "lora_b": 0.0}, "norm": {"scale": 0.0}}
    assert path_matches(("query/kernel$",), params) == {
        "query": {"lora_a": True, "lora_b": True},
        "norm": {"scale": False},
    }
    assert path_matches(("lora_a$",), params) == {"query": {"lora_a": True, "lora_b": False}, "norm": {"scale": False}}
