"""Hand-written gradients against those of the plain formulas, in float64 where the bound is on the error itself."""

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxstages.models import cpu
from jaxstages.models.attention import AttentionSpec, attend_masked, packed_mask
from jaxstages.models.losses import cross_entropy_loss
from jaxstages.models.ops import ACTIVATIONS, REFERENCE, TRANSPOSED, Ops, linear_transposed
from jaxstages.models.select import ACCELERATOR
from jaxstages.models.transformer import make_model
from jaxstages.types import HiddenAndHead, Params
from tests.tiny import VOCAB, mixed_batch, model_config

BOUND = 2e-6
"""Largest error of an output or a gradient, relative to the largest value in it, in float32 against float64."""


TABLES = {"reference": REFERENCE, "cpu": cpu.OPS, "accelerator": ACCELERATOR}


def close(actual: object, expected: object, bound: float = BOUND) -> None:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for left, right in pairs:
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        assert np.abs(left - right).max() <= bound * np.abs(right).max(), (
            np.abs(left - right).max() / np.abs(right).max()
        )


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 24), (24, 8), (7, 7)])
def test_linear(ops: Ops, inputs: int, outputs: int) -> None:
    """Both orders of the kernel's gradient, over any leading dims."""
    x, kernel, d_out = normal(0, 3, 5, inputs), normal(1, inputs, outputs), normal(2, 3, 5, outputs)
    out, back = jax.vjp(lambda x, kernel: ops.linear(x, kernel, ("", "")), x, kernel)
    wide = [np.asarray(array, np.float64) for array in (x, kernel, d_out)]
    d_kernel = wide[0].reshape(-1, inputs).T @ wide[2].reshape(-1, outputs)
    close((out, *back(d_out)), (wide[0] @ wide[1], wide[2] @ wide[1].T, d_kernel))


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("centred", [True, False])
def test_normalize(ops: Ops, centred: bool) -> None:
    x, scale, d_out = 3 + normal(0, 4, 6, 32), normal(1, 32), normal(2, 4, 6, 32)

    def formula(x: jax.Array, scale: jax.Array) -> jax.Array:
        shifted = x - jnp.mean(x, axis=-1, keepdims=True) if centred else x
        return shifted / jnp.sqrt(jnp.mean(shifted**2, axis=-1, keepdims=True) + 1e-5) * scale[None, None]

    out, back = jax.vjp(lambda x, scale: ops.norm(x, scale, centred, 1e-5), x, scale)
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in (x, scale, d_out)]
        expected, expected_back = jax.vjp(formula, *wide[:2])
        close((out, *back(d_out)), (expected, *expected_back(wide[2])), 5e-6)


