"""Config of the built-in decoder."""

from dataclasses import dataclass, field

from jaxstages.config.setting import setting

LAYER_KINDS = ("global", "local", "nope")
"""Kinds of attention that a layer can have; see `AttentionConfig.pattern`."""


@dataclass(kw_only=True, slots=True)
class RopeScalingConfig:
    """RoPE scaling beyond the trained context: "linear" (Chen et al. 2023), "llama3" (Llama 3.1), "yarn" (Peng et al.
    2023), "longrope" (Ding et al. 2024) or "dynamic". The frequencies of the last two depend on the length of a text
    beyond `trained_context`, so `model.context` must not exceed it."""

    kind: str = setting("none", choices=("none", "linear", "llama3", "yarn", "longrope", "dynamic"))
    """Scaling method, as above."""
    factor: float = setting(1.0, above=0, only_for={"kind": ("linear", "llama3", "yarn", "longrope", "dynamic")})
    """Factor by which the context is extended; linear scaling rotates position p as p / factor."""
    low_frequency_factor: float = setting(1.0, above=0, only_for={"kind": ("llama3",)})
    """Llama 3.1 `low_freq_factor`: frequencies with fewer turns than this in `trained_context` are divided by
    `factor`."""
    high_frequency_factor: float = setting(4.0, above=0, only_for={"kind": ("llama3",)})
    """Llama 3.1 `high_freq_factor`: frequencies with more turns than this in `trained_context` do not change; between
    the two factors, scaled and unscaled frequencies are interpolated."""
    trained_context: int = setting(8192, at_least=1, only_for={"kind": ("llama3", "yarn", "longrope", "dynamic")})
    """Context length that the model was trained with before scaling."""
    beta_fast: float = setting(32.0, above=0, only_for={"kind": ("yarn",)})
    """Frequencies with more turns than this in `trained_context` do not change."""
    beta_slow: float = setting(1.0, above=0, only_for={"kind": ("yarn",)})
    """Frequencies with fewer turns than this are divided by `factor`; between the two betas they are interpolated."""
    truncate: bool = setting(True, only_for={"kind": ("yarn",)})
    """Round the two bounds of the interpolation to whole pairs of dims."""
    attention_factor: float = setting(0.0, at_least=0, only_for={"kind": ("yarn", "longrope")})
    """Multiplier of queries and keys; 0 computes the paper's value from `factor`."""
    short_factors: tuple[float, ...] = setting((), above=0, only_for={"kind": ("longrope",)})
    """Divisor of each pair's frequency for texts up to `trained_context`."""
    long_factors: tuple[float, ...] = setting((), above=0, only_for={"kind": ("longrope",)})
    """Divisors for longer texts; not used here, only kept for export."""


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """Attention of the built-in decoder, with causal masks."""

    heads: int = setting(4, at_least=1, at_most=2**14)
    """Number of query heads."""
    kv_heads: int = setting(4, at_least=1, at_most=2**14)
    """Number of key/value heads; fewer than `heads` is grouped-query attention (Ainslie et al. 2023)."""
    head_dim: int = setting(32, at_least=1, at_most=2**14)
    """Dims of each head; `heads * head_dim` may differ from `width`."""
    position: str = setting("rope", choices=("rope", "learned"))
    """Position embedding: "rope" (Su et al. 2021) or "learned"."""
    rope_theta: float = setting(10_000.0, above=0)
    """Base of the RoPE frequencies, theta in the paper."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """RoPE scaling for longer contexts."""
    rope_dims: int = setting(0, at_least=0, only_for={"position": ("rope",)})
    """Leading dims of each head to rotate (partial rotary; Phi-4-mini rotates three quarters); 0 rotates all dims."""
    pattern: tuple[str, ...] = setting((), choices=LAYER_KINDS)
    """Kind of each layer, repeated over the layers: "global", "local" (sliding window of `window` keys), or "nope"
    (global, without RoPE). By default all layers are "local" if `window` is set, else "global"."""
    window: int = setting(0, at_least=0)
    """Sliding window of local layers, in keys, including the query's own; 0 means no limit."""
    local_rope_theta: float = setting(0.0, at_least=0)
    """RoPE theta of local layers, which then use no RoPE scaling (Gemma 3); 0 treats them like global layers."""
    qk_norm: bool = False
    """Normalize queries and keys before RoPE."""
    qk_norm_over: str = setting("head", choices=("head", "heads"), only_for={"qk_norm": (True,)})
    """ "head" (each head by itself, as in Qwen 3) or "heads" (all heads together, as in OLMo 2)."""
    qkv_bias: bool = False
    """Add biases to query, key and value even if `model.bias` is off (Qwen 2)."""
    out_bias: bool = False
    """Add a bias to the output projection even if `model.bias` is off (Llama variants with `attention_bias`)."""
    scale: float = setting(0.0, at_least=0)
    """Multiplier of attention scores; 0 means `head_dim ** -0.5`."""
    softcap: float = setting(0.0, at_least=0)
    """Cap attention scores as `softcap * tanh(score / softcap)` (Gemma 2); 0 is off."""


