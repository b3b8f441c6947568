"""What lies in folders of models: which keys and weights count, names with something in front, adapters, and that what
comes in goes out as it was. Without torch or transformers; `test_parity.py` compares with them.
"""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxstages.checkpoint.fingerprint import named_leaves
from jaxstages.cli.transfer import import_model
from jaxstages.config import AttentionConfig, ModelConfig, RopeScalingConfig, TokenizerConfig
from jaxstages.data.sentencepiece import BPE
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.interop import hf_export, peft
from jaxstages.interop.config_json import choose_family, read_config
from jaxstages.interop.families import FAMILIES, LLAMA
from jaxstages.interop.hf_import import Plan, describe, load
from jaxstages.interop.layout import by_plain_names, entries_of, match, tensor_slots
from jaxstages.interop.tensors import open_folder, write_shards
from jaxstages.models.transformer import make_model
from jaxstages.runtime.files import read_json, write_json
from tests.test_interop import call, config_of, params_of, write_folder
from tests.tiny import recipe, sentencepiece_model, write_data


def model_of(kind: str, **changes: Any) -> ModelConfig:
    return read_config(config_of(kind, **changes), "config.json").model


# Which keys count.


def test_keys_count_in_the_order_of_transformers() -> None:
    """Each as transformers 5.24 reads it."""
    linear, yarn = ({"rope_type": kind, "factor": 2.0, "rope_theta": 7.0} for kind in ("linear", "yarn"))
    assert model_of("llama", rope_scaling=linear, rope_parameters=yarn).attention.rope_scaling.kind == "linear"
    assert model_of("llama", rope_scaling={}, rope_parameters=yarn).attention.rope_scaling.kind == "yarn"
    assert model_of("llama", rope_theta=5e5, rope_parameters=yarn).attention.rope_theta == 7.0
    assert model_of("llama", rope_theta=5e5, rope_parameters={"rope_type": "default"}).attention.rope_theta == 5e5
    both = {"original_max_position_embeddings": 16, "rope_scaling": yarn | {"original_max_position_embeddings": 32}}
    assert model_of("llama", **both).attention.rope_scaling.trained_context == 16, "the one beside it"
    period = {"num_hidden_layers": 6, "sliding_window": 9}
    patterns = {
        ("gemma2", "sliding_window_pattern"): ("local", "global"),
        ("gemma3_text", "sliding_window_pattern"): ("local", "local", "global"),
        ("gemma3_text", "_sliding_window_pattern"): ("local",) * 5 + ("global",),
    }
    for (kind, key), pattern in patterns.items():
        assert model_of(kind, **period, **{key: 3}).attention.pattern == pattern, (kind, key)
    types = {"layer_types": ["full_attention", "sliding_attention"] * 3, "sliding_window_pattern": 3}
    assert model_of("gemma3_text", **period, **types).attention.pattern == ("global", "local")
    assert model_of("qwen3_moe", num_experts=3, num_local_experts=5).experts.count == 5
    assert model_of("mixtral", num_experts=3, num_local_experts=5).experts.count == 3
    assert model_of("gpt2", hidden_size=32, n_embd=16).width == 32
    assert model_of("cwm").attention.rope_scaling.kind == "llama3", "where it has none"


def test_a_softcap_of_gemma_3_is_not_used_and_not_exported() -> None:
    """transformers stores the key, and computes without it."""
    plain = model_of("gemma3_text")
    assert model_of("gemma3_text", attn_logit_softcapping=50.0) == plain and plain.attention.softcap == 0.0
    plain.attention.softcap = 50.0
    with pytest.raises(ValueError, match=r"no family of transformers can express this model: .*softcap"):
        choose_family(plain)


