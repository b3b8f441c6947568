"""Families of open models as tables: the tensors of each parameter, and the keys of `config.json`.

A family has no code of its own. `models/` implements what all of them need, and this file selects from it.

Legend: N layers, E experts.
"""

from typing import Any, NamedTuple

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Kinds of layers in `layer_types` of a config.json."""


class Row(NamedTuple):
    """A tensor of a family.

    name: with {n} for the layer and {e} for the expert.
    parts: our parameters in it, concatenated along the outputs.
    inputs: number of their dims, beside N and E, that are inputs; 0 for a vector.
    transposed: the tensor is [outputs, inputs].
    """

    name: str
    parts: tuple[str, ...]
    inputs: int = 0
    transposed: bool = False


class Power(NamedTuple):
    """A key of config.json whose value, raised to `exponent`, is that of our field."""

    name: str
    exponent: float


class Nested(NamedTuple):
    """For a family whose `rope_parameters` have an entry for each kind of layer.

    key: key of the theta of local layers in transformers 4; "" if there is none.
    theta: its default.
    both: transformers 4 has `rope_scaling`, which applies to global layers.
    """

    key: str
    theta: float
    both: bool = True


class Family(NamedTuple):
    """A model family of transformers.

    model_type, architecture: its names in config.json.
    rows: its tensors; rows of parameters that a model lacks are left out.
    keys: key of config.json for our fields, if it differs from `KEYS`; "" if there is none.
    defaults: values of keys that a config.json may lack.
    model: values of our fields that all its models share.
    only: supported values of keys, beside null.
    layers: kinds of layers, see `config_json.py`.
    pattern: kinds of layers, repeated, if config.json does not name them.
    nested: for `rope_parameters` of each kind of layer.
    also: other names of keys, which take precedence.
    values: replacements of some values of keys, as in transformers.
    rope: entries that `rope_parameters` must have for any scaling.
    partial_rope: whether transformers applies a `partial_rotary_factor`.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    keys: dict[str, str | Power]
    defaults: dict[str, Any]
    model: dict[str, Any]
    only: dict[str, tuple[Any, ...]]
    layers: str
    pattern: tuple[str, ...] = ()
    nested: Nested | None = None
    also: dict[str, str] = {}
    values: dict[str, dict[str, str]] = {}
    rope: dict[str, Any] = {}
    partial_rope: bool = False


KEYS: dict[str, str | Power] = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "ff_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tied_head": "tie_word_embeddings",
    "attention.heads": "num_attention_heads",
    "attention.kv_heads": "num_key_value_heads",
    "attention.head_dim": "head_dim",
}
"""Key of config.json for each field of `ModelConfig`."""

ATTENTION_BIAS: dict[str, str | Power] = {
    "attention.qkv_bias": "attention_bias",
    "attention.out_bias": "attention_bias",
}
BIASES = ATTENTION_BIAS | {"ff_bias": "mlp_bias"}
MULTIPLIERS: dict[str, str | Power] = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
}

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu_fast": "geglu"}
PLAIN = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf", "relu2": "relu2"}
"""Our name of each activation, for feed-forwards with a gate and without. Exports write the first name of each."""

IGNORED = (r"\.rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$")
"""Names of buffers, which older versions of transformers saved beside the parameters."""


def _linear(name: str, *parts: str, inputs: int = 1, transposed: bool = True) -> tuple[Row, Row]:
    return (
        Row(f"{name}.weight", tuple(f"{part}/kernel" for part in parts), inputs, transposed),
        Row(f"{name}.bias", tuple(f"{part}/bias" for part in parts)),
    )


