"""Architectures of llama.cpp as tables: the models that each computes, its tensors and its hyperparameters.

An architecture has no code of its own. Sources: `src/models/` and `conversion/` of llama.cpp.

Legend: N layers, E experts, I inputs, O outputs, H heads, K dims of a head.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxstages.config import ModelConfig
from jaxstages.interop.config_json import get_field, layer_kinds, plain_model
from jaxstages.models.rope import rope_frequencies

Leaves = dict[str, np.ndarray]
"""Parameters on the host, by path."""


# Tensors ----------------------------------------------------------------------------------------------------------


def table(array: np.ndarray) -> np.ndarray:
    """A row per token or position."""
    return array


def vector(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)


def kernel(array: np.ndarray) -> np.ndarray:
    """[I, ...] -> [O, I]."""
    return array.reshape(len(array), -1).T


def kernel_of_heads(array: np.ndarray) -> np.ndarray:
    """[H, K, O] -> [O, HK]."""
    return array.reshape(-1, array.shape[-1]).T


def kernels_of_experts(array: np.ndarray) -> np.ndarray:
    """[E, I, O] -> [E, O, I]."""
    return array.swapaxes(1, 2)


class Row(NamedTuple):
    """A tensor of a GGUF file.

    name: with {n} for the layer.
    parts: our parameters in it, concatenated along the outputs.
    layout: converts a parameter (of one layer) to the layout of the file.
    """

    name: str
    parts: tuple[str, ...]
    layout: Callable[[np.ndarray], np.ndarray]


def _linear(name: str, *parts: str, layout: Callable[[np.ndarray], np.ndarray] = kernel) -> tuple[Row, Row]:
    paths = [f"layers/{part}" for part in parts]
    return (
        Row(f"blk.{{n}}.{name}.weight", tuple(f"{path}/kernel" for path in paths), layout),
        Row(f"blk.{{n}}.{name}.bias", tuple(f"{path}/bias" for path in paths), vector),
    )


def _norm(name: str, path: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", (f"{path}/scale",), vector), Row(f"{name}.bias", (f"{path}/bias",), vector)


def _norm_of_layer(name: str, part: str) -> tuple[Row, Row]:
    return _norm(f"blk.{{n}}.{name}", f"layers/{part}")


ENDS = (
    Row("token_embd.weight", ("embedding",), table),
    Row("position_embd.weight", ("position_embedding",), table),
    *_norm("output_norm", "final_norm"),
    Row("output.weight", ("head",), table),
)
NORMS = (
    *_norm_of_layer("attn_norm", "attention_norm"),
    *_norm_of_layer("post_attention_norm", "attention_post_norm"),
    *_norm_of_layer("ffn_norm", "ff_norm"),
    *_norm_of_layer("post_ffw_norm", "ff_post_norm"),
)
ATTENTION = (
    *_linear("attn_q", "attention/query"),
    *_linear("attn_k", "attention/key"),
    *_linear("attn_v", "attention/value"),
    *_norm_of_layer("attn_q_norm", "attention/query_norm"),
    *_norm_of_layer("attn_k_norm", "attention/key_norm"),
)
FUSED_ATTENTION = _linear("attn_qkv", "attention/query", "attention/key", "attention/value")
OUT = _linear("attn_output", "attention/out", layout=kernel_of_heads)
GATE_UP = (*_linear("ffn_gate", "ff/gate"), *_linear("ffn_up", "ff/up"))
FUSED_GATE_UP = _linear("ffn_up", "ff/gate", "ff/up")
DOWN = _linear("ffn_down", "ff/down")
EXPERTS = (
    Row("blk.{n}.ffn_gate_inp.weight", ("layers/experts/router",), kernel),
    Row("blk.{n}.ffn_gate_exps.weight", ("layers/experts/gate",), kernels_of_experts),
    Row("blk.{n}.ffn_up_exps.weight", ("layers/experts/up",), kernels_of_experts),
    Row("blk.{n}.ffn_down_exps.weight", ("layers/experts/down",), kernels_of_experts),
)
ROWS = (*ENDS, *NORMS, *ATTENTION, *OUT, *GATE_UP, *DOWN, *EXPERTS)


# Architectures ----------------------------------------------------------------------------------------------------


def anything(value: Any) -> bool:
    return True


def nonzero(value: Any) -> bool:
    return bool(value)


Allowed = tuple[Any, ...] | Callable[[Any], bool]
"""Values of a field that an architecture computes, or a function that tells."""

SIZES = (
    *("vocab_size", "context", "layers", "width", "ff_width", "norm_eps"),
    *("attention.heads", "attention.kv_heads", "attention.head_dim", "attention.rope_theta", "attention.window"),
    *("experts.per_token", "attention.qk_norm_over", "attention.pattern", "attention.scale"),
    *(f"attention.rope_scaling.{name}" for name in ("factor", "trained_context", "beta_fast", "beta_slow")),
    *(f"attention.rope_scaling.{name}_factor" for name in ("low_frequency", "high_frequency")),
    *(f"attention.rope_scaling.{name}_factors" for name in ("short", "long")),
    *("dropout", "dtype", "unroll", "family"),
)
"""Fields that any architecture takes with any value, that `missing_features` checks by itself, or that a forward pass
does not use."""

PLAIN: Mapping[str, Allowed] = {
    "norm": ("rmsnorm",),
    "norm_place": ("before",),
    "activation": ("swiglu",),
    "tied_head": anything,
    "bias": (False,),
    "ff_bias": (False,),
    "scaled_embedding": (False,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "logit_scale": (1.0,),
    "logit_softcap": (0.0,),
    "attention.position": ("rope",),
    "attention.rope_dims": (0,),
    "attention.local_rope_theta": (0.0,),
    "attention.qk_norm": (False,),
    "attention.qkv_bias": (False,),
    "attention.out_bias": (False,),
    "attention.softcap": (0.0,),
    "attention.rope_scaling.kind": ("none", "linear", "yarn"),
    "attention.rope_scaling.truncate": (True,),
    "attention.rope_scaling.attention_factor": (0.0,),
    "experts.count": (0,),
    "experts.normalize": (True,),
}
"""Defaults of the tables of architectures."""


class Arch(NamedTuple):
    """An architecture of llama.cpp.

    name: in `general.architecture`, and before its hyperparameters.
    families: model types of transformers that it computes, as far as `allowed` goes.
    allowed: values of our fields, if they differ from `PLAIN`.
    layers: "global", "windows" (global and local layers), or "every fourth without RoPE".
    rows: its tensors; those of parameters that a model lacks are left out.
    adjacent: RoPE rotates adjacent dims, not halves, so that queries and keys have another order in the file.
    square: `heads * head_dim` must equal the width.
    qk_norm_over: see `AttentionConfig`.
    own_head: it requires a head even if that equals the embedding.
    scale_by_width: number of layers for which attention scores are divided by the root of `width / heads`.
    keys: our fields for further hyperparameters, with their exponent.
    """

    name: str
    families: tuple[str, ...]
    allowed: Mapping[str, Allowed] = {}
    layers: str = "global"
    rows: tuple[Row, ...] = ROWS
    adjacent: bool = False
    square: bool = False
    qk_norm_over: str = "head"
    own_head: bool = False
    scale_by_width: int = 0
    keys: dict[str, tuple[str, int]] = {}


FLAGS: Allowed = (False, True)
BIASES: dict[str, Allowed] = {"attention.qkv_bias": FLAGS, "attention.out_bias": FLAGS, "ff_bias": FLAGS}
LLAMA3_SCALING: dict[str, Allowed] = {"attention.rope_scaling.kind": ("none", "linear", "yarn", "llama3")}
LAYER_NORM: dict[str, Allowed] = {"norm": ("layernorm",), "bias": (True,), "experts.count": (0,)}

LLAMA = Arch(
    "llama",
    ("llama", "mistral", "mixtral", "internlm3", "iquestcoder"),
    BIASES | LLAMA3_SCALING | {"experts.count": anything},
    adjacent=True,
)
QWEN2 = Arch("qwen2", ("qwen2",), {"attention.qkv_bias": FLAGS}, square=True)
QWEN3 = Arch("qwen3", ("qwen3",), {"attention.qk_norm": (True,), "attention.qkv_bias": FLAGS})
QWEN3_MOE = Arch("qwen3moe", ("qwen3_moe",), {**QWEN3.allowed, "experts.count": nonzero})
GEMMA = Arch(
    "gemma",
    ("gemma",),
    {
        "norm": ("rmsnorm_plus_one",),
        "activation": ("geglu",),
        "scaled_embedding": (True,),
        "tied_head": (True,),
        "attention.qkv_bias": FLAGS,
        "attention.rope_scaling.kind": ("none",),
    },
)
GEMMA2 = Arch(
    "gemma2",
    ("gemma2",),
    {**GEMMA.allowed, "norm_place": ("both",), "attention.softcap": nonzero, "logit_softcap": nonzero},
    layers="windows",
    scale_by_width=46,
    keys={"attn_logit_softcapping": ("attention.softcap", 1), "final_logit_softcapping": ("logit_softcap", 1)},
)
GEMMA3 = Arch(
    "gemma3",
    ("gemma3_text",),
    {
        **GEMMA.allowed,
        "norm_place": ("both",),
        "tied_head": anything,
        "logit_softcap": anything,
        "attention.qk_norm": (True,),
        "attention.local_rope_theta": anything,
        "attention.rope_scaling.kind": ("none", "linear"),
    },
    layers="windows",
    scale_by_width=62,
    keys={"final_logit_softcapping": ("logit_softcap", 1)},
)
OLMO2 = Arch(
    "olmo2",
    ("olmo2", "olmo3"),
    {"norm_place": ("after",), "attention.qk_norm": (True,), "attention.local_rope_theta": anything},
    layers="windows",
    square=True,
    qk_norm_over="heads",
    own_head=True,
)
PHI3 = Arch(
    "phi3",
    ("phi3",),
    {"attention.rope_dims": anything},
    rows=(*ENDS, *NORMS, *FUSED_ATTENTION, *OUT, *FUSED_GATE_UP, *DOWN),
    square=True,
)
GRANITE = Arch(
    "granite",
    ("granite",),
    BIASES
    | LLAMA3_SCALING
    | dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale", "attention.scale"), anything),
    adjacent=True,
    keys={
        "embedding_scale": ("embedding_scale", 1),
        "residual_scale": ("residual_scale", 1),
        "logit_scale": ("logit_scale", -1),
        "attention.scale": ("attention.scale", 1),
    },
)
SMOLLM3 = Arch(
    "smollm3", ("smollm3",), {"attention.qkv_bias": FLAGS}, layers="every fourth without RoPE", adjacent=True
)
ARCEE = Arch(
    "arcee", ("arcee",), {"activation": ("relu2",), "attention.qkv_bias": FLAGS} | LLAMA3_SCALING, adjacent=True
)
GPT2 = Arch(
    "gpt2",
    ("gpt2",),
    LAYER_NORM | {"activation": ("gelu",), "attention.position": ("learned",)},
    rows=(*ENDS, *NORMS, *FUSED_ATTENTION, *OUT, *GATE_UP, *DOWN),
    square=True,
)
STARCODER2 = Arch("starcoder2", ("starcoder2",), LAYER_NORM | {"activation": ("gelu",)}, square=True)
JAIS2 = Arch("jais2", ("jais2",), LAYER_NORM | {"activation": ("relu2",)})

ARCHS = (
    *(LLAMA, QWEN2, QWEN3, GEMMA3, GEMMA2, GEMMA, OLMO2, SMOLLM3, PHI3, QWEN3_MOE, GRANITE, ARCEE, GPT2, JAIS2),
    STARCODER2,
)
"""A model that fits several is exported as that of its family, else as the first of them."""


class Choice(NamedTuple):
    """An architecture of llama.cpp.

    model: the same model within `context`.
    context: longest context, in tokens.
    """

    arch: Arch
    model: ModelConfig
    context: int


def choose_arch(model: ModelConfig, context: int) -> Choice:
    """Return the architecture of the model's own family, or the first other one that computes the model.

    An architecture without windows computes a model that has one in contexts up to the window.

    Args:
        context: the longest that the model can have.

    Raises:
        ValueError: none does; the message names the fields that the nearest one lacks.
    """
    own = [arch for arch in ARCHS if model.family in arch.families]
    choices = [(model, context)]
    if "local" in layer_kinds(model) and not model.attention.local_rope_theta:
        choices.append((_without_window(model), min(context, model.attention.window)))

    nearest: list[str] | None = None
    for candidate, reach in choices:
        for arch in (*own, *ARCHS):
            lines = [f"{arch.name} {line}" for line in missing_features(arch, candidate)]
            if not lines:
                return Choice(arch, candidate, reach)
            nearest = lines if nearest is None or (len(lines) < len(nearest) and not own) else nearest
    raise ValueError(f"no architecture of llama.cpp computes this model: {'; '.join(nearest or [])}; change these")


def _without_window(model: ModelConfig) -> ModelConfig:
    kinds = tuple("global" if kind == "local" else kind for kind in layer_kinds(model))
    return dataclasses.replace(model, attention=dataclasses.replace(model.attention, pattern=kinds, window=0))


def missing_features(arch: Arch, model: ModelConfig) -> list[str]:
    """Return a line for each field of the model that an architecture does not compute."""
    plain = plain_model(model)
    part, lines = plain.attention, []
    for path, allowed in ({**PLAIN, **arch.allowed}).items():
        value = get_field(plain, path)
        if not (value in allowed if isinstance(allowed, tuple) else allowed(value)):
            expected = " or ".join(map(repr, allowed)) if isinstance(allowed, tuple) else "a number above 0"
            lines.append(f"has model.{path}={expected}, this model {value!r}")

    kinds = layer_kinds(plain)
    match arch.layers:
        case "global":
            possible = all(kind == "global" for kind in kinds)
        case "windows":
            possible = "nope" not in kinds
        case _:
            possible = all((kind == "nope") == (n % 4 == 3) and kind != "local" for n, kind in enumerate(kinds))
    if not possible:
        what = f"windows of {part.window}" if "local" in kinds else "layers without RoPE"
        lines.append(f"has {arch.layers} layers, this model {', '.join(kinds[:4])} ... ({what})")

    if arch.square and part.heads * part.head_dim != plain.width:
        lines.append(f"has heads * head_dim = width, this model {part.heads} * {part.head_dim} and {plain.width}")
    if part.qk_norm and part.qk_norm_over != arch.qk_norm_over:
        lines.append(f"has qk_norm_over={arch.qk_norm_over!r}, this model {part.qk_norm_over!r}")
    by_width = arch.scale_by_width and arch.scale_by_width == plain.layers
    scale = (plain.width // part.heads if by_width else part.head_dim) ** -0.5
    if "attention.scale" not in arch.allowed and abs((part.scale or part.head_dim**-0.5) / scale - 1) > 1e-6:
        lines.append(f"has model.attention.scale={scale:.6g}, this model {part.scale:.6g}")

    # Local layers of olmo2 and gemma3 never have RoPE scaling, and those of olmo2 have no theta of their own.
    if "local" in kinds and part.rope_scaling.kind != "none" and not part.local_rope_theta:
        lines.append(f"has no RoPE scaling in local layers, this model {part.rope_scaling.kind!r}")
    if arch is OLMO2 and part.local_rope_theta not in (0.0, part.rope_theta):
        lines.append(f"has one rope_theta, this model {part.rope_theta:g} and {part.local_rope_theta:g}")
    return lines


def hyperparameters(arch: Arch, model: ModelConfig, context: int) -> dict[str, Any]:
    """Return the hyperparameters of a model by their keys in the file.

    Args:
        context: tokens that the model can have in its context; with learned positions, their number.
    """
    plain, kinds = plain_model(model), layer_kinds(model)
    part, scaling, experts = plain.attention, plain.attention.rope_scaling, plain.experts
    norm = "layer_norm_epsilon" if plain.norm == "layernorm" else "layer_norm_rms_epsilon"
    keys: dict[str, Any] = {
        "vocab_size": plain.vocab_size,
        "context_length": context,
        "embedding_length": plain.width,
        "block_count": plain.layers,
        "feed_forward_length": plain.ff_width,
        "attention.head_count": part.heads,
        "attention.head_count_kv": part.kv_heads,
        "attention.key_length": part.head_dim,
        "attention.value_length": part.head_dim,
        f"attention.{norm}": plain.norm_eps,
    }
    if part.position == "rope":
        keys |= {"rope.dimension_count": part.rope_dims or part.head_dim, "rope.freq_base": part.rope_theta}
    if scaling.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        keys |= {
            "rope.scaling.original_context_length": scaling.trained_context,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }
    if arch.layers == "windows":
        keys |= {
            "attention.sliding_window": part.window,
            "attention.sliding_window_pattern": [kind == "local" for kind in kinds],
            "rope.freq_base_swa": part.local_rope_theta or part.rope_theta,
        }
    if experts.count:
        keys |= {"expert_count": experts.count, "expert_used_count": experts.per_token}
        keys |= {"expert_feed_forward_length": plain.ff_width}
    for key, (path, exponent) in arch.keys.items():
        if value := get_field(plain, path):
            keys[key] = float(value) ** exponent
    return {f"{arch.name}.{key}": value for key, value in keys.items()}


def tensors(arch: Arch, model: ModelConfig, leaves: Leaves) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a model with their names, one at a time."""
    rows = [row for row in arch.rows if all(part in leaves for part in row.parts)]
    covered = {part for row in rows for part in row.parts}
    if missing := sorted(leaves.keys() - covered):
        raise ValueError(f"{arch.name} of llama.cpp has no tensor for {', '.join(missing)}; train the model without")

    for row in rows:
        if "{n}" not in row.name:
            yield row.name, _values(arch, model, row, [leaves[part] for part in row.parts])
    if arch.own_head and "head" not in leaves:
        yield "output.weight", leaves["embedding"]
    if model.attention.rope_scaling.kind == "llama3":
        yield "rope_freqs.weight", _frequency_divisors(model)

    for n in range(model.layers):
        for row in rows:
            if "{n}" in row.name:
                yield row.name.format(n=n), _values(arch, model, row, [leaves[part][n] for part in row.parts])


