"""Fused attention kernels of GPUs and TPUs: which kernel supports a shape, and a check of its results before use.

Legend: B batch, L length, H query heads, G key/value heads, K head dim, M runs (stretches of one segment) of a row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxstages.models.attention import Attend, AttentionSpec, attend_packed, packed_mask

MAX_ERROR_RATIO = 4.0
"""Largest error of a kernel, relative to that of the formula in the same dtype. A wrong mask gives some hundreds."""


class Machine(NamedTuple):
    """platform: "cpu", "gpu" or "tpu". capability: compute capability of an NVIDIA GPU, 9.0 for Hopper; 0 elsewhere."""

    platform: str
    capability: float = 0.0


class Shape(NamedTuple):
    """The attention that a kernel must compute. runs: the largest number of runs in a row, including padding."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    runs: int
    spec: AttentionSpec = AttentionSpec()


class Kernel(NamedTuple):
    """lacks: `lacks(machine, shape)` returns why the kernel can't be used on this machine of its platform, or "".
    make: `make(shape)` returns the attention."""

    name: str
    platform: str
    lacks: Callable[[Machine, Shape], str]
    make: Callable[[Shape], Attend]


class Choice(NamedTuple):
    """attend: the attention for the model. reason: its name, and why faster ones can't be used."""

    attend: Attend
    reason: str


def machine_of(device: Any) -> Machine:
    """Describe one of `jax.devices()`."""
    capability = getattr(device, "compute_capability", 0) if "nvidia" in device.device_kind.lower() else 0
    return Machine(device.platform, float(capability))


def has_kernels(machine: Machine) -> bool:
    """Return whether there are attention kernels for the machine's platform."""
    return machine.platform in ("gpu", "tpu")


def run_lengths(segments_BL: Int[Array, "B L"], runs: int) -> tuple[Int[Array, "B M"], Int[Array, "B M+1"], Array]:
    """Return length and first slot of each run of a row, -1 after the last, and the number of runs, [B].

    | segments 1 1 2 0, M 4 | lengths 2 1 1 -1 | starts 0 2 3 -1 -1 |
    """
    new_BL = jnp.concatenate([jnp.ones_like(segments_BL[:, :1]), jnp.diff(segments_BL) != 0], axis=1, dtype=jnp.int32)
    run_BL = jnp.cumsum(new_BL, axis=1) - 1
    rows = jnp.arange(segments_BL.shape[0])[:, None]
    lengths_BM = jnp.zeros((segments_BL.shape[0], runs), jnp.int32).at[rows, run_BL].add(1, mode="drop")
    starts_BM = jnp.where(lengths_BM > 0, jnp.cumsum(lengths_BM, axis=1) - lengths_BM, -1)
    last = jnp.full((segments_BL.shape[0], 1), -1, jnp.int32)
    return jnp.where(lengths_BM > 0, lengths_BM, -1), jnp.concatenate([starts_BM, last], axis=1), run_BL[:, -1] + 1


def _cudnn_packed(shape: Shape) -> Attend:
    """cuDNN treats each run of a packed row as a sequence of its own."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # the public function takes no segments (jax#29731)

    def attend(query: Array, key: Array, value: Array, segments: Array, spec: AttentionSpec) -> Array:
        lengths, starts, count = run_lengths(segments, shape.runs)
        # JAX up to 0.11.0 is wrong for packed rows with fewer key than query heads (jax#39521): repeat the key heads.
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        out: Any = cudnn.dot_product_attention(
            *(query, key, value, None, None, lengths, lengths, starts, starts),
            scale=query.shape[-1] ** -0.5,
            mask_type=cudnn.MaskType.PADDING_CAUSAL,
            sliding_window_length=spec.window or None,
        )
        # A row with more runs than the shape allows must not be silently wrong: the loss is NaN, the step is refused.
        return jnp.where((count > shape.runs)[:, None, None, None], jnp.nan, out)

    return attend


def _cudnn_masked(_shape: Shape) -> Attend:
    """The mask is a bias with one number per pair of slots. It is read from memory; scores are not written to it."""

    def attend(query: Array, key: Array, value: Array, segments: Array, spec: AttentionSpec) -> Array:
        mask = packed_mask(segments, spec.window)
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")

    return attend


def _splash(shape: Shape, interpret: bool = False) -> Attend:
    """Block-sparse flash attention. It skips the blocks of the masked half."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(size for size in (1024, 512, 256, 128) if shape.length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )

    def attend(query: Array, key: Array, value: Array, segments: Array, spec: AttentionSpec) -> Array:
        square = (shape.length, shape.length)
        mask = masks.LocalMask(square, (spec.window - 1, 0), 0) if spec.window else masks.CausalMask(square)
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=spec.softcap or None,
            interpret=interpret,
        )
        query = (query * query.shape[-1] ** -0.5).astype(query.dtype)
        out: Any = jax.vmap(kernel)(
            *(x.swapaxes(1, 2) for x in (query, key, value)), splash.SegmentIds(segments, segments)
        )
        return out.swapaxes(1, 2)

    return attend


