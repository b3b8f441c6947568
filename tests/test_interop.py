"""Import and export without torch or transformers: folders written by the tests, refusals, kills, the command line."""

import dataclasses
import json
import math
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import named_leaves
from jaxstages.checkpoint.metadata import read_meta
from jaxstages.cli.main import main
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.config import AttentionConfig, ModelConfig, RopeScalingConfig, TokenizerConfig
from jaxstages.data.sentencepiece import BPE
from jaxstages.data.tokenizer import load_tokenizer
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.interop import peft
from jaxstages.interop.config_json import choose_family, plain_model, read_config, write_config
from jaxstages.interop.families import FAMILIES, LLAMA
from jaxstages.interop.hf_export import export
from jaxstages.interop.layout import shape_of, tensor_slots
from jaxstages.models.transformer import make_model
from jaxstages.runtime.files import read_json, write_json
from jaxstages.runtime.workdir import checkpoint_folder
from tests import compiled
from tests.tiny import model_config, recipe, sentencepiece_model, write_data

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 6, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 6},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "smollm3": {},
    "olmo2": {},
    "phi3": {"sliding_window": 7},
    "qwen3_moe": {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6},
    "mixtral": {"num_local_experts": 3},
    "internlm3": {"head_dim": 8},
    "iquestcoder": {"head_dim": 8},
    "seed_oss": {"head_dim": 8, "attention_out_bias": True},
    "granite": {"attention_multiplier": 0.25, "logits_scaling": 6.0, "residual_multiplier": 0.22},
    "hyperclovax": {"head_dim": 8, "logits_scaling": 0.125, "embedding_multiplier": 10.0},
    "ministral3": {"head_dim": 8},
    "cwm": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "vaultgemma": {"head_dim": 8},
    "exaone4": {"sliding_window": 5},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 3, "num_experts_per_tok": 2},
    "mellum": {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6},
}
ROWS = 320


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    if kind == "gpt2":
        base = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48, "vocab_size": ROWS}
    else:
        base = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 2}
        base |= {"num_key_value_heads": 1, "vocab_size": ROWS, "max_position_embeddings": 64}
    return {"model_type": kind} | base | CONFIGS.get(kind, {}) | changes