def _norm(name: str, part: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", (f"{part}/scale",)), Row(f"{name}.bias", (f"{part}/bias",))


def _in_layers(prefix: str, *rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(
        row._replace(name=f"{prefix}.{{n}}.{row.name}", parts=tuple(f"layers/{part}" for part in row.parts))
        for group in rows
        for row in group
    )


ATTENTION = (
    *_linear("self_attn.q_proj", "attention/query"),
    *_linear("self_attn.k_proj", "attention/key"),
    *_linear("self_attn.v_proj", "attention/value"),
    *_linear("self_attn.o_proj", "attention/out", inputs=2),
    *_norm("self_attn.q_norm", "attention/query_norm"),
    *_norm("self_attn.k_norm", "attention/key_norm"),
)
FEED_FORWARD = (
    *_linear("mlp.gate_proj", "ff/gate"),
    *_linear("mlp.up_proj", "ff/up"),
    *_linear("mlp.down_proj", "ff/down"),
)
NORMS_BEFORE = (*_norm("input_layernorm", "attention_norm"), *_norm("post_attention_layernorm", "ff_norm"))
NORMS_AFTER = (
    *_norm("post_attention_layernorm", "attention_post_norm"),
    *_norm("post_feedforward_layernorm", "ff_post_norm"),
)
NORMS_BOTH = (
    *_norm("input_layernorm", "attention_norm"),
    *_norm("post_attention_layernorm", "attention_post_norm"),
    *_norm("pre_feedforward_layernorm", "ff_norm"),
    *_norm("post_feedforward_layernorm", "ff_post_norm"),
)
ENDS = (
    Row("model.embed_tokens.weight", ("embedding",), 1),
    *_norm("model.norm", "final_norm"),
    Row("lm_head.weight", ("head",), 1),
)


def _decoder(*layer: tuple[Row, ...]) -> tuple[Row, ...]:
    return (*ENDS[:1], *_in_layers("model.layers", *layer), *ENDS[1:])


def _experts(prefix: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    return (
        Row(f"{prefix}.gate.weight", ("experts/router",), 1, True),
        Row(f"{prefix}.experts.{{e}}.{gate}.weight", ("experts/gate",), 1, True),
        Row(f"{prefix}.experts.{{e}}.{up}.weight", ("experts/up",), 1, True),
        Row(f"{prefix}.experts.{{e}}.{down}.weight", ("experts/down",), 1, True),
    )


EXPERTS: dict[str, str | Power] = {
    "experts.count": "num_experts",
    "experts.per_token": "num_experts_per_tok",
    "experts.normalize": "norm_topk_prob",
}
MINISTRAL3_ROPE = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1},
}
CWM_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8192},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
"""RoPE parameters of these families if config.json has none."""


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=_decoder(ATTENTION, FEED_FORWARD, NORMS_BEFORE),
    keys=BIASES,
    defaults={"tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    | {"rope_theta": 10_000.0, "attention_bias": False, "mlp_bias": False},
    model={},
    only={},
    layers="global",
)
"""Llama 2, 3, 3.1, 3.2 and SmolLM2. The other tables list the differences."""

