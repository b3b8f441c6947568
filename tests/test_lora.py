"""Adapters: at step 0 the base's own logits, only they are trained and kept, and merged they are the same model."""

import copy
import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import params_sha256
from jaxstages.checkpoint.metadata import read_meta, stored_shapes
from jaxstages.cli.checkpoints import checkpoints
from jaxstages.cli.evaluate import evaluate
from jaxstages.cli.train import train
from jaxstages.config import LoraConfig, MeshConfig, Recipe
from jaxstages.config.checks import validate
from jaxstages.models import lora
from jaxstages.models.lora_layer import ADAPTER
from jaxstages.models.transformer import make_model
from jaxstages.runtime.files import read_json, write_json
from jaxstages.runtime.workdir import checkpoint_folder, steps_of
from jaxstages.training.compile import abstract_step_arguments, compile_step
from jaxstages.training.handoff import read_base, read_parent, read_trained
from jaxstages.training.metric_writer import read_metrics
from jaxstages.training.setup import StageSetup, make_stage_evaluate, setup_stage
from jaxstages.types import Model, Params
from tests.tiny import VOCAB, mixed_batch, model_config, write_data
from tests.tiny import recipe as tiny_recipe

MODELS = {
    "plain": {"tied_head": False},
    "half": {"dtype": "bfloat16", "bias": True},
    "experts": {"layers": 1, "experts": recipes.ExpertsConfig(count=2, per_token=1)},
    "unrolled": {"unroll": True, "activation": "gelu"},
}
FORMS = {
    "plain": {},
    "stabilized": {"rank_stabilized": True, "targets": ("attention/(query|out)/kernel",)},
    "dora": {"dora": True},
    "everywhere": {"dora": True, "targets": ("/kernel$", "embedding", "experts/")},
    "int8": {"base": "int8"},
    "bfloat16": {"base": "bfloat16", "dora": True},
}


@functools.cache
def made(name: str) -> tuple[Model, Params]:
    model = make_model(model_config(**MODELS[name]), VOCAB)
    return model, jax.jit(model.init)(jax.random.key(0))


def moved(adapters: Params) -> Params:
    """Adapters as after training: every leaf is another."""
    leaves, tree = jax.tree.flatten(adapters)
    waves = [jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32) + i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * wave.reshape(leaf.shape) for leaf, wave in zip(leaves, waves, strict=True)]
    )


@functools.partial(jax.jit, static_argnums=0)
def logits(apply: Any, params: Params) -> jax.Array:
    return apply(params, mixed_batch(2), None)


@pytest.mark.parametrize("name", MODELS)
def test_at_step_0_the_logits_are_those_of_the_base_to_the_last_bit(name: str) -> None:
    """Each in a program of its own. With DoRA the columns' lengths are divided by what was summed elsewhere."""
    model, base = made(name)
    expected = logits(model.apply, base)
    for dora, tolerance in ((False, 0.0), (True, 2e-2 if name == "half" else 1e-6)):
        config = LoraConfig(rank=4, dora=dora)
        adapters = jax.jit(lambda b, config=config: lora.init(jax.random.key(1), b, model.axes, config))(base)
        actual = logits(model.apply, lora.apply_adapters(base, adapters, config))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_merged_they_are_the_same_model(form: str) -> None:
    model, params = made("experts" if form == "everywhere" else "plain")
    config = LoraConfig(rank=4, **FORMS[form])
    base = jax.jit(lambda p: lora.quantize_base(p, model.axes, config.base))(params)
    adapters = jax.jit(lambda b: moved(lora.init(jax.random.key(1), b, model.axes, config)))(base)
    merged = jax.jit(lambda b, a: lora.merge(b, a, config))(base, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(merged))
    applied = logits(model.apply, lora.apply_adapters(base, adapters, config))
    np.testing.assert_allclose(logits(model.apply, merged), applied, atol=1e-5)
    assert np.abs(applied - logits(model.apply, params)).max() > 1e-2, "they change something"
    if form == "everywhere":
        assert len(jax.tree.leaves(adapters)) == 3 * len(lora.matrices(model.axes)) == 3 * 9


