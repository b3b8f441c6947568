"""The recipe: typed dataclasses, one owner each, and their form as JSON.

Plain (not frozen) dataclasses, so that `--config.pretrain.optim.schedule.peak_lr=3e-4` can set a field; after
`validate` (in `commands/validate.py`) nothing writes to them.
"""

import dataclasses
import difflib
import json
import reprlib
import typing
from dataclasses import dataclass, field
from typing import Any

from jaxstages.data_config import CleanConfig, DuplicatesConfig
from jaxstages.mesh_config import MeshConfig

STAGES = ("pretrain", "finetune", "instruct")
IMPORT = "import"
"""The stage of a workdir that holds weights from elsewhere; it comes before all others, and no recipe has it."""

HELD = (IMPORT, *STAGES)
"""What of a workdir may have checkpoints."""

TASKS = ("lm", "seq2seq", "classify", "chat")

EARLIER = "earlier"
"""In `evaluation.watch`: each stage before this one."""


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """kind: "bpe" (byte-level, trained here), "characters" (one token a character, trained here) or "file"."""

    kind: str = "bpe"
    vocab_size: int = 1024
    path: str = ""
    """For kind "file": a `tokenizer.json`, or a `.model` of SentencePiece."""
    sources: tuple[str, ...] = ()
    """What "bpe" and "characters" are trained on; by default the training sources of every stage."""
    max_bytes: int = 20_000_000
    """Training reads at most this much text, an equal share from each source."""


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


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Sources are strings, see `data/sources.py`: a path or pattern (`data/*.jsonl`), `tfds:NAME[/CONFIG]:SPLIT`,
    `tfds:DIRECTORY:SPLIT`, `hf:NAME:SPLIT` or `world:NAME:SPLIT` (the embedded small world)."""

    task: str = "lm"
    """ "lm", "seq2seq", "classify" or "chat"."""
    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    """Share of rows from each training source; by default in proportion to their rows."""
    validation: tuple[str, ...] = ()
    holdout: float = 0.0
    """Without validation sources: the share held out of `train` (the tail of a text file; records by hash of
    what they ask, so that no repeated question falls on both sides)."""
    text: str = "{text}"
    """lm: format string over a record's fields."""
    prompt: str = "{prompt}"
    """seq2seq, classify: format string of what is given."""
    target: str = "{target}"
    """seq2seq, classify: format string of what is to be answered, or of the label."""
    answers: str = "all"
    """chat: which of a conversation's answers are trained on, "all" or the "last"."""
    max_bad_share: float = 0.01
    """Stop when more than this share of a source's records are malformed."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """name: "constant", "linear", "cosine", "wsd", "rsqrt" or "plateau", each with linear warm-up to `peak_lr`."""

    name: str = "cosine"
    peak_lr: float = 1e-3
    warmup_steps: int = 100
    end_factor: float = 0.1
    """linear, cosine, wsd: the last learning rate as a share of the peak."""
    decay_share: float = 0.2
    """wsd: the share of all steps that decays, at the end."""
    plateau_factor: float = 0.5
    plateau_patience: int = 3
    plateau_window: int = 100
    """plateau: steps whose mean training loss makes one observation."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    name: str = "adamw"
    """ "adamw", "adafactor", "lion", "muon" or "sgd"."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    moment_dtype: str = "float32"
    """Of the first moment (adamw, lion, muon, sgd): "float32" or "bfloat16", which saves 2 bytes a parameter. Second
    moments stay float32: one step changes them by less than bfloat16 resolves."""
    muon_lr_factor: float = 20.0
    """muon: learning rate of the matrices, as a multiple of the schedule's, which the rest (AdamW) follows. Decay is
    the same for both: `weight_decay` times the schedule's rate."""
    no_decay: tuple[str, ...] = ("scale", "bias", "embed")
    """Parameters whose path contains one of these regular expressions are not decayed."""
    freeze: tuple[str, ...] = ()
    """Parameters whose path contains one of these regular expressions are not trained."""
    rates: tuple[tuple[str, float], ...] = ()
    """Learning-rate factors by path: (("embedding", 0.1),). The first regular expression that a parameter's path
    contains gives its factor, of decay too; without one it is 1."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    average: float = 0.0
    """Decay of an exponential moving average of the parameters, such as 0.999; 0 is none. Early in a stage at step t it
    is `(1 + t) / (10 + t)`, so that the start is soon forgotten. The average is evaluated beside the parameters, and
    handed on where it is better."""
    max_bad_steps: int = 10
    """Steps in a row whose loss or gradient is not finite, each of them skipped, that end the run."""
    spike_sigma: float = 0.0
    """Also skip a step whose loss or gradient norm is so many standard deviations above the mean of the last
    `spike_window`; 0 is off. OLMo 2 takes 6."""
    spike_window: int = 128


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """The length of a stage is one of `steps`, `epochs` and `tokens`; the others are 0."""

    steps: int = 1000
    epochs: float = 0.0
    """Passes over the stage's own training rows."""
    tokens: int = 0
    """Tokens that the stage reads, replayed ones among them; padding does not count."""
    batch_size: int = 16
    """Rows in one optimizer step, over all devices and hosts."""
    accumulate: int = 1
    """Parts that the batch is split into; the loss and gradient do not depend on it."""
    loss_tile: int = 0
    """Positions of each row whose logits exist at once, which saves memory where the vocabulary is large; 0 is all."""
    remat: str = "none"
    """What the backward pass computes again to save memory: "none", "dots" (all but matrix products), "offload" (these
    are kept in the host's memory), "full", or "auto", the least that fits the device. On CPU without model.unroll."""
    compiler_options: tuple[str, ...] = ()
    """Of XLA, for the step alone, such as "xla_gpu_enable_triton_gemm=false"; `XLA_FLAGS` sets them for all."""
    eval_every: int = 100
    save_every: int = 100
    log_every: int = 10
    stop_after: int = 0
    """End this run after so many steps without changing its schedule; 0 is off."""
    keep: int = 2
    """Latest checkpoints that stay; the best one always does."""
    hang_seconds: float = 600.0
    """A step, or a batch of an evaluation, that takes longer ends the run, with the stacks of all threads; the first
    step, which compiles, may take ten times that."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    metrics: tuple[str, ...] = ()
    """Beside the loss, perplexity and bits per byte: "bleu", "chrf", "exact_match" (by generation), "accuracy",
    "macro_f1" (task classify)."""
    max_examples: int = 500
    """Held-out examples that generation and labels are scored on; 0 takes all."""
    max_rows: int = 0
    """Held-out rows that the loss is computed on; 0 takes all."""
    max_new_tokens: int = 64
    batch_size: int = 64
    watch: tuple[str, ...] = (EARLIER,)
    """Stages whose held-out data are measured at each evaluation too, as `watch/STAGE/METRIC`: what does this stage
    make the model forget? "earlier" is each stage before this one that this workdir has; () watches none."""
    watch_max_rows: int = 256
    """Held-out rows of each watched stage that the loss is computed on; 0 takes all."""
    watch_max_examples: int = 64
    """Held-out examples of each watched stage that its scores are computed on; 0 takes all."""


@dataclass(kw_only=True, slots=True)
class EarlyStoppingConfig:
    """The best evaluation is kept and handed on whatever the patience."""

    metric: str = "loss"
    mode: str = "min"
    patience: int = 0
    """Evaluations in a row without improvement before the stage stops; 0 never stops."""
    min_delta: float = 0.0
    """An improvement must be larger than this."""
    within: tuple[tuple[str, float], ...] = ()
    """Conditions on the best step: (("watch/pretrain/loss", 0.1),) passes over evaluations at which that metric is
    worse by more than 0.1 than at the stage's start."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Train low-rank adapters beside a base that stays as it is (LoRA, Hu et al. 2022)."""

    rank: int = 0
    """0 is full fine-tuning: all parameters are trained."""
    alpha: float = 16.0
    """The adapters' product is multiplied by `alpha / rank`."""
    targets: tuple[str, ...] = ("/kernel$",)
    """Matrices whose path has one of these regular expressions in it are adapted; by default all linear maps of
    attention and feed-forward."""
    rank_stabilized: bool = False
    """`alpha / sqrt(rank)` instead (rsLoRA, Kalajdzievski 2023)."""
    dora: bool = False
    """Also train the length of each column (DoRA, Liu et al. 2024)."""
    base: str = "float32"
    """What the base is held in: "float32", "bfloat16", or "int8" (its kernels, by column; the rest is bfloat16)."""


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """One more data set of a stage, with a task and a format of its own."""

    data: DataConfig = field(default_factory=DataConfig)
    share: tuple[float, ...] = (0.1,)
    """Share of the stage's rows; a second number replaces it from `StageConfig.late_from` on."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Metrics and limits; `batch_size` and `watch` are the stage's own."""