def write_folder(folder: Path, config: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """A model with random weights, by the names of the table. Returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    actual = read_config(config, "config.json")
    model = make_model(actual.model, actual.model.vocab_size)
    tree = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in named_leaves(tree).items()}
    rng = np.random.default_rng(seed)
    places = tensor_slots(actual.family, shapes)
    tensors = {p.name: (0.1 * rng.standard_normal(shape_of(p, shapes))).astype(dtype) for p in places}
    save_file(tensors, folder / "model.safetensors")
    if not (folder / "tokenizer.json").exists():
        text = iter(["Ann likes red. Bob likes blue, and grey is a colour."])
        make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=290), text, folder / "tokenizer.json")
    return tensors


def call(*words: str) -> int:
    return main(["jaxstages", *words])


OF_MORE_PARTS = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}


def params_of(workdir: Path) -> str:
    return read_json(workdir / "import" / "result.json")["params_sha256"]


def params_here(workdir: Path) -> Any:
    """The imported parameters, and their lineage."""
    from jaxstages.training.handoff import read_parent
    from jaxstages.training.setup import setup_stage

    setup = setup_stage(resolve_recipe(None, workdir), "import", workdir, with_data=False)
    return read_parent(setup.folder, setup.program, setup.contract)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    write_folder(folder, config_of("llama"))
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "gemma3_text", "olmo2", "qwen3_moe", "mixtral", "arcee"])
def test_import_export_import_is_the_same_tensors(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = write_folder(tmp_path / "one", config_of(kind))
    assert call("import", f"--from={tmp_path}/one", f"--workdir={tmp_path}/a") == 0
    assert call("export", f"--workdir={tmp_path}/a", f"--to={tmp_path}/two") == 0, capsys.readouterr().err
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    assert "logits differ by 0" in capsys.readouterr().out
    assert call("import", f"--from={tmp_path}/two", f"--workdir={tmp_path}/b") == 0
    assert params_of(tmp_path / "a") == params_of(tmp_path / "b")
    first, second = (resolve_recipe(None, tmp_path / name).model for name in "ab")
    assert first == second and first.family == kind


def test_where_each_tensor_goes(tmp_path: Path) -> None:
    """By hand, not by the table: [outputs, inputs] there, [inputs, heads, width] here; heads one after the other."""
    tensors = write_folder(tmp_path / "one", config_of("phi3"))
    tensors |= {"model.layers.1.self_attn.qkv_proj.weight": np.arange(4 * 8 * 16, dtype=np.float32).reshape(32, 16)}
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    assert call("import", f"--from={tmp_path}/one", f"--workdir={tmp_path}/a") == 0
    assert call("export", f"--workdir={tmp_path}/a", f"--to={tmp_path}/two") == 0
    params, _ = params_here(tmp_path / "a")
    attention = params["layers"]["attention"]
    fused = tensors["model.layers.1.self_attn.qkv_proj.weight"]
    np.testing.assert_array_equal(attention["query"]["kernel"][1, :, 1, :], fused[8:16].T)
    np.testing.assert_array_equal(attention["key"]["kernel"][1, :, 0, :], fused[16:24].T)
    np.testing.assert_array_equal(attention["value"]["kernel"][1, :, 0, :], fused[24:32].T)
    out = tensors["model.layers.2.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(attention["out"]["kernel"][2, 1], out[:, 8:].T)
    gate_up = tensors["model.layers.0.mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(params["layers"]["ff"]["gate"]["kernel"][0], gate_up[:20].T)
    np.testing.assert_array_equal(params["layers"]["ff"]["up"]["kernel"][0], gate_up[20:].T)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_config_goes_there_and_back(kind: str) -> None:
    actual = read_config(config_of(kind), "config.json")
    written = json.loads(json.dumps(write_config(actual.family, actual.model)))
    again = read_config(written, "config.json")
    assert again.model == actual.model and choose_family(actual.model)[0] is actual.family


@pytest.mark.parametrize(
    ("kind", "changes", "complaint"),
    [
        ("llama", {"model_type": "bert"}, "model_type='bert' is not supported; supported: llama, "),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 can't be represented here; supported: none"),
        ("llama", {"is_causal": False}, "is_causal=False can't be represented here; supported: True"),
        ("starcoder2", {"use_bias": False}, "use_bias=False can't be represented here; supported: True"),
        ("mellum", {"mlp_layer_types": ["sparse", "dense"] * 2}, "mlp_layer_types=['sparse', 'dense', "),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu' can't be represented here; supported: silu"),
        ("llama", {"rope_scaling": {"type": "proportional"}}, "rope_type='proportional' can't"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "config.json: rope_scaling.factor is missing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "x"}}, "json: rope_scaling.factor='x' is of type str"),
        ("llama", {"rope_scaling": "linear"}, "config.json: rope_scaling='linear' must be an object"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": []}},
            "short_factor=[] must be a list of 4 numb",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": True}}, "rope_parameters.factor=True is of type"),
        ("phi3", {"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4 of head_dim=8 must give an even number of"),
        ("llama", {"rope_theta": "many"}, "config.json: rope_theta='many' is of type str; it must be float"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} can't"),
        ("gemma3_text", OF_MORE_PARTS | {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} can't"),
        (
            "llama",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 can't be represented here",
        ),
        ("llama", {"hidden_size": "16"}, "hidden_size='16' is of type str; it must be int"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0 must be larger than 0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True can't"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers=[0] can't"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types='chunked_attention' can't"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types=['full_attention'] must name 4 layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0 must be larger than 0"),
        ("exaone4", {"sliding_window_pattern": "LLG"}, "sliding_window_pattern='LLG' is of type str; it must be int"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": []}, "max_window_layers=[] is of type list"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "local and without rope"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True can't"),
    ],
)
def test_what_cant_be_represented_is_refused_by_name(
    kind: str, changes: dict[str, Any], complaint: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(llama, tmp_path / "bad")
    write_json(tmp_path / "bad" / "config.json", config_of(kind) | changes)
    assert call("import", f"--from={tmp_path}/bad", f"--workdir={tmp_path}/work") == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1 and not (tmp_path / "work" / "import").exists()


def test_both_spellings_of_rope() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}
    old["rope_scaling"] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    new = {"rope_parameters": {"rope_theta": 5e5} | old["rope_scaling"]}
    models = [read_config(config_of("llama") | entry, "x").model for entry in (old, new)]
    assert models[0] == models[1] and models[0].attention.rope_theta == 5e5
    assert models[0].attention.rope_scaling == RopeScalingConfig(kind="llama3", factor=8.0, trained_context=32)
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}}
    new |= {"sliding_attention": {"rope_theta": 1e3, "rope_type": "default"}}
    models = [read_config(config_of("gemma3_text") | entry, "x").model for entry in (old, {"rope_parameters": new})]
    assert models[0] == models[1] and models[0].attention.local_rope_theta == 1e3
    assert models[0].attention.rope_scaling.factor == 8.0


def test_null_is_not_always_the_default() -> None:
    part = read_config(config_of("mistral", num_key_value_heads=None, head_dim=None), "x").model.attention
    assert (part.kv_heads, part.head_dim) == (2, 8)
    without = read_config(config_of("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None), "x").model
    assert (without.attention.softcap, without.logit_softcap) == (0.0, 0.0)
    default = read_config(config_of("gemma2"), "x").model
    assert (default.attention.softcap, default.logit_softcap) == (50.0, 30.0)


def test_layers_are_told_apart_by_what_each_family_writes() -> None:
    def pattern(kind: str, **changes: Any) -> tuple[tuple[str, ...], int]:
        part = read_config(config_of(kind, num_hidden_layers=6, **changes), "x").model.attention
        return part.pattern, part.window

    assert pattern("gemma2", sliding_window=9) == (("local", "global"), 9)
    assert pattern("gemma3_text", sliding_window=9) == (("local",) * 5 + ("global",), 9)
    assert pattern("gemma3_text", sliding_window=9, sliding_window_pattern=3) == (("local", "local", "global"), 9)
    assert pattern("smollm3", no_rope_layer_interval=3) == (("global", "global", "nope"), 0)
    assert pattern("qwen2", sliding_window=9) == ((), 0), "use_sliding_window is off"
    switched = pattern("qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=4)
    assert switched == (("global",) * 4 + ("local",) * 2, 9)
    assert pattern("mistral") == ((), 5) and pattern("mistral", sliding_window=None) == ((), 0)


# Files.


def spoil(folder: Path, how: str) -> str:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    match how:
        case "a pickle":
            file.unlink()
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
            return "pytorch_model.bin is a pickle, which runs code"
        case "nothing":
            file.unlink()
            return "has no model.safetensors; name a folder"
        case "missing":
            del tensors["model.norm.weight"]
            save_file(tensors, file)
            return "it lacks model.norm.weight"
        case "unexpected":
            save_file(tensors | {"score.weight": np.zeros((2, 16), np.float32)}, file)
            return "it has unexpected score.weight"
        case "another shape":
            save_file(tensors | {"model.norm.weight": np.zeros(17, np.float32)}, file)
            return "model.norm.weight [17] instead of [16]"
        case "integers":
            save_file(tensors | {"model.norm.weight": np.zeros(16, np.int32)}, file)
            return "none of F32, BF16, F16"
        case "cut short":
            file.write_bytes(file.read_bytes()[:-4])
            return "offsets that do not fit its shapes, or reach beyond its end"
        case "no header":
            file.write_bytes(b"\xff" * 64)
            return "is no safetensors file, or cut short"
        case "index leads out":
            file.unlink()  # which would come first
            write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": "../model/model.safetensors"}})
            return "which is no file beside it"
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
            return "has no tokenizer.json"
        case "no config":
            (folder / "config.json").unlink()
            return "has no config.json"
        case _:
            raise ValueError(how)


@pytest.mark.parametrize(
    "how",
    [
        *("a pickle", "nothing", "missing", "unexpected", "another shape", "integers", "cut short", "no header"),
        *("index leads out", "no tokenizer", "no config"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    how: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    complaint = spoil(tmp_path / "model", how)
    assert call("import", f"--from={tmp_path}/model", f"--workdir={tmp_path}/work") == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1, err
    assert not (tmp_path / "work" / "import" / "result.json").exists()
    assert call("generate", f"--workdir={tmp_path}/work", "--prompt=x") == 2


def test_a_folder_with_a_model_of_sentencepiece(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What the class of transformers puts in front by default, `<s>`, is put; a file that was changed is refused."""
    folder, work = tmp_path / "model", f"--workdir={tmp_path}/work"
    shutil.copytree(llama, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(BPE, {35: 1}))
    beside = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    write_json(folder / "tokenizer_config.json", beside)
    assert call("import", f"--from={folder}", work) == 0, capsys.readouterr().err
    assert resolve_recipe(None, tmp_path / "work").tokenizer.path == f"{folder}/tokenizer.model"
    tokenizer = load_tokenizer(tmp_path / "work" / "tokenizer" / "tokenizer.json")
    assert tokenizer.backend.encode("a").ids == [1, 5] and tokenizer.begin == (1,)
    assert tokenizer.decode(tokenizer.encode("a ab\n")) == "a ab\n"
    assert call("generate", work, "--prompt=a ab", "--max_new_tokens=2") == 0, capsys.readouterr().err
    assert call("import", f"--from={folder}", work) == 0
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(BPE))
    capsys.readouterr()
    assert call("import", f"--from={folder}", work) == 2 and "tokenizer.model differ" in capsys.readouterr().err


