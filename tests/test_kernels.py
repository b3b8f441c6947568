"""The accelerators' kernels, as far as they can be tried without one: the choice, the check, the mask, the lowering."""

import functools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxstages.config import MeshConfig
from jaxstages.models import cpu, kernels
from jaxstages.models.attention import Attend, AttentionSpec, attend_packed
from jaxstages.models.kernels import KERNELS, Kernel, Machine, Shape, choose_attend, run_lengths
from jaxstages.models.sharding import RULES, make_mesh, make_sharding_hooks
from jaxstages.models.spmd import sharded_attention

SHAPE = Shape(length=256, heads=8, kv_heads=2, head_dim=64, dtype="bfloat16", runs=5)
SMALL = SHAPE._replace(length=24, head_dim=16, dtype="float32")
HOPPER, AMPERE, TPU = Machine("gpu", 9.0), Machine("gpu", 8.0), Machine("tpu")


def usable(machine: Machine, shape: Shape) -> list[str]:
    return [k.name for k in KERNELS if k.platform == machine.platform and not k.lacks(machine, shape)]


@pytest.mark.parametrize(
    ("machine", "changes", "names"),
    [
        (HOPPER, {}, ["cuDNN, packed", "cuDNN with a mask"]),
        (AMPERE, {}, ["cuDNN with a mask"]),
        (HOPPER, {"head_dim": 256}, ["cuDNN, packed", "cuDNN with a mask"]),
        (AMPERE, {"head_dim": 256}, []),
        (HOPPER, {"head_dim": 60}, []),
        (HOPPER, {"length": 255}, []),
        (HOPPER, {"dtype": "float32"}, []),
        (HOPPER, {"spec": AttentionSpec(softcap=50.0)}, []),
        (HOPPER, {"spec": AttentionSpec(window=64)}, ["cuDNN, packed", "cuDNN with a mask"]),
        (Machine("gpu", 7.5), {}, []),
        (Machine("gpu"), {}, []),  # of another maker
        (TPU, {}, ["splash attention"]),
        (TPU, {"length": 250}, []),
        (TPU, {"spec": AttentionSpec(64, 50.0)}, ["splash attention"]),
    ],
)
def test_which_kernel_takes_what(machine: Machine, changes: dict, names: list[str]) -> None:
    assert usable(machine, SHAPE._replace(**changes)) == names


def kernel(name: str, attend: Attend) -> Kernel:
    return Kernel(name, HOPPER.platform, lambda machine, shape: "", lambda shape: attend)


def of_one_segment(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, spec: AttentionSpec) -> jax.Array:
    return attend_packed(q, k, v, jnp.ones_like(segments), spec)


@jax.custom_vjp
def twice_back(x: jax.Array) -> jax.Array:
    return x


twice_back.defvjp(lambda x: (x, None), lambda _, d_x: (2.0 * d_x,))


def wrong_gradient(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, spec: AttentionSpec) -> jax.Array:
    return attend_packed(q, twice_back(k), v, segments, spec)


def nan_in_padding(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, spec: AttentionSpec) -> jax.Array:
    return jnp.where(segments[..., None, None] == 0, jnp.nan, attend_packed(q, k, v, segments, spec))


def fails(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, spec: AttentionSpec) -> jax.Array:
    raise NotImplementedError("no such kernel in this version\nand more")


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (of_one_segment, "the plain formula.*one is wrong here: its output is off by"),
        (wrong_gradient, "the plain formula.*one is wrong here: its d_key is off by"),
        (nan_in_padding, "the plain formula.*one is wrong here: its output is off by nan"),
        (fails, "the plain formula.*one fails here: no such kernel in this version$"),
    ],
)
def test_a_kernel_that_is_wrong_here_is_not_used(attend: Attend, said: str) -> None:
    """The next one is taken; without one, the formula, and it is said."""
    second = kernel("two", cpu.attention)
    choice = choose_attend(SMALL, HOPPER, (kernel("one", attend), second))
    assert choice.reason.startswith("attention: two; one ")
    choice = choose_attend(SMALL, HOPPER, (kernel("one", attend),))
    assert choice.attend is attend_packed
    assert re.search(said, choice.reason), choice.reason


