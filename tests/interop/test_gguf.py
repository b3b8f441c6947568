"""GGUF files: the table of llama.cpp's architectures, tokenizers, the file and its Modelfile, and what is refused.

The last part compares with llama.cpp itself, where `llama_cpp` is installed: log-probabilities, greedy tokens, and ids
of 500 texts.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxstages.cli.resolve import resolve_recipe
from jaxstages.cli.train import train
from jaxstages.config import AttentionConfig, ModelConfig, RopeScalingConfig, TokenizerConfig
from jaxstages.data.tokenizer import load_tokenizer
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.interop import gguf_export
from jaxstages.interop.config_json import read_config
from jaxstages.interop.families import FAMILIES
from jaxstages.interop.gguf_layout import PLAIN, SIZES, choose_arch, hyperparameters, tensors
from jaxstages.interop.gguf_tokenizer import CONTROL, vocabulary
from jaxstages.models.ops import REFERENCE
from jaxstages.models.rope import rope_frequencies
from jaxstages.models.transformer import make_model
from jaxstages.runtime.files import read_json, write_json
from jaxstages.training.handoff import read_parent
from jaxstages.training.setup import setup_stage
from jaxstages.types import Batch
from tests.test_interop import call, config_of, write_folder
from tests.tiny import model_config, recipe, write_data

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed: pip install '.[gguf]'")


# Architectures.


def model_of(kind: str, **changes: Any) -> ModelConfig:
    return read_config(config_of(kind, **changes), "config.json").model


def test_each_field_of_a_model_is_checked_or_known_to_be_a_size() -> None:
    """A new field must not be ignored by exports."""

    def paths(config: Any, prefix: str = "") -> list[str]:
        fields = [(f"{prefix}{field.name}", getattr(config, field.name)) for field in dataclasses.fields(config)]
        return [
            path
            for name, value in fields
            for path in (paths(value, f"{name}.") if dataclasses.is_dataclass(value) else [name])
        ]

    assert sorted([*PLAIN, *SIZES]) == sorted(paths(ModelConfig()))


COMPUTED = {
    **{kind: kind for kind in ("llama", "qwen2", "qwen3", "gemma", "olmo2", "smollm3", "granite", "arcee", "gpt2")},
    **{"internlm3": "llama", "iquestcoder": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "olmo3": "olmo2"},
    **{"jais2": "jais2", "starcoder2": "starcoder2", "mistral": "llama", "ministral": "llama", "phi3": "phi3"},
    **{"seed_oss": "llama", "mellum": "qwen3moe", "cwm": "llama"},
}
REFUSED = {
    "gemma2": "gemma2 has model.attention.scale=0.353553, this model 0.408248",
    "vaultgemma": "gemma2 has model.norm_place='both', this model 'before'",
    "exaone4": "this model local, local, local, nope ... (windows of 5)",
    "qwen3_moe": "qwen3moe has model.experts.normalize=True, this model False",
    "olmoe": "has qk_norm_over='head', this model 'heads'",
    "flex_olmo": "olmo2 has model.experts.count=0, this model 3",
    "hyperclovax": "granite has model.norm_place='before', this model 'both'",
    "ministral3": "llama has model.attention.rope_scaling.attention_factor=0.0, this model 1.0",
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_family_has_an_architecture_or_a_reason(kind: str) -> None:
    if kind in COMPUTED:
        assert choose_arch(model_of(kind), 64).arch.name == COMPUTED[kind]
        return
    with pytest.raises(ValueError, match="no architecture of llama.cpp computes this model: ") as raised:
        choose_arch(model_of(kind), 64)
    assert REFUSED[kind] in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("olmo2", {"head_dim": 6}, "olmo2 has heads * head_dim = width, this model 2 * 6 and 16"),
        ("gpt2", {"activation_function": "gelu"}, "gpt2 has model.activation='gelu', this model 'gelu_erf'"),
        ("gemma", {"tie_word_embeddings": False}, "gemma has model.tied_head=True, this model False"),
        (
            "gemma2",
            {"final_logit_softcapping": None},
            "gemma2 has model.logit_softcap=a number above 0, this model 0.0",
        ),
        ("smollm3", {"no_rope_layer_interval": 2}, "every fourth without RoPE layers, this model global, nope"),
        (
            "llama",
            {"hidden_act": "gelu_pytorch_tanh"},
            "llama has model.activation='swiglu', this model 'geglu'",
        ),
        ("qwen3", {"attention_bias": True}, "qwen3 has model.attention.out_bias=False, this model True"),
    ],
)
def test_a_feature_that_an_architecture_lacks_is_named(kind: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        choose_arch(model_of(kind, **changes), 64)


def test_a_model_trained_here_takes_the_first_that_fits() -> None:
    part = {"heads": 2, "kv_heads": 1, "head_dim": 8}
    assert choose_arch(model_config(), 16).arch.name == "llama"
    assert choose_arch(model_config(attention=AttentionConfig(**part, qk_norm=True)), 16).arch.name == "qwen3"
    assert choose_arch(model_config(activation="relu2"), 16).arch.name == "arcee"
    with pytest.raises(ValueError, match="model.activation='swiglu', this model 'relu2'"):
        choose_arch(model_config(attention=AttentionConfig(**part, qk_norm=True), activation="relu2"), 16)


def test_a_window_becomes_the_context_of_an_architecture_without_windows() -> None:
    window = model_config(attention=AttentionConfig(heads=2, kv_heads=2, head_dim=8, window=5))
    arch, model, context = choose_arch(window, 16)
    assert (arch.name, model.attention.window, context) == ("llama", 0, 5)
    assert choose_arch(window, 4).context == 4


def test_scores_of_the_largest_gemmas_are_scaled_by_width() -> None:
    """27B: `query_pre_attn_scalar` is the width per head, not the dims of a head."""
    sizes = {"hidden_size": 36, "num_attention_heads": 2, "head_dim": 8}
    wide = sizes | {"num_hidden_layers": 62, "query_pre_attn_scalar": 18}
    assert choose_arch(model_of("gemma3_text", **wide), 64).arch.name == "gemma3"
    for changes in ({"num_hidden_layers": 61}, {"query_pre_attn_scalar": 8}):
        with pytest.raises(ValueError, match=r"gemma3 has model\.attention\.scale"):
            choose_arch(model_of("gemma3_text", **(wide | changes)), 64)


# Tensors and hyperparameters.


def leaves_of(model: ModelConfig) -> dict[str, np.ndarray]:
    from jaxstages.checkpoint.fingerprint import named_leaves

    tree = jax.eval_shape(make_model(model, 7).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in named_leaves(tree).items()}


def test_where_each_tensor_goes() -> None:
    """By hand, not by the table."""
    model = model_of("llama", vocab_size=7, head_dim=6)
    leaves = leaves_of(model)
    stored = dict(tensors(choose_arch(model, 64).arch, model, leaves))
    query, out = (leaves[f"layers/attention/{name}/kernel"] for name in ("query", "out"))
    rows = stored["blk.1.attn_q.weight"]
    for head, (position, dim) in itertools.product(range(2), enumerate((0, 3, 1, 4, 2, 5))):
        np.testing.assert_array_equal(rows[6 * head + position], query[1, :, head, dim])
    np.testing.assert_array_equal(stored["blk.2.attn_output.weight"][:, 6:], out[2, 1].T)
    np.testing.assert_array_equal(stored["blk.0.ffn_down.weight"], leaves["layers/ff/down/kernel"][0].T)
    np.testing.assert_array_equal(stored["output.weight"], leaves["head"])

    model = model_of("phi3", vocab_size=7, sliding_window=None)
    leaves = leaves_of(model)
    stored = dict(tensors(choose_arch(model, 64).arch, model, leaves))
    value = leaves["layers/attention/value/kernel"]
    np.testing.assert_array_equal(stored["blk.3.attn_qkv.weight"][-8:], value[3, :, 0].T)
    np.testing.assert_array_equal(stored["blk.3.ffn_up.weight"][:20], leaves["layers/ff/gate/kernel"][3].T)

    model = model_of("gemma", vocab_size=7)
    leaves = leaves_of(model)
    stored = dict(tensors(choose_arch(model, 64).arch, model, leaves))
    np.testing.assert_array_equal(stored["output_norm.weight"], leaves["final_norm/scale"] + 1)
    np.testing.assert_array_equal(stored["token_embd.weight"], leaves["embedding"])

    model = model_of("mixtral", vocab_size=7)
    leaves = leaves_of(model)
    stored = dict(tensors(choose_arch(model, 64).arch, model, leaves))
    np.testing.assert_array_equal(stored["blk.0.ffn_gate_exps.weight"][2], leaves["layers/experts/gate"][0, 2].T)


def test_hyperparameters_of_windows_and_scalings() -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 1e3}
    ropes = {"full_attention": scaled, "sliding_attention": local}
    model = model_of("gemma3_text", sliding_window=9, sliding_window_pattern=2, rope_parameters=ropes)
    keys = hyperparameters(choose_arch(model, 64).arch, model, 64)
    assert keys["gemma3.attention.sliding_window_pattern"] == [True, False, True, False]
    assert (keys["gemma3.attention.sliding_window"], keys["gemma3.context_length"]) == (9, 64)
    assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (1e6, 1e3)
    assert (keys["gemma3.rope.scaling.type"], keys["gemma3.rope.scaling.factor"]) == ("linear", 4.0)
    model = model_of("granite")
    keys = hyperparameters(choose_arch(model, 64).arch, model, 64)
    assert (keys["granite.logit_scale"], keys["granite.attention.scale"]) == (pytest.approx(6.0), 0.25)

    yarn = RopeScalingConfig(kind="yarn", factor=8.0, trained_context=32, beta_fast=9.0, beta_slow=2.0)
    model = model_config(attention=AttentionConfig(heads=2, kv_heads=2, head_dim=8, rope_scaling=yarn))
    keys = hyperparameters(choose_arch(model, 64).arch, model, 64)
    names = ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
    assert [keys[f"llama.rope.scaling.{name}"] for name in names] == ["yarn", 8.0, 32, 9.0, 2.0]

    llama3 = RopeScalingConfig(kind="llama3", factor=8.0, trained_context=32)
    model = model_config(attention=AttentionConfig(heads=2, kv_heads=2, head_dim=8, rope_scaling=llama3))
    divisors = dict(tensors(choose_arch(model, 64).arch, model, leaves_of(model)))["rope_freqs.weight"]
    plain = dataclasses.replace(model.attention, rope_scaling=RopeScalingConfig())
    expected = rope_frequencies(plain, "global") / divisors
    np.testing.assert_allclose(expected, rope_frequencies(model.attention, "global"), rtol=1e-6)


# Tokenizers.

TEXT = "Ann likes red. Bob likes blue, and grey is a colour; it's 1984 again, isn't it?\n\n" * 3


def bpe(pre_tokenizer: Any, texts: Sequence[str] = (TEXT,), size: int = 300, **options: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE. Its merges cross words, so that a text that is split differently gets other ids."""
    backend = tokenizers.Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings: Any = {"initial_alphabet": alphabet, "special_tokens": ["<s>"], "show_progress": False}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **settings))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    return backend


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    steps = [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert)]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "gpt-2": (BYTES, {}),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), {}),
    "qwen2": (split(CL100K.replace("{1,3}", "")), {}),
    "llama-bpe": (split(CL100K, "removed", True), {"ignore_merges": True}),
    "dbrx": (split(CL100K), {}),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_pre_tokenizer_is_named_by_its_regular_expressions(name: str) -> None:
    backend = bpe(SPLITS[name][0], **SPLITS[name][1])
    keys = vocabulary(json.loads(backend.to_str()), 310, "x")
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert keys["tokenizer.ggml.tokens"][309] == "[PAD309]" and len(keys["tokenizer.ggml.token_type"]) == 310
    assert keys["tokenizer.ggml.token_type"][0] == CONTROL


