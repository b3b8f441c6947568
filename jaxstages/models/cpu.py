"""All workarounds for XLA:CPU. Each operation equals its reference in `ops.py` (see tests/test_primitives.py).

Legend: B batch, L query length, D width, H query heads, G key/value heads, R = H / G query heads that share a key/value
head, K head dim, F feed-forward, V vocab, M rows (all leading dims), I inputs, O outputs; in tiled attention N = B * G,
S keys and T queries of a block.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstages.models.attention import HIDDEN, AttentionSpec, merge_heads, soft_cap, split_heads, within_window
from jaxstages.models.custom_vjp import with_backward
from jaxstages.models.fused_cross_entropy import Form, make_loss_head
from jaxstages.models.ops import REFERENCE, TRANSPOSED, as_last_dim
from jaxstages.types import Names, Params


def recompute_after(x: Array, dependency: Array) -> Array:
    """Return `x` with an artificial data dependency on `dependency`.

    XLA:CPU hoists recomputations of the backward pass into the forward pass, and keeps their results in memory. It
    removes optimization barriers too early for them to prevent that. NaN if one of the first few numbers of
    `dependency` is not finite.
    """
    # A sum, because fusion ends at it. Otherwise each use of x would recompute `dependency`.
    return x + 0.0 * jnp.sum(dependency[(0,) * (dependency.ndim - 1)][:8]).astype(x.dtype)


# Linear maps.
#
# The gradient of a kernel is a product over rows. For the usual form of it, XLA:CPU writes one operand transposed,
# recomputes what that operand came from, and calls a slower matmul of its library.


LARGE_INPUT = 2**18
"""Elements of an input. Larger ones are recomputed for the backward pass."""

_CONTRACT_ROWS = (((0,), (0,)), ((), ()))


def linear(x: Float[Array, "*B I"], kernel_IO: Float[Array, "I O"], names: Names = ("", "")) -> Float[Array, "*B O"]:
    """`x @ kernel`."""
    del names
    out_MO = _linear(x.reshape(-1, x.shape[-1]), kernel_IO)
    return out_MO.reshape(*x.shape[:-1], kernel_IO.shape[1])


def _matmul_on_cpu(x_MI: Array, kernel_IO: Array) -> Array:
    return x_MI @ kernel_IO


def _linear_backward(residuals: tuple[Array, Array], d_out_MO: Array) -> tuple[Array, Array]:
    x_MI, kernel_IO = residuals

    # Unrolled layers would otherwise keep large kernels, which are sliced out of a stack, and the outputs of norms.
    large_kernel = 2 * kernel_IO.size > x_MI.size
    d_x_MI = d_out_MO @ (recompute_after(kernel_IO, d_out_MO) if large_kernel else kernel_IO).T

    if kernel_IO.shape[0] <= kernel_IO.shape[1]:
        inputs = recompute_after(x_MI, d_out_MO) if x_MI.size > LARGE_INPUT else x_MI
        return d_x_MI, jax.lax.dot_general(inputs, d_out_MO, _CONTRACT_ROWS)

    # The narrower operand comes first; the other order takes up to 1.8 times as long. The barrier keeps XLA from
    # swapping the operands back.
    d_kernel_OI = jax.lax.optimization_barrier(jax.lax.dot_general(d_out_MO, x_MI, _CONTRACT_ROWS))
    return d_x_MI, d_kernel_OI.T


def _linear_forward(x_MI: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array]]:
    return x_MI @ kernel_IO, (x_MI, kernel_IO)


_linear = with_backward(_matmul_on_cpu, _linear_forward, _linear_backward)


# Norms.
#
# XLA:CPU computes a sum over the last dim as a scalar loop and fuses its surroundings into every consumer: a backward
# pass then recomputes the gradient of the residual stream from the top, layer by layer. A product with a vector of ones
# is as exact, uses the matmul library, and ends the fusion.


def norm(x: Float[Array, "*B D"], scale_D: Float[Array, " D"], centred: bool, epsilon: float) -> Float[Array, "*B D"]:
    """Layer norm or RMS norm, with sums as matrix products."""
    return _norm(x, scale_D, centred, epsilon)


def row_sum(x: Float[Array, "*B D"]) -> Float[Array, "*B 1"]:
    """Sum over the last dim, which is kept with size 1."""
    x_MD = x.reshape(-1, x.shape[-1])
    return (x_MD @ jnp.ones((x.shape[-1], 1), x.dtype)).reshape(*x.shape[:-1], 1)


def _row_mean(x: Array) -> Array:
    return row_sum(x) / x.shape[-1]


def _column_sum(x: Float[Array, "*B D"]) -> Float[Array, " D"]:
    x_MD = x.reshape(-1, x.shape[-1])
    return (jnp.ones((1, x_MD.shape[0]), x.dtype) @ x_MD)[0]


_NormResiduals = tuple[Array, Array | None, Array, Array]


def _norm_forward(x: Array, scale_D: Array, centred: bool, epsilon: float) -> tuple[Array, _NormResiduals]:
    wide = x.astype(jnp.float32)
    mean = _row_mean(wide) if centred else None
    shifted = wide if mean is None else wide - mean
    inverse_std = jax.lax.rsqrt(_row_mean(jnp.square(shifted)) + epsilon)
    out = (shifted * inverse_std * as_last_dim(scale_D, x.ndim)).astype(x.dtype)
    return out, (x, mean, inverse_std, scale_D)


def _norm_backward(centred: bool, epsilon: float, residuals: _NormResiduals, d_out: Array) -> tuple[Array, Array]:
    del epsilon
    x, mean, inverse_std, scale_D = residuals
    wide, d_out = x.astype(jnp.float32), d_out.astype(jnp.float32)
    normed = (wide if mean is None else wide - mean) * inverse_std

    d_normed = d_out * as_last_dim(scale_D, x.ndim)
    d_x = d_normed - normed * _row_mean(d_normed * normed)
    if centred:
        d_x = d_x - _row_mean(d_normed)
    return (d_x * inverse_std).astype(x.dtype), _column_sum(d_out * normed)


def _norm_output(x: Array, scale_D: Array, centred: bool, epsilon: float) -> Array:
    return _norm_forward(x, scale_D, centred, epsilon)[0]


_norm = with_backward(_norm_output, _norm_forward, _norm_backward, static=(2, 3))


# Activations, each as a pair of value and slope.
#
# The backward pass computes the slope from the input, the only array that is kept. JAX's own derivative would keep
# several (the input, the power or tanh, their products). If the forward pass computed the slope, XLA:CPU would move
# that to the backward pass in unrolled layers, and keep the same arrays.


def activation(name: str, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Apply an activation that keeps only its input for the backward pass."""
    return _activation(name, x)