@dataclass(kw_only=True, slots=True)
class AnchorConfig:
    """A penalty on forgetting without the old data: `weight` times the mean of KL(parent || model) over the tokens of
    rows that the parent itself generates (Marek et al. 2026). For weights that were imported."""

    weight: float = 0.0
    """0 is off."""
    batch_size: int = 4
    """Generated rows in one optimizer step, over all devices and hosts."""
    texts: int = 256
    """Texts that the parent generates before the stage, sampled at temperature 1, each up to its end or to
    `model.context` tokens."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    data: DataConfig = field(default_factory=DataConfig)
    replay: tuple[tuple[str, float], ...] = ()
    """Earlier stages, and the share of this stage's rows that comes from the training data of each:
    (("pretrain", 0.15), ("finetune", 0.1)). `data` fills the rest."""
    mixture: dict[str, DatasetConfig] = field(default_factory=dict)
    """Further data sets, each by a name of its own: text, pairs and chats in one stage. `data` fills the rest."""
    late_from: float = 1.0
    """Share of the stage's steps after which the second number of `DatasetConfig.share` holds."""
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    neftune_alpha: float = 0.0
    """In training, embeddings get uniform noise of this over `sqrt(tokens of the example * width)` (Jain et al. 2023);
    5 is usual, 0 is none."""
    init_from: str = "parent"
    """ "parent" (the stage before, in this workdir, or what was imported into it), "scratch", `WORKDIR/STAGE` of
    another run, or `hf:FOLDER`, which is imported into this workdir and gives the model and the tokenizer."""