def test_our_own_tokenizer_splits_as_gpt_2(tmp_path: Path) -> None:
    make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), iter([TEXT]), tmp_path / "tokenizer.json")
    keys = vocabulary(read_json(tmp_path / "tokenizer.json"), 300, "x")
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.tokens"][:2] == ["<|endoftext|>", "<|sep|>"]
    assert keys["tokenizer.ggml.merges"][0] == " ".join(read_json(tmp_path / "tokenizer.json")["model"]["merges"][0])


def spoiled(**changes: Any) -> dict[str, Any]:
    content = json.loads(bpe(BYTES).to_str())
    model = {key: changes.pop(key) for key in [*changes] if key in ("type", "dropout", "merges", "ignore_merges")}
    content["model"] |= model
    return content | changes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (spoiled(type="WordLevel"), "x is of type WordLevel; GGUF files can have BPE"),
        (spoiled(type="Unigram"), "x is of type Unigram; GGUF files can have BPE"),
        (spoiled(dropout=0.1), "x has dropout=0.1, which llama.cpp does not know"),
        (spoiled(merges=[]), "x has no merges"),
        (
            spoiled(ignore_merges=True),
            "ignoring merges, which is no pre-tokenizer of llama.cpp (compared: gpt-2, smollm,",
        ),
        (spoiled(normalizer={"type": "Lowercase"}), "x has a normalizer (Lowercase), which llama.cpp does not apply"),
        (
            json.loads(bpe(split(r"\w+|[^\w]+")).to_str()),
            r"x splits words by '\\w+|[^\\w]+', which is no pre-tokenizer",
        ),
        (json.loads(bpe(pre_tokenizers.ByteLevel()).to_str()), '"add_prefix_space": true'),
        (
            spoiled(added_tokens=[{"id": 5, "content": "<x>", "special": False, "lstrip": True, "rstrip": False}]),
            "x: '<x>' has lstrip, which llama.cpp does not know",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        vocabulary(content, 310, "x")
    assert "\n" not in str(raised.value)


LIKES = ("\u2581a", "ab", "li", "ke", "\u2581l", "re", "\u2581\u2581", "\u2581li", "red", "\u2581like", "\u2581likes")


def sentencepiece(words: Sequence[str] = LIKES, **changes: Any) -> dict[str, Any]:
    """A BPE as Llama 2 has it: bytes, letters, and merges in the order of their tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcnlikesrd.éß"]
    tokens += sorted(set("".join(words)) - {*tokens})
    words = [word for word in words if word not in tokens]
    vocab = {token: i for i, token in enumerate([*tokens, *words])}
    merges = [(w[:n], w[n:]) for w in words for n in range(1, len(w)) if w[:n] in vocab and w[n:] in vocab]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>", "<|endoftext|>"])
    content = json.loads(backend.to_str())
    content["model"] |= {key: changes.pop(key) for key in [*changes] if key in content["model"]}
    return content | changes


def test_sentencepiece_gets_scores_in_the_order_of_its_merges() -> None:
    keys = vocabulary(sentencepiece(), 320, "x")
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"]
    tokens, scores, types = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    score = dict(zip(tokens, scores, strict=True))
    assert score["\u2581a"] > score["\u2581li"] > score["\u2581like"] > score["\u2581likes"] > score["a"]
    assert types[:4] == [2, 3, 3, 6] and keys["tokenizer.ggml.unknown_token_id"] == 0
    bare = sentencepiece(normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})
    assert not vocabulary(bare, 320, "x")["tokenizer.ggml.add_space_prefix"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"byte_fallback": False}, "x has byte_fallback=False; llama.cpp encodes unknown characters as bytes"),
        ({"merges": [["\u2581", "a"]]}, "x has 0 merges into 'ab', and llama.cpp would have 1"),
        ({"merges": [["\u2581", "a"], ["a", "b"], ["\u2581", "a"]]}, "x merges into '\u2581a' at two ranks"),
        ({"normalizer": {"type": "NFKC"}}, 'x has {"type": "NFKC"}, which llama.cpp does not apply to a text'),
        ({"normalizer": None}, "x does not write spaces as"),
    ],
)
def test_a_sentencepiece_that_would_split_differently_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        vocabulary(sentencepiece(**changes), 320, "x")


def test_llama_cpp_also_merges_characters_that_are_no_tokens() -> None:
    content = sentencepiece(("zz",))
    assert vocabulary(content, 320, "x")["tokenizer.ggml.model"] == "llama"
    del content["model"]["vocab"]["z"]
    content["model"]["merges"] = [["a", "b"]]
    with pytest.raises(ValueError, match="x has 0 merges into 'zz', and llama.cpp would have 1"):
        vocabulary(content, 330, "x")


def test_text_that_can_become_a_control_token_there_is_named(capsys: pytest.CaptureFixture) -> None:
    vocabulary(sentencepiece(), 330, "x")
    assert "text that spells" not in capsys.readouterr().out
    vocabulary(sentencepiece(("<s", "12")), 330, "x")
    assert "in llama.cpp, text that spells <s> can become that token" in capsys.readouterr().out


# The file and its Modelfile.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages, trained here."""
    root = tmp_path_factory.mktemp("run")
    write_data(root / "data")
    made = recipe(root / "data", steps=4)
    made.model.context = 96
    for stage in ("pretrain", "finetune", "instruct"):
        train(made, root / "work", stage)
    return root / "work"


def contents(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Instructions of a Modelfile with their values; triple quotes may span lines."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    actual = re.findall(
        r'^(FROM|TEMPLATE|PARAMETER \w+) (?:"""(.*?)"""|"(.*?)"|(.*?))$', text, re.MULTILINE | re.DOTALL
    )
    return [(name, next(filter(None, values), "")) for name, *values in actual]


def test_a_run_is_exported_with_its_tokenizer_and_a_modelfile(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "model.gguf"
    assert call("export", f"--workdir={run}", f"--to={file}") == 0
    keys, tokenizer = contents(file), load_tokenizer(run / "tokenizer" / "tokenizer.json")
    assert (keys["general.architecture"], keys["general.name"], keys["general.file_type"]) == ("llama", "tiny", 0)
    assert (keys["llama.context_length"], keys["llama.vocab_size"]) == (96, tokenizer.vocab_size)
    assert keys["tokenizer.ggml.eos_token_id"] == tokenizer.specials.end_of_text
    assert keys["tokenizer.ggml.eot_token_id"] == tokenizer.specials.end_of_turn
    assert keys["tokenizer.ggml.bos_token_id"] == tokenizer.begin[0] and keys["tokenizer.ggml.add_bos_token"]
    assert keys["jaxstages.params_sha256"] == read_json(run / "instruct" / "result.json")["params_sha256"]
    assert sorted(path.name for path in file.parent.iterdir()) == ["Modelfile", "model.gguf"]

    modelfile = read_modelfile((tmp_path / "out" / "Modelfile").read_text())
    assert modelfile[0] == ("FROM", "./model.gguf")
    assert modelfile[2:] == [
        ("PARAMETER stop", "<|endoftext|>"),
        ("PARAMETER stop", "<|end|>"),
        ("PARAMETER num_ctx", "96"),
    ]
    messages = [("system", "Be brief."), ("user", "say red"), ("assistant", "red"), ("user", "and Ann")]
    from jaxstages.data.chat import make_chat

    ours = make_chat(tokenizer).render([{"role": role, "content": text} for role, text in messages], None, True)
    assert "<|endoftext|>" + in_go(modelfile[1][1], messages) == ours
    from jaxstages.data.chat_template import make_render

    render = make_render(keys["tokenizer.chat_template"], "", "")
    assert render([{"role": role, "content": text} for role, text in messages], None, True).text == ours


def in_go(template: str, messages: list[tuple[str, str]]) -> str:
    """Render a Go template that consists of text, fields, and one loop over the messages."""
    before, body, after = re.fullmatch(r"(.*)\{\{ range \.Messages }}(.*)\{\{ end }}(.*)", template, re.DOTALL).groups()  # type: ignore[union-attr]
    turns = [body.replace("{{ .Role }}", role).replace("{{ .Content }}", text) for role, text in messages]
    assert not any("{{" in text for text in (before, after, *turns))
    return before + "".join(turns) + after


@pytest.mark.parametrize(
    ("dtype", "file_type", "bound"), [("float16", 1, 5e-4), ("bfloat16", 32, 4e-3), ("q8_0", 7, 5e-3)]
)
def test_smaller_types_round_as_they_say(
    dtype: str, file_type: int, bound: float, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert call("export", f"--workdir={run}", f"--to={tmp_path}/f32/x.gguf") == 0
    assert call("export", f"--workdir={run}", f"--to={tmp_path}/small/x.gguf", f"--dtype={dtype}") == 0
    exact, small = (gguf.GGUFReader(tmp_path / name / "x.gguf") for name in ("f32", "small"))
    assert contents(tmp_path / "small" / "x.gguf")["general.file_type"] == file_type
    for left, right in zip(exact.tensors, small.tensors, strict=True):
        values = gguf.quants.dequantize(right.data, right.tensor_type)
        assert left.name == right.name and values.shape == left.data.shape
        kind = right.tensor_type.name
        if left.data.ndim == 1:
            assert kind == "F32"
        elif dtype == "q8_0":
            assert kind == ("F16" if left.data.shape[-1] % 32 else "Q8_0")
        np.testing.assert_allclose(values, left.data, atol=bound * np.abs(left.data).max())
    assert ("tensors are float16" in capsys.readouterr().out) == (dtype == "q8_0")


def test_a_file_is_never_overwritten_and_never_left_half_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("export", f"--workdir={run}", f"--to={tmp_path}/out/model.gguf")
    quantize = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda values, kind: quantize(values * np.float32(1.0001), kind))
    assert call(*words) == 74
    err = capsys.readouterr().err
    assert "is not what was to be written: token_embd.weight, " in err and err.count("\n") == 1
    assert not [*(tmp_path / "out").iterdir()]
    monkeypatch.undo()
    assert call(*words) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert call(*words) == 2
    assert "model.gguf is there already; export into another folder" in capsys.readouterr().err
    assert call(*words[:2], f"--to={tmp_path}/out/other.gguf") == 2
    assert "Modelfile is there already" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_what_cant_be_exported_is_refused_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str) -> str:
        assert call("export", f"--workdir={run}", *words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and not (tmp_path / "x.gguf").exists()
        return err

    to = f"--to={tmp_path}/x.gguf"
    assert "--dtype=int4: known for GGUF files: float32, float16, bfloat16, q8_0" in refused(to, "--dtype=int4")
    assert "--dtype=q8_0: known for folders: float32, bfloat16" in refused(f"--to={tmp_path}/x", "--dtype=q8_0")
    assert "--adapter does not apply to --to=" in refused(to, "--adapter")
    monkeypatch.setattr(gguf_export, "LARGEST_FLOAT16", 1e-3)
    assert "too large for float16; take --dtype=bfloat16" in refused(to, "--dtype=float16")
    custom: Any = SimpleNamespace(model=SimpleNamespace())
    with pytest.raises(ValueError, match="is a custom model; export needs a ModelConfig"):
        gguf_export.export_gguf(custom, run, "instruct", tmp_path / "x.gguf", "float32")
    monkeypatch.setattr(gguf_export.importlib, "import_module", lambda name: exec("raise ImportError"))
    assert "GGUF files need the library gguf; install it: pip install '.[gguf]'" in refused(to)


def test_an_imported_model_keeps_its_own_ids_template_and_context(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    write_folder(folder, config_of("qwen2") | {"eos_token_id": [5, 0], "max_position_embeddings": 4096})
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|", "<:").replace("|>", ":>"))
    template = "{% for m in messages %}<:user:>{{ m['content'] }}<:end:>{% endfor %}"
    write_json(folder / "tokenizer_config.json", {"eos_token": "<:end:>", "chat_template": template})
    assert call("import", f"--from={folder}", f"--workdir={tmp_path}/work") == 0
    assert call("export", f"--workdir={tmp_path}/work", f"--to={tmp_path}/out/m.gguf") == 0
    keys = contents(tmp_path / "out" / "m.gguf")
    assert (keys["qwen2.context_length"], keys["qwen2.vocab_size"]) == (4096, 320)
    assert keys["tokenizer.chat_template"] == template and not keys["tokenizer.ggml.add_bos_token"]
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (5, 0)
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "TEMPLATE" not in dict(read_modelfile(text)) and "the model's own is in Jinja" in text
    assert dict(read_modelfile(text))["PARAMETER num_ctx"] == "4096"


# llama.cpp.


LENGTH, NEW = 48, 64


class Theirs:
    """A model in llama.cpp, computed in float32 as far as the file allows."""

    def __init__(self, file: Path, context: int = 96, vocab_only: bool = False) -> None:
        library: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
        options = {"type_k": 0, "type_v": 0, "flash_attn": False, "n_threads": 1, "n_gpu_layers": 0}
        options |= {"n_ctx": context, "n_batch": context, "logits_all": True, "vocab_only": vocab_only}
        self.llama = library.Llama(str(file), verbose=False, **options)

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        self.llama.reset()
        self.llama.eval(ids)
        logits = np.array(self.llama.scores[: len(ids)], np.float64)
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    def greedy(self, ids: list[int], new: int) -> list[int]:
        self.llama.reset()
        self.llama.eval(ids)
        out = [int(self.llama.scores[len(ids) - 1].argmax())]
        while len(out) < new:
            self.llama.eval(out[-1:])
            out.append(int(self.llama.scores[len(ids) + len(out) - 1].argmax()))
        return out

    def encode(self, text: str) -> list[int]:
        return [] if not text else self.llama.tokenize(text.encode(), add_bos=False, special=False)


def to_float16(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float16).astype(jnp.float32)


def gelu_of_llama_cpp(name: str, x: jax.Array) -> jax.Array:
    """llama.cpp looks gelu up in a table of float16 numbers by float16 numbers."""
    return (
        to_float16(REFERENCE.activation(name, to_float16(x)))
        if name in ("gelu", "geglu")
        else REFERENCE.activation(name, x)
    )


def ours_of(workdir: Path, stage: str, ids: list[int], dtype: str) -> np.ndarray:
    """Log-probabilities of a row here, with the arithmetic of llama.cpp: matrices in float16 are multiplied with
    activations in float16, summed in float32."""
    setup = setup_stage(resolve_recipe(None, workdir), stage, workdir, with_data=False)
    spread, _ = read_parent(setup.folder, setup.program, setup.contract)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), spread)
    rounded = to_float16 if dtype == "float16" else jnp.asarray
    for name in {"embedding", "head"} & params.keys():
        params[name] = rounded(params[name])

    def linear(x: jax.Array, kernel_IO: jax.Array, names: Any = ("", "")) -> jax.Array:
        return REFERENCE.linear(rounded(x), rounded(kernel_IO), names)

    ops = REFERENCE._replace(linear=linear, activation=gelu_of_llama_cpp)
    row = jnp.asarray([ids], jnp.int32)
    ones = jnp.ones_like(row)
    batch = Batch(row, row, ones.astype(jnp.float32), ones, jnp.arange(len(ids), dtype=jnp.int32)[None])
    model = make_model(setup.recipe.model, setup.data.tokenizer.vocab_size, ops=ops)
    output = model.hidden(params, batch, None)
    logits = output._replace(hidden_BLD=rounded(output.hidden_BLD)).logits()[0]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


SCALING = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3, YARN, LINEAR = ({"rope_type": kind} | SCALING for kind in ("llama3", "yarn", "linear"))
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e3}
MODELS: dict[str, dict[str, Any]] = {
    "llama, llama3 scaling": {"head_dim": 12, "rope_parameters": LLAMA3},
    "llama, biases, yarn": {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN},
    "mixtral, linear scaling": {"sliding_window": None, "rope_parameters": LINEAR},
    "qwen2": {"rope_parameters": YARN},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {"norm_topk_prob": True},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 7},
    "gemma3_text": {
        **{"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN_ROPE},
    },
    "olmo2": {"tie_word_embeddings": True},
    "olmo3": {
        "sliding_window": 7,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN_ROPE | {"rope_theta": 1e4}},
    },
    "phi3": {"sliding_window": None, "partial_rotary_factor": 0.5},
    "granite": {"attention_bias": True, "logits_scaling": 1.5},
    "smollm3": {},
    "arcee": {},
    "gpt2": {"n_positions": 96},
    "starcoder2": {},
    "jais2": {},
}


