"""Properties of the transformer: who sees whom, by gradient; decoding equals the full pass; every option works."""

import itertools
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstages.config import AttentionConfig, ExpertsConfig, ModelConfig, RopeScalingConfig
from jaxstages.models.layers import scaled
from jaxstages.models.losses import cross_entropy_loss
from jaxstages.models.transformer import make_model
from jaxstages.types import Batch, Model, Params
from tests.tiny import VOCAB, example, mixed_batch, model_config, packed_batch

VARIANTS = {
    "default": {},
    "learned positions, layer norm, biases": {
        "attention": AttentionConfig(heads=4, kv_heads=4, head_dim=8, position="learned"),
        "norm": "layernorm",
        "bias": True,
        "activation": "gelu",
    },
    "query norm, yarn of some dims, untied, relu2, multipliers": {
        "attention": AttentionConfig(
            **{"heads": 4, "kv_heads": 1, "head_dim": 8, "qk_norm": True, "rope_dims": 6, "out_bias": True},
            rope_scaling=RopeScalingConfig(kind="yarn", factor=4.0, trained_context=16),
        ),
        "tied_head": False,
        "activation": "relu2",
        "ff_bias": True,
        **{"embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 0.25},
    },
    "unrolled geglu": {"activation": "geglu", "unroll": True},
    "local and global layers, soft caps, two norms": {
        "layers": 3,
        "attention": AttentionConfig(
            **{"heads": 4, "kv_heads": 2, "head_dim": 8, "pattern": ("local", "global"), "window": 20},
            **{"local_rope_theta": 100.0, "scale": 0.3, "softcap": 5.0},
        ),
        "norm": "rmsnorm_plus_one",
        "norm_place": "both",
        "scaled_embedding": True,
        "logit_softcap": 8.0,
    },
    "norms after, query norm over all heads, a layer without rope": {
        "attention": AttentionConfig(
            **{"heads": 4, "kv_heads": 2, "head_dim": 8, "pattern": ("global", "nope")},
            **{"qk_norm": True, "qk_norm_over": "heads", "qkv_bias": True, "scale": 0.02},
            rope_scaling=RopeScalingConfig(kind="llama3", factor=4.0, trained_context=8),
        ),
        "norm_place": "after",
    },
    "experts": {"experts": ExpertsConfig(count=4, per_token=2)},
}


def make(**changes: object) -> tuple[Model, Params]:
    model = make_model(model_config(**changes), VOCAB)
    params = jax.jit(model.init)(jax.random.key(0))
    # Initial weights are small: scaled up, so that an effect that should be there can be seen.
    return model, jax.tree.map(lambda x: x * 8.0, params)


def influence(model: Model, params: Params, batch: Batch) -> np.ndarray:
    """[L, L]: does the logit at a query (row) depend on the token at a key (column)? By gradient of the embeddings."""
    length = batch.tokens_BL.shape[1]
    # One token id a place, so that the gradient of a row of the embedding is that of a place.
    tokens = jnp.arange(length)[None, :]
    batch = Batch(tokens, *map(jnp.asarray, batch[1:]))

    def logits(embedding: jax.Array) -> jax.Array:
        # Untied head: the embedding has no way to the logits but through its place.
        return jnp.sum(model.apply(params | {"embedding": embedding}, batch, None)[0] ** 2, axis=-1)

    jacobian = jax.jit(jax.jacrev(logits))(params["embedding"])
    return np.abs(np.asarray(jacobian)).sum(-1)[:, :length] > 0


def test_causality_and_no_leak_between_documents_by_gradient() -> None:
    model, params = make(tied_head=False)
    batch = packed_batch([[example(6, 0), example(8, 1)]])
    segments = batch.segments_BL[0]
    seen = influence(model, params, batch)
    places = np.arange(len(segments))
    expected = (places[:, None] >= places[None, :]) & (segments[:, None] == segments[None, :])
    np.testing.assert_array_equal(seen, expected)


def test_packed_and_unpacked_rows_have_the_same_loss_and_gradient() -> None:
    import optax

    from jaxstages.training.step import init_state, make_train_step

    model = make_model(model_config(), VOCAB)
    params = jax.jit(model.init)(jax.random.key(0))
    documents = [example(5, 0), example(7, 1, 3), example(6, 2), example(9, 3, 2)]
    packed = packed_batch([documents[:2], documents[2:]])
    alone = packed_batch([[document] for document in documents])
    tx = optax.with_extra_args_support(optax.sgd(1.0))
    step = jax.jit(make_train_step(cross_entropy_loss(model.apply), tx))
    after_packed, sums_packed = step(init_state(params, tx), packed)
    after_alone, sums_alone = step(init_state(params, tx), alone)
    np.testing.assert_allclose(sums_packed["nll"], sums_alone["nll"], rtol=1e-5)
    assert float(sums_packed["weight"]) == float(sums_alone["weight"])
    for left, right in zip(jax.tree.leaves(after_packed.params), jax.tree.leaves(after_alone.params), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_with_a_cache_equals_the_full_pass(name: str) -> None:
    """Prompts of different lengths, prefilled together, then token by token."""
    model, params = make(**VARIANTS[name])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 10)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(10)[None, :], (2, 10))
    ones = jnp.ones((2, 10), jnp.int32)
    full = model.apply(params, Batch(tokens, tokens, ones.astype(jnp.float32), ones, positions), None)
    lengths = np.array([3, 5])
    cache = model.decoder.init_cache(2, 12)
    prompt = jnp.where(positions[:, :6] < jnp.asarray(lengths)[:, None], tokens[:, :6], 0)
    apart, decode = model.decoder.prepare(params), jax.jit(model.decoder.step)
    actual, cache = decode(apart, prompt, positions[:, :6], cache)
    logits = actual.logits()
    for b in range(2):
        np.testing.assert_allclose(logits[b, : lengths[b]], full[b, : lengths[b]], atol=1e-4)
    for i in range(5):
        at = (lengths + i)[:, None]
        actual, cache = decode(
            apart, jnp.take_along_axis(tokens, jnp.asarray(at), axis=1), jnp.asarray(at, jnp.int32), cache
        )
        logits = actual.logits()
        for b in range(2):
            np.testing.assert_allclose(logits[b, 0], full[b, lengths[b] + i], atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_axes_name_every_dim_of_every_parameter(name: str) -> None:
    model, params = make(**VARIANTS[name])
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    assert jax.tree.structure(params) == jax.tree.structure(model.axes, is_leaf=is_names)
    for leaf, names in zip(jax.tree.leaves(params), jax.tree.leaves(model.axes, is_leaf=is_names), strict=True):
        assert leaf.ndim == len(names)
        assert leaf.dtype == jnp.float32


def test_scan_and_unrolled_layers_are_the_same_function_of_the_same_parameters() -> None:
    scanned, params = make()
    unrolled = make_model(model_config(unroll=True), VOCAB)
    batch = mixed_batch(2)
    np.testing.assert_allclose(scanned.apply(params, batch, None), unrolled.apply(params, batch, None), atol=1e-5)


@pytest.mark.parametrize("experts", [None, ExpertsConfig(count=4, per_token=2)])
def test_on_one_device_nothing_goes_the_way_of_a_mesh(experts: ExpertsConfig | None) -> None:
    """The same numbers come out of it, but slower: a model of one CPU takes the linear maps made for that."""
    model = make_model(model_config(**({"experts": experts} if experts else {})), VOCAB)
    params = jax.eval_shape(model.init, jax.random.key(0))
    program = str(jax.make_jaxpr(lambda params: model.apply(params, mixed_batch(), None))(params))
    assert "_matmul_on_cpu" in program
    assert not [way for way in ("shard_map", "sharding_constraint") if way in program]


def test_dropout_needs_a_key_and_follows_it() -> None:
    model, params = make(dropout=0.3)
    batch = mixed_batch(2)
    off = model.apply(params, batch, None)
    keys = [jax.random.key(i) for i in (0, 0, 1)]
    first, again, other = (model.apply(params, batch, key) for key in keys)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, off)