def temporary(function: Callable[..., Any], *shapes: tuple[int, ...]) -> float:
    """Float32 numbers that the function has in memory at once beside its arguments and results, by the compiler's own
    count, compiled as it is for users."""
    lowered = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    compiled = lowered.compile(compiler_options={"xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT"})
    return compiled.memory_analysis().temp_size_in_bytes / 4


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, ops: Ops) -> None:
    """Value and slope, near 0 and far out on both sides."""
    formulas = {
        "swiglu": lambda x: x / (1 + jnp.exp(-x)),
        "geglu": lambda x: x / 2 * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "gelu_erf": lambda x: x / 2 * (1 + jax.scipy.special.erf(x / 2**0.5)),
        "relu2": lambda x: jnp.where(x > 0, x, 0) ** 2,
    }
    formula = formulas["geglu" if name == "gelu" else name]
    x = jnp.concatenate([jnp.linspace(-9, 9, 4001), 0.01 * normal(0, 1000)])

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})  # as outside of these tests
    def value_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, back = jax.vjp(lambda x: ops.activation(name, x), x)
        return out, back(jnp.ones_like(x))[0]

    out, slope = value_and_slope(x)
    with jax.enable_x64(True):
        expected, expected_back = jax.vjp(formula, jnp.asarray(x, jnp.float64))
        ones = jnp.ones(x.shape, jnp.float64)
        for left, right in ((out, expected), (slope, expected_back(ones)[0])):
            error = np.abs(np.asarray(left, np.float64) - np.asarray(right)) / np.maximum(
                np.maximum(np.abs(x), np.abs(right)), 1
            )
            assert error.max() < 1e-6, (name, float(x[error.argmax()]), error.max())
    assert ops.activation(name, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_slopes_take_no_words_between_devices() -> None:
    """As they would with the form for one device, in which all wait for a number that one of them has."""
    rows = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices()[:2], ("data",)), P("data"))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=rows)

    def collectives(ops: Ops) -> list[str]:
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(ops.activation("gelu", x)))), out_shardings=rows)
        return re.findall("all-reduce|all-gather|collective-permute", gradient.lower(x).compile().as_text())

    assert collectives(cpu.OPS)
    assert not collectives(ACCELERATOR)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_unrolled_layers_keep_an_activations_input_and_value_only(name: str) -> None:
    """By the compiler's count of what lives at once, in arrays of a layer's size."""
    layers, shape = 12, (64, 1024)

    def loss(x: jax.Array, downs: jax.Array, ups: jax.Array) -> jax.Array:
        for n in range(layers):
            x = cpu.linear(cpu.activation(name, cpu.linear(x, downs[n])), ups[n])
        return jnp.sum(x)

    arrays = temporary(jax.grad(loss, (1, 2)), (64, 8), (layers, 8, 1024), (layers, 1024, 8)) / math.prod(shape)
    assert arrays < 2 * layers + 8, arrays


def test_unrolled_layers_keep_no_kernel() -> None:
    """Slices of a stack, they are cut out in the forward pass and again in the backward pass: what is kept is an array
    of a kernel's size a layer, the activation. (The kernels are frozen, for gradients would be there in the end.)"""
    layers, size = 12, 512

    def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
        return cpu.activation("relu2", cpu.linear(x, kernel)), None

    def loss(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(layer, x, kernels, unroll=layers)[0])

    arrays = temporary(jax.value_and_grad(loss), (size, size), (layers, size, size)) / size**2
    assert arrays < 1.5 * layers, arrays


def test_unrolled_layers_keep_no_output_of_a_norm() -> None:
    """From the residual stream, which is kept as the activation's input is, the backward pass makes it again."""
    layers, rows, width = 12, 4096, 128

    def loss(kernels: jax.Array, x: jax.Array) -> jax.Array:
        for n in range(layers):
            normed = cpu.norm(x, jnp.ones(width), True, 1e-6)
            x = x + cpu.activation("relu2", cpu.linear(normed, kernels[n]))
        return jnp.sum(x)

    arrays = temporary(jax.grad(loss), (layers, width, width), (rows, width)) / (rows * width)
    assert arrays < 2.5 * layers, arrays


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)
def test_bfloat16_goes_through_float32(ops: Ops) -> None:
    """Of 512 equal bfloat16 numbers, a sum in bfloat16 would stop growing at 256 times the first."""
    ones = jnp.ones((2, 512), jnp.bfloat16)
    assert ops.norm(ones * 3, jnp.ones(512), False, 1e-6).dtype == jnp.bfloat16
    close(ops.norm(ones * 3, jnp.ones(512), False, 0.0), ones, 1e-2)
    close(cpu.row_sum(jnp.ones((2, 512))), np.full((2, 1), 512.0))