@dataclass(kw_only=True, slots=True)
class Recipe:
    name: str
    seed: int = 0
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pretrain: StageConfig | None = None
    finetune: StageConfig | None = None
    instruct: StageConfig | None = None
    prompts: tuple[str, ...] = ()
    """Answered by every stage after a run, so that one can read what each stage taught."""
    cache: str = ""
    """Where prepared rows are kept; by default `WORKDIR/cache`."""


def stages(recipe: Recipe) -> dict[str, StageConfig]:
    """The stages that the recipe has, in their order."""
    return {name: getattr(recipe, name) for name in STAGES if getattr(recipe, name) is not None}


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts and lists, as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _item_types(kind: Any, length: int) -> tuple[Any, ...] | None:
    """Types of a tuple's items: `tuple[str, ...]` has as many as there are, `tuple[str, float]` two; None if the length
    does not fit."""
    options = typing.get_args(kind)
    if options[-1] is Ellipsis:
        return options[:1] * length
    return options if len(options) == length else None


def _has_type(value: Any, kind: Any) -> bool:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            isinstance(k, str) and _has_type(v, options[1]) for k, v in value.items()
        )
    if typing.get_origin(kind) is tuple:
        types = _item_types(kind, len(value)) if isinstance(value, tuple) else None
        return types is not None and all(map(_has_type, value, types))
    if options:  # a stage, or None
        return any(_has_type(value, option) for option in options)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_type(value: Any, kind: Any, path: str) -> None:
    """Raises ValueError for a field's value that is not of its type."""
    if not _has_type(value, kind):
        wanted = str(getattr(kind, "__name__", kind))
        if kind == tuple[tuple[str, float], ...]:
            wanted = "a tuple of pairs, such as (('name', 0.5),)"
        elif wanted.startswith("tuple"):
            wanted = "a tuple, such as ('one',)"
        raise ValueError(f"{path}={reprlib.repr(value)} is of type {type(value).__name__}; it must be {wanted}")


def _from_dict(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{path}={reprlib.repr(value)} must be an object with the fields of {kind.__name__}")
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            if item.name not in value and item.default is item.default_factory is dataclasses.MISSING:
                raise ValueError(f"{path} has no {item.name!r}; add it")
        for name in value:
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(hints)}"
                raise ValueError(f"unknown field {path}.{reprlib.repr(name)[1:-1]}; {hint}")
        return kind(**{name: _from_dict(hints[name], item, f"{path}.{name}") for name, item in value.items()})
    options = typing.get_args(kind)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {name: _from_dict(options[1], item, f"{path}.{name}") for name, item in value.items()}
    if type(None) in options:
        return None if value is None else _from_dict(options[0], value, path)
    types = _item_types(kind, len(value)) if typing.get_origin(kind) is tuple and isinstance(value, list) else None
    if types is not None:
        return tuple(_from_dict(item_type, item, path) for item_type, item in zip(types, value, strict=True))
    check_type(value, kind, path)
    return float(str(value)) if kind is float else value  # by way of text, a whole number of any size gives a float


def from_dict(value: Any) -> Recipe:
    """What `to_dict` wrote, as a Recipe again. Raises ValueError for what is no recipe, or a field that is unknown."""
    return _from_dict(Recipe, value, "recipe")


def lora_from(value: dict[str, Any] | None) -> LoraConfig | None:
    """What a checkpoint says of its adapters; None where all parameters were trained. Raises ValueError as above."""
    return None if value is None else _from_dict(LoraConfig, value, "lora")


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """Fields in which two recipes, or parts of them, differ, each as `path: old -> new`."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        return [
            line
            for item in dataclasses.fields(old)
            for line in differences(getattr(old, item.name), getattr(new, item.name), f"{path}.{item.name}")
        ]
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [line for name in old for line in differences(old[name], new[name], f"{path}.{name}")]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