def test_bfloat16_activations_float32_parameters_and_logits() -> None:
    model, params = make(dtype="bfloat16")
    low = model.apply(params, mixed_batch(2), None)
    high = make()[0].apply(params, mixed_batch(2), None)
    assert low.dtype == jnp.float32
    assert 1e-6 < float(jnp.mean(jnp.abs(low - high)) / jnp.mean(jnp.abs(high))) < 0.1


def test_a_constant_is_not_rounded_to_bfloat16() -> None:
    x = jnp.linspace(1.0, 2.0, 1001, dtype=jnp.bfloat16)
    error = np.asarray(scaled(x, 0.22).astype(jnp.float32) / (x.astype(jnp.float32) * 0.22)) - 1
    assert abs(error.mean()) < 2e-4, "bfloat16(0.22) is 1.2e-3 too small"


def test_rope_depends_on_relative_positions_only() -> None:
    from jaxstages.models.rope import rope_frequencies, rotate

    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))

    def scores(start: int) -> jax.Array:
        at = jnp.arange(start, start + 6)[None, :]
        q = rotate(x, at, jnp.asarray(rope_frequencies(AttentionConfig(head_dim=8), "global")))
        return jnp.einsum("BLHK,BSHK->BHLS", q, q)

    np.testing.assert_allclose(scores(0), scores(37), atol=1e-4)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1_000_000.0])
@pytest.mark.parametrize("head_dim", [12, 64, 128])
def test_rope_frequencies_are_rounded_once_a_step(head_dim: int, theta: float) -> None:
    """`1 / theta ** (i / half)` where each of the three results is the float32 that is nearest to the true one."""
    from jaxstages.models.rope import rope_frequencies

    actual = rope_frequencies(AttentionConfig(head_dim=head_dim, rope_theta=theta), "global")
    for i, frequency in enumerate(actual):
        exponent = Decimal(float(np.float32(Decimal(i) / Decimal(head_dim // 2))))
        assert frequency == np.float32(1 / Decimal(float(np.float32(Decimal(theta) ** exponent))))


def test_layers_learn_the_same_whatever_their_number_of_key_heads() -> None:
    """Grouped heads against the same heads written out: two query heads that share a key head."""
    grouped = make_model(
        ModelConfig(
            context=8, layers=1, width=16, ff_width=16, attention=AttentionConfig(heads=2, kv_heads=1, head_dim=4)
        ),
        VOCAB,
    )
    full = make_model(
        ModelConfig(
            context=8, layers=1, width=16, ff_width=16, attention=AttentionConfig(heads=2, kv_heads=2, head_dim=4)
        ),
        VOCAB,
    )
    params = grouped.init(jax.random.key(0))
    doubled = jax.tree.map(lambda x: x, params)
    for name, part in itertools.product(("key", "value"), ("kernel",)):
        kernel = params["layers"]["attention"][name][part]
        doubled["layers"]["attention"][name][part] = jnp.concatenate([kernel, kernel], axis=2)
    batch = mixed_batch(2)
    np.testing.assert_allclose(grouped.apply(params, batch, None), full.apply(doubled, batch, None), atol=1e-6)