WORTHLESS = (None, "x", -1, 0, 1.5, [], {}, True, 10**40, float("nan"), ["x"], {"rope_type": []}, [None] * 4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_value_that_makes_no_sense_is_refused_with_file_and_key(kind: str) -> None:
    family, plain = FAMILIES[kind], config_of(kind)
    keys = dict.fromkeys([*plain, *family.defaults, *family.only, "rope_scaling", "rope_parameters", "layer_types"])
    for key, value in itertools.product(keys, WORTHLESS):
        try:
            read_config(plain | {key: value}, "DIR/config.json")
        except ValueError as error:
            assert str(error).startswith("DIR/config.json: ") and len(str(error)) < 1000, error
            near = ("hidden_size", "head_dim", "n_embd", "sliding_window", "rope")
            assert key in str(error) or any(name in str(error) for name in near), (key, value, error)
    for key, value in itertools.product(("factor", "rope_theta", "short_factor", "low_freq_factor"), WORTHLESS):
        for scaling in ("linear", "yarn", "longrope", "llama3", "dynamic"):
            entry = {"rope_type": scaling, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            try:
                read_config(plain | {"rope_scaling": entry | {key: value}}, "DIR/config.json")
            except ValueError as error:
                assert str(error).startswith("DIR/config.json: rope_"), error


def test_a_scaling_that_depends_on_the_length_of_a_text_ends_at_the_trained_context(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    config = config_of("llama", rope_scaling=scaling, original_max_position_embeddings=16)
    actual = read_config(config, "x")
    assert (actual.model.context, actual.reach, actual.positions) == (16, 16, 64)
    assert actual.model.attention.rope_scaling.factor == 4.0, "of the positions"
    write_folder(tmp_path / "one", config)
    (tmp_path / "recipe.py").write_text(
        "from jaxstages.config import *\n\ndef get_config(variant=''):\n"
        "    return Recipe(name='x', model=ModelConfig(context=17))\n"
    )
    words = ("import", f"--from={tmp_path}/one", f"--workdir={tmp_path}/a", f"--config={tmp_path}/recipe.py")
    assert call(*words) == 2
    assert "config.model.context=17 must be at most 16: up to there" in capsys.readouterr().err


# Which weights count.


def test_one_file_comes_before_an_index_and_the_other_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = write_folder(tmp_path / "one", config_of("llama"))
    save_file({name: value + 1 for name, value in tensors.items()}, tmp_path / "one" / "part.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    write_json(tmp_path / "one" / "model.safetensors.index.json", index)
    stored = open_folder(tmp_path / "one")
    assert {tensor.file.name for tensor in stored.values()} == {"model.safetensors"}
    assert call("import", f"--from={tmp_path}/one", f"--workdir={tmp_path}/a") == 0
    out = capsys.readouterr().out
    assert "has two sets of weights; not read, as by transformers: model.safetensors.index.json" in out


def opened(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Parameters by path."""
    actual = describe(folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.eval_shape(make_model(actual.model, actual.model.vocab_size).init, jax.random.key(0))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(target).items()}
    places, rows = tensor_slots(actual.family, shapes), actual.model.vocab_size
    stored = match(places, shapes, by_plain_names(open_folder(folder), str(folder)), rows, str(folder), parts=True)
    params = load(Plan(places, shapes, stored, rows), target)
    return actual.model, {path: np.asarray(leaf) for path, leaf in named_leaves(params).items()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_comes_in_goes_out_as_it_was(kind: str, tmp_path: Path) -> None:
    """Names, shapes and values of the tensors; and the config, with keys that are nothing to us."""
    config = config_of(kind) | {"attention_dropout": 0.25, "eos_token_id": [3, 4], "auto_map": {}, "dtype": "float16"}
    tensors = write_folder(tmp_path / "one", config)
    model, leaves = opened(tmp_path / "one")
    family, written = choose_family(model)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    write_shards(tmp_path, entries_of(tensor_slots(family, shapes), leaves, shapes), "F32", 10**9, lambda done: None)
    again = load_file(tmp_path / "model.safetensors")
    assert family.model_type == kind and again.keys() == tensors.keys()
    assert all(
        np.array_equal(again[name], value) and again[name].shape == value.shape for name, value in tensors.items()
    )
    kept = tmp_path / "work" / "import" / "source"
    kept.mkdir(parents=True)
    write_json(kept / "config.json", config)
    setup: Any = SimpleNamespace(workdir=tmp_path / "work", recipe=SimpleNamespace(model=model))
    out = hf_export._config_json(written, family, model.vocab_size, setup)
    expected = {key: value for key, value in config.items() if key not in ("auto_map", "dtype")}
    assert out == expected | {"architectures": [family.architecture]}
    model.norm_eps *= 2
    changed = hf_export._config_json(choose_family(model)[1], family, model.vocab_size, setup)
    assert "attention_dropout" not in changed, "another model has a config of its own"


TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": TEMPLATE + "tools"}]


@pytest.mark.parametrize("template", ["", TEMPLATE, NAMED])
def test_an_import_goes_out_with_its_tokenizer_and_its_ids(
    template: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its tokens have other names than ours, and there is a row for each, and no more: none are added by an import."""
    config = config_of("llama") | {"eos_token_id": 5, "attention_dropout": 0.5, "vocab_size": 290}
    write_folder(tmp_path / "one", config)
    file = tmp_path / "one" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|", "<:").replace("|>", ":>"))
    beside: dict[str, Any] = {"eos_token": "<:end:>", "tokenizer_class": "PreTrainedTokenizerFast"}
    beside |= {"model_max_length": 77} | ({"chat_template": template} if template else {})
    write_json(tmp_path / "one" / "tokenizer_config.json", beside)
    assert call("import", f"--from={tmp_path}/one", f"--workdir={tmp_path}/a") == 0, capsys.readouterr().err
    assert call("export", f"--workdir={tmp_path}/a", f"--to={tmp_path}/two") == 0, capsys.readouterr().err
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys() and all(np.array_equal(value, second[name]) for name, value in first.items())
    assert second["lm_head.weight"].shape == (290, 16)
    out = read_json(tmp_path / "two" / "config.json")
    assert out == config | {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "torch_dtype": "float32"}
    assert read_json(tmp_path / "two" / "tokenizer_config.json") == beside
    assert read_json(tmp_path / "two" / "generation_config.json") == {"eos_token_id": 5}
    vocabularies = [json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("one", "two")]
    for part in ("model", "post_processor", "pre_tokenizer", "normalizer", "decoder", "added_tokens"):
        assert vocabularies[0][part] == vocabularies[1][part], part


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_import_without_changes_is_exported_as_it_came(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Even if later stages of the recipe need tokens that the folder lacks: these get rows here, not in the export."""
    config = config_of(kind, vocab_size=290, eos_token_id=5)
    write_folder(tmp_path / "one", config)
    file = tmp_path / "one" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|", "<:").replace("|>", ":>"))
    write_json(tmp_path / "one" / "tokenizer_config.json", {"eos_token": "<:end:>", "model_max_length": 77})
    write_data(tmp_path / "data")
    staged = recipe(tmp_path / "data")
    staged.tokenizer, staged.model = TokenizerConfig(), ModelConfig(context=48)
    assert staged.pretrain is not None
    staged.pretrain.init_from = f"hf:{tmp_path}/one"

    work, out = tmp_path / "work", tmp_path / "out"
    import_model(staged, work, str(tmp_path / "one"))
    assert (
        "gets <|sep|>, <|system|>, <|user|>, <|assistant|>, <|end|>, which the stages need" in capsys.readouterr().out
    )
    assert call("export", f"--workdir={work}", f"--to={out}", "--stage=import") == 0, capsys.readouterr().err
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", out))
    assert {name: (value.shape, value.tobytes()) for name, value in first.items()} == {
        name: (value.shape, value.tobytes()) for name, value in second.items()
    }
    written = {key: value for key, value in read_json(out / "config.json").items() if "dtype" not in key}
    assert written == config | {"architectures": [FAMILIES[kind].architecture]}
    assert json.loads((out / "tokenizer.json").read_text()) == json.loads(file.read_text())


# Names with something in front.


def renamed(tensors: dict[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    match how:
        case "language":
            names = {name: f"language_model.{name}" for name in tensors}
        case "inner":
            names = {name: name.replace("model.", "model.language_model.", 1) for name in tensors}
        case "layers":
            names = {name: name.replace("layers.1.", "layers.1._orig_mod.") for name in tensors}
        case _:
            names = {name: f"{how}{name}" for name in tensors}
    return {names[name]: value for name, value in tensors.items()}


@pytest.mark.parametrize("how", ["_orig_mod.", "module.", "module._orig_mod.", "language", "inner", "layers"])
def test_what_wrappers_put_into_names_makes_no_difference(how: str, tmp_path: Path) -> None:
    tensors = write_folder(tmp_path / "one", config_of("llama"))
    _, plain = opened(tmp_path / "one")
    save_file(renamed(tensors, how), tmp_path / "one" / "model.safetensors")
    _, actual = opened(tmp_path / "one")
    assert all(np.array_equal(actual[path], value) for path, value in plain.items())


def test_any_other_prefix_is_named(tmp_path: Path) -> None:
    tensors = write_folder(tmp_path / "one", config_of("llama"))
    save_file(renamed(tensors, "actor.llm."), tmp_path / "one" / "model.safetensors")
    with pytest.raises(ValueError, match=r"one: the names of its tensors begin with 'actor.llm.', and would fit"):
        opened(tmp_path / "one")
    save_file(renamed(tensors, "module.") | tensors, tmp_path / "one" / "model.safetensors")
    with pytest.raises(ValueError, match="weight twice, once as module"):
        opened(tmp_path / "one")


def test_the_text_part_is_taken_and_the_other_parts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    inner = config_of("gemma3_text")
    tensors = write_folder(tmp_path / "one", inner)
    more = {f"vision_tower.layer.{n}.weight": np.ones(3, np.float32) for n in range(4)}
    more |= {"multi_modal_projector.weight": np.ones(3, np.float32)}
    save_file(renamed(tensors, "language") | more, tmp_path / "one" / "model.safetensors")
    outer = {"model_type": "gemma3", "text_config": inner, "vision_config": {}, "eos_token_id": [1, 106]}
    write_json(tmp_path / "one" / "config.json", outer)
    assert call("import", f"--from={tmp_path}/one", f"--workdir={tmp_path}/a") == 0
    out = capsys.readouterr().out
    assert "of more parts than text; left out are 5 tensors of multi_modal_projector, vision_tower" in out
    assert call("export", f"--workdir={tmp_path}/a", f"--to={tmp_path}/two") == 0, capsys.readouterr().err
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(np.array_equal(again[n], value) for n, value in tensors.items())
    config = read_json(tmp_path / "two" / "config.json")
    assert config["model_type"] == "gemma3_text" and config["eos_token_id"] == [1, 106]
    assert call("import", f"--from={tmp_path}/two", f"--workdir={tmp_path}/b") == 0
    assert params_of(tmp_path / "a") == params_of(tmp_path / "b")
    write_json(tmp_path / "one" / "config.json", outer | {"text_config": inner | {"hidden_size": "x"}})
    assert call("import", f"--from={tmp_path}/one", f"--workdir={tmp_path}/c") == 2
    assert "config.json: text_config: hidden_size='x' is of type str" in capsys.readouterr().err


def test_the_head_of_a_text_part_is_tied_as_transformers_ties_it(tmp_path: Path) -> None:
    """Mistral 3 ties by default, but not where there are weights for a head."""
    inner = {key: value for key, value in config_of("mistral").items() if key != "tie_word_embeddings"}
    tensors = write_folder(tmp_path / "one", inner)
    write_json(tmp_path / "one" / "config.json", {"model_type": "mistral3", "text_config": inner})
    assert not describe(tmp_path / "one").model.tied_head
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    assert describe(tmp_path / "one").model.tied_head


# Adapters.


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_folder(tmp_path / "base", config_of("phi3"))
    rng = np.random.default_rng(0)
    shapes = {"qkv_proj": (32, 16), "o_proj": (16, 16)}
    tensors = {}
    for n, (name, (outputs, inputs)) in itertools.product(range(4), shapes.items()):
        module = f"base_model.model.model.layers.{n}.self_attn.{name}"
        tensors[f"{module}.lora_A.weight"] = rng.standard_normal((2, inputs)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.standard_normal((outputs, 2)).astype(np.float32)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": str(tmp_path / "base")}
    write_json(tmp_path / "adapter" / "adapter_config.json", config | {"alpha_pattern": {"o_proj": 4}})
    return tmp_path / "adapter"


def test_adapters_are_imported_beside_their_base(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    work = f"--workdir={tmp_path}/a"
    assert call("import", f"--from={adapter}", work) == 0, capsys.readouterr().err
    assert f"adapters of {adapter}, merged into their base {tmp_path}/base" in capsys.readouterr().out
    assert call("export", work, f"--to={tmp_path}/two") == 0
    base, out = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    beside = load_file(adapter / "adapter_model.safetensors")
    for name, value in base.items():
        down, up = (beside.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        if down is not None and up is not None:
            value = value + (2.0 if "o_proj" in name else 3.0) * up @ down
        np.testing.assert_allclose(out[name], value, atol=1e-5, err_msg=name)
    assert call("import", f"--from={adapter}", work) == 0
    assert "already there" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "base")
    assert call("generate", work, "--prompt=Ann", "--max_new_tokens=2") == 0, "it is not needed"


def test_adapters_that_cant_be_read_are_refused_by_file_and_key(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = read_json(adapter / "adapter_config.json")
    for changes, complaint in (
        (
            {"base_model_name_or_path": "who/what"},
            "base_model_name_or_path='who/what' is no folder here; fetch",
        ),
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type='IA3' can't be read here; supported: 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] can't be read here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' can't be read here"),
        ({"r": "8"}, "adapter_config.json is damaged, it lacks r, or has it in another form"),
    ):
        write_json(adapter / "adapter_config.json", config | changes)
        assert call("import", f"--from={adapter}", f"--workdir={tmp_path}/a") == 2, changes
        err = capsys.readouterr().err
        assert complaint in err and err.count("\n") == 1, err
    write_json(adapter / "adapter_config.json", config)
    tensors = load_file(adapter / "adapter_model.safetensors")
    odd = {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((2, 9), np.float32)}
    save_file(tensors | odd, adapter / "adapter_model.safetensors")
    assert call("import", f"--from={adapter}", f"--workdir={tmp_path}/a") == 2
    assert "embed_tokens.lora_embedding_A, which is no part of LoRA or DoRA of a linear map" in capsys.readouterr().err


def test_adapters_of_kernels_in_one_tensor_are_its_blocks() -> None:
    shapes = {"layers/attention/query/kernel": (1, 6, 2, 2), "layers/attention/key/kernel": (1, 6, 1, 2)}
    shapes |= {"layers/attention/value/kernel": (1, 6, 1, 2)}
    leaves = {
        f"layers/attention/{part}/lora_a": np.full((1, 6, 1), n + 1.0) for n, part in enumerate(("query", "value"))
    }
    leaves |= {"layers/attention/query/lora_b": np.full((1, 1, 4), 3.0)}
    leaves |= {"layers/attention/value/lora_b": np.full((1, 1, 2), 4.0)}
    tensors, rows = peft._tensors(FAMILIES["phi3"], leaves, shapes)
    module = "base_model.model.model.layers.0.self_attn.qkv_proj"
    np.testing.assert_array_equal(tensors[f"{module}.lora_A.weight"], [[1.0] * 6, [2.0] * 6])
    blocks = [[3.0, 0.0]] * 4 + [[0.0, 0.0]] * 2 + [[0.0, 4.0]] * 2
    np.testing.assert_array_equal(tensors[f"{module}.lora_B.weight"], blocks)
    assert list(rows.values()) == [2]
    leaves |= {f"layers/attention/{part}/lora_magnitude": np.ones((1, n)) for part, n in (("query", 4), ("value", 2))}
    with pytest.raises(ValueError, match="PEFT needs DoRA of layers/attention/key/kernel too"):
        peft._tensors(FAMILIES["phi3"], leaves, shapes)


# The tokenizer.


def test_what_stands_between_two_pieces_of_a_user_is_text(tmp_path: Path) -> None:
    """Ids as sentencepiece 0.2.3 gives them: none but the user's own piece is found in text by its name."""
    (tmp_path / "small.model").write_bytes(sentencepiece_model(BPE))
    config = TokenizerConfig(kind="file", path=str(tmp_path / "small.model"))
    tokenizer = make_tokenizer(config, iter(()), tmp_path / "tokenizer.json")
    names = {i: name for name, i in tokenizer.backend.get_vocab().items()}

    def pieces(text: str) -> list[str]:
        return [names[i] for i in tokenizer.encode(text).tolist()]

    assert pieces("a<word><s><word>") == ["\u2581a", "<word>", "<", "s", ">", "<word>"]
    assert pieces("a<word><unk>a") == ["\u2581a", "<word>", "<", "<unk>", ">", "a"]
    assert pieces("a<word><unk>") == ["\u2581a", "<word>", "<", "<unk>", ">"]


def test_own_fields_of_the_new_scalings_make_a_config_and_back() -> None:
    for kind, more in (
        ("yarn", {"beta_fast": 16.0, "attention_factor": 1.25}),
        ("longrope", {"short_factors": (1.0, 2.0), "long_factors": (3.0, 4.0)}),
        ("dynamic", {}),
    ):
        scaling = RopeScalingConfig(kind=kind, factor=2.0, trained_context=64, **more)
        part = AttentionConfig(heads=2, kv_heads=1, head_dim=4, rope_scaling=scaling)
        model = ModelConfig(vocab_size=9, context=32, attention=part, family="llama")
        family, written = choose_family(model)
        assert family is LLAMA and read_config(written, "x").model.attention == part