@pytest.mark.parametrize("listed", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_beside_a_model_of_sentencepiece(llama: Path, tmp_path: Path, listed: str) -> None:
    """Such as those of a chat template that was trained later: the file itself does not have them."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(BPE))
    size = 15
    beside: dict[str, Any] = {"bos_token": "<s>", "eos_token": "<|im_end|>", "tokenizer_class": "LlamaTokenizer"}
    by_name = {"<|im_end|>": size, "<|im_start|>": size + 1}
    if listed == "added_tokens.json":
        write_json(folder / listed, by_name)
    else:
        entries = {str(i): {"content": name, "special": True, "normalized": False} for name, i in by_name.items()}
        beside |= {"added_tokens_decoder": entries | {"1": {"content": "<s>", "special": True}}}
    write_json(folder / "tokenizer_config.json", beside)
    assert call("import", f"--from={folder}", f"--workdir={tmp_path}/work") == 0
    tokenizer = load_tokenizer(tmp_path / "work" / "tokenizer" / "tokenizer.json")
    assert {name: tokenizer.backend.token_to_id(name) for name in by_name} == by_name
    assert tokenizer.specials.end_of_text == size in tokenizer.stops
    assert size not in tokenizer.encode("a <|im_end|>"), "in a text it is text"

    write_json(folder / "added_tokens.json", {"<|far|>": size + 7})
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    assert call("import", f"--from={folder}", f"--workdir={tmp_path}/again") == 2


def test_another_folder_after_an_import_that_failed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the first is left: its hyperparameters, its tokenizer, its other files."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for folder, theta in ((broken, 1e4), (whole, 5e9)):
        shutil.copytree(llama, folder)
        write_json(folder / "config.json", config_of("llama", rope_theta=theta))
    write_json(broken / "generation_config.json", {"eos_token_id": 5})
    header = load_file(broken / "model.safetensors")
    save_file(dict([*header.items()][1:]), broken / "model.safetensors")
    work = f"--workdir={tmp_path}/work"
    assert call("import", f"--from={broken}", work) == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("import", "--from=~/whole", work) == 0
    recipe = resolve_recipe(None, tmp_path / "work")
    assert recipe.model.attention.rope_theta == 5e9 and recipe.name == "whole"
    assert recipe.tokenizer.path == f"{whole}/tokenizer.json"
    assert not (tmp_path / "work" / "import" / "source" / "generation_config.json").exists()


class Marker:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


def test_no_code_of_a_folder_is_run(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "marker")))
    (tmp_path / "model" / "modeling_own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    auto = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    write_json(tmp_path / "model" / "config.json", config_of("llama") | auto)
    assert call("import", f"--from={tmp_path}/model", f"--workdir={tmp_path}/work") == 0
    assert "code of its own (auto_map), which is not used" in capsys.readouterr().out
    assert not (tmp_path / "marker").exists() and "modeling_own" not in sys.modules


def test_shards_bfloat16_buffers_tied_heads_and_bare_names(llama: Path, tmp_path: Path) -> None:
    """The same weights in all the forms that folders have."""
    tensors = write_folder(tmp_path / "plain", config_of("llama", tie_word_embeddings=True), ml_dtypes.bfloat16)
    digests = []

    def brought(name: str) -> None:
        assert call("import", f"--from={tmp_path}/{name}", f"--workdir={tmp_path}/{name}-work") == 0
        digests.append(params_of(tmp_path / f"{name}-work"))

    brought("plain")
    for name in ("wide", "shards", "bare", "buffers"):
        shutil.copytree(tmp_path / "plain", tmp_path / name)
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, tmp_path / "wide" / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    more |= {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    save_file(tensors | more, tmp_path / "buffers" / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, tmp_path / "shards" / file)
    (tmp_path / "shards" / "model.safetensors").unlink()
    write_json(tmp_path / "shards" / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    for name in ("wide", "shards", "bare", "buffers"):
        brought(name)
    assert len(set(digests)) == 1
    assert call("export", f"--workdir={tmp_path}/plain-work", f"--to={tmp_path}/back", "--dtype=bfloat16") == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(back[name].dtype == value.dtype and np.array_equal(back[name], value) for name, value in tensors.items())


def test_tokens_that_the_folder_has_no_row_for_begin_as_the_mean(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A tokenizer that names no end of a text gets ours, and no other token before a stage needs it; the folder has a
    row for each of its own only."""
    tensors = write_folder(tmp_path / "one", config_of("llama"))
    content = read_json(tmp_path / "one" / "tokenizer.json")
    # The control tokens take other names, which are no control tokens of ours.
    text = json.dumps(content).replace("<|", "<:").replace("|>", ":>")
    (tmp_path / "one" / "tokenizer.json").write_text(text)
    size = len(content["model"]["vocab"])
    write_json(tmp_path / "one" / "config.json", config_of("llama", vocab_size=size))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:size]
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    assert call("import", f"--from={tmp_path}/one", f"--workdir={tmp_path}/a") == 0
    assert "the tokenizer has 1 tokens more than the folder has rows" in capsys.readouterr().out
    assert read_json(tmp_path / "a" / "import" / "result.json")["source"]["new_tokens"] == ["<|endoftext|>"]
    params, _ = params_here(tmp_path / "a")
    for name, ours in (("model.embed_tokens.weight", "embedding"), ("lm_head.weight", "head")):
        assert params[ours].shape == (size + 1, 16)
        np.testing.assert_array_equal(params[ours][:size], tensors[name])
        np.testing.assert_allclose(params[ours][size:], np.tile(tensors[name].mean(0), (1, 1)), atol=1e-6)

    assert call("export", f"--workdir={tmp_path}/a", f"--to={tmp_path}/two") == 0, "as it came, without the row"
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert all(np.array_equal(again[name], value) for name, value in tensors.items())
    assert read_json(tmp_path / "two" / "config.json")["vocab_size"] == size


