"""The recipe: typed dataclasses, one owner each, and `validate`, which is called once at the door.

Plain (not frozen) dataclasses, so that `--config.pretrain.optim.schedule.peak_lr=3e-4` can set a field; after
`validate` nothing writes to them.
"""

import dataclasses
import difflib
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Any

STAGES = ("pretrain", "finetune", "instruct")
TASKS = ("lm", "seq2seq", "classify", "chat")


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """kind: "bpe" (byte-level, trained here), "characters" (one token a character, trained here) or "file"."""

    kind: str = "bpe"
    vocab_size: int = 1024
    path: str = ""
    """For kind "file": a `tokenizer.json`."""
    sources: tuple[str, ...] = ()
    """What "bpe" and "characters" are trained on; by default the training sources of every stage."""
    max_bytes: int = 20_000_000
    """Training reads at most this much text, an equal share from each source."""


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    position: str = "rope"
    """ "rope" or "learned"."""
    rope_theta: float = 10_000.0
    qk_norm: bool = False


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    context: int = 128
    """Tokens in a row, and the most that attention reaches back."""
    layers: int = 4
    width: int = 128
    ff_width: int = 512
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    norm: str = "rmsnorm"
    """ "rmsnorm" or "layernorm"."""
    activation: str = "swiglu"
    """ "swiglu", "geglu", "gelu" or "relu2"."""
    tied_head: bool = True
    bias: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    """Of activations and matmuls: "float32" or "bfloat16". Parameters are float32."""
    unroll: bool = False
    """Unroll the scan over layers: slower to compile, sometimes faster to run."""


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 (one axis at most) takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


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
    max_bad_share: float = 0.01
    """Stop when more than this share of a source's records are malformed."""


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
    muon_lr_factor: float = 20.0
    """muon: learning rate of the matrices, as a multiple of the schedule's, which the rest (AdamW) follows."""
    no_decay: tuple[str, ...] = ("scale", "bias", "embed")
    """Parameters whose path has one of these regular expressions in it are not decayed."""
    freeze: tuple[str, ...] = ()
    """Parameters whose path has one of these regular expressions in it stay as they are."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    steps: int = 1000
    batch_size: int = 16
    """Rows in one optimizer step, over all devices and hosts."""
    accumulate: int = 1
    """Parts that the batch is split into; the loss and gradient do not depend on it."""
    eval_every: int = 100
    save_every: int = 100
    log_every: int = 10
    stop_after: int = 0
    """End this run after so many steps without changing its schedule; 0 is off."""
    keep: int = 2
    """Latest checkpoints that stay; the best one always does."""


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


@dataclass(kw_only=True, slots=True)
class EarlyStoppingConfig:
    """The best evaluation is kept and handed on whatever the patience."""

    metric: str = "loss"
    mode: str = "min"
    patience: int = 0
    """Evaluations in a row without improvement before the stage stops; 0 never stops."""
    min_delta: float = 0.0
    """An improvement must be larger than this."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    init_from: str = "parent"
    """ "parent" (the stage before, in this workdir), "scratch", or `WORKDIR/STAGE` of another run."""


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


