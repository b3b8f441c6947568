"""`validate`, called once at the door: what can't be run is refused in one line that names the field and the remedy."""

import dataclasses
import difflib
import math
import typing
from typing import Any

from jaxstages.config import TASKS, Recipe, StageConfig, stages

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
    *("plateau_patience", "plateau_window", "fsdp", "tensor", "max_bad_steps", "spike_window"),
)
POSITIVE = ("peak_lr", "rope_theta", "muon_lr_factor", "plateau_factor", "hang_seconds")
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


def _has_type(value: Any, kind: Any) -> bool:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_has_type(item, options[0]) for item in value)
    if options:  # a stage, or None
        return any(_has_type(value, option) for option in options)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _check_tree(config: Any, path: str) -> None:
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, where = getattr(config, item.name), f"{path}.{item.name}"
        if not _has_type(value, hints[item.name]):
            wanted = str(getattr(hints[item.name], "__name__", hints[item.name]))
            wanted = "a tuple, such as ('one',)" if wanted.startswith("tuple") else wanted
            raise ValueError(f"{where}={value!r} is of type {type(value).__name__}; it must be {wanted}")
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
    both = sorted(set(data.train) & set(data.validation))
    if both:
        raise ValueError(f"{where}.data: {both[0]!r} is in train and in validation; use holdout, or another source")
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
        generates = recipe.prompts or (stage.data.task != "classify" and stage.evaluation.metrics)
        if generates and stage.evaluation.max_new_tokens >= recipe.model.context:
            raise ValueError(
                f"config.{name}.evaluation.max_new_tokens={stage.evaluation.max_new_tokens} must be less than "
                f"config.model.context={recipe.model.context}, which holds the prompt too"
            )