def _gelu_exact(x: Array) -> tuple[Array, Array]:
    """`x * Phi(x)` with the normal distribution's Phi (Hendrycks & Gimpel 2016).

    Phi and its density share one power: Phi(-|x|) is the power times a polynomial in 1 / u, u = 1 + p |x|, to 1e-7
    (Abramowitz & Stegun 1964, 7.1.26; halved, and with |x| / sqrt(2) for their x). Here the polynomial is in u, divided
    by u**5, so that each result takes one power and one quotient: XLA:CPU stores what is expensive and used twice.
    """
    size, power = jnp.abs(x), jnp.exp(-0.5 * jnp.square(x))
    u = 1.0 + (0.3275911 * 0.5**0.5) * jnp.minimum(size, 100.0)  # the power is 0 long before 100

    polynomial = 0.0
    for factor in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429):
        polynomial = polynomial * u + 0.5 * factor
    ratio = polynomial / (u * jnp.square(jnp.square(u)))

    slope_of_minus_size = power * (ratio - size * (2.0 * jnp.pi) ** -0.5)
    value = jnp.maximum(x, 0.0) - size * ratio * power
    return value, jnp.where(x < 0, slope_of_minus_size, 1.0 - slope_of_minus_size)


def _gelu_tanh(x: Array) -> tuple[Array, Array]:
    """GPT-2's approximation, with Phi(x) = `(1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))) / 2`."""
    root, cubic = (2.0 / jnp.pi) ** 0.5, 0.044715
    tanh = jnp.tanh(root * (x + cubic * x * jnp.square(x)))
    phi = 0.5 + 0.5 * tanh
    inner_slope = root * (1.0 + 3.0 * cubic * jnp.square(x))
    return x * phi, phi + 0.5 * x * (1.0 - jnp.square(tanh)) * inner_slope