def _values(arch: Arch, model: ModelConfig, row: Row, arrays: list[np.ndarray]) -> np.ndarray:
    if arch.adjacent and row.parts[0].split("/")[-2:-1] in (["query"], ["key"]):
        arrays = [_with_adjacent_pairs(array) for array in arrays]
    if model.norm == "rmsnorm_plus_one" and row.parts[0].endswith("/scale"):
        arrays = [array + np.float32(1) for array in arrays]
    return np.concatenate([row.layout(array) for array in arrays]) if len(arrays) > 1 else row.layout(arrays[0])


def _with_adjacent_pairs(array: np.ndarray) -> np.ndarray:
    """Reorder the last dim, that of a head, so that the pairs that RoPE rotates together are neighbours.

    | our order  | a b c A B C |
    | theirs     | a A b B c C |
    """
    order = np.arange(array.shape[-1]).reshape(2, -1).T.reshape(-1)
    return array[..., order]


def _frequency_divisors(model: ModelConfig) -> np.ndarray:
    """Divisor of the RoPE frequency of each pair."""
    scaled = rope_frequencies(model.attention, "global")
    pairs = np.arange(len(scaled), dtype=np.float64) / len(scaled)
    return (model.attention.rope_theta**-pairs / scaled).astype(np.float32)