@dataclass(kw_only=True, slots=True)
class ExpertsConfig:
    """Mixture of experts in place of the feed-forward: each token is routed to `per_token` of `count` experts (Shazeer
    et al. 2017). No token is dropped, however unbalanced the routing."""

    count: int = setting(0, at_least=0)
    """Number of experts; 0 uses a plain feed-forward."""
    per_token: int = setting(2, at_least=1)
    """Experts that process each token."""
    normalize: bool = True
    """Normalize the router weights of a token's experts to a sum of 1."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The built-in decoder-only transformer."""

    context: int = setting(128, at_least=1, at_most=2**20)
    """Tokens per row, the longest context of attention."""
    layers: int = setting(4, at_least=1, at_most=2**14)
    """Number of transformer layers."""
    width: int = setting(128, at_least=1, at_most=2**20)
    """Width of the residual stream."""
    ff_width: int = setting(512, at_least=1, at_most=2**20)
    """Hidden width of the feed-forward, or of each expert."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention of every layer."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Mixture of experts in place of the feed-forward; off by default."""
    norm: str = setting("rmsnorm", choices=("rmsnorm", "rmsnorm_plus_one", "layernorm"))
    """Kind of norm: "rmsnorm", "rmsnorm_plus_one" (the scale is 1 + the parameter, as in Gemma) or "layernorm"."""
    norm_place: str = setting("before", choices=("before", "after", "both"))
    """Normalize "before" attention and feed-forward, "after" them (OLMo 2), or "both" (Gemma 2)."""
    norm_eps: float = setting(1e-6, above=0)
    """Epsilon of the norms, added to the variance or the mean square."""
    activation: str = setting("swiglu", choices=("swiglu", "geglu", "gelu", "gelu_erf", "relu2"))
    """Activation of the feed-forward: "swiglu", "geglu", "gelu" (tanh approximation), "gelu_erf" (exact) or "relu2"."""
    tied_head: bool = True
    """Use the token embedding as the unembedding matrix."""
    bias: bool = False
    """Add biases to all linear layers and layer norms."""
    ff_bias: bool = False
    """Add biases to the feed-forward even if `bias` is off (Llama variants with `mlp_bias`)."""
    dropout: float = setting(0.0, at_least=0, below=1)
    """Dropout rate of the embeddings and of the outputs of attention and feed-forward; 0 is off."""
    scaled_embedding: bool = False
    """Multiply embeddings by `sqrt(width)` (Gemma)."""
    embedding_scale: float = setting(1.0, above=0)
    """Multiplier of embeddings (Granite)."""
    residual_scale: float = setting(1.0, above=0)
    """Multiplier of the outputs of attention and feed-forward before the residual sum (Granite)."""
    logit_scale: float = setting(1.0, above=0)
    """Multiplier of logits (Granite)."""
    logit_softcap: float = setting(0.0, at_least=0)
    """Cap logits as `softcap * tanh(logit / softcap)` (Gemma 2); 0 is off."""
    vocab_size: int = setting(0, at_least=0, at_most=2**20)
    """Rows of the embedding, if more than the tokenizer has tokens; 0 means one row per token."""
    family: str = ""
    """Hugging Face model type of an imported model, and of its export; "" exports as the first type that fits."""
    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Dtype of activations and matrix products: "float32" or "bfloat16". Parameters are float32."""
    unroll: bool = False
    """Unroll the scan over layers: slower to compile, sometimes faster to run."""