def test_shards_have_a_size_and_an_index(llama: Path, tmp_path: Path) -> None:
    assert call("import", f"--from={llama}", f"--workdir={tmp_path}/a") == 0
    export(resolve_recipe(None, tmp_path / "a"), tmp_path / "a", "import", tmp_path / "two", "float32", 30_000)
    index = read_json(tmp_path / "two" / "model.safetensors.index.json")
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    tensors = load_file(llama / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for file in files:
        for name, value in load_file(tmp_path / "two" / file).items():
            np.testing.assert_array_equal(value, tensors[name])


# As a stage.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A recipe of three stages that starts from the folder, run to its end."""
    root = tmp_path_factory.mktemp("home")
    write_data(root / "data")
    text = (
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\nfrom pathlib import Path\n"
        "from jaxstages.config import *\nfrom tests.tiny import recipe\n\ndef get_config(variant=''):\n"
        f"    found = recipe(Path({str(root / 'data')!r}), steps=4)\n    found.tokenizer = TokenizerConfig()\n"
        f"    found.cache = {str(root / 'cache')!r}\n    found.model = ModelConfig(context=48)\n"
        f"    found.pretrain.init_from = 'hf:{llama}'\n    return found\n"
    )
    (root / "tiny.py").write_text(text)
    assert call("run", f"--config={root}/tiny.py", f"--workdir={root}/work") == 0
    return root


def test_a_run_that_starts_from_a_folder(home: Path, llama: Path, capsys: pytest.CaptureFixture) -> None:
    work = home / "work"
    parent = read_json(work / "pretrain" / "result.json")["parent"]
    assert parent["path"] == str(work / "import") and parent["params_sha256"] == params_of(work)
    kept = recipes.from_dict(read_json(work / "recipe.json")["recipe"])
    assert kept.model.context == 48 and kept.model.width == 16 and kept.tokenizer.path == f"{llama}/tokenizer.json"
    assert read_json(work / "stage_matrix.json")["checkpoints"] == ["import", *recipes.STAGES]
    assert call("run", f"--config={home}/tiny.py", f"--workdir={work}") == 0
    out = capsys.readouterr().out
    assert "import: already there" in out and "pretrain: already completed" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generate", "--stage=import", "--prompt=Ann likes", "--max_new_tokens=4"), '"prompt": "Ann likes"'),
        (("evaluate", "--stage=import"), '{"stage": "import", "step": 0, "loss": '),
        (("inspect", "--stage=import"), "import: batch 0"),
        (("checkpoints", "list"), "import"),
        (("checkpoints", "verify", "--stage=import"), "import/0: every file is as it was written"),
        (("checkpoints", "diff", "import/0", "pretrain/4"), "import/0 -> pretrain/4"),
    ],
)
def test_an_import_is_a_stage_like_any_other(
    home: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert call(*words, f"--workdir={home}/work") == 0
    assert said in capsys.readouterr().out


def test_the_last_stage_is_exported_with_its_lineage(home: Path, tmp_path: Path) -> None:
    assert call("export", f"--workdir={home}/work", f"--to={tmp_path}/out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n") and "Stage `instruct`" in card
    for stage in ("import", *recipes.STAGES):
        assert f"`{read_json(home / 'work' / stage / 'result.json')['params_sha256']}`" in card
    assert "| exact_match | " in card and "sets the field `license`" in card
    tokenizer = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert "<|assistant|>" in tokenizer["chat_template"]
    generation = read_json(tmp_path / "out" / "generation_config.json")
    assert len(generation["eos_token_id"]) == 2, "the end of a text, and of a turn"
    assert not list((tmp_path).glob("*.tmp"))
    assert read_json(tmp_path / "out" / "config.json")["max_position_embeddings"] == 64, "the folder's, not the rows'"


def test_an_import_alone_generates_and_has_no_data(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    work = f"--workdir={tmp_path}/a"
    assert call("import", f"--from={llama}", work) == 0
    assert call("generate", work, "--prompt=Ann", "--max_new_tokens=3") == 0
    assert call("import", f"--from={llama}", work) == 0
    assert "already there" in capsys.readouterr().out
    for words, complaint in (
        (("evaluate", "--stage=import"), "no stage, and so no data"),
        (("inspect",), "no stage, and so no data"),
        (("run",), "the recipe has no stage to run"),
        (("export", "--to=", "--stage=import"), "export needs --to=DIR"),
        (("export", f"--to={llama}"), "is there already, and not empty"),
        (("export", f"--to={tmp_path}/x", "--dtype=int8"), "--dtype=int8: known for folders: float32, bfloat16"),
        (("export", f"--to={tmp_path}/x", "--stage=pretrain"), "has no stage pretrain; it has import"),
        (("import",), "import needs --from=DIR"),
        (("import", "--from=nowhere"), "nowhere is no folder"),
        (("import", "--from=a/b", "--to=c"), "--to does not apply to import"),
    ):
        assert call(*words, work) == 2
        assert complaint in capsys.readouterr().err, words


def test_a_name_of_the_hub_needs_the_library_or_says_why(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from jaxstages.interop import hf_import

    class Hub:
        @staticmethod
        def snapshot_download(name: str, allow_patterns: list[str]) -> str:
            assert name == "who/what" and "*.safetensors" in allow_patterns and "*.py" not in allow_patterns
            raise OSError("no network")

    before = hf_import.importlib.import_module
    try:
        hf_import.importlib.import_module = lambda name: Hub if name == "huggingface_hub" else before(name)
        assert call("import", "--from=who/what", f"--workdir={tmp_path}/a") == 2
    finally:
        hf_import.importlib.import_module = before
    assert "who/what is no folder here, and the hub does not give it: no network" in capsys.readouterr().err


def test_a_recipe_that_contradicts_the_folder_is_refused_by_field(
    home: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = (home / "tiny.py").read_text()
    bad = tmp_path / "bad.py"
    for change, complaint in (
        ("ModelConfig(context=48, width=32)", "config.model.width: 32 -> 16"),
        ("ModelConfig(context=48, attention=AttentionConfig(qk_norm=True))", "config.model.attention.qk_norm: True ->"),
    ):
        bad.write_text(text.replace("ModelConfig(context=48)", change))
        assert call("run", f"--config={bad}", f"--workdir={tmp_path}/w") == 2
        assert complaint in capsys.readouterr().err
    bad.write_text(text.replace("= TokenizerConfig()", "= TokenizerConfig(vocab_size=999)"))
    assert call("run", f"--config={bad}", f"--workdir={tmp_path}/w") == 2
    assert "config.tokenizer.kind: 'bpe' -> 'file'" in capsys.readouterr().err
    bad.write_text(text.replace("return found", f"found.finetune.init_from = 'hf:{tmp_path}'; return found"))
    assert call("run", f"--config={bad}", f"--workdir={tmp_path}/w") == 2
    assert "a workdir has one import: name one of them" in capsys.readouterr().err


def test_a_folder_that_changed_since_is_refused(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(llama, tmp_path / "model")
    words = ("import", f"--from={tmp_path}/model", f"--workdir={tmp_path}/a")
    assert call(*words) == 0
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert call(*words) == 2
    assert "is not what was imported into" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "model")
    assert call("generate", f"--workdir={tmp_path}/a", "--prompt=x", "--max_new_tokens=2") == 0, "it is not needed"


def test_imported_weights_start_a_stage_of_another_context(home: Path, llama: Path, tmp_path: Path) -> None:
    """`import`, with its own context, and then a recipe with another: rope has no parameters."""
    assert call("import", f"--from={llama}", f"--workdir={tmp_path}/a") == 0
    meta = read_meta(checkpoint_folder(tmp_path / "a" / "import", 0))
    assert meta["model"]["context"] == 64 and meta["parent"] is None
    text = (home / "tiny.py").read_text().replace(f"hf:{llama}", "parent")
    (tmp_path / "b.py").write_text(text)
    stop = "--config.pretrain.loop.stop_after=1"
    assert call("pretrain", f"--config={tmp_path}/b.py", f"--workdir={tmp_path}/a", stop) == 0
    assert read_meta(checkpoint_folder(tmp_path / "a" / "pretrain", 1))["model"]["context"] == 48


@pytest.mark.parametrize("seconds", [0.0, 0.15, 0.4])
def test_a_killed_import_leaves_nothing_half_believed(llama: Path, tmp_path: Path, seconds: float) -> None:
    work = tmp_path / "work"
    words = [sys.executable, "-m", "jaxstages", "import", f"--from={llama}", f"--workdir={work}"]
    process = subprocess.Popen(words, env=os.environ | {"XLA_FLAGS": compiled.QUICK})
    while not (work / "import").exists():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not (work / "import" / "result.json").exists():
        assert call("generate", f"--workdir={work}", "--prompt=x") == 2
    assert call("import", f"--from={llama}", f"--workdir={work}") == 0
    assert call("import", f"--from={llama}", f"--workdir={tmp_path}/whole") == 0
    assert params_of(work) == params_of(tmp_path / "whole")


# What was trained here.


def test_a_model_trained_here_becomes_the_nearest_family() -> None:
    def kind(**changes: Any) -> str:
        return choose_family(model_config(vocab_size=64, **changes))[0].model_type

    part = {"heads": 2, "kv_heads": 1, "head_dim": 8}
    assert kind() == "llama"
    assert kind(attention=AttentionConfig(**part, qk_norm=True)) == "qwen3"
    # For qwen2 transformers builds a tokenizer of its own, so that only a Qwen2 becomes one.
    assert kind(attention=AttentionConfig(**part, qkv_bias=True)) == "seed_oss"
    assert kind(attention=AttentionConfig(**part, qkv_bias=True), family="qwen2") == "qwen2"
    assert kind(attention=AttentionConfig(**part, rope_dims=4)) == "phi3", "only there it is applied"
    assert kind(attention=AttentionConfig(heads=3, kv_heads=1, head_dim=8)) == "mistral", "others refuse the width"
    assert kind(attention=AttentionConfig(**part, window=5)) == "mistral"
    assert kind(activation="relu2") == "arcee"
    learned = AttentionConfig(heads=2, kv_heads=2, head_dim=8, position="learned")
    assert kind(attention=learned, norm="layernorm", bias=True, activation="gelu") == "gpt2"
    with pytest.raises(ValueError, match=r"no family .* can express this model: .*activation.*this model 'relu2'"):
        kind(attention=AttentionConfig(**part, qk_norm=True), activation="relu2")
    with pytest.raises(ValueError, match="no family"):
        kind(norm="layernorm", bias=False)


@pytest.mark.parametrize("name", ["demo", "text_to_chat"])
def test_what_the_recipes_train_has_a_family(name: str) -> None:
    recipe = runpy.run_path(str(Path(__file__).parents[1] / "configs" / f"{name}.py"))["get_config"]()
    assert choose_family(dataclasses.replace(recipe.model, vocab_size=64))[0].model_type == "qwen3"


def test_what_has_no_effect_does_not_keep_a_model_from_its_family() -> None:
    model = ModelConfig(vocab_size=64, attention=AttentionConfig(pattern=("global",), scale=32**-0.5))
    assert choose_family(model)[0] is LLAMA
    assert plain_model(model) == plain_model(ModelConfig(vocab_size=64, dropout=0.1, dtype="bfloat16"))


def test_a_trained_run_is_exported(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    made = recipe(tmp_path / "data", steps=2)
    made.finetune = made.instruct = None
    made.prompts = ()
    from jaxstages.cli.train import train

    train(made, tmp_path / "work", "pretrain")
    assert call("export", f"--workdir={tmp_path}/work", f"--to={tmp_path}/out") == 0
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["max_position_embeddings"] == 64
    assert call("import", f"--from={tmp_path}/out", f"--workdir={tmp_path}/back") == 0
    result = read_json(tmp_path / "work" / "pretrain" / "result.json")
    assert params_of(tmp_path / "back") == result["params_sha256"]


def test_large_parameters_are_written_and_read_in_pieces(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxstages.checkpoint import arrays

    assert call("import", f"--from={llama}", f"--workdir={tmp_path}/whole") == 0
    monkeypatch.setattr(arrays, "WRITE_CHUNK_BYTES", 2048)
    monkeypatch.setattr(arrays, "READ_BATCH_BYTES", 8192)
    read, parts = arrays.read, []
    monkeypatch.setattr(arrays, "read", lambda *words, **part: parts.append(1) or read(*words, **part))
    assert call("import", f"--from={llama}", f"--workdir={tmp_path}/pieces") == 0
    assert params_of(tmp_path / "pieces") == params_of(tmp_path / "whole")
    handler = ocp.PyTreeCheckpointHandler()
    largest = []
    for name in ("whole", "pieces"):
        written = handler.metadata(checkpoint_folder(tmp_path / name / "import", 0) / "params").tree
        largest.append(max(4 * math.prod(leaf.storage.chunk_shape) for leaf in jax.tree.leaves(written)))
    assert largest[1] <= 2048 < largest[0]
    assert call("export", f"--workdir={tmp_path}/pieces", f"--to={tmp_path}/out") == 0
    assert len(parts) > 3
    tensors, again = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "out"))
    assert all(np.array_equal(again[name], value) for name, value in tensors.items())


def test_adapters_alone_are_for_stages_that_have_them_and_families_with_a_place_for_them(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert call("export", f"--workdir={home}/work", f"--to={tmp_path}/x", "--adapter") == 2
    assert "instruct has no adapters, it trained all parameters; export it without --adapter" in capsys.readouterr().err
    assert call("export", f"--workdir={home}/work", f"--to={tmp_path}/x", "--adapter", "--dtype=bfloat16") == 2
    assert "--dtype=bfloat16 does not apply to --adapter" in capsys.readouterr().err
    leaf = np.zeros((2, 16, 4), np.float32)
    shapes = {"layers/attention/query/kernel": (2, 16, 2, 8)}
    leaves = {"layers/attention/query/lora_a": leaf, "layers/attention/query/lora_b": np.zeros((2, 4, 16), np.float32)}
    tensors, rows = peft._tensors(LLAMA, leaves, shapes)
    assert [row.name for row in rows] == ["model.layers.{n}.self_attn.q_proj.weight"]
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (4, 16)
    imported = {"params_sha256": "a", "source": {"folder": "x", "new_tokens": [], "wrapper": "gemma3"}}
    write_json(tmp_path / "import" / "result.json", imported)
    with pytest.raises(ValueError, match="the imported base is a gemma3, in which PEFT names"):
        peft._base_of(tmp_path, {"parent": {"params_sha256": "a"}})
    for family, place in (("llama", "embedding"), ("mixtral", "layers/experts/up")):
        with pytest.raises(ValueError, match=f"PEFT has no adapter for {place}"):
            peft._tensors(FAMILIES[family], {f"{place}/lora_a": leaf}, shapes)
