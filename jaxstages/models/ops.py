"""The operations of the model as a table, and their reference implementation.

The reference reads like a textbook and supports forward- and reverse-mode differentiation. Faster versions for one kind
of hardware are other tables, tested against this one; `select.py` chooses among them.

Legend: B batch, L length, D width, H query heads, G key/value heads, K head dim, F feed-forward, V vocab, I inputs,
O outputs, T positions of a tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxstages.models.attention import Attend, attend_packed
from jaxstages.types import HiddenAndHead, Names, Params, Sums

Linear = Callable[[Array, Array, Names], Array]
"""`linear(x, kernel_IO, names) -> x @ kernel`, where `names` are the logical axes of the kernel."""

LossHead = Callable[[HiddenAndHead, Array, Array, float, float, int], Sums]
"""`loss_head(outputs, targets_BL, weights_BL, label_smoothing, z_loss, tile) -> sums`: cross-entropy of hidden states.
`tile` is the number of positions per row whose logits exist at the same time, 0 for all."""


class Ops(NamedTuple):
    """The operations that a platform may implement differently. All implementations compute the same function.

    linear: see `Linear`.
    norm: `norm(x, scale_D, centred, epsilon)`, layer norm if centred, else RMS norm.
    activation: `activation(name, x)`, a function of `ACTIVATIONS`.
    attention: see `Attend`.
    embed: `embed(table_VD, tokens_BL, dtype) -> [B, L, D]`, see `embed`.
    loss_head: see `LossHead`.
    prepare_decode: `prepare_decode(params, dtype)` converts the parameters of one layer for decoding.
    """

    linear: Linear
    norm: Callable[[Array, Array, bool, float], Array]
    activation: Callable[[str, Array], Array]
    attention: Attend
    embed: Callable[[Array, Array, Any], Array]
    loss_head: LossHead
    prepare_decode: Callable[[Params, Any], Params]


# Linear maps and lookups.


def linear(x: Float[Array, "*B I"], kernel_IO: Float[Array, "I O"], names: Names = ("", "")) -> Float[Array, "*B O"]:
    """`x @ kernel`."""
    del names  # only sharded versions need them
    return x @ kernel_IO


TRANSPOSED = "transposed"
"""Name of a kernel that is stored as [O, I], with two dims and in the dtype of the activations, for decoding."""


def linear_transposed(x: Float[Array, "*B I"], kernel_OI: Float[Array, "O I"]) -> Float[Array, "*B O"]:
    """`x @ kernel.T`."""
    x_MI = jnp.reshape(x, (-1, x.shape[-1]))
    out_MO = jax.lax.dot_general(x_MI, kernel_OI, (((1,), (1,)), ((), ())))
    return out_MO.reshape(*x.shape[:-1], len(kernel_OI))


def embed(table_VD: Float[Array, "V D"], tokens_BL: Int[Array, "B L"], dtype: Any) -> Float[Array, "B L D"]:
    """`table[tokens]` in a dtype. Gradients of a token's occurrences are added up in the dtype of the table: a sum in
    bfloat16 stops growing at 256 equal terms."""
    return table_VD[tokens_BL].astype(dtype)


# Norms.


def norm(x: Float[Array, "*B D"], scale_D: Float[Array, " D"], centred: bool, epsilon: float) -> Float[Array, "*B D"]:
    """Normalise the last dim, in float32 whatever the dtype of x.

    Layer norm (Ba et al. 2016) if centred, `scale * (x - mean) / sqrt(variance + epsilon)`, else RMS norm (Zhang &
    Sennrich 2019), `scale * x / sqrt(mean(x**2) + epsilon)`.
    """
    wide = x.astype(jnp.float32)
    if centred:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)

    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon) * as_last_dim(scale_D, x.ndim)).astype(x.dtype)


def as_last_dim(vector_D: Float[Array, " D"], ndim: int) -> Float[Array, "... D"]:
    """Return the vector with `ndim` dims, of which it is the last. Tests forbid implicit rank promotion."""
    return jnp.expand_dims(vector_D, tuple(range(ndim - 1)))


# Activations.


class Activation(NamedTuple):
    """gated: the function is applied to a gate, which is multiplied with the up projection (Shazeer 2020)."""

    function: Callable[[Array], Array]
    gated: bool = False


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_exact(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _relu_squared(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {
    "swiglu": Activation(jax.nn.silu, gated=True),  # Elfwing et al. 2017
    "geglu": Activation(_gelu_tanh, gated=True),
    "gelu": Activation(_gelu_tanh),  # Hendrycks & Gimpel 2016, as in GPT-2
    "gelu_erf": Activation(_gelu_exact),
    "relu2": Activation(_relu_squared),  # So et al. 2021
}
"""By the recipe's name."""