INTERNLM3 = LLAMA._replace(
    model_type="internlm3",
    defaults=LLAMA.defaults
    | {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "num_key_value_heads": 2, "head_dim": 128},
    also={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
)
IQUESTCODER = LLAMA._replace(
    model_type="iquestcoder",
    defaults=LLAMA.defaults
    | {"max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128},
)
SEED_OSS = LLAMA._replace(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    keys=BIASES | {"attention.out_bias": "attention_out_bias"},
    defaults=LLAMA.defaults
    | {"max_position_embeddings": 524_288, "num_key_value_heads": 8, "head_dim": 128}
    | {"attention_bias": True, "attention_out_bias": False},
)
GRANITE = LLAMA._replace(
    model_type="granite",
    architecture="GraniteForCausalLM",
    keys=BIASES | MULTIPLIERS | {"logit_scale": Power("logits_scaling", -1.0)},
    defaults=LLAMA.defaults
    | dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0),
)
HYPERCLOVAX = LLAMA._replace(
    model_type="hyperclovax",
    architecture="HyperCLOVAXForCausalLM",
    rows=_decoder(
        ATTENTION,
        FEED_FORWARD,
        NORMS_BEFORE,
        _norm("post_norm1", "attention_post_norm"),
        _norm("post_norm2", "ff_post_norm"),
    ),
    keys=BIASES | MULTIPLIERS | {"logit_scale": "logits_scaling"},
    defaults=LLAMA.defaults | dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0),
    model={"norm_place": "both"},
    only={"use_post_norm": (True,)},
)
MISTRAL = LLAMA._replace(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys={},
    defaults=LLAMA.defaults | {"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    layers="local",
)
MINISTRAL = MISTRAL._replace(
    model_type="ministral", architecture="MinistralForCausalLM", layers="alternating", pattern=("local",)
)
MINISTRAL3 = MISTRAL._replace(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    defaults=MISTRAL.defaults
    | {"head_dim": 128, "max_position_embeddings": 262_144}
    | {"rms_norm_eps": 1e-5, "sliding_window": None, "rope_parameters": MINISTRAL3_ROPE},
    rope={"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": 2**20},
)
QWEN2 = LLAMA._replace(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys={},
    defaults=LLAMA.defaults
    | {"max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28}
    | {"num_key_value_heads": 32},
    model={"attention.qkv_bias": True},
    layers="switched",
)
QWEN2_VL = QWEN2._replace(
    defaults=QWEN2.defaults
    | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80, "num_key_value_heads": 8}
)
QWEN3 = QWEN2._replace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=ATTENTION_BIAS,
    defaults=QWEN2.defaults | {"head_dim": 128},
    model={"attention.qk_norm": True},
)
QWEN3_MOE = QWEN3._replace(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=_decoder(ATTENTION, _experts("mlp", "gate_proj", "up_proj", "down_proj"), NORMS_BEFORE),
    keys=ATTENTION_BIAS | EXPERTS | {"ff_width": "moe_intermediate_size"},
    defaults=QWEN2.defaults
    | {"num_key_value_heads": 4, "moe_intermediate_size": 768}
    | {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False},
    only={"decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    layers="local, switched",
    also={"num_local_experts": "num_experts"},
)
MELLUM = QWEN3_MOE._replace(
    model_type="mellum",
    architecture="MellumForCausalLM",
    defaults=QWEN3_MOE.defaults
    | {"max_position_embeddings": 131_072, "sliding_window": 1024, "head_dim": 128, "rope_theta": 5e5}
    | {"moe_intermediate_size": 896, "num_experts": 64, "norm_topk_prob": True},
    only={"mlp_layer_types": ("sparse",), "num_nextn_predict_layers": (0,), "num_mtp_layers": (0,)},
    layers="alternating",
    pattern=("global",),
    nested=Nested("", 1e4, both=False),
)
MIXTRAL = MISTRAL._replace(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=_decoder(ATTENTION, _experts("block_sparse_moe", "w1", "w3", "w2"), NORMS_BEFORE),
    keys={"experts.count": "num_local_experts", "experts.per_token": "num_experts_per_tok"},
    defaults=MISTRAL.defaults
    | {"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2}
    | {"num_local_experts": 8},
    model={"experts.normalize": True},
    also={"num_experts": "num_local_experts"},
)
GEMMA = LLAMA._replace(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    keys=ATTENTION_BIAS,
    defaults=LLAMA.defaults
    | {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192}
    | {"head_dim": 256, "num_key_value_heads": 16},
    model={"norm": "rmsnorm_plus_one", "scaled_embedding": True},
    values={"hidden_act": {"gelu": "gelu_pytorch_tanh"}},
)
GEMMA2 = GEMMA._replace(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    rows=_decoder(ATTENTION, FEED_FORWARD, NORMS_BOTH),
    keys=ATTENTION_BIAS
    | {
        "activation": "hidden_activation",
        "attention.scale": Power("query_pre_attn_scalar", -0.5),
        "attention.softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    defaults=GEMMA.defaults
    | {"hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4, "num_attention_heads": 8}
    | {"query_pre_attn_scalar": 256, "sliding_window": 4096}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    model=GEMMA.model | {"norm_place": "both"},
    layers="alternating",
    pattern=("local", "global"),
    values={},
)
GEMMA3 = GEMMA2._replace(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys={field: key for field, key in GEMMA2.keys.items() if field != "attention.softcap"},
    defaults=GEMMA2.defaults
    | {"max_position_embeddings": 131_072, "sliding_window_pattern": 6, "rope_theta": 1e6}
    | {"final_logit_softcapping": None},
    model=GEMMA2.model | {"attention.qk_norm": True},
    nested=Nested("rope_local_base_freq", 1e4),
)
"""Its config.json has `attn_logit_softcapping`, which transformers does not use."""

VAULTGEMMA = GEMMA2._replace(
    model_type="vaultgemma",
    architecture="VaultGemmaForCausalLM",
    rows=_decoder(
        ATTENTION,
        FEED_FORWARD,
        _norm("input_layernorm", "attention_norm"),
        _norm("pre_feedforward_layernorm", "ff_norm"),
    ),
    model=GEMMA.model,
)
SMOLLM3 = LLAMA._replace(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults=LLAMA.defaults
    | {"tie_word_embeddings": True, "max_position_embeddings": 32_768, "num_key_value_heads": 4, "rope_theta": 2e6}
    | {"no_rope_layer_interval": 4},
    layers="nope",
)
OLMO2 = LLAMA._replace(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    rows=_decoder(ATTENTION, FEED_FORWARD, NORMS_AFTER),
    keys=ATTENTION_BIAS,
    defaults=LLAMA.defaults | {"rms_norm_eps": 1e-5},
    model={"norm_place": "after", "attention.qk_norm": True, "attention.qk_norm_over": "heads"},
)
OLMO3 = OLMO2._replace(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults=OLMO2.defaults | {"sliding_window": 4096, "rope_theta": 5e5},
    layers="alternating",
    pattern=("local", "local", "local", "global"),
    nested=Nested("", 5e5),
)
OLMOE = LLAMA._replace(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    rows=QWEN3_MOE.rows,
    keys=ATTENTION_BIAS | EXPERTS,
    defaults=LLAMA.defaults
    | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    | {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    model={"attention.qk_norm": True, "attention.qk_norm_over": "heads"},
    only={"clip_qkv": ()},
    also={"num_local_experts": "num_experts"},
)
FLEX_OLMO = OLMOE._replace(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    rows=_decoder(ATTENTION, _experts("mlp", "gate_proj", "up_proj", "down_proj"), NORMS_AFTER),
    defaults=OLMOE.defaults | {"rms_norm_eps": 1e-6, "rope_theta": 5e5, "num_experts": 7, "num_experts_per_tok": 5},
    model=OLMO2.model,
    only={},
)
EXAONE4 = LLAMA._replace(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    rows=OLMO2.rows,
    keys={},
    defaults=LLAMA.defaults | {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
    model={"norm_place": "after", "attention.qk_norm": True},
    layers="alternating, nope",
)
CWM = LLAMA._replace(
    model_type="cwm",
    architecture="CwmForCausalLM",
    keys={"ff_bias": "mlp_bias"},
    defaults=LLAMA.defaults
    | {"max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128}
    | {"rope_theta": 1e6, "sliding_window": 8192, "rope_parameters": CWM_ROPE},
    layers="alternating",
    pattern=("global", "local", "local", "local"),
)
PHI3 = MISTRAL._replace(
    model_type="phi3",
    partial_rope=True,
    architecture="Phi3ForCausalLM",
    rows=_decoder(
        (
            *_linear("self_attn.qkv_proj", "attention/query", "attention/key", "attention/value"),
            *_linear("self_attn.o_proj", "attention/out", inputs=2),
            *_linear("mlp.gate_up_proj", "ff/gate", "ff/up"),
            *_linear("mlp.down_proj", "ff/down"),
        ),
        NORMS_BEFORE,
    ),
    defaults=LLAMA.defaults
    | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None}
    | {"original_max_position_embeddings": 4096},
)
ARCEE = LLAMA._replace(
    model_type="arcee",
    architecture="ArceeForCausalLM",
    rows=_decoder(ATTENTION, FEED_FORWARD[2:], NORMS_BEFORE),
    defaults=LLAMA.defaults | {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)
JAIS2 = ARCEE._replace(
    model_type="jais2",
    architecture="Jais2ForCausalLM",
    keys={"norm_eps": "layer_norm_eps"},
    defaults=ARCEE.defaults | {"max_position_embeddings": 8192, "layer_norm_eps": 1e-5},
    model={"norm": "layernorm", "bias": True},
    only={"attention_bias": (True,), "mlp_bias": (True,)},
)
STARCODER2 = LLAMA._replace(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    rows=_decoder(ATTENTION, (*_linear("mlp.c_fc", "ff/up"), *_linear("mlp.c_proj", "ff/down")), NORMS_BEFORE),
    keys={"norm_eps": "norm_epsilon"},
    defaults=LLAMA.defaults
    | {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096, "norm_epsilon": 1e-5}
    | {"num_key_value_heads": 2, "tie_word_embeddings": True, "sliding_window": None},
    model={"norm": "layernorm", "bias": True},
    only={"use_bias": (True,)},
    layers="local",
)
GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    rows=(
        Row("transformer.wte.weight", ("embedding",), 1),
        Row("transformer.wpe.weight", ("position_embedding",), 1),
        *_in_layers(
            "transformer.h",
            _norm("ln_1", "attention_norm"),
            _linear("attn.c_attn", "attention/query", "attention/key", "attention/value", transposed=False),
            _linear("attn.c_proj", "attention/out", inputs=2, transposed=False),
            _norm("ln_2", "ff_norm"),
            _linear("mlp.c_fc", "ff/up", transposed=False),
            _linear("mlp.c_proj", "ff/down", transposed=False),
        ),
        *_norm("transformer.ln_f", "final_norm"),
        Row("lm_head.weight", ("head",), 1),
    ),
    keys={
        "context": "n_positions",
        "layers": "n_layer",
        "width": "n_embd",
        "ff_width": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "activation": "activation_function",
        "attention.heads": "n_head",
        "attention.kv_heads": "",
        "attention.head_dim": "",
    },
    defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    | {"n_positions": 1024, "rope_theta": 10_000.0},
    model={"norm": "layernorm", "bias": True, "attention.position": "learned"},
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    layers="global",
    also={"hidden_size": "n_embd", "max_position_embeddings": "n_positions"}
    | {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
)

FAMILIES = {
    family.model_type: family
    for family in (
        *(LLAMA, QWEN2, QWEN3, MISTRAL, MINISTRAL, GEMMA3, GEMMA2, GEMMA, VAULTGEMMA, OLMO2, OLMO3, EXAONE4, SMOLLM3),
        *(CWM, PHI3, QWEN3_MOE, MIXTRAL, OLMOE, FLEX_OLMO, MELLUM, GRANITE, HYPERCLOVAX, SEED_OSS, ARCEE, GPT2, JAIS2),
        *(STARCODER2, MINISTRAL3, INTERNLM3, IQUESTCODER),
    )
}
"""Families by model type. A model that fits several is exported as the first of them."""

TEXT_PARTS = {
    "qwen2_vl_text": QWEN2_VL,
    "qwen2_5_vl_text": QWEN2_VL,
    "qwen3_vl_text": QWEN3._replace(
        defaults=QWEN3.defaults | {"max_position_embeddings": 128_000, "rope_theta": 5e5}, layers="global"
    ),
}
"""Families of text parts of multimodal models, by model type."""

WRAPPERS = {
    "gemma3": "gemma3_text",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "llava": "llama",
}
"""Model type of the text part, if config.json does not name it, by the model type of the multimodal model."""

SIZES = {
    "gemma3_text": (262_208, 2304, 9216, 26, 8),
    "mistral": (32_000, 4096, 14_336, 32, 32),
    "ministral3": (131_072, 4096, 14_336, 34, 32),
    "llama": (32_000, 4096, 11_008, 32, 32),
    "qwen2_vl_text": (152_064, 8192, 29_568, 80, 64),
    "qwen2_5_vl_text": (152_064, 8192, 29_568, 80, 64),
    "qwen3_vl_text": (151_936, 4096, 22_016, 32, 32),
}
"""Default sizes of text parts, which config.json may leave out: tokens, width, ff_width, layers, heads."""

TIED_WRAPPERS = ("gemma3", "mistral3")
"""Multimodal models with a tied head by default."""

REFUSED_ANYWHERE = {
    "quantization_config": (),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
}
"""Supported values of keys, beside null, in every family."""