def _cudnn_lacks(machine: Machine, shape: Shape, capability: float) -> str:
    if not machine.capability:
        return "is for NVIDIA GPUs"
    if machine.capability < capability:
        return f"needs compute capability {capability}, this GPU has {machine.capability}"
    if shape.dtype != "bfloat16":
        return f"takes bfloat16, model.dtype is {shape.dtype}"
    if shape.head_dim % 8 or shape.head_dim > (256 if machine.capability >= 9 else 128):
        return f"does not take head_dim={shape.head_dim}"
    if shape.length % 2:
        return f"takes an even length, context is {shape.length}"
    return "has no soft cap" if shape.spec.softcap else ""


def _splash_lacks(_machine: Machine, shape: Shape) -> str:
    return f"takes a multiple of 128 as length, context is {shape.length}" if shape.length % 128 else ""


KERNELS = (
    Kernel("cuDNN, packed", "gpu", functools.partial(_cudnn_lacks, capability=9.0), _cudnn_packed),
    Kernel("cuDNN with a mask", "gpu", functools.partial(_cudnn_lacks, capability=8.0), _cudnn_masked),
    Kernel("splash attention", "tpu", _splash_lacks, _splash),
)
"""Fastest first."""


def choose_attend(shape: Shape, machine: Machine, kernels: tuple[Kernel, ...] = KERNELS) -> Choice:
    """Return the fastest kernel that supports the shape and passes the check on this machine, else the formula."""
    reasons = []
    for kernel in (kernel for kernel in kernels if kernel.platform == machine.platform):
        problem = kernel.lacks(machine, shape) or _check(kernel, shape, jax.local_devices()[0])
        if not problem:
            return Choice(kernel.make(shape), "; ".join([f"attention: {kernel.name}", *reasons]))
        reasons.append(f"{kernel.name} {problem}")
    return Choice(attend_packed, "; ".join(["attention: the plain formula, which keeps all scores", *reasons]))


@functools.cache
def _check(kernel: Kernel, shape: Shape, device: Any) -> str:
    """Compare the kernel's outputs and gradients with the formula on random rows. Return the problem, or ""."""
    rng = np.random.default_rng(0)
    groups = min(shape.kv_heads, 2)  # two groups show the errors that all would
    query_heads = groups * shape.heads // shape.kv_heads
    arrays = [
        rng.normal(size=(3, shape.length, heads, shape.head_dim))
        for heads in (query_heads, groups, groups, query_heads)
    ]
    segments = _check_segments(rng, shape)

    def outputs_and_gradients(attend: Attend, dtype: Any) -> list[np.ndarray]:
        query, key, value, d_out = (jax.device_put(jnp.asarray(x, shape.dtype).astype(dtype), device) for x in arrays)

        def compute(query: Array, key: Array, value: Array, d_out: Array) -> Any:
            packed = jnp.asarray(segments)
            out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, packed, shape.spec), query, key, value)
            return out, *backward(d_out)

        return [np.asarray(x, np.float64) for x in jax.jit(compute)(query, key, value, d_out)]

    with jax.default_matmul_precision("highest"):
        exact = outputs_and_gradients(attend_packed, jnp.float32)
    formula = outputs_and_gradients(attend_packed, shape.dtype)
    try:
        results = outputs_and_gradients(kernel.make(shape), shape.dtype)
    except Exception as error:  # of any kind: the formula is the fallback
        return f"fails here: {(str(error).splitlines() or [repr(error)])[0][:200]}"

    names = ("output", "d_query", "d_key", "d_value")
    for name, result, plain, true in zip(names, results, formula, exact, strict=True):
        error, allowed = (np.abs(x - true).max() / np.abs(true).max() for x in (result, plain))
        if not error <= MAX_ERROR_RATIO * allowed + 1e-5:
            return f"is wrong here: its {name} is off by {error:.2g} of the largest, the formula's by {allowed:.2g}"
    return ""


def _check_segments(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Three rows: one segment, several segments with padding, and several without."""
    segments = np.zeros((3, shape.length), np.int32)
    segments[0] = 1
    for row in (1, 2):
        cuts = rng.choice(np.arange(1, shape.length), min(shape.runs, shape.length) - 1, replace=False)
        number = np.isin(np.arange(shape.length), cuts).cumsum() + 1
        is_padding = (row == 1) & (number == number[-1]) & (number[-1] > 1)
        segments[row] = np.where(is_padding, 0, number)
    return segments