def activation(name: str, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Apply an elementwise function of `ACTIVATIONS` in float32, whatever the dtype of x."""
    return ACTIVATIONS[name].function(x.astype(jnp.float32)).astype(x.dtype)


# Loss.


def cross_entropy(
    logits_BLV: Float[Array, "*B V"],
    targets_BL: Int[Array, "*B"],
    weights_BL: Float[Array, "*B"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """Weighted sums over tokens of the cross-entropy, with the softmax in float32."""
    logits_BLV = logits_BLV.astype(jnp.float32)
    return weighted_sums(
        logits_BLV, jax.nn.logsumexp(logits_BLV, axis=-1), targets_BL, weights_BL, label_smoothing, z_loss
    )


def weighted_sums(
    logits_BLV: Float[Array, "*B V"],
    lse_BL: Float[Array, "*B"],
    targets_BL: Int[Array, "*B"],
    weights_BL: Float[Array, "*B"],
    label_smoothing: float,
    z_loss: float,
) -> Sums:
    """The sums of `cross_entropy`, given the log of the sum of the exponentials of each token's logits."""
    target_logits_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    nll_BL = lse_BL - target_logits_BL

    objective_BL = nll_BL
    if label_smoothing:
        uniform_nll_BL = lse_BL - jnp.mean(logits_BLV, axis=-1)
        objective_BL = (1.0 - label_smoothing) * nll_BL + label_smoothing * uniform_nll_BL
    if z_loss:
        objective_BL = objective_BL + z_loss * jnp.square(lse_BL)

    correct_BL = (target_logits_BL >= jnp.max(logits_BLV, axis=-1)).astype(jnp.float32)

    def total(values_BL: Array) -> Array:
        # Select as well as multiply: 0 * inf is NaN.
        return jnp.sum(jnp.where(weights_BL > 0, values_BL * weights_BL, 0.0))

    return {
        "nll": total(nll_BL),
        "objective": total(objective_BL),
        "correct": total(correct_BL),
        "weight": jnp.sum(weights_BL),
    }


def tile_size(length: int, tile: int) -> int:
    """Positions per tile: the largest divisor of the length that is at most `tile`; 0 means the whole length."""
    return max(n for n in range(1, min(tile or length, length) + 1) if length % n == 0)


def into_tiles(x: Array, size: int) -> Array:
    """[B, L, ...] -> [tiles, B, T, ...]."""
    return x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:]).swapaxes(0, 1)


def loss_head(
    outputs: HiddenAndHead,
    targets_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    tile: int = 0,
) -> Sums:
    """Cross-entropy of `outputs.logits()`. Logits of a tile are recomputed in the backward pass."""
    size = tile_size(targets_BL.shape[1], tile)
    tiles = [into_tiles(x, size) for x in (outputs.hidden_BLD, targets_BL, weights_BL)]

    @jax.checkpoint
    def tile_sums(rows: list[Array]) -> Sums:
        hidden_BTD, targets_BT, weights_BT = rows
        logits_BTV = outputs._replace(hidden_BLD=hidden_BTD).logits()
        return cross_entropy(logits_BTV, targets_BT, weights_BT, label_smoothing, z_loss)

    return jax.tree.map(jnp.sum, jax.lax.map(tile_sums, tiles))


def prepare_decode(params: Params, dtype: Any) -> Params:
    """Return the parameters unchanged."""
    del dtype
    return params


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Cast the kernels of a layer, as the layer would before each product. A kernel with an adapter next to it, a
    router, biases and the scales of norms stay as they are."""
    if not isinstance(params, dict):
        return params
    cast: set[str] = {"gate", "up", "down"} if "router" in params else set()
    if params.keys() - {"bias"} == {"kernel"}:
        cast = {"kernel"}
    return {name: leaf.astype(dtype) if name in cast else cast_kernels(leaf, dtype) for name, leaf in params.items()}


REFERENCE = Ops(
    linear=linear,
    norm=norm,
    activation=activation,
    attention=attend_packed,
    embed=embed,
    loss_head=loss_head,
    prepare_decode=prepare_decode,
)