METRICS = ("bleu", "chrf", "exact_match", "accuracy", "macro_f1")
CHOICES = {
    "tokenizer.kind": ("bpe", "characters", "file"),
    "attention.position": ("rope", "learned"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.activation": ("swiglu", "geglu", "gelu", "relu2"),
    "model.dtype": ("float32", "bfloat16"),
    "data.task": TASKS,
    "schedule.name": ("constant", "linear", "cosine", "wsd", "rsqrt", "plateau"),
    "optim.name": ("adamw", "adafactor", "lion", "muon", "sgd"),
    "early_stopping.mode": ("min", "max"),
}
"""Owner and field -> what it may be."""

AT_LEAST_ONE = (
    *("context", "layers", "width", "ff_width", "heads", "kv_heads", "head_dim", "vocab_size", "max_bytes"),
    *("steps", "batch_size", "accumulate", "eval_every", "save_every", "log_every", "keep", "max_new_tokens"),
    *("plateau_patience", "plateau_window", "fsdp", "tensor"),
)
POSITIVE = ("peak_lr", "rope_theta", "muon_lr_factor", "plateau_factor")
SHARES = ("holdout", "dropout", "max_bad_share", "beta1", "beta2", "label_smoothing", "end_factor", "decay_share")


def _check_field(path: str, name: str, value: Any) -> None:
    owner = ".".join(path.split(".")[-2:])
    if owner in CHOICES and value not in CHOICES[owner]:
        near = difflib.get_close_matches(str(value), CHOICES[owner], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{path}={value!r}: {hint}known: {', '.join(CHOICES[owner])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}={value} must be a finite number")
    if name in AT_LEAST_ONE and value < 1:
        raise ValueError(f"{path}={value} must be at least 1")
    if name in POSITIVE and value <= 0:
        raise ValueError(f"{path}={value} must be larger than 0")
    if name in SHARES and not 0 <= value <= 1:
        raise ValueError(f"{path}={value} must be between 0 and 1")
    if name not in ("data", "seed") and isinstance(value, int | float) and value < 0:
        raise ValueError(f"{path}={value} must not be negative")


def _check_tree(config: Any, path: str) -> None:
    for item in dataclasses.fields(config):
        value, where = getattr(config, item.name), f"{path}.{item.name}"
        if dataclasses.is_dataclass(value):
            _check_tree(value, where)
        elif not (where == "config.mesh.data" and value == -1):
            _check_field(where, item.name, value)


def _check_stage(name: str, stage: StageConfig) -> None:
    data, where = stage.data, f"config.{name}"
    if not data.train:
        raise ValueError(f"{where}.data.train is empty; name a source, such as --{where}.data.train='data/*.jsonl'")
    if data.weights and len(data.weights) != len(data.train):
        raise ValueError(f"{where}.data.weights has {len(data.weights)} shares for {len(data.train)} training sources")
    if data.weights and (min(data.weights) < 0 or not sum(data.weights)):
        raise ValueError(f"{where}.data.weights={data.weights} must be at least 0, and not all 0")
    if bool(data.validation) == bool(data.holdout):
        raise ValueError(f"{where}.data: set validation (held-out sources) or holdout (a share of train), one of them")
    allowed = {"pretrain": ("lm",), "finetune": ("seq2seq", "classify"), "instruct": ("chat",)}[name]
    if data.task not in allowed:
        raise ValueError(f"{where}.data.task={data.task!r}; this stage's tasks: {', '.join(allowed)}")
    fits = {
        "lm": (),
        "seq2seq": ("bleu", "chrf", "exact_match"),
        "classify": ("accuracy", "macro_f1"),
        "chat": ("exact_match", "bleu", "chrf"),
    }[data.task]
    for metric in stage.evaluation.metrics:
        if metric not in fits:
            raise ValueError(
                f"{where}.evaluation.metrics: {metric!r} does not apply to task {data.task!r}; known there: {fits}"
            )
    watched = ("loss", "perplexity", "bits_per_byte", "token_accuracy", *stage.evaluation.metrics)
    if stage.early_stopping.metric not in watched:
        raise ValueError(
            f"{where}.early_stopping.metric={stage.early_stopping.metric!r} is not evaluated here; known: "
            f"{', '.join(watched)} (or add it to evaluation.metrics)"
        )
    higher = stage.early_stopping.metric in ("token_accuracy", *METRICS)
    if (stage.early_stopping.mode == "max") != higher:
        raise ValueError(
            f"{where}.early_stopping: {stage.early_stopping.metric} is better when "
            f'{"higher" if higher else "lower"}; set mode="{"max" if higher else "min"}"'
        )
    if stage.loop.batch_size % stage.loop.accumulate:
        raise ValueError(
            f"{where}.loop.batch_size={stage.loop.batch_size} must be divisible by accumulate={stage.loop.accumulate}"
        )


def validate(recipe: Recipe) -> None:
    """Raises ValueError, one line that names the field, its value and the remedy, for a recipe that can't be run."""
    _check_tree(recipe, "config")
    if not stages(recipe):
        raise ValueError("the recipe has no stage; set pretrain, finetune or instruct")
    attention = recipe.model.attention
    if attention.heads % attention.kv_heads:
        raise ValueError(
            f"config.model.attention: heads={attention.heads} must be divisible by kv_heads={attention.kv_heads}"
        )
    if attention.position == "rope" and attention.head_dim % 2:
        raise ValueError(f"config.model.attention.head_dim={attention.head_dim} must be even for rope")
    if recipe.tokenizer.kind == "file" and not recipe.tokenizer.path:
        raise ValueError('config.tokenizer.path is empty; kind "file" needs the path of a tokenizer.json')
    for name, stage in stages(recipe).items():
        _check_stage(name, stage)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts and lists, as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _from_dict(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{path}={value!r} must be an object with the fields of {kind.__name__}")
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                raise ValueError(f"unknown field {path}.{name}; " + (f"did you mean {near[0]}?" if near else ""))
        return kind(**{name: _from_dict(hints[name], item, f"{path}.{name}") for name, item in value.items()})
    options = typing.get_args(kind)
    if type(None) in options:
        return None if value is None else _from_dict(options[0], value, path)
    return tuple(value) if typing.get_origin(kind) is tuple else value


def from_dict(value: dict[str, Any]) -> Recipe:
    """What `to_dict` wrote, as a Recipe again. Raises ValueError for a field that this version does not know."""
    return _from_dict(Recipe, value, "recipe")


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """Fields in which two recipes, or parts of them, differ, each as `path: old -> new`."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        return [
            line
            for item in dataclasses.fields(old)
            for line in differences(getattr(old, item.name), getattr(new, item.name), f"{path}.{item.name}")
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