SHAPES = {"heads": (4, 4), "grouped": (6, 2), "one key head": (4, 1)}
SPECS = {
    "causal": AttentionSpec(),
    "window": AttentionSpec(window=5),
    "softcap": AttentionSpec(softcap=2.0),
    "both": AttentionSpec(11, 3.0),
}


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_attention_in_tiles(monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, spec: AttentionSpec) -> None:
    """Several blocks, the last of them shorter, and several groups of rows, over packed rows with padding."""
    batch, length, head_dim = 4, 27, 8
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 10)
    monkeypatch.setattr(cpu, "TILE_SCORES", 2 * heads * 10 * length)
    segments = np.asarray([[1] * 27, [1] * 4 + [2] * 20 + [0] * 3, [1] * 13 + [2] * 14, [1] * 9 + [2] * 9 + [3] * 9])
    query, d_out = normal(0, batch, length, heads, head_dim), normal(3, batch, length, heads, head_dim)
    key, value = normal(1, batch, length, kv_heads, head_dim), normal(2, batch, length, kv_heads, head_dim)
    out, back = jax.vjp(lambda *qkv: cpu.attention(*qkv, jnp.asarray(segments, jnp.int32), spec), query, key, value)
    with jax.enable_x64(True):
        mask = packed_mask(jnp.asarray(segments), spec.window)
        wide = [jnp.asarray(array, jnp.float64) for array in (query, key, value, d_out)]
        expected, expected_back = jax.vjp(lambda *qkv: formula(*qkv, mask, spec.softcap), *wide[:3])
        close((out, *back(d_out)), (expected, *expected_back(wide[3])))
        close(attend_masked(query, key, value, mask, spec.softcap), expected)