def _silu(x: Array) -> tuple[Array, Array]:
    sigmoid = jax.nn.sigmoid(x)
    return x * sigmoid, sigmoid + x * sigmoid * (1.0 - sigmoid)


def _relu_squared(x: Array) -> tuple[Array, Array]:
    positive = jnp.maximum(x, 0.0)
    return jnp.square(positive), 2.0 * positive


VALUE_AND_SLOPE: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "swiglu": _silu,
    "geglu": _gelu_tanh,
    "gelu": _gelu_tanh,
    "gelu_erf": _gelu_exact,
    "relu2": _relu_squared,
}


def _activation_value(name: str, x: Array) -> Array:
    return VALUE_AND_SLOPE[name](x.astype(jnp.float32))[0].astype(x.dtype)


def _activation_backward(name: str, x: Array, d_out: Array) -> tuple[Array]:
    _, slope = VALUE_AND_SLOPE[name](recompute_after(x, d_out).astype(jnp.float32))
    return ((slope * d_out).astype(x.dtype),)


_activation = with_backward(
    _activation_value, lambda name, x: (_activation_value(name, x), x), _activation_backward, static=(0,)
)


# Attention, as in FlashAttention (Dao et al. 2022) but in plain operations: tile by tile, without the masked half. For
# each query one number is kept, from which the backward pass recomputes the probabilities.
#
# Scores are stored keys by queries, [N, S, R, T]: a maximum or a sum over keys then works row by row, where XLA:CPU
# would go number by number along a row. No product transposes an operand, because XLA:CPU then uses a matmul of half
# the speed: each operand exists as rows and as columns, both made from the original, since XLA would merge a
# transposition into the product.


QUERY_BLOCK = 128
"""Queries of a block. Keys after the last query of a block are left out."""

TILE_SCORES = 2**18
"""Scores of a tile: 1 MiB of float32, to fit in the caches of the cores."""


def attention(
    query_BLHK: Array, key_BLGK: Array, value_BLGK: Array, segments_BL: Array, spec: AttentionSpec
) -> Float[Array, "B L H K"]:
    """Causal attention within segments (an `Attend`), tile by tile."""
    return _attention(query_BLHK, key_BLGK, value_BLGK, segments_BL, spec)


def _attention_output(query: Array, key: Array, value: Array, segments: Array, spec: AttentionSpec) -> Array:
    return _attention_forward(query, key, value, segments, spec)[0]


def _attention_forward(
    query: Array, key: Array, value: Array, segments: Array, spec: AttentionSpec
) -> tuple[Array, tuple[Array, ...]]:
    inputs = _tile_inputs(query, key, value, segments)
    out_NKRL, lse = _map_tiles(functools.partial(_tile_forward, spec=spec), inputs)
    out = _from_rows(out_NKRL.transpose(0, 2, 3, 1), query)
    return out, (query, key, value, segments, out, lse)


def _attention_backward(
    spec: AttentionSpec, residuals: tuple[Array, ...], d_out: Array
) -> tuple[Array, Array, Array, None]:
    query, key, value, segments, out, lse = residuals
    groups = key.shape[2]
    inputs = _tile_inputs(query, key, value, segments)
    outputs = (_rows_and_columns(out, groups), _rows_and_columns(d_out, groups), lse)
    d_query, d_key, d_value = (
        _from_rows(d_NRLK, out) for d_NRLK in _map_tiles(functools.partial(_tile_backward, spec=spec), inputs, *outputs)
    )
    return d_query, d_key, d_value, None


_attention = with_backward(_attention_output, _attention_forward, _attention_backward, static=(4,))


class _RowsAndColumns(NamedTuple):
    """An array and its transpose."""

    rows: Float[Array, "N R L K"]
    columns: Float[Array, "N K R L"]


class _TileInputs(NamedTuple):
    """Segments appear twice, for queries and for keys: XLA:CPU does not vectorise a fusion that reads one slice of a
    loop both along rows and along columns (exp took seven times as long)."""

    query: _RowsAndColumns
    key: _RowsAndColumns
    value: _RowsAndColumns
    segments_NL: Array
    key_segments_NS: Array