def test_the_check_is_made_once() -> None:
    calls = []

    def counted(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, spec: AttentionSpec) -> jax.Array:
        calls.append(q.shape)
        return attend_packed(q, k, v, segments, spec)

    chosen = kernel("one", counted)
    for _ in range(2):
        assert choose_attend(SMALL, HOPPER, (chosen,)).reason == "attention: one"
    assert len(calls) == 1


def test_without_a_kernel_it_is_the_formula_and_says_why() -> None:
    choice = choose_attend(SMALL, HOPPER)
    assert choice.attend is attend_packed
    assert "cuDNN, packed takes bfloat16, model.dtype is float32" in choice.reason and "splash" not in choice.reason


def arrays(shape: Shape, batch: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    rows = [jnp.asarray(rng.normal(size=(batch, shape.length, n, shape.head_dim)), shape.dtype) for n in heads]
    segments = np.sort(rng.integers(1, 4, (batch, shape.length)), axis=1).astype(np.int32)
    return *rows, jnp.asarray(segments)


def test_each_device_attends_with_its_own_rows_and_heads() -> None:
    """Over rows and heads of a mesh of eight; rows of another length take the formula."""
    mesh, seen = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), []

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, spec: AttentionSpec) -> jax.Array:
        seen.append((q.shape, k.shape, segments.shape))
        return attend_packed(q, k, v, segments, spec)

    shape = SMALL._replace(runs=4)
    attend = sharded_attention(local, make_sharding_hooks(mesh, RULES), 24)
    for batch, length in ((8, 24), (8, 20)):
        values = arrays(shape._replace(length=length), batch)
        actual = jax.jit(functools.partial(attend, spec=AttentionSpec()))(*values)
        np.testing.assert_allclose(actual, attend_packed(*values, AttentionSpec()), rtol=1e-5, atol=1e-6)
    assert seen == [((2, 24, 4, 16), (2, 24, 1, 16), (2, 24))]


def test_run_lengths() -> None:
    """Of each stretch of one segment, padding's too; what is too many is counted."""
    segments = jnp.asarray([[1, 1, 2, 0, 0], [1, 1, 1, 1, 1], [1, 2, 3, 4, 0]], jnp.int32)
    lengths, starts, count = run_lengths(segments, 4)
    assert lengths.tolist() == [[2, 1, 2, -1], [5, -1, -1, -1], [1, 1, 1, 1]]
    assert starts.tolist() == [[0, 2, 3, -1, -1], [0, -1, -1, -1, -1], [0, 1, 2, 3, -1]]
    assert count.tolist() == [3, 1, 5]


SPECS = {"causal": AttentionSpec(), "window": AttentionSpec(window=100), "softcap": AttentionSpec(softcap=2.0)}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_splash_attention_sees_what_the_formula_sees(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, spec: AttentionSpec
) -> None:
    """The TPU kernel, interpreted: outputs and gradients, packed rows, grouped heads."""
    shape = Shape(128, 4, kv_heads, 64, "float32", 4, spec)
    monkeypatch.setattr(kernels, "MAX_ERROR_RATIO", 20.0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        interpreted = Kernel("splash", "tpu", KERNELS[2].lacks, functools.partial(kernels._splash, interpret=True))
        assert kernels._check(interpreted, shape, jax.devices()[0]) == ""


@pytest.fixture
def with_cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if there were a Hopper GPU with cuDNN 9.8: enough to lower for it."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90800)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    return


def lowered(name: str, platform: str, shape: Shape) -> str:
    made = next(entry for entry in KERNELS if entry.name == name).make(shape)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return jnp.sum(made(q, k, v, segments, shape.spec).astype(jnp.float32))

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays(shape, 2))
    return step.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.usefixtures("with_cudnn")
def test_cudnn_is_lowered_without_a_gpu(kv_heads: int) -> None:
    """Forward and backward are cuDNN's calls, with no array of all scores beside them."""
    text = lowered("cuDNN, packed", "cuda", SHAPE._replace(kv_heads=kv_heads))
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert "PADDING_CAUSAL" in text and "x256x256" not in text
    text = lowered("cuDNN with a mask", "cuda", SHAPE._replace(kv_heads=kv_heads))
    assert "__cudnn$fmhaScaleBiasSoftmax" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


def test_splash_attention_is_lowered_without_a_tpu() -> None:
    text = lowered("splash attention", "tpu", SHAPE._replace(head_dim=128))
    assert text.count("tpu_custom_call") >= 2 and "x256x256" not in text
