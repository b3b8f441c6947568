"""Small random models of each family, made by transformers, in shapes that are easy to get wrong."""

import json
from pathlib import Path
from typing import Any

VOCAB = 331
"""Rows: more than the tokenizer has tokens."""

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}


def longrope(pairs: int) -> dict[str, Any]:
    short, long = ([1.0 + step * n for n in range(pairs // 2)] for step in (0.1, 0.7))
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, "rope_theta": 1e4}


ZOO: dict[str, dict[str, Any]] = {
    "llama, grouped heads wider than D/H, llama3 scaling": {"head_dim": 14, "rope_parameters": LLAMA3},
    "llama, one key head, tied, linear scaling": {
        **{"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    },
    "mistral, window": {"sliding_window": 24, "head_dim": 16},
    "mistral, no window, tied": {"sliding_window": None, "head_dim": 6, "tie_word_embeddings": True},
    "qwen2, tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2, window from layer 1 on": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3, tied": {"head_dim": 12, "tie_word_embeddings": True},
    "qwen3, layers of both kinds": {
        **{"head_dim": 16, "num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 24},
        "layer_types": [LOCAL, GLOBAL],
    },
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 24},
    "gemma2, ungrouped, no caps": {
        **{"head_dim": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 8, "sliding_window": 24},
        **{"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    "gemma3_text": {
        **{"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 24, "num_hidden_layers": 3},
        "layer_types": [LOCAL, LOCAL, GLOBAL],
        "rope_parameters": {
            GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            LOCAL: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma3_text, one key head, caps, untied": {
        **{"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 24, "num_key_value_heads": 1},
        **{"final_logit_softcapping": 15.0, "tie_word_embeddings": False, "layer_types": [GLOBAL, LOCAL]},
    },
    "smollm3, tied": {"no_rope_layer_interval": 2},
    "smollm3, untied": {"no_rope_layers": [0, 1], "tie_word_embeddings": False, "num_key_value_heads": 1},
    "olmo2": {"num_key_value_heads": 2},
    "olmo2, ungrouped, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    "phi3, window": {"sliding_window": 24},
    "phi3, tied, one key head": {"tie_word_embeddings": True, "num_key_value_heads": 1, "intermediate_size": 30},
    "qwen3_moe": {
        **{"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        "norm_topk_prob": False,
    },
    "qwen3_moe, shares add up, window": {
        **{"head_dim": 8, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
        **{"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 24, "tie_word_embeddings": True},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12},
    "mixtral, window": {
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "sliding_window": 24,
        "rope_parameters": LINEAR,
    },
    "arcee": {"head_dim": 14},
    "arcee, tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "gpt2": {"n_inner": 50},
    "gpt2, exact gelu, untied": {"activation_function": "gelu", "tie_word_embeddings": False, "n_layer": 3},
    "granite": {
        **{"attention_multiplier": 0.15, "embedding_multiplier": 3.0, "residual_multiplier": 0.4},
        **{"logits_scaling": 3.0, "attention_bias": True},
    },
}

MORE: dict[str, dict[str, Any]] = {
    "llama, biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama, biases of attention, dynamic scaling": {"attention_bias": True, "rope_parameters": DYNAMIC},
    "llama, yarn": {"head_dim": 14, "rope_parameters": YARN},
    "qwen2, yarn with its own factor": {"rope_parameters": YARN | {"attention_factor": 0.9, "truncate": False}},
    "phi3, longrope": {"original_max_position_embeddings": 400, "rope_parameters": longrope(10)},
    "phi3, longrope, three quarters": {
        **{"original_max_position_embeddings": 400, "hidden_size": 32, "num_key_value_heads": 1},
        "rope_parameters": longrope(6) | {"partial_rotary_factor": 0.75},
    },
    "internlm3": {"head_dim": 14, "attention_bias": True, "mlp_bias": True},
    "iquestcoder": {"head_dim": 10},
    "seed_oss": {"head_dim": 14, "attention_out_bias": True},
    "hyperclovax": {"attention_multiplier": 0.15, "residual_multiplier": 0.4, "logits_scaling": 0.5, "head_dim": 10},
    "ministral, layers of both kinds": {"sliding_window": 24, "head_dim": 10, "layer_types": [GLOBAL, LOCAL]},
    "ministral3": {
        **{"head_dim": 14, "sliding_window": None},
        "rope_parameters": YARN
        | {"original_max_position_embeddings": 400, "mscale": 1.0, "mscale_all_dim": 0.7, "llama_4_scaling_beta": 0.1},
    },
    "gemma": {"head_dim": 12, "hidden_act": "gelu"},
    "vaultgemma": {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 24},
    "olmo3": {
        **{"sliding_window": 24, "layer_types": [LOCAL, GLOBAL]},
        "rope_parameters": {
            GLOBAL: YARN,
            LOCAL: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "mellum": {
        **{"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        **{"sliding_window": 24, "layer_types": [LOCAL, GLOBAL]},
    },
    "exaone4": {"sliding_window": 24, "num_hidden_layers": 3, "layer_types": [LOCAL, LOCAL, GLOBAL]},
    "exaone4, no window": {"sliding_window": None, "layer_types": [GLOBAL] * 2, "tie_word_embeddings": True},
    "cwm": {"head_dim": 14, "sliding_window": 24, "rope_parameters": LLAMA3},
    "jais2": {"head_dim": 14},
    "starcoder2, window": {"sliding_window": 24},
}
"""Models that are the same as those of `ZOO` but for what a table says."""

VISION = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2}
QWEN_VISION |= {"out_hidden_size": 40}
QWEN_IDS = {"image_token_id": 901, "video_token_id": 902, "vision_start_token_id": 903, "vision_end_token_id": 904}

PARTS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 20, "model_type": "gemma3_text"},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {"head_dim": 14, "model_type": "mistral", "sliding_window": None},
        "vision_config": VISION | {"model_type": "pixtral"},
        "image_token_index": 901,
        "tie_word_embeddings": False,
    },
    "qwen2_5_vl": QWEN_IDS
    | {
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 2]},
        },
        "vision_config": QWEN_VISION,
    },
    "qwen3_vl": QWEN_IDS
    | {
        "text_config": {
            **{"model_type": "qwen3_vl_text", "head_dim": 12},
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True},
        },
        "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        "tie_word_embeddings": True,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
        "image_token_index": 901,
    },
}
"""Models with more parts than text."""


def make(name: str, folder: Path, tokenizer: Path) -> Any:
    """The model, saved into `folder` beside a tokenizer.json. Norms and biases are random too, and all weights larger
    than transformers would begin with, so that an error in any of them shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind = name.split(",")[0]
    if kind == "gpt2":
        shape = {"vocab_size": VOCAB, "n_embd": 40, "n_layer": 2, "n_head": 4, "n_positions": 320}
        config = AutoConfig.for_model(kind, **(shape | {"bos_token_id": 0, "eos_token_id": 0} | (ZOO | MORE)[name]))
    elif kind in PARTS:
        config = AutoConfig.for_model(kind, **(PARTS[kind] | {"text_config": BASE | PARTS[kind]["text_config"]}))
    else:
        config = AutoConfig.for_model(kind, **(BASE | (ZOO | MORE)[name]))
    auto: Any = AutoModelForImageTextToText if kind in PARTS else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.add_(0.3 * noise)
            else:
                wide = "embed" in path or "wte" in path or "wpe" in path or "lm_head" in path
                weight.copy_(0.2 * noise if wide else noise / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return model
