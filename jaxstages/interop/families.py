"""Families of open models, as tables: which tensor holds which parameters, and which key of `config.json` says what.

A family has no code of its own: what its models do, `models/` does for all, and this page says how to ask for it.

Legend: N layers, E experts.
"""

from typing import Any, NamedTuple

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Kinds of layers, as `layer_types` of a config.json has them."""


class Row(NamedTuple):
    """A tensor of a family.

    name: with {n} for the layer and {e} for the expert.
    parts: our parameters that lie in it, their outputs one after the other.
    inputs: how many of their dims (beside N and E) are inputs; 0 is a vector.
    transposed: the tensor is [outputs, inputs].
    """

    name: str
    parts: tuple[str, ...]
    inputs: int = 0
    transposed: bool = False


class Family(NamedTuple):
    """model_type, architecture: what config.json calls it. rows: its tensors; those of parameters that a model has not
    are left out. keys: our field -> key of config.json, where it is not that of `KEYS`; "" is none. defaults: of keys
    that a config.json may lack. model: fields of ours that all its models have so. only: key -> what it may be, or be
    missing. layers: how its layers differ, see `config_json.py`.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    keys: dict[str, str]
    defaults: dict[str, Any]
    model: dict[str, Any]
    only: dict[str, tuple[Any, ...]]
    layers: str


KEYS = {
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
"""Field of `ModelConfig` -> key of a config.json."""

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu_fast": "geglu"}
PLAIN = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf", "relu2": "relu2"}
"""Their name of an activation -> ours, of feed-forwards with a gate and without. The first of a kind is written."""

IGNORED = (r"\.rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$")
"""Tensors that hold nothing learned: older versions of transformers saved buffers too."""


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


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=_decoder(ATTENTION, FEED_FORWARD, NORMS_BEFORE),
    keys={},
    defaults={"tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    | {"rope_theta": 10_000.0},
    model={},
    only={"attention_bias": (False,), "mlp_bias": (False,)},
    layers="global",
)
"""Llama 2, 3, 3.1, 3.2 and SmolLM2. The other tables say what differs."""

MISTRAL = LLAMA._replace(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults=LLAMA.defaults | {"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    only={},
    layers="local",
)
QWEN2 = LLAMA._replace(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=LLAMA.defaults | {"max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28},
    model={"attention.qkv_bias": True},
    only={},
    layers="switched",
)
QWEN3 = QWEN2._replace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=QWEN2.defaults | {"head_dim": 128},
    model={"attention.qk_norm": True},
    only={"attention_bias": (False,)},
)
QWEN3_MOE = QWEN3._replace(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=_decoder(ATTENTION, _experts("mlp", "gate_proj", "up_proj", "down_proj"), NORMS_BEFORE),
    keys={
        "ff_width": "moe_intermediate_size",
        "experts.count": "num_experts",
        "experts.per_token": "num_experts_per_tok",
        "experts.normalize": "norm_topk_prob",
    },
    defaults=QWEN2.defaults | {"num_experts_per_tok": 8, "norm_topk_prob": False},
    only={"attention_bias": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    layers="local, switched",
)
MIXTRAL = MISTRAL._replace(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=_decoder(ATTENTION, _experts("block_sparse_moe", "w1", "w3", "w2"), NORMS_BEFORE),
    keys={"experts.count": "num_local_experts", "experts.per_token": "num_experts_per_tok"},
    defaults=MISTRAL.defaults
    | {"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2},
    model={"experts.normalize": True},
    only={},
)
GEMMA2 = LLAMA._replace(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    rows=_decoder(ATTENTION, FEED_FORWARD, NORMS_BOTH),
    keys={
        "activation": "hidden_activation",
        "attention.scale": "query_pre_attn_scalar",
        "attention.softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    defaults=LLAMA.defaults
    | {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192}
    | {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 2}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    model={"norm": "rmsnorm_plus_one", "norm_place": "both", "scaled_embedding": True},
    only={"attention_bias": (False,), "use_bidirectional_attention": (False,)},
    layers="alternating",
)
GEMMA3 = GEMMA2._replace(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys=GEMMA2.keys | {"attention.local_rope_theta": "rope_local_base_freq"},
    defaults=GEMMA2.defaults
    | {"max_position_embeddings": 131_072, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    model=GEMMA2.model | {"attention.qk_norm": True},
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
    defaults=LLAMA.defaults | {"rms_norm_eps": 1e-5},
    model={"norm_place": "after", "attention.qk_norm": True, "attention.qk_norm_over": "heads"},
    only={"attention_bias": (False,)},
)
PHI3 = MISTRAL._replace(
    model_type="phi3",
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
    defaults=LLAMA.defaults | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
)
ARCEE = LLAMA._replace(
    model_type="arcee",
    architecture="ArceeForCausalLM",
    rows=_decoder(ATTENTION, FEED_FORWARD[2:], NORMS_BEFORE),
    defaults=LLAMA.defaults | {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
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
)

FAMILIES = {
    family.model_type: family
    for family in (
        *(LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA3, GEMMA2, OLMO2, SMOLLM3, PHI3, QWEN3_MOE, MIXTRAL, ARCEE, GPT2),
    )
}
"""By model type; where several fit a model, the first is what it is exported as."""

REFUSED_ANYWHERE = {"quantization_config": (), "partial_rotary_factor": (1.0, 1)}
"""Keys that no family may have, but as here."""