def formula(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, softcap: float) -> jax.Array:
    """Each head by itself."""
    shared = query.shape[2] // key.shape[2]
    outs = []
    for head in range(query.shape[2]):
        scores = jnp.einsum("blk,bsk->bls", query[:, :, head], key[:, :, head // shared]) / query.shape[3] ** 0.5
        scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
        shares = jax.nn.softmax(jnp.where(mask[:, 0], scores, -1e300), axis=-1)
        outs.append(jnp.einsum("bls,bsk->blk", shares, value[:, :, head // shared]))
    return jnp.stack(outs, axis=2)


def test_what_is_looked_at_together_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (normal(seed, 6, 16, 2, 8) for seed in range(3))
    segments = jnp.ones((6, 16), jnp.int32)
    results = []
    for tile, block in itertools.product((1, 2 * 16 * 16 * 2, 2**20), (4, 16, 128)):
        monkeypatch.setattr(cpu, "TILE_SCORES", tile)
        monkeypatch.setattr(cpu, "QUERY_BLOCK", block)
        results.append(cpu.attention(query, key, value, segments, AttentionSpec()))
    for other in results[1:]:
        close(other, results[0])


@pytest.mark.parametrize("tile", [2**13, 2**20])
def test_no_product_of_attention_turns_its_first_operand(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """In a loop or at once. XLA:CPU takes another way for such products, in which the step of nanoGPT's CPU setting
    took 1.13 times as long."""
    monkeypatch.setattr(cpu, "TILE_SCORES", tile)
    array, segments = jax.ShapeDtypeStruct((2, 64, 4, 32), "float32"), jax.ShapeDtypeStruct((2, 64), "int32")

    def both(query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, segments: jax.Array) -> Any:
        out, back = jax.vjp(lambda *qkv: cpu.attention(*qkv, segments, AttentionSpec()), query, key, value)
        return out, back(d_out)

    as_users = {"xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT"}
    program = jax.jit(both).lower(array, array, array, array, segments).compile(as_users).as_text()
    assert program
    products = re.findall(r" dot\(.*lhs_batch_dims=\{0\}, lhs_contracting_dims=\{(\d)\}", program)
    assert len(products) in (6, 7) and set(products) == {"2"}


def test_what_makes_exponentials_reads_a_slice_in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA:CPU makes no vectors of a fusion that reads a loop's slice along rows and along columns."""
    monkeypatch.setattr(cpu, "TILE_SCORES", 1)
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 8)
    array, segments = jnp.ones((4, 16, 2, 8)), jnp.ones((4, 16), jnp.int32)

    def both(array: jax.Array, segments: jax.Array) -> Any:
        return jax.vjp(lambda *qkv: cpu.attention(*qkv, segments, AttentionSpec()), array, array, array)[1](array)

    as_users = {"xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT"}
    program = jax.jit(both).lower(array, segments).compile(as_users).as_text()
    assert program
    fusions = [part for part in re.split(r"\n(?=%)", program) if " exponential(" in part]
    slices = [(name, part) for part in fusions for name in re.findall(r"(%\S+) = \S+ dynamic-slice\(", part)]
    assert slices
    for name, part in slices:
        assert ways_to_read(name, part) == 1, part


def ways_to_read(name: str, part: str) -> int:
    """Instructions that take a value, or the same numbers in another shape or type."""
    readers = re.findall(rf"(%\S+) = \S+ ([\w-]+)\(.*{re.escape(name)}[,)]", part)
    if len(readers) == 1 and readers[0][1] in ("bitcast", "convert", "slice"):
        return ways_to_read(readers[0][0], part)
    return len(readers)


OPTIONS = {
    "plain": (0.0, 0.0, 0),
    "label smoothing and z-loss": (0.1, 0.01, 0),
    "tiles": (0.0, 0.0, 4),
    "all": (0.1, 0.01, 4),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("vocab", [7, 40])
@pytest.mark.parametrize("name", ["cpu", "accelerator"])
def test_loss_head_equals_its_reference(name: str, vocab: int, softcap: float | None, options: tuple) -> None:
    """Sums and gradients, with a vocabulary narrower and wider than the hidden states."""
    hidden, head = normal(0, 2, 12, 16), normal(1, vocab, 16)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, vocab, (2, 12)), jnp.int32)
    weights = jnp.asarray(np.random.default_rng(1).integers(0, 3, (2, 12)), jnp.float32)

    def sums_and_gradients(ops: Ops) -> object:
        def objective(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, dict]:
            outputs = HiddenAndHead(hidden, head, None if softcap is None else jnp.float32(softcap))
            sums = ops.loss_head(outputs, targets, weights, *options)
            return sums["objective"], sums

        return jax.value_and_grad(objective, (0, 1), has_aux=True)(hidden, head)

    close(sums_and_gradients(TABLES[name]), sums_and_gradients(REFERENCE), 5e-6)


@pytest.mark.parametrize("name", ["cpu", "accelerator"])
def test_embedding_lookup_equals_its_reference(name: str) -> None:
    table, tokens = normal(0, 9, 4), jnp.asarray([[3, 0, 8], [8, 8, 1]], jnp.int32)
    embeddings = (ops.embed(table, tokens, jnp.float32) for ops in (TABLES[name], REFERENCE))
    np.testing.assert_array_equal(*embeddings)


def test_gradients_of_a_frequent_token_add_up_in_float32() -> None:
    """In bfloat16 a sum of ones stops at 256."""
    tokens = jnp.zeros((4, 500), jnp.int32)
    gradient = jax.grad(lambda table: REFERENCE.embed(table, tokens, jnp.bfloat16).astype(jnp.float32).sum())
    np.testing.assert_array_equal(gradient(jnp.ones((2, 3))), [[2000.0] * 3, [0.0] * 3])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_attention_equals_its_reference(spec: AttentionSpec) -> None:
    """Outputs and gradients of packed rows with grouped heads."""
    query, key, value, d_out = (normal(seed, 2, 12, heads, 8) for seed, heads in enumerate((4, 2, 2, 4)))
    segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], jnp.int32)

    def output_and_gradients(ops: Ops) -> object:
        out, backward = jax.vjp(lambda *qkv: ops.attention(*qkv, segments, spec), query, key, value)
        return out, backward(d_out)

    close(output_and_gradients(cpu.OPS), output_and_gradients(REFERENCE), 5e-6)


def test_an_accelerator_decodes_with_kernels_in_the_dtype_of_the_model() -> None:
    kernel, scale = normal(0, 6, 4), jnp.ones(6)
    experts = {"router": normal(1, 6, 2)} | dict.fromkeys(("gate", "up", "down"), normal(2, 2, 6, 4))
    adapted = {"kernel": kernel, "lora_a": normal(3, 6, 1)}
    layer = {"query": {"kernel": kernel, "bias": scale}, "key": adapted, "norm": {"scale": scale}, "experts": experts}
    dtypes = jax.tree.map(lambda x: x.dtype.name, ACCELERATOR.prepare_decode(layer, jnp.bfloat16))
    assert dtypes == {
        "query": {"kernel": "bfloat16", "bias": "float32"},
        "key": {"kernel": "float32", "lora_a": "float32"},
        "norm": {"scale": "float32"},
        "experts": {"router": "float32", "gate": "bfloat16", "up": "bfloat16", "down": "bfloat16"},
    }


def test_a_prepared_layer_decodes_to_the_same_numbers() -> None:
    """CPU transposes kernels, and leaves those that have an adapter."""
    kernel, bias = normal(0, 6, 2, 4), normal(1, 2, 4)
    plain, adapted = {"kernel": kernel, "bias": bias}, {"kernel": kernel, "lora_a": normal(2, 6, 1)}
    layer = {"attention": {"query": plain, "key": adapted}, "attention_norm": {"scale": jnp.ones(6)}}
    prepared = cpu.OPS.prepare_decode(layer, jnp.float32)
    assert REFERENCE.prepare_decode(layer, jnp.float32) == layer
    assert prepared["attention"]["key"] == adapted and prepared["attention_norm"] == layer["attention_norm"]

    query = prepared["attention"]["query"]
    x = normal(3, 5, 6)
    close(linear_transposed(x, query[TRANSPOSED]), x @ kernel.reshape(6, 8))
    np.testing.assert_array_equal(query["bias"], bias)


def test_forward_mode_works_through_the_reference_model_and_loss() -> None:
    """`jax.jvp` in a random direction equals the gradient's product with it; so does a Hessian-vector product."""
    model = make_model(model_config(logit_softcap=5.0), VOCAB, ops=REFERENCE)
    loss, batch = cross_entropy_loss(model.outputs, z_loss=1e-3, tile=4, ops=REFERENCE), mixed_batch(2)
    params = jax.jit(model.init)(jax.random.key(0))
    direction = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)

    def objective(params: Params) -> jax.Array:
        return loss(params, batch, None)["objective"]

    def product(gradient: Params) -> float:
        return float(sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction))))

    _, slope = jax.jit(lambda p: jax.jvp(objective, (p,), (direction,)))(params)
    gradient, hessian_product = jax.jit(lambda p: jax.jvp(jax.grad(objective), (p,), (direction,)))(params)
    assert float(slope) == pytest.approx(product(gradient), rel=1e-4)

    step = 1e-2
    ahead, behind = (
        jax.jit(jax.grad(objective))(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction))
        for s in (step, -step)
    )
    difference = (product(ahead) - product(behind)) / (2 * step)
    assert product(hessian_product) == pytest.approx(difference, rel=2e-2)


def test_the_model_is_the_same_function_with_every_table() -> None:
    """Loss and gradients of a whole model."""

    def loss_and_gradient(ops: Ops) -> object:
        model = make_model(model_config(unroll=True), VOCAB, ops=ops)
        loss, params = cross_entropy_loss(model.outputs, ops=ops), jax.jit(model.init)(jax.random.key(0))
        return jax.jit(jax.value_and_grad(lambda p: loss(p, mixed_batch(2), None)["objective"]))(params)

    expected = loss_and_gradient(REFERENCE)
    for ops in (cpu.OPS, ACCELERATOR):
        close(loss_and_gradient(ops), expected, 2e-5)