def test_product_and_scale_are_the_formula_s() -> None:
    """Against numpy: W + alpha / r * A B, and DoRA's m * (W + s A B) / |W + s A B| by column."""
    kernel = np.random.default_rng(0).normal(size=(2, 6, 2, 3)).astype(np.float32)
    base, axes = (
        {"query": {"kernel": jnp.asarray(kernel)}},
        {"query": {"kernel": ("layers", "embed", "heads", "head_dim")}},
    )
    for stabilized, scale in ((False, 8 / 4), (True, 8 / 2)):
        config = LoraConfig(rank=4, alpha=8.0, rank_stabilized=stabilized, dora=True)
        adapters = moved(lora.init(jax.random.key(1), base, axes, config))
        a, b, m = (np.asarray(adapters["query"][name], np.float64) for name in ADAPTER)
        whole = kernel.reshape(2, 6, 6) + scale * a @ b
        whole = m[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        merged = lora.merge(base, adapters, config)["query"]["kernel"]
        np.testing.assert_allclose(merged, whole.reshape(kernel.shape), rtol=1e-5)
    first = lora.init(jax.random.key(1), base, axes, config)["query"]
    assert np.abs(first["lora_a"]).max() <= 6**-0.5 < 1.2 * np.abs(first["lora_a"]).max() and not first["lora_b"].any()
    np.testing.assert_allclose(first["lora_magnitude"], np.linalg.norm(kernel.reshape(2, 6, 6), axis=1), rtol=1e-6)


def test_a_base_is_held_in_fewer_bytes() -> None:
    model, params = made("plain")
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    kinds = ("float32", "bfloat16", "int8")
    quantized = jax.jit(lambda p: {kind: lora.quantize_base(p, model.axes, kind) for kind in kinds})(params)
    released = jax.jit(lambda h: {kind: lora.dequantize(h[kind]) for kind in kinds})(quantized)
    assert size(quantized["bfloat16"]) < 0.52 * size(params) and size(quantized["int8"]) < 0.45 * size(params)
    query = quantized["int8"]["layers"]["attention"]["query"]
    assert query["kernel"].dtype == jnp.int8 and query["kernel_scale"].shape == (2, 1, 4, 8)
    for kind, most in (("bfloat16", 2**-8), ("int8", 0.5 / 127)):
        for left, right in zip(jax.tree.leaves(released[kind]), jax.tree.leaves(params), strict=True):
            assert left.dtype == jnp.float32 and float(jnp.max(jnp.abs(left - right))) <= 1.01 * most * float(
                jnp.max(jnp.abs(right))
            )
        axes = lora.base_axes(model.axes, kind)
        is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
        assert jax.tree.structure(axes, is_leaf=is_names) == jax.tree.structure(quantized[kind])
        assert [len(n) for n in jax.tree.leaves(axes, is_leaf=is_names)] == [
            x.ndim for x in jax.tree.leaves(quantized[kind])
        ]


def test_decoding_takes_adapters_beside_a_base_in_int8() -> None:
    model, params = made("plain")
    config = LoraConfig(rank=4, base="int8")

    @jax.jit
    def both(params: Params) -> tuple[jax.Array, jax.Array]:
        base = lora.quantize_base(params, model.axes, "int8")
        joined = lora.apply_adapters(base, moved(lora.init(jax.random.key(1), base, model.axes, config)), config)
        batch = mixed_batch(1)
        where = (batch.tokens_BL[:, :4], batch.positions_BL[:, :4])
        actual, _ = model.decoder.step(model.decoder.prepare(joined), *where, model.decoder.init_cache(1, 4))
        return actual.logits(), model.apply(joined, batch, None)[:, :4]

    np.testing.assert_allclose(*both(params), atol=1e-5)


# Stages.


def adapted(recipe: Recipe, **changes: Any) -> Recipe:
    recipe = copy.deepcopy(recipe)
    for stage in (recipe.finetune, recipe.instruct):
        assert stage is not None
        stage.lora = LoraConfig(**({"rank": 4} | changes))
        stage.evaluation.metrics, stage.optim.schedule.peak_lr = (), 1e-2
    return recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """pretrain in full, finetune by adapters."""
    root = tmp_path_factory.mktemp("lora")
    write_data(root / "data")
    recipe = adapted(tiny_recipe(root / "data"))
    recipe.cache = str(root / "cache")
    validate(recipe)
    train(recipe, root / "work", "pretrain")
    train(recipe, root / "work", "finetune")
    return recipe, root / "work"


@pytest.fixture
def run(finished: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    shutil.copytree(finished[1], tmp_path / "work", ignore=shutil.ignore_patterns("tensorboard"))
    return copy.deepcopy(finished[0]), tmp_path / "work"


def fresh(run: tuple[Recipe, Path]) -> tuple[Recipe, Path]:
    shutil.rmtree(run[1] / "finetune")
    return run


def result_of(work: Path, stage: str) -> dict[str, Any]:
    return read_json(work / stage / "result.json")


def losses(work: Path, stage: str, kind: str = "train") -> list[float]:
    return [line["loss"] for line in read_metrics(work / stage / "metrics.jsonl") if line["kind"] == kind]


def parts_of(recipe: Recipe, work: Path, stage: str) -> tuple[StageSetup, Params, Params]:
    """The stage, the base, and what was trained."""
    setup = setup_stage(recipe, stage, work)
    adapters, meta, _ = read_trained(work / stage, setup.program, setup.contract)
    return setup, read_base(work / stage, meta, setup.program, setup.contract), adapters


def test_only_adapters_are_trained_and_kept(finished: tuple[Recipe, Path]) -> None:
    recipe, work = finished
    setup, base, adapters = parts_of(recipe, work, "finetune")
    step = steps_of(work / "finetune")[-1]
    meta = read_meta(checkpoint_folder(work / "finetune", step))
    assert {path.rpartition("/")[2] for path in stored_shapes(meta)} == {"lora_a", "lora_b"}
    assert len(stored_shapes(meta)) == 14
    assert recipes.lora_from(meta["lora"]) == recipe.finetune.lora
    assert meta["parent"]["params_sha256"] == result_of(work, "pretrain")["params_sha256"] == params_sha256(base)
    assert params_sha256(adapters) == result_of(work, "finetune")["params_sha256"]
    optimizer = [path for path in meta["fingerprint"] if path.startswith("train/opt_state")]
    assert sum("lora_" in path for path in optimizer) == 28 and not any("kernel" in path for path in optimizer)
    assert losses(work, "finetune")[-1] < losses(work, "finetune")[0]
    assert read_meta(checkpoint_folder(work / "pretrain", 6))["lora"] is None
    start = losses(work, "finetune", "eval")[0]
    full = make_evaluation(setup, base)
    assert start == full, "step 0 is the base"


def make_evaluation(setup: StageSetup, params: Params) -> float:
    return make_stage_evaluate(setup)(params, False).metrics["loss"]


def test_what_is_trained_is_counted_and_said(run: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, work = fresh(run)
    recipe.finetune.loop.stop_after, recipe.finetune.lora.base = 1, "int8"
    train(recipe, work, "finetune")
    out = capsys.readouterr().out
    width, ff, q, kv, layers, rank = 16, 32, 32, 16, 2, 4
    sides = ((width, q), (width, kv), (width, kv), (q, width), (width, ff), (width, ff), (ff, width))
    trained = layers * rank * sum(i + o for i, o in sides)
    whole = 300 * width + width + layers * (2 * width + sum(i * o for i, o in sides))
    said = f"trains {trained:,} of {whole + trained:,} parameters ({trained / (whole + trained):.2%})"
    assert f"{said}; the base is stored in int8" in out
    assert "  new      layers/attention/query/lora_a  float32[2, 16, 4]" in out
    assert "  restored layers/attention/query/kernel  float32[2, 16, 4, 8]" in out


def test_a_later_stage_evaluation_and_tools_take_the_merged_model(
    run: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, work = run
    setup, base, adapters = parts_of(recipe, work, "finetune")
    params, lineage = read_parent(work / "finetune", setup.program, setup.contract)
    assert lineage["params_sha256"] == params_sha256(adapters)
    merged = lora.merge(base, adapters, recipe.finetune.lora)
    jax.tree.map(lambda left, other: np.testing.assert_allclose(left, other, atol=1e-6), params, merged)
    last = losses(work, "finetune", "eval")[-1]
    assert make_evaluation(setup, params) == pytest.approx(last, rel=1e-5)
    evaluate(recipe, work, "finetune")
    train(recipe, work, "instruct")  # adapters on adapters
    out = capsys.readouterr().out
    assert "adapters merged into their base" in out and "restored layers/ff/up/kernel" in out
    assert result_of(work, "instruct")["parent"]["params_sha256"] == result_of(work, "finetune")["params_sha256"]
    shutil.rmtree(work / "instruct")
    recipe.instruct.lora = LoraConfig()
    train(recipe, work, "instruct")  # all parameters, from adapters
    checkpoints(work, None, ["list"])
    checkpoints(work, None, ["diff", "finetune/4", "finetune/6"])
    assert "lora_a" in capsys.readouterr().out


def test_a_stopped_run_goes_on_to_the_same_bits(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, work = fresh(run)
    recipe.finetune.lora = LoraConfig(rank=4, base="int8", dora=True)
    shutil.copytree(work, tmp_path / "whole")
    train(recipe, tmp_path / "whole", "finetune")
    recipe.finetune.loop.stop_after = 3
    assert train(recipe, work, "finetune") is False
    # The run is moved on the way, and called from another folder.
    moved_to = tmp_path / "elsewhere"
    work.rename(moved_to)
    recipe.finetune.loop.stop_after = 0
    assert train(recipe, moved_to, "finetune") is True
    whole, again = (result_of(w, "finetune") for w in (tmp_path / "whole", moved_to))
    for name in ("params_sha256", "last_params_sha256", "best", "best_step", "tokens"):
        assert again[name] == whole[name], name
    assert losses(moved_to, "finetune") == losses(tmp_path / "whole", "finetune")


def test_any_mesh_has_the_same_losses(run: tuple[Recipe, Path], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe, work = fresh(run)
    recipe.finetune.lora = LoraConfig(rank=4, base="int8", dora=True, targets=("/kernel$", "embedding"))
    shutil.copytree(work, tmp_path / "split")
    train(recipe, work, "finetune")
    request.getfixturevalue("all_devices")
    recipe.mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    train(recipe, tmp_path / "split", "finetune")
    np.testing.assert_allclose(losses(tmp_path / "split", "finetune"), losses(work, "finetune"), rtol=1e-4)


@pytest.mark.usefixtures("all_devices")
def test_adapters_are_split_as_their_matrices_are(finished: tuple[Recipe, Path]) -> None:
    recipe, work = finished
    recipe = copy.deepcopy(recipe)
    recipe.mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    setup = setup_stage(recipe, "finetune", work)
    attention = setup.program.abstract_state.params["layers"]["attention"]
    specs = {name: {n: tuple(x.sharding.spec) for n, x in part.items()} for name, part in attention.items()}
    assert specs["query"] == {"lora_a": (None, "fsdp", None), "lora_b": (None, None, "tensor")}
    assert specs["out"] == {"lora_a": (None, "tensor", None), "lora_b": (None, None, "fsdp")}


def test_nothing_is_differentiated_by_the_base(finished: tuple[Recipe, Path]) -> None:
    """No product that only a frozen kernel's gradient needs is left: the step has far fewer operations."""
    recipe, work = finished
    flops = {}
    for rank in (0, 2):
        recipe = copy.deepcopy(recipe)
        recipe.finetune.lora, recipe.model.unroll = LoraConfig(rank=rank), True
        recipe.model.width, recipe.model.ff_width = 64, 256
        setup = setup_stage(recipe, "finetune", work)
        step = compile_step(setup.program, setup.program.abstract_base)[1]
        compiled = step.func.lower(*abstract_step_arguments(setup.program), base=setup.program.abstract_base).compile()
        flops[rank] = compiled.cost_analysis()["flops"]
    assert flops[2] < 0.75 * flops[0], flops


def test_neftune_is_in_training_only(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, work = fresh(run)
    recipe.finetune.loop.steps = 2
    recipe.finetune.loop.eval_every = 2
    shutil.copytree(work, tmp_path / "noisy")
    train(recipe, work, "finetune")
    recipe.finetune.neftune_alpha = 5.0
    train(recipe, tmp_path / "noisy", "finetune")
    (plain, noisy) = (losses(w, "finetune", "eval") for w in (work, tmp_path / "noisy"))
    assert plain[0] == noisy[0] and plain[-1] != noisy[-1]
    assert losses(work, "finetune") != losses(tmp_path / "noisy", "finetune")


# What is refused.


def test_a_base_that_is_gone_or_another_is_refused(run: tuple[Recipe, Path]) -> None:
    recipe, work = run
    setup = setup_stage(recipe, "finetune", work)
    for name in ("finetune", "instruct"):  # going on, and as a parent
        if name == "finetune":
            (work / "finetune" / "result.json").rename(work / "kept")
        else:
            (work / "kept").rename(work / "finetune" / "result.json")
        result = result_of(work, "pretrain")
        write_json(work / "pretrain" / "result.json", result | {"params_sha256": "0" * 64})
        step = steps_of(work / "finetune")[-1]
        parent = read_meta(checkpoint_folder(work / "finetune", step))["parent"]
        elsewhere = Path(parent["path"]).with_name("hidden")
        Path(parent["path"]).rename(elsewhere)
        try:
            words = "is now 000000000000" if name == "finetune" else r"has adapters only; their base, .* put it back"
            with pytest.raises(ValueError, match=words):
                train(recipe, work, name)
            shutil.move(work / "pretrain", work / "gone")
            with pytest.raises(ValueError, match=r"has adapters only; their base, \S+pretrain with .* put it back"):
                train(recipe, work, name)
            shutil.move(work / "gone", work / "pretrain")
        finally:
            elsewhere.rename(parent["path"])
        write_json(work / "pretrain" / "result.json", result)
    read_parent(work / "finetune", setup.program, setup.contract)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 32.0}, r"other adapters: config.finetune.lora.alpha: 16.0 -> 32.0; set it back"),
        ({"base": "int8"}, r"other adapters: config.finetune.lora.base: 'float32' -> 'int8'"),
        ({"rank": 8}, r"does not fit the recipe .*lora_a: checkpoint float32\[2, 16, 4\], recipe .*16, 8\]"),
        ({"rank": 0}, r"does not fit the recipe .*lora_a: only in the checkpoint"),
        ({"targets": ("query/kernle",)}, r"lora.targets: 'query/kernle' matches no matrix; near it are .*query/kernel"),
        ({"targets": ("norm/scale",)}, r"lora.targets: 'norm/scale' matches no matrix"),
    ],
)
def test_a_stage_that_goes_on_keeps_its_adapters(run: tuple[Recipe, Path], changes: dict[str, Any], words: str) -> None:
    recipe, work = run
    (work / "finetune" / "result.json").unlink()
    recipe.finetune.lora = LoraConfig(**({"rank": 4} | changes))
    with pytest.raises(ValueError, match=words):
        train(recipe, work, "finetune")


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("pretrain", {"rank": 8}, r"config.pretrain.lora.rank=8: adapters need a base, and pretrain starts from scrat"),
        ("finetune", {"alpha": 32.0}, r"lora.alpha: 16.0 -> 32.0 does not apply to config.finetune.lora.rank=0"),
        ("finetune", {"rank": 4, "alpha": 0.0}, r"lora.alpha=0.0 must be larger than 0"),
        ("finetune", {"rank": -1}, r"lora.rank=-1 must not be negative"),
        ("finetune", {"rank": 4, "base": "int4"}, r"lora.base='int4': did you mean 'int8'"),
        ("finetune", {"rank": 4, "targets": ("(",)}, r"lora.targets='\(': .*regular expression"),
        ("finetune", {"rank": 4, "targets": ()}, r"lora.targets is empty; name matrices"),
    ],
)
def test_refused_at_the_door(tmp_path: Path, stage: str, changes: dict[str, Any], words: str) -> None:
    recipe = tiny_recipe(tmp_path)
    getattr(recipe, stage).lora = LoraConfig(**changes)
    with pytest.raises(ValueError, match=words) as caught:
        validate(recipe)
    assert "\n" not in str(caught.value)


def test_muon_is_refused(tmp_path: Path) -> None:
    recipe = adapted(tiny_recipe(tmp_path))
    recipe.finetune.optim.name = "muon"
    with pytest.raises(ValueError, match="'muon' is for whole matrices, not for adapters; use 'adamw'"):
        validate(recipe)


def test_frozen_and_decayed_paths(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    """`freeze` may name what an adapter lies beside, and its own leaves; magnitudes are lengths, and not decayed."""
    recipe, work = copy.deepcopy(finished[0]), tmp_path / "work"
    shutil.copytree(finished[1], work)
    shutil.rmtree(work / "finetune")
    optim, recipe.finetune.lora.dora = recipe.finetune.optim, True
    optim.freeze, optim.weight_decay = ("embedding", "lora_a$", "query"), 1.0
    optim.schedule.peak_lr, recipe.finetune.loop.steps = 1e-9, 2  # nothing but decay, and that in vain, would show
    train(recipe, work, "finetune")
    setup, base, adapters = parts_of(recipe, work, "finetune")
    first = lora.init(jax.random.fold_in(jax.random.key(0), 1), base, setup.program.model.axes, recipe.finetune.lora)
    attention = (adapters["layers"]["attention"], first["layers"]["attention"])
    np.testing.assert_array_equal(attention[0]["key"]["lora_a"], attention[1]["key"]["lora_a"])
    np.testing.assert_array_equal(attention[0]["query"]["lora_b"], attention[1]["query"]["lora_b"])
    assert np.any(attention[0]["key"]["lora_b"] != attention[1]["key"]["lora_b"])
    optim.freeze = ("embeding",)
    with pytest.raises(ValueError, match="optim.freeze: 'embeding' matches no parameter"):
        setup_stage(recipe, "finetune", work)
