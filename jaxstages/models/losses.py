"""The loss: token-weighted cross-entropy as sums, which are divided once, at the end.

Legend: B batch, L length, D width, V vocab, T positions of a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxstages.types import SINGLE_DEVICE, HiddenAndHead, ShardingHooks, Sums


def cross_entropy_sums(
    outputs: Float[Array, "B L V"] | HiddenAndHead,
    targets_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    tile: int = 0,
    place: ShardingHooks = SINGLE_DEVICE,
) -> Sums:
    """Weighted sums over tokens of the negative log-likelihood and of what is minimised.

    Args:
        outputs: logits of any float dtype; the softmax is in float32. Or `HiddenAndHead`, what they are made from: then they
            are formed here, and their gradient at the same time, in three matmuls.
        targets_BL: token ids in [0, V).
        weights_BL: how much each target counts; 0 leaves it out, also where its logits are not finite.
        label_smoothing: share of the target's probability that is spread evenly over V (Szegedy et al. 2016).
        z_loss: factor of `log(sum(exp(logits)))**2`, which keeps logits from drifting (PaLM, Chowdhery et al. 2022).
        tile: of `HiddenAndHead`, logits of so many positions of each row exist at once, or of a few less, so that the tiles
            are equal; 0 is all of them. Saves memory, and costs some time.
        place: which device holds what.

    Returns:
        "nll" in nats; "objective", which is nll unless smoothing or z-loss are on, and the only one that gradients are
        taken of; "correct", where the target has the largest logit; "weight", the sum of weights that all of them are
        to be divided by.
    """
    if isinstance(outputs, HiddenAndHead):
        at_once = _tile_size(targets_BL.shape[1], tile)
        sums: Any = _headless_sums(outputs, targets_BL, weights_BL, label_smoothing, z_loss, at_once, place)
    else:
        sums, *_ = _sums_of_logits(outputs, targets_BL, weights_BL, label_smoothing, z_loss)
    aside = {name: jax.lax.stop_gradient(value) for name, value in sums.items() if name != "objective"}
    return aside | {"objective": sums["objective"]}


def _tile_size(length: int, tile: int) -> int:
    """Positions of a tile: the largest divisor of the length that is at most `tile`; 0 is the whole length."""
    return max(n for n in range(1, min(tile or length, length) + 1) if length % n == 0)


def _tiles(x: Array, size: int) -> Array:
    """[B, L, ...] -> [tiles, B, T, ...]."""
    return x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:]).swapaxes(0, 1)


def kl_sum(
    reference: Float[Array, "B L V"] | HiddenAndHead,
    outputs: Float[Array, "B L V"] | HiddenAndHead,
    weights_BL: Float[Array, "B L"],
    *,
    tile: int = 0,
) -> Float[Array, ""]:
    """Weighted sum over tokens of KL(reference || outputs), in nats, between the distributions of the next token.

    Args:
        reference: logits, or what they are made from, of the model that is to be kept to; no gradient goes there.
        outputs: the same of the model that is trained.
        tile: positions of each row whose logits exist at once; 0 is all. They are computed again for the gradient.
    """
    split = functools.partial(_tiles, size=_tile_size(weights_BL.shape[1], tile))

    def states(side: Array | HiddenAndHead) -> Array:
        return split(side.hidden_BLD if isinstance(side, HiddenAndHead) else side)

    def logits(side: Array | HiddenAndHead, part: Array) -> Array:
        made = side._replace(hidden_BLD=part).logits() if isinstance(side, HiddenAndHead) else part
        return made.astype(jnp.float32)

    @jax.checkpoint
    def tile_sum(parts: tuple[Array, Array, Array]) -> Array:
        kept = jax.lax.stop_gradient(jax.nn.log_softmax(logits(reference, parts[0])))
        ours = jax.nn.log_softmax(logits(outputs, parts[1]))
        kl_BT = jnp.sum(jnp.exp(kept) * (kept - ours), axis=-1)
        return jnp.sum(jnp.where(parts[2] > 0, kl_BT * parts[2], 0.0))

    return jnp.sum(jax.lax.map(tile_sum, (states(reference), states(outputs), split(weights_BL))))


def _sums_of_logits(
    logits_BLV: Array, targets_BL: Array, weights_BL: Array, label_smoothing: float, z_loss: float
) -> tuple[Sums, Array, Array]:
    """The sums, the log of the sum of the exponentials of each token's logits, and their shares of that sum."""
    logits_BLV = logits_BLV.astype(jnp.float32)
    most_BL = jax.lax.stop_gradient(jnp.max(logits_BLV, axis=-1))
    powers_BLV = jnp.exp(logits_BLV - most_BL[..., None])
    total_BL = jnp.sum(powers_BLV, axis=-1)
    lse_BL = most_BL + jnp.log(total_BL)
    target_logits_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    nll_BL = lse_BL - target_logits_BL
    objective_BL = nll_BL
    if label_smoothing:
        uniform_nll_BL = lse_BL - jnp.mean(logits_BLV, axis=-1)
        objective_BL = (1.0 - label_smoothing) * nll_BL + label_smoothing * uniform_nll_BL
    if z_loss:
        objective_BL = objective_BL + z_loss * jnp.square(lse_BL)
    correct_BL = (target_logits_BL >= most_BL).astype(jnp.float32)

    def total(values_BL: Array) -> Array:
        # Selection, not only multiplication: 0 * inf would be NaN.
        return jnp.sum(jnp.where(weights_BL > 0, values_BL * weights_BL, 0.0))

    sums = {"nll": total(nll_BL), "objective": total(objective_BL), "correct": total(correct_BL)}
    return sums | {"weight": jnp.sum(weights_BL)}, lse_BL, powers_BLV / total_BL[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _headless_sums(
    outputs: HiddenAndHead,
    targets: Array,
    weights: Array,
    smoothing: float,
    z_loss: float,
    tile: int,
    place: ShardingHooks,
) -> Sums:
    return _tile_by_tile(outputs, targets, weights, smoothing, z_loss, tile, place, False)[0]


def _headless_forward(
    outputs: HiddenAndHead,
    targets: Array,
    weights: Array,
    smoothing: float,
    z_loss: float,
    tile: int,
    place: ShardingHooks,
) -> tuple[Sums, Any]:
    sums, gradients = _tile_by_tile(outputs, targets, weights, smoothing, z_loss, tile, place, True)
    return sums, (gradients, outputs.softcap)


def _headless_backward(
    smoothing: float, z_loss: float, tile: int, place: ShardingHooks, saved: Any, d_sums: Sums
) -> Any:
    gradients, softcap = saved
    d_hidden, d_head = ((d.astype(jnp.float32) * d_sums["objective"]).astype(d.dtype) for d in gradients)
    return HiddenAndHead(d_hidden, d_head, None if softcap is None else jnp.zeros_like(softcap)), None, None


_headless_sums.defvjp(_headless_forward, _headless_backward)


def _tile_by_tile(
    outputs: HiddenAndHead,
    targets_BL: Array,
    weights_BL: Array,
    smoothing: float,
    z_loss: float,
    tile: int,
    place: ShardingHooks,
    differentiate: bool,
) -> tuple[Sums, tuple[Array, Array] | None]:
    """The sums and, made in the same pass, the objective's gradients by hidden and head (as in Liger's fused linear
    cross-entropy, Hsu et al. 2024, but with the tiles along the row, so that each device keeps its own rows). Devices
    add up what their own rows give to the head, and are asked for it once, after the last tile."""
    hidden_BLD, head_VD, softcap = outputs
    dtype, vocab = hidden_BLD.dtype, head_VD.shape[0]

    def one(part: tuple[Array, Array, Array]) -> tuple[tuple[Sums, Any], Any]:
        hidden_BTD, targets, weights = part
        logits = HiddenAndHead(hidden_BTD, head_VD, softcap).logits()
        if place == SINGLE_DEVICE:  # in two dims, as products have it, what is made of logits on CPU takes their place
            logits, targets, weights = (jax.lax.collapse(x, 0, 2) for x in (logits, targets, weights))
        sums, lse, shares = _sums_of_logits(logits, targets, weights, smoothing, z_loss)
        if not differentiate:
            return (sums, None), None
        # Of z * lse**2 the gradient is 2 * z * lse times the shares, which is how the lse's own gradient comes in.
        slope = 1.0 + 2.0 * z_loss * lse if z_loss else jnp.ones_like(lse)
        wanted = (1.0 - smoothing) * jax.nn.one_hot(targets, vocab) + smoothing / vocab
        d_logits = (shares * slope[..., None] - wanted) * weights[..., None]
        if softcap is not None:
            d_logits = d_logits * (1.0 - jnp.square(logits / softcap))
        # Operands of the model's dtype: float32 ones would take the matmuls off the fast path of accelerators.
        d_logits_BTV = jnp.where(weights[..., None] > 0, d_logits, 0.0).astype(dtype).reshape(*hidden_BTD.shape[:2], -1)
        d_hidden_BTD = jnp.einsum("BTV,VD->BTD", d_logits_BTV, head_VD.astype(dtype))
        return (sums, _head_gradient(d_logits_BTV, hidden_BTD, parts, place)), d_hidden_BTD

    parts = place.parts("rows") if tile < targets_BL.shape[1] else 1
    length = targets_BL.shape[1]
    if tile == length:
        (sums, d_head), d_hidden = one((hidden_BLD, targets_BL, weights_BL))
        return sums, None if d_head is None else (d_hidden, d_head.astype(head_VD.dtype))

    split = functools.partial(_tiles, size=tile)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        found, d_hidden = one(part)
        return jax.tree.map(jnp.add, total, found), d_hidden

    zero = dict.fromkeys(("nll", "objective", "correct", "weight"), jnp.zeros(()))
    start = (zero, jnp.zeros((parts,) * (parts > 1) + head_VD.shape, jnp.float32) if differentiate else None)
    (sums, d_head), d_hiddens = jax.lax.scan(add, start, tuple(map(split, (hidden_BLD, targets_BL, weights_BL))))
    if d_head is None:
        return sums, None
    d_head_VD = (jnp.sum(d_head, axis=0) if parts > 1 else d_head).astype(head_VD.dtype)
    return sums, (d_hiddens.swapaxes(0, 1).reshape(hidden_BLD.shape), d_head_VD)


def _head_gradient(d_logits_BTV: Array, hidden_BTD: Array, parts: int, place: ShardingHooks) -> Float[Array, "*P V D"]:
    """Summed in float32, over tokens; of each part of the rows by itself where there are several. Both operands lie as
    they are, neither is copied, and the narrower is first: the other way round takes 1.4 times as long on CPU. The
    barrier keeps XLA from turning it back."""
    if parts > 1:
        apart = (x.reshape(parts, -1, *x.shape[1:]) for x in (d_logits_BTV, hidden_BTD))
        found = jnp.einsum("PBTV,PBTD->PVD", *apart, preferred_element_type=jnp.float32)
        return place.activation(found, ("rows", "vocab", ""))
    narrow, wide = sorted((d_logits_BTV, hidden_BTD), key=lambda x: x.shape[-1])
    found = jax.lax.dot_general(narrow, wide, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
    return found if len(found) == d_logits_BTV.shape[-1] else jax.lax.optimization_barrier(found).T
