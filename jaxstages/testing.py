"""Property checks for anyone's model, loss, step or task.

Each check is one call, takes seconds on CPU, and raises AssertionError with a plain message. `check_model` and
`check_task` run all that apply; `jaxstages check --config=mine.py` does so for a recipe.

    import jaxstages.testing as testing

    def test_my_model():
        testing.check_model(MyModel().make(vocab_size=64), vocab_size=64)
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxstages.types import Batch, HiddenAndHead, LossFn, Model, Params, Sums

TOLERANCE = 1e-3
"""Largest difference of two logits, or relative difference of two sums, that rounding explains in float32."""


def documents(
    vocab_size: int, lengths: Sequence[int] = (5, 7), padding: int = 4, rows: int = 4, seed: int = 0
) -> Batch:
    """Return packed rows of random documents, for checks of a model or a loss.

    | tokens    | a a a a a b b b b b b b 0 0 0 0 |
    | segments  | 1 1 1 1 1 2 2 2 2 2 2 2 0 0 0 0 |
    | positions | 0 1 2 3 4 0 1 2 3 4 5 6 0 0 0 0 |

    Rows have different total weights, so that a mean of means differs from the mean.

    Args:
        lengths: tokens of each document in a row.
        padding: empty slots after them.
    """
    draw = np.random.default_rng(seed)
    segments = np.concatenate([np.full(length, i) for i, length in enumerate(lengths, start=1)] + [np.zeros(padding)])
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(padding)])
    shape, real = (rows, len(segments)), segments > 0
    weights = real & (draw.random(shape) < np.linspace(0.3, 1.0, rows)[:, None])
    weights[:, 0] = True  # no row without a scored token
    return Batch(
        tokens_BL=jnp.asarray(np.where(real, draw.integers(0, vocab_size, shape), 0), jnp.int32),
        targets_BL=jnp.asarray(np.where(real, draw.integers(0, vocab_size, shape), 0), jnp.int32),
        weights_BL=jnp.asarray(weights, jnp.float32),
        segments_BL=jnp.asarray(np.broadcast_to(segments, shape), jnp.int32),
        positions_BL=jnp.asarray(np.broadcast_to(positions, shape), jnp.int32),
    )


def check_model(model: Model, vocab_size: int, length: int = 16) -> None:
    """Run every check that applies to a model: a decoder, and several devices, are optional.

    Args:
        vocab_size: rows of its output.
        length: tokens of a row, at most the model's context and at least 8.
    """
    params = jax.jit(model.init)(jax.random.key(0))
    first = length // 3
    batch = documents(vocab_size, (first, length - first - 2), padding=2)
    check_logits(model, params, batch, vocab_size)
    check_causal(model, params, batch, vocab_size)
    check_no_leak(model, params, batch, vocab_size)
    check_packed_equals_unpacked(model, params, batch)
    check_finite_gradients(lambda p, b, key: _cross_entropy(model, p, b, key), params, batch)
    if model.decoder is not None:
        check_decoding(model, params, vocab_size, length)
    if len(jax.devices()) > 1:
        check_sharded(model, params, documents(vocab_size, (first,), rows=len(jax.devices())))


def check_logits(model: Model, params: Params, batch: Batch, vocab_size: int) -> None:
    """Check that logits are [B, L, V] in a float dtype."""
    logits_BLV = jax.eval_shape(model.apply, params, batch, None)
    shape = (*batch.tokens_BL.shape, vocab_size)
    assert logits_BLV.shape[:2] == shape[:2] and logits_BLV.shape[2] >= vocab_size, (
        f"logits have the shape {logits_BLV.shape}; [B, L, V] is {shape}"
    )
    assert jnp.issubdtype(logits_BLV.dtype, jnp.floating), f"logits are {logits_BLV.dtype}; they must be float"


def check_causal(model: Model, params: Params, batch: Batch, vocab_size: int) -> None:
    """Check that no logits depend on a later token: each token in turn is replaced."""
    logits_BLV, apply = _logits(model, params, batch)
    for position in range(1, batch.tokens_BL.shape[1]):
        change_BLV = _difference(
            apply(params, _replace(batch, slice(position, position + 1), vocab_size), None), logits_BLV
        )
        seen = np.flatnonzero(np.max(change_BLV, axis=(0, 2))[:position] > TOLERANCE)
        assert not len(seen), (
            f"the model sees the future: the logits at slot {seen[0]} change with the token at {position}"
        )


def check_no_leak(model: Model, params: Params, batch: Batch, vocab_size: int) -> None:
    """Check that no logits depend on another document of the row."""
    logits_BLV, apply = _logits(model, params, batch)
    segments_L = np.asarray(batch.segments_BL[0])
    for segment in np.unique(segments_L[segments_L > 0]):
        slots = np.flatnonzero(segments_L == segment)
        changed = _replace(batch, slice(slots[0], slots[-1] + 1), vocab_size)
        change_L = np.max(_difference(apply(params, changed, None), logits_BLV), axis=(0, 2))
        leaks = np.flatnonzero((change_L > TOLERANCE) & (segments_L != segment) & (segments_L > 0))
        assert not len(leaks), (
            f"documents leak into each other: the logits at slot {leaks[0]}, of document {segments_L[leaks[0]]}, "
            f"change with the tokens of document {segment}; mask attention by batch.segments_BL"
        )


def check_packed_equals_unpacked(model: Model, params: Params, batch: Batch) -> None:
    """Check that a document has the same logits in a packed row as alone."""
    logits_BLV, apply = _logits(model, params, batch)
    segments_L = np.asarray(batch.segments_BL[0])
    for segment in np.unique(segments_L[segments_L > 0]):
        slots = np.flatnonzero(segments_L == segment)
        alone = jax.tree.map(lambda x, slots=slots: jnp.zeros_like(x).at[:, : len(slots)].set(x[:, slots]), batch)
        alone = alone._replace(segments_BL=jnp.minimum(alone.segments_BL, 1))
        change = np.max(_difference(apply(params, alone, None)[:, : len(slots)], logits_BLV[:, slots]))
        assert change <= TOLERANCE, (
            f"document {segment} has other logits in a packed row than alone, by {change:.2g}; use batch.positions_BL, "
            "which restart at 0 in each document"
        )


def check_finite_gradients(loss: LossFn, params: Params, batch: Batch) -> None:
    """Check that every gradient is finite, and that no parameter of the model is without one."""
    gradients = jax.jit(jax.grad(lambda p: loss(p, batch, None)["objective"]))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert bool(jnp.all(jnp.isfinite(gradient))), f"the gradient of {name} is not finite"
        assert bool(jnp.any(gradient != 0)), f"the gradient of {name} is 0 everywhere: the loss does not depend on it"


def check_loss(loss: LossFn, params: Params, batch: Batch) -> None:
    """Check that a loss returns sums: those of a batch are the sums of its parts', and padding adds nothing.

    Means would make the objective depend on how a batch is split over micro-batches, devices and hosts.
    """
    sums = _objective_and_weight(loss, params, batch)
    half = batch.tokens_BL.shape[0] // 2
    halves = [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in (slice(half), slice(half, None))]
    parts = [_objective_and_weight(loss, params, part) for part in halves]
    for index, name in enumerate(("objective", "weight")):
        total = parts[0][index] + parts[1][index]
        assert np.isclose(sums[index], total, rtol=TOLERANCE), (
            f"{name} of a batch is {sums[index]:.6g}, and its halves have {total:.6g} together; return sums over "
            "tokens, not means: the step divides by the weight of the whole batch"
        )
    check_finite_gradients(loss, params, batch)


def check_accumulation(
    make_step: Callable[[int], Callable[[Any, Batch], tuple[Any, Sums]]], state: Any, batch: Batch, parts: int = 2
) -> None:
    """Check that accumulation over micro-batches makes the same update as the whole batch.

    Args:
        make_step: `make_step(accumulate) -> step(state, batch)`.
        state: with `params`.
        batch: of rows with different weights, as `documents` makes them.
    """
    weight_B = jnp.sum(batch.weights_BL, axis=1)
    assert float(jnp.max(weight_B)) > float(jnp.min(weight_B)), "rows of equal weight would hide a mean of means"
    whole, split = (jax.jit(make_step(accumulate))(state, batch)[0].params for accumulate in (1, parts))
    moved = _largest(jax.tree.map(jnp.subtract, whole, state.params))
    change = _largest(jax.tree.map(jnp.subtract, whole, split))
    assert moved > 0, "the step does not change the parameters"
    assert change <= 1e-2 * moved, (
        f"with accumulate={parts} parameters move elsewhere, by {change:.2g} of {moved:.2g}; add up sums over the "
        "parts, and divide once by the weight of the whole batch"
    )


def check_decoding(model: Model, params: Params, vocab_size: int, length: int = 16) -> None:
    """Check that decoding with the cache gives the logits of the full forward pass: a prompt at once, then single
    tokens."""
    decoder, prompt = model.required_decoder, length // 2
    row = documents(vocab_size, (length,), padding=0, rows=2)
    logits_BLV, _ = _logits(model, params, row)
    prepared, step = decoder.prepare(params), jax.jit(decoder.step)
    cache = decoder.init_cache(2, length)
    pieces = [slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, length))]
    for piece in pieces:
        output, cache = step(prepared, row.tokens_BL[:, piece], row.positions_BL[:, piece], cache)
        output_BLV = output.logits() if isinstance(output, HiddenAndHead) else output
        change = np.max(_difference(output_BLV, logits_BLV[:, piece]))
        assert change <= 10 * TOLERANCE, (
            f"decoding differs from the full forward pass by {change:.2g} at position {piece.start}; keys and values "
            "belong to the slot of their position, and a query attends to slots up to its own"
        )


def check_compiles_once(step: Callable[..., Any], calls: Iterable[Sequence[Any]]) -> None:
    """Check that one compilation serves all calls.

    Args:
        step: not jitted; nothing is donated.
        calls: the arguments of each call.
    """
    shapes: list[Any] = []  # of each trace

    @jax.jit
    def traced(*arguments: Any) -> Any:
        shapes.append(sorted({str(leaf.shape) for leaf in jax.tree.leaves(arguments)}))
        return step(*arguments)

    for arguments in calls:
        traced(*arguments)
    assert len(shapes) == 1, f"{len(shapes)} compilations; shapes and dtypes must not change between calls: {shapes}"


def check_sharded(model: Model, params: Params, batch: Batch) -> None:
    """Check that logits do not depend on how rows are split over devices."""
    logits_BLV, apply = _logits(model, params, batch)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    sharded_BLV = apply(jax.device_put(params, whole), jax.device_put(batch, rows), None)
    change = np.max(_difference(sharded_BLV, logits_BLV))
    assert change <= TOLERANCE, f"logits over {mesh.size} devices differ from those on a single one by {change:.2g}"


def check_task(encode: Callable[[Any], Any], records: Iterable[Any], context: int) -> None:
    """Check what a data task makes of records: shapes, lengths, and a loss mask that excludes the prompt.

    Args:
        encode: `encode(record) -> Encoded`, see `jaxstages.data.tasks`.
        context: of the model; examples have at most context + 1 ids.
    """
    trained = 0.0
    for number, record in enumerate(records):
        encoded = encode(record)
        for example in encoded.examples:
            ids, weights = np.asarray(example.ids), np.asarray(example.weights)
            where = f"record {number}"
            assert ids.shape == weights.shape and ids.ndim == 1, f"{where}: ids {ids.shape}, weights {weights.shape}"
            assert len(ids) <= context + 1, f"{where}: {len(ids)} ids; at most context + 1 = {context + 1} fit"
            assert weights[0] == 0, f"{where}: weights[0] is {weights[0]}; nothing predicts the first token"
            assert np.all(weights >= 0), f"{where}: a weight is negative"
            trained += float(np.sum(weights))
        if encoded.question is not None and encoded.examples:
            ids, weights = encoded.examples[0].ids, np.asarray(encoded.examples[0].weights)
            prompt = list(encoded.question.prompt)
            if list(ids[: len(prompt)]) == prompt:
                on_prompt = int(np.sum(weights[: len(prompt)] > 0))
                assert not on_prompt, (
                    f"record {number}: the mask trains on {on_prompt} tokens of the prompt; set their weights to 0"
                )
    assert trained > 0, "no token is trained on: all weights are 0"


def _logits(model: Model, params: Params, batch: Batch) -> tuple[Array, Callable[..., Array]]:
    apply = jax.jit(model.apply, static_argnums=2)
    return apply(params, batch, None), apply


def _difference(a: Array, b: Array) -> np.ndarray:
    return np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32))


def _replace(batch: Batch, slots: slice, vocab_size: int) -> Batch:
    """Replace the tokens of some slots by others."""
    tokens_BL = batch.tokens_BL.at[:, slots].set((batch.tokens_BL[:, slots] + 1) % vocab_size)
    return batch._replace(tokens_BL=tokens_BL)


def _cross_entropy(model: Model, params: Params, batch: Batch, key: Array | None) -> Sums:
    """A loss that depends on all logits of real tokens."""
    logits_BLV = model.apply(params, batch, key).astype(jnp.float32)
    log_probs_BLV = jax.nn.log_softmax(logits_BLV)
    target_BL = jnp.take_along_axis(log_probs_BLV, batch.targets_BL[:, :, None], axis=-1)[:, :, 0]
    real_BL = (batch.segments_BL > 0).astype(jnp.float32)
    return {"objective": -jnp.sum(target_BL * real_BL), "weight": jnp.sum(real_BL)}


def _objective_and_weight(loss: LossFn, params: Params, batch: Batch) -> tuple[float, float]:
    sums = jax.jit(lambda p, b: loss(p, b, None))(params, batch)
    for name in ("objective", "weight"):
        assert name in sums, f"the loss returns {sorted(sums)}; it must have {name!r}"
    return float(sums["objective"]), float(sums["weight"])


def _largest(tree: Any) -> float:
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))
