"""The recipe's description of the model."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class RopeScalingConfig:
    """Scaling of rope beyond the trained context: "none", "linear" (Chen et al. 2023), "llama3" (Llama 3.1),
    "yarn" (Peng et al. 2023), "longrope" (Ding et al. 2024) or "dynamic". The frequencies of the last two depend on the
    length of a text beyond `trained_context`, which `model.context` must not exceed."""

    kind: str = "none"
    factor: float = 1.0
    """Positions are so many times as close to each other."""
    low_frequency_factor: float = 1.0
    """llama3: what turns less often than this within `trained_context` is scaled."""
    high_frequency_factor: float = 4.0
    """llama3: what turns more often than this within `trained_context` stays; between the two it is blended."""
    trained_context: int = 8192
    """llama3, yarn, longrope, dynamic: positions that the model was trained on before it was scaled."""
    beta_fast: float = 32.0
    """yarn: what turns more often than this within `trained_context` stays."""
    beta_slow: float = 1.0
    """yarn: what turns less often than this is scaled; between the two it is blended."""
    truncate: bool = True
    """yarn: the two bounds of the blend are rounded to whole pairs."""
    attention_factor: float = 0.0
    """yarn, longrope: queries and keys are multiplied by this; 0 is the paper's value, from `factor`."""
    short_factors: tuple[float, ...] = ()
    """longrope: what the frequency of each pair is divided by, up to `trained_context`."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same beyond it, which is only carried along."""


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    position: str = "rope"
    """ "rope" or "learned"."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    rope_dims: int = 0
    """Dims of each head that rope turns, the first ones; 0 is all of them (Phi-4-mini turns three quarters)."""
    pattern: tuple[str, ...] = ()
    """Kind of each layer, repeated over the layers: "global", "local" (sees `window` tokens back), or "nope" (global,
    without rope). By default all are "local" where `window` is set, else "global"."""
    window: int = 0
    """Keys that a local layer sees, the query's own among them; 0 is no limit."""
    local_rope_theta: float = 0.0
    """Of local layers, which are then not scaled (Gemma 3); 0 is as in global ones."""
    qk_norm: bool = False
    qk_norm_over: str = "head"
    """ "head" (each by itself, as in Qwen 3) or "heads" (all together, as in OLMo 2)."""
    qkv_bias: bool = False
    """Biases of query, key and value where `model.bias` gives none (Qwen 2)."""
    out_bias: bool = False
    """A bias of the output projection where `model.bias` gives none (Llama-likes with `attention_bias`)."""
    scale: float = 0.0
    """Scores are multiplied by this; 0 is `head_dim ** -0.5`."""
    softcap: float = 0.0
    """Scores are `softcap * tanh(score / softcap)`; 0 leaves them (Gemma 2)."""


@dataclass(kw_only=True, slots=True)
class ExpertsConfig:
    """In place of each feed-forward, `count` of them, of which each token takes `per_token` (Shazeer et al. 2017). No
    token is dropped, whatever the others choose."""

    count: int = 0
    """0 is the plain feed-forward."""
    per_token: int = 2
    normalize: bool = True
    """The shares of the chosen ones add up to one."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    context: int = 128
    """Tokens in a row, and the most that attention reaches back."""
    layers: int = 4
    width: int = 128
    ff_width: int = 512
    """Of the feed-forward, or of each expert."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    norm: str = "rmsnorm"
    """ "rmsnorm", "rmsnorm_plus_one" (its scale is one more than the parameter, as in Gemma) or "layernorm"."""
    norm_place: str = "before"
    """Of attention and feed-forward: "before", "after" (OLMo 2) or "both" (Gemma 2)."""
    norm_eps: float = 1e-6
    activation: str = "swiglu"
    """ "swiglu", "geglu", "gelu" (by tanh), "gelu_erf" (exact) or "relu2"."""
    tied_head: bool = True
    bias: bool = False
    """Biases of all linear layers and layer norms."""
    ff_bias: bool = False
    """Biases of the feed-forward where `bias` gives none (Llama-likes with `mlp_bias`)."""
    dropout: float = 0.0
    scaled_embedding: bool = False
    """Embeddings are multiplied by `sqrt(width)` (Gemma)."""
    embedding_scale: float = 1.0
    """Embeddings are multiplied by this (Granite)."""
    residual_scale: float = 1.0
    """Multiplier of the outputs of attention and feed-forward before the residual sum (Granite)."""
    logit_scale: float = 1.0
    """Logits are multiplied by this (Granite)."""
    logit_softcap: float = 0.0
    """Logits are `softcap * tanh(logit / softcap)`; 0 leaves them (Gemma 2)."""
    vocab_size: int = 0
    """Rows of the embedding where the tokenizer has fewer tokens."""
    family: str = ""
    """The Hugging Face model type that it was imported as and is exported as; "" is the nearest one."""
    dtype: str = "float32"
    """Of activations and matmuls: "float32" or "bfloat16". Parameters are float32."""
    unroll: bool = False
    """Unroll the scan over layers: slower to compile, sometimes faster to run."""