def write_lively_folder(folder: Path, config: dict[str, Any]) -> None:
    """A random model whose predictions are far from uniform, so that an error in any tensor shows."""
    from safetensors.numpy import save_file

    lively = {}
    for name, values in write_folder(folder, config).items():
        if values.ndim == 1:
            one_is_added = name.endswith("bias") or "gemma" in config["model_type"]
            lively[name] = 3 * values + np.float32(0 if one_is_added else 1)
        else:
            lively[name] = values * np.float32(3 if "emb" in name or "wte" in name else 10 / values.shape[-1] ** 0.5)
    save_file(lively, folder / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    config = config_of(name.split(",")[0], **({"max_position_embeddings": 96} | MODELS[name]))
    write_lively_folder(tmp_path / "hf", config)
    assert call("import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/work") == 0
    check_same(tmp_path / "work", "import", "float32", tmp_path / "float32", name)
    if "moe" not in name and "mixtral" not in name:  # whose products of float16 have no counterpart here
        # An activation on the border of two numbers of float16 is rounded to either of them.
        check_same(tmp_path / "work", "import", "float16", tmp_path / "float16", name, bound=1e-2)


def test_llama_cpp_computes_the_same_for_a_run(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    for dtype in ("float32", "float16"):
        check_same(run, "instruct", dtype, tmp_path / dtype, "trained here")
    prompt = list(range(40))
    expected = ours_of(run, "instruct", prompt, "float32")
    for dtype in ("bfloat16", "q8_0"):
        to = tmp_path / dtype / "m.gguf"
        assert call("export", f"--workdir={run}", f"--to={to}", f"--dtype={dtype}") == 0
        difference = float(np.abs(Theirs(to).log_probabilities(prompt) - expected).max())
        print(f"| trained here | {dtype} | {difference:.1e} | {expected.std():.2f} |")
        assert difference <= 0.02


def check_same(workdir: Path, stage: str, dtype: str, folder: Path, name: str, bound: float = 1e-3) -> None:
    """Greedy tokens are equal, and log-probabilities up to `bound`."""
    assert call("export", f"--workdir={workdir}", f"--to={folder}/m.gguf", f"--stage={stage}", f"--dtype={dtype}") == 0
    theirs = Theirs(folder / "m.gguf")
    prompt = np.random.default_rng(0).integers(0, 280, LENGTH - 16).tolist()
    ids = prompt + theirs.greedy(prompt, NEW)
    expected = ours_of(workdir, stage, ids, dtype)
    assert np.array_equal(expected.argmax(-1)[len(prompt) - 1 : -1], ids[len(prompt) :])
    difference = float(np.abs(theirs.log_probabilities(ids) - expected).max())
    print(f"| {name} | {dtype} | {difference:.1e} | {expected.std():.2f} |")
    assert difference <= bound < expected.std() / 50


PIECES = (
    *("the ", "Ann", "'s", "'S", "'LL", "n't", " it's", "I'M", "1984", "٣٤", "½", "Ⅷ", "²", "12345678", " 7", "a1b2"),
    *(" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n ", " \n", "\u00a0", "\u2003", "\u3000", "\u0085", "\u200b", "\ufeff"),
    *(
        "\u180e",
        "\u2028",
        "\x0b",
        "\x1f",
        "\x1c",
        "\x7f",
        "\u2581",
        "\u2581\u2581a",
        "é",
        "e\u0301",
        "ß",
        "ﬁ",
        "İ",
        "ǅ",
    ),
    *(
        "日本語",
        "中文，",
        "한국어",
        "עברית",
        "العربية",
        "हिन्दी",
        "ไทย",
        "🙂",
        "👩‍👩‍👧",
        "🇩🇪",
        "\U0001d518",
        "\u0378",
        "\ue000",
    ),
    *("<|end|>", "<|endoftext|>", "<s>", "</s>", "<0x0A>", "[PAD7]", "<unk>", "<|im_end|>", "Ġ", "ĊĊ", "Ā"),
    *(
        "...",
        "!?",
        "--",
        "$5",
        "@x",
        "#1",
        "{}[]",
        "\\n",
        "=" * 9,
        "ab" * 20,
        "_",
        "`",
        "“”",
        "—",
        "\u0300",
        "A\u0300\u0301",
    ),
)
"""What tokenizers disagree about."""


def nasty_texts(count: int = 500) -> list[str]:
    rng = np.random.default_rng(0)
    singles = [*PIECES, *(f"{piece} x" for piece in PIECES)]
    mixed = ["".join(rng.choice(PIECES, rng.integers(2, 12))) for _ in range(count - len(singles))]
    return [*singles, *mixed]


def check_same_ids(content: dict[str, Any], folder: Path) -> None:
    """A tokenizer.json gives the same ids here and there."""
    folder.mkdir(parents=True)
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<s>"})
    source = TokenizerConfig(kind="file", path=str(folder / "tokenizer.json"))
    ours = make_tokenizer(source, iter(()), folder / "made" / "tokenizer.json", tasks=())
    keys = vocabulary(content, ours.vocab_size, "x") | {"tokenizer.ggml.add_bos_token": False}
    keys |= hyperparameters(choose_arch(model_config(), 16).arch, model_config(), 16)
    gguf_export._write(gguf, folder / "x.gguf", "llama", keys, lambda: iter(()), "F32")
    theirs = Theirs(folder / "x.gguf", vocab_only=True)

    differing = [
        (text, ours.encode(text).tolist(), theirs.encode(text))
        for text in nasty_texts()
        if ours.encode(text).tolist() != theirs.encode(text)
    ]
    assert not differing, f"{len(differing)} of 500, such as {differing[:3]}"


@pytest.mark.parametrize("name", [*SPLITS, "sentencepiece", "sentencepiece without a space in front"])
def test_llama_cpp_encodes_nasty_texts_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    texts = nasty_texts()
    joined = " ".join(texts).replace(" ", "\u2581")
    cuts = np.random.default_rng(1).integers(0, len(joined) - 5, 2000)
    words = dict.fromkeys(joined[cut : cut + 2 + n % 4] for n, cut in enumerate(cuts))
    words = [word for word in words if not {*"<>"} & {*word}]  # else text that spells a control token becomes one
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    match name:
        case "sentencepiece":
            content = sentencepiece(words)
        case "sentencepiece without a space in front":
            content = sentencepiece(words, normalizer=escape)
        case _:
            content = json.loads(bpe(SPLITS[name][0], texts, 3000, **SPLITS[name][1]).to_str())
    check_same_ids(content, tmp_path / "x")


def test_llama_cpp_encodes_nasty_texts_as_a_run_does(run: Path, tmp_path: Path) -> None:
    theirs = Theirs(export_of(run, tmp_path))
    ours = load_tokenizer(run / "tokenizer" / "tokenizer.json")
    assert all(ours.encode(text).tolist() == theirs.encode(text) for text in nasty_texts())
    assert theirs.llama.tokenize(b"say red", add_bos=True, special=True)[0] == ours.begin[0]
    assert theirs.llama.tokenize(b"<|end|>", add_bos=False, special=True) == [ours.specials.end_of_turn]


def export_of(workdir: Path, folder: Path) -> Path:
    assert call("export", f"--workdir={workdir}", f"--to={folder}/out/m.gguf") == 0
    return folder / "out" / "m.gguf"