def _tile_inputs(query: Array, key: Array, value: Array, segments: Array) -> _TileInputs:
    both = functools.partial(_rows_and_columns, groups=key.shape[2])
    segments_NL = jnp.repeat(segments, key.shape[2], axis=0)
    return _TileInputs(both(query), both(key), both(value), segments_NL, segments_NL)


def _rows_and_columns(x_BLHK: Array, groups: int) -> _RowsAndColumns:
    rows = jax.lax.collapse(split_heads(x_BLHK, groups), 0, 2)
    return _RowsAndColumns(rows, rows.transpose(0, 3, 1, 2))


def _from_rows(x_NRLK: Array, like: Array) -> Float[Array, "B L H K"]:
    return merge_heads(x_NRLK.reshape(like.shape[0], -1, *x_NRLK.shape[1:])).astype(like.dtype)


def _map_tiles(function: Callable[..., Any], inputs: _TileInputs, *more: Any) -> Any:
    """Map `function(inputs, *more)` in float32 over slices of N, each with at most `TILE_SCORES` scores."""
    total, shared, length, _ = inputs.query.rows.shape
    limit = max(TILE_SCORES // (shared * min(QUERY_BLOCK, length) * length), 1)
    slice_size = next(n for n in range(min(limit, total), 0, -1) if total % n == 0)

    def in_float32(arrays: tuple[Any, ...]) -> Any:
        return function(*jax.tree.map(lambda x: x.astype(jnp.float32), arrays))

    if slice_size == total:
        return in_float32((inputs, *more))
    slices = jax.tree.map(lambda x: x.reshape(total // slice_size, slice_size, *x.shape[1:]), (inputs, *more))
    return jax.tree.map(lambda x: jax.lax.collapse(x, 0, 2), jax.lax.map(in_float32, slices))


def _blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block and the keys that any of them may see."""
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        yield slice(start, stop), slice(max(start - window + 1, 0) if window else 0, stop)


def _scores(
    inputs: _TileInputs, queries: slice, keys: slice, spec: AttentionSpec
) -> tuple[Float[Array, "N S R T"], Array | None]:
    """Return masked scores and the derivative of their soft cap."""
    raw = jnp.einsum("NSK,NKRT->NSRT", inputs.key.rows[:, 0, keys], inputs.query.columns[..., queries])
    capped, slope = soft_cap(raw * inputs.key.rows.shape[3] ** -0.5, spec.softcap)

    distance_ST = jnp.arange(queries.start, queries.stop)[None, :] - jnp.arange(keys.start, keys.stop)[:, None]
    near_ST = within_window(distance_ST, spec.window)
    same_NST = inputs.key_segments_NS[:, keys, None] == inputs.segments_NL[:, None, queries]
    return jnp.where((same_NST & near_ST[None])[:, :, None], capped, HIDDEN), slope


def _tile_forward(inputs: _TileInputs, *, spec: AttentionSpec) -> tuple[Float[Array, "N K R L"], Array]:
    """Return outputs and, for each query, the log of the sum of the exponentials of its scores [N, 1, R, L]."""
    outs, lses = [], []
    for queries, keys in _blocks(inputs.query.rows.shape[2], spec.window):
        scores, _ = _scores(inputs, queries, keys, spec)
        largest = jnp.max(scores, axis=1, keepdims=True)
        powers = jnp.exp(scores - largest)
        total = jnp.sum(powers, axis=1, keepdims=True)
        outs.append(jnp.einsum("NKS,NSRT->NKRT", inputs.value.columns[:, :, 0, keys], powers) / total)
        lses.append(largest + jnp.log(total))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _tile_backward(
    inputs: _TileInputs, out: _RowsAndColumns, d_out: _RowsAndColumns, lse: Array, *, spec: AttentionSpec
) -> tuple[Array, ...]:
    """Return the gradients of queries, keys and values, each [N, _, L, K]."""
    query, key, value = inputs.query, inputs.key, inputs.value
    scale = key.rows.shape[3] ** -0.5
    out_dot_d_out = jnp.sum(out.columns * d_out.columns, axis=1, keepdims=True)

    d_queries = []
    d_key, d_value = (jnp.zeros_like(x.rows[:, 0]) for x in (key, value))
    for queries, keys in _blocks(lse.shape[3], spec.window):
        scores, slope = _scores(inputs, queries, keys, spec)
        probabilities = jnp.exp(scores - lse[..., queries])
        d_probabilities = jnp.einsum("NSK,NKRT->NSRT", value.rows[:, 0, keys], d_out.columns[..., queries])
        scale_and_slope = scale if slope is None else scale * slope
        d_scores = probabilities * (d_probabilities - out_dot_d_out[..., queries]) * scale_and_slope

        d_queries.append(jnp.einsum("NKS,NSRT->NKRT", key.columns[:, :, 0, keys], d_scores))
        d_key = d_key.at[:, keys].add(jnp.einsum("NSRT,NRTK->NSK", d_scores, query.rows[:, :, queries]))
        d_value = d_value.at[:, keys].add(jnp.einsum("NSRT,NRTK->NSK", probabilities, d_out.rows[:, :, queries]))
    return jnp.concatenate(d_queries, axis=3).transpose(0, 2, 3, 1), d_key[:, None], d_value[:, None]


# Loss head.


def head_gradient(d_logits_BTV: Array, hidden_BTD: Array) -> Float[Array, "V D"]:
    """Gradient of the head, summed over tokens in float32.

    Neither operand is copied, and the narrower one comes first: the other order takes 1.4 times as long. The barrier
    keeps XLA from swapping them back.
    """
    dims = (((0, 1), (0, 1)), ((), ()))
    narrow, wide = sorted((d_logits_BTV, hidden_BTD), key=lambda x: x.shape[-1])
    product = jax.lax.dot_general(narrow, wide, dims, preferred_element_type=jnp.float32)
    if len(product) == d_logits_BTV.shape[-1]:
        return product
    return jax.lax.optimization_barrier(product).T


# Flat logits, [B * T, V], because XLA:CPU then reuses their buffer for the exponentials.
loss_head = make_loss_head(Form(head_gradient=head_gradient, flatten=True))


# Decoding.
#
# A product with few rows is limited by memory bandwidth. With a kernel stored as [I, O] it takes up to 1.4 times (one
# row) or 1.7 times (16 rows) as long as with [O, I].

_TWO_INPUT_DIMS = ("out",)
"""Projections whose input has two dims, heads and head_dim."""


def prepare_decode(params: Params, dtype: Any) -> Params:
    """Transpose the kernels of a layer. A kernel with an adapter next to it stays as it is."""
    return _transpose_kernels(params, "", dtype)


def _transpose_kernels(part: Any, name: str, dtype: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part.keys() - {"bias"} != {"kernel"}:
        return {inner: _transpose_kernels(leaf, inner, dtype) for inner, leaf in part.items()}

    kernel: Array = part["kernel"]
    inputs = kernel.shape[0] * (kernel.shape[1] if name in _TWO_INPUT_DIMS else 1)
    kernel_OI = kernel.reshape(inputs, -1).T.astype(dtype)
    return {TRANSPOSED: kernel_OI} | {key: leaf for key, leaf in part.items() if key != "kernel"}


OPS = REFERENCE._replace(
    linear=linear,
    norm=norm,
    activation=activation,
    attention=attention,
    loss_head=loss_head,
    prepare_decode=prepare_decode,
)


# The optimizer and the step.


def sum_by_rows(x: Array) -> Float[Array, ""]:
    """Sum of all numbers. Groups of up to 32 rows are added first: XLA:CPU sums to a scalar in a scalar loop."""
    group = max(k for k in range(1, 33) if x.shape[0] % k == 0)
    return jnp.sum(jax.lax.optimization_barrier(x.reshape(-1, group, *x.shape[1:]).sum(axis=1)))


LARGE_TEMP_BYTES = 2**28
"""Steps that need more temporary memory than this run one at a time. The 2 ms wait is negligible beside them."""


def run_synchronously(jitted: Callable[..., Any], compiled: Any) -> Callable[..., Any]:
    """Return a jitted step that waits for its results, if it needs much temporary memory.

    XLA:CPU allocates the temporary memory of a step when it is dispatched, next to that of the step still running, and
    reports results as ready before it has released the memory.
    """
    if compiled.memory_analysis().temp_size_in_bytes <= LARGE_TEMP_BYTES:
        return jitted

    def step(*arguments: Any) -> Any:
        results = jax.block_until_ready(jitted(*arguments))
        time.sleep(0.002)  # seconds until the memory is released; 0.0005 was too short after 1 step in 25
        return results

    return step
