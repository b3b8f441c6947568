"""`validate`, called once at the door: what can't be run is refused in one line that names the field and the remedy."""

import dataclasses
import difflib
import math
import re
import reprlib
import string
import typing
from typing import Any

from jaxstages.config import (
    CHECKPOINTED_STAGES,
    EARLIER,
    IMPORT,
    TASKS,
    AnchorConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    StageConfig,
    check_type,
    differences,
    stages,
)
from jaxstages.config.data import DuplicatesConfig
from jaxstages.config.metrics import FITS, LOSSES, higher_is_better

CHOICES = {
    "tokenizer.kind": ("bpe", "characters", "file"),
    "attention.position": ("rope", "learned"),
    "attention.qk_norm_over": ("head", "heads"),
    "rope_scaling.kind": ("none", "linear", "llama3", "yarn", "longrope", "dynamic"),
    "model.norm": ("rmsnorm", "rmsnorm_plus_one", "layernorm"),
    "model.norm_place": ("before", "after", "both"),
    "model.activation": ("swiglu", "geglu", "gelu", "gelu_erf", "relu2"),
    "model.dtype": ("float32", "bfloat16"),
    "data.task": TASKS,
    "data.answers": ("all", "last"),
    "clean.control_characters": ("keep", "remove"),
    "clean.unicode": ("none", "nfc", "nfkc"),
    "duplicates.shingle": ("words", "characters"),
    "schedule.name": ("constant", "linear", "cosine", "wsd", "rsqrt", "plateau"),
    "optim.name": ("adamw", "adafactor", "lion", "muon", "sgd"),
    "early_stopping.mode": ("min", "max"),
    "optim.moment_dtype": ("float32", "bfloat16"),
    "loop.remat": ("none", "dots", "offload", "full", "auto"),
    "lora.base": ("float32", "bfloat16", "int8"),
}
"""Owner and field -> what it may be."""

KINDS = ("global", "local", "nope")
"""Of layers, in `attention.pattern`."""

AT_LEAST_ONE = (
    *("context", "layers", "width", "ff_width", "heads", "kv_heads", "head_dim", "tokenizer.vocab_size", "max_bytes"),
    *("per_token", "trained_context", "shingle_size", "permutations", "bands"),
    *("batch_size", "texts", "accumulate", "eval_every", "save_every", "log_every", "keep", "max_new_tokens"),
    *("plateau_patience", "plateau_window", "fsdp", "tensor", "max_bad_steps", "spike_window"),
    "data",
)
AT_MOST = {
    **dict.fromkeys(("layers", "heads", "kv_heads", "head_dim", "accumulate", "fsdp", "tensor", "rank"), 2**14),
    **dict.fromkeys(("context", "width", "ff_width", "vocab_size", "batch_size", "max_new_tokens"), 2**20),
    "spike_window": 2**20,
    **dict.fromkeys(("shingle_size", "permutations"), 2**12),
    "bands": 2**8,
    "max_bytes": 2**40,
    "hang_seconds": 1e9,
}
"""More is a slip of the pen, which would end in a crash or without memory."""

BELOW_ONE = ("beta1", "beta2", "dropout", "label_smoothing", "average")
POSITIVE = (
    *("peak_lr", "norm_eps", "rope_theta", "muon_lr_factor", "plateau_factor", "hang_seconds"),
    *("alpha", "factor", "low_frequency_factor", "high_frequency_factor", "beta_fast", "beta_slow"),
    *("short_factors", "long_factors", "embedding_scale", "residual_scale", "logit_scale"),
)
SHARES = (
    "holdout",
    "threshold",
    "dropout",
    "max_bad_share",
    "beta1",
    "beta2",
    "label_smoothing",
    "end_factor",
    "decay_share",
    "share",
    "late_from",
    "average",
)


LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3e38
"""What an int32 and a float32 hold, which numbers become on the device."""

APPLIES = {
    "tokenizer.path": ("kind", ("file",)),
    "data.text": ("task", ("lm",)),
    "data.answers": ("task", ("chat",)),
    **dict.fromkeys(("data.prompt", "data.target"), ("task", ("seq2seq", "classify"))),
    "schedule.end_factor": ("name", ("linear", "cosine", "wsd")),
    "schedule.decay_share": ("name", ("wsd",)),
    **{f"schedule.plateau_{name}": ("name", ("plateau",)) for name in ("factor", "patience", "window")},
    "optim.beta1": ("name", ("adamw", "lion", "muon", "sgd")),
    "optim.beta2": ("name", ("adamw", "lion", "muon")),
    "optim.moment_dtype": ("name", ("adamw", "lion", "muon", "sgd")),
    "optim.muon_lr_factor": ("name", ("muon",)),
    "rope_scaling.factor": ("kind", ("linear", "llama3", "yarn", "longrope", "dynamic")),
    **{f"rope_scaling.{name}_frequency_factor": ("kind", ("llama3",)) for name in ("low", "high")},
    "rope_scaling.trained_context": ("kind", ("llama3", "yarn", "longrope", "dynamic")),
    **{f"rope_scaling.{name}": ("kind", ("yarn",)) for name in ("beta_fast", "beta_slow", "truncate")},
    "rope_scaling.attention_factor": ("kind", ("yarn", "longrope")),
    **{f"rope_scaling.{name}_factors": ("kind", ("longrope",)) for name in ("short", "long")},
    "attention.rope_dims": ("position", ("rope",)),
    "attention.qk_norm_over": ("qk_norm", (True,)),
}
"""Owner and field -> the field beside it that it depends on, and for which of its values it is read."""


def _check_text(path: str, name: str, value: str) -> None:
    if re.search("[\0\ud800-\udfff]", value):
        raise ValueError(f"{path}={reprlib.repr(value)} must be text, without NUL and what is not UTF-8")
    try:
        if name in ("text", "prompt", "target"):
            list(string.Formatter().parse(value))
        if name in ("no_decay", "freeze", "targets", "rates"):
            re.compile(value)
    except (ValueError, re.error) as error:
        raise ValueError(f"{path}={reprlib.repr(value)}: {error}; mend it") from error


def _check_number(path: str, name: str, value: int | float, most: int | float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}={value} must be a finite number")
    owner = ".".join(path.split(".")[-2:])
    if (name in AT_LEAST_ONE or owner in AT_LEAST_ONE) and value < 1:
        raise ValueError(f"{path}={value} must be at least 1")
    if name in POSITIVE and value <= 0:
        raise ValueError(f"{path}={value} must be larger than 0")
    if name in SHARES and not 0 <= value <= 1:
        raise ValueError(f"{path}={value} must be between 0 and 1")
    if name in BELOW_ONE and value == 1:
        raise ValueError(f"{path}={value} must be less than 1")
    if value < 0 and name != "within":
        raise ValueError(f"{path}={value} must not be negative")
    if value > most:
        raise ValueError(f"{path}={value} must be at most {most}")


def _flat(value: Any) -> list[Any]:
    """The items of a tuple, and of the tuples in it."""
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, tuple) else [value]


def _check_field(path: str, name: str, value: Any, largest: int | float) -> None:
    owner = ".".join(path.split(".")[-2:])
    if owner in CHOICES and value not in CHOICES[owner]:
        near = difflib.get_close_matches(str(value), CHOICES[owner], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{path}={reprlib.repr(value)}: {hint}known: {', '.join(CHOICES[owner])}")
    for item in _flat(value):
        if isinstance(item, str):
            _check_text(path, name, item)
        elif isinstance(item, int | float):
            _check_number(path, name, item, AT_MOST.get(name, largest))


def _check_tree(config: Any, path: str) -> None:
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, where = getattr(config, item.name), f"{path}.{item.name}"
        check_type(value, hints[item.name], where)
        key = ".".join(where.split(".")[-2:])
        if key in APPLIES and value != item.default:
            beside, readers = APPLIES[key]
            if getattr(config, beside) not in readers:
                raise ValueError(
                    f"{where}={reprlib.repr(value)} does not apply to {beside}={getattr(config, beside)!r}; leave it "
                    f"at {item.default!r}, or set {beside} to {' or '.join(map(repr, readers))}"
                )
        if dataclasses.is_dataclass(value):
            _check_tree(value, where)
        elif isinstance(value, dict):
            for key, part in value.items():
                _check_tree(part, f"{where}.{key}")
        elif not (where == "config.mesh.data" and value == -1):
            _check_field(where, item.name, value, LARGEST_INT if hints[item.name] is int else LARGEST_FLOAT)


def _check_stage(name: str, stage: StageConfig, earlier: tuple[str, ...]) -> None:
    data, where = stage.data, f"config.{name}"
    _check_data(data, f"{where}.data")
    allowed = {"pretrain": ("lm",), "finetune": ("seq2seq", "classify"), "instruct": ("chat",)}[name]
    if data.task not in allowed:
        raise ValueError(
            f"{where}.data.task={data.task!r}; this stage's tasks: {', '.join(allowed)} (others can be mixed in with "
            f"{where}.mixture)"
        )
    _check_metrics(stage.evaluation.metrics, data.task, f"{where}.evaluation.metrics")
    _check_mixture(name, stage, earlier)
    lengths = {"steps": stage.loop.steps, "epochs": stage.loop.epochs, "tokens": stage.loop.tokens}
    if sum(value > 0 for value in lengths.values()) != 1:
        listed = ", ".join(f"{field}={value}" for field, value in lengths.items())
        raise ValueError(f"{where}.loop: {listed}; set one of them, and the others to 0")
    watched = (*LOSSES, *stage.evaluation.metrics)
    others = tuple(f"{key}/" for key in stage.mixture) + tuple(f"watch/{key}/" for key in earlier)
    if stage.early_stopping.metric not in watched and not stage.early_stopping.metric.startswith(others):
        raise ValueError(
            f"{where}.early_stopping.metric={stage.early_stopping.metric!r} is not evaluated here; known: "
            f"{', '.join(watched)} (or add it to evaluation.metrics)"
        )
    higher = higher_is_better(stage.early_stopping.metric)
    if (stage.early_stopping.mode == "max") != higher:
        raise ValueError(
            f"{where}.early_stopping: {stage.early_stopping.metric} is better when "
            f'{"higher" if higher else "lower"}; set mode="{"max" if higher else "min"}"'
        )
    if stage.loop.batch_size % stage.loop.accumulate:
        raise ValueError(
            f"{where}.loop.batch_size={stage.loop.batch_size} must be divisible by accumulate={stage.loop.accumulate}"
        )


def _check_data(data: DataConfig, where: str) -> None:
    if not data.train:
        raise ValueError(f"{where}.train is empty; name a source, such as --{where}.train='data/*.jsonl'")
    if data.weights and len(data.weights) != len(data.train):
        raise ValueError(f"{where}.weights has {len(data.weights)} shares for {len(data.train)} training sources")
    if data.weights and (min(data.weights) < 0 or not sum(data.weights)):
        raise ValueError(f"{where}.weights={data.weights} must be at least 0, and not all 0")
    if bool(data.validation) == bool(data.holdout):
        raise ValueError(f"{where}: set validation (held-out sources) or holdout (a share of train), one of them")
    both = sorted(set(data.train) & set(data.validation))
    if both:
        raise ValueError(f"{where}: {both[0]!r} is in train and in validation; use holdout, or another source")
    _check_cleaning(data, where)


def _check_metrics(metrics: tuple[str, ...], task: str, where: str) -> None:
    for metric in metrics:
        if metric not in FITS[task]:
            raise ValueError(f"{where}: {metric!r} does not apply to task {task!r}; known there: {FITS[task]}")


def _check_mixture(name: str, stage: StageConfig, earlier: tuple[str, ...]) -> None:
    """Args: earlier: the recipe's stages before this one."""
    where = f"config.{name}"
    for replayed, share in stage.replay:
        if replayed == IMPORT:
            raise ValueError(f"{where}.replay: imported weights come without their data; set {where}.anchor.weight")
        if replayed not in earlier:
            raise ValueError(
                f"{where}.replay: {replayed!r} is no stage of this recipe before {name}; there "
                f"{'are ' + ', '.join(earlier) if earlier else 'is none'}"
            )
        if not 0 <= share < 1:
            raise ValueError(f"{where}.replay: the share of {replayed} is {share}; it must be at least 0, and below 1")
    names = [replayed for replayed, _ in stage.replay]
    if twice := [replayed for replayed in names if names.count(replayed) > 1]:
        raise ValueError(f"{where}.replay names {twice[0]} twice; add the shares up")
    for key, part in stage.mixture.items():
        if not key.isidentifier() or key in (*CHECKPOINTED_STAGES, "watch", "average", "loss"):
            raise ValueError(f"{where}.mixture: {key!r} can't be the name of a data set; take another word")
        if len(part.share) not in (1, 2):
            raise ValueError(f"{where}.mixture.{key}.share={part.share} must be one share, or two: (0.0, 0.2)")
        _check_data(part.data, f"{where}.mixture.{key}.data")
        _check_metrics(part.evaluation.metrics, part.data.task, f"{where}.mixture.{key}.evaluation.metrics")
    for late in (0, -1):
        total = sum(share for _, share in stage.replay) + sum(part.share[late] for part in stage.mixture.values())
        if total >= 1:
            raise ValueError(f"{where}: replay and mixture take {total:.0%} of the rows, and leave none to data")
    if any(len(set(part.share)) == 2 for part in stage.mixture.values()) == (stage.late_from == 1):
        raise ValueError(
            f"{where}.late_from={stage.late_from}: it says from which share of the steps on the second number of "
            f"{where}.mixture.NAME.share holds; set both or neither"
        )
    unknown = [watched for watched in stage.evaluation.watch if watched not in (EARLIER, *earlier)]
    if unknown:
        raise ValueError(
            f"{where}.evaluation.watch: {unknown[0]!r} is no stage of this recipe before {name}; known: "
            f"{', '.join((EARLIER, *earlier))}"
        )


def _check_cleaning(data: DataConfig, where: str) -> None:
    low, high = data.clean.min_characters, data.clean.max_characters
    if high and high < low:
        raise ValueError(f"{where}.clean: max_characters={high} must be at least min_characters={low}, or 0, no limit")
    part = data.duplicates
    if not part.threshold:
        for line in differences(DuplicatesConfig(), part, f"{where}.duplicates"):
            raise ValueError(f"{line} does not apply to {where}.duplicates.threshold=0; set threshold to 0.8, say")
    if part.permutations % part.bands:
        raise ValueError(
            f"{where}.duplicates: permutations={part.permutations} must be divisible by bands={part.bands}"
        )


def _check_model(model: ModelConfig) -> None:
    part, where = model.attention, "config.model.attention"
    for kind in part.pattern:
        if kind not in KINDS:
            raise ValueError(f"{where}.pattern: {reprlib.repr(kind)} is no kind of layer; known: {', '.join(KINDS)}")
    if ("local" in part.pattern) > (part.window > 0):
        raise ValueError(f"{where}.pattern has local layers; say with {where}.window how many keys they see")
    if part.local_rope_theta and not part.window:
        raise ValueError(f"{where}.local_rope_theta={part.local_rope_theta} does not apply without local layers")
    if part.rope_scaling.high_frequency_factor <= part.rope_scaling.low_frequency_factor:
        raise ValueError(f"{where}.rope_scaling: high_frequency_factor must be larger than low_frequency_factor")
    scaling, pairs = part.rope_scaling, (part.rope_dims or part.head_dim) // 2
    if part.rope_dims % 2 or part.rope_dims > part.head_dim:
        raise ValueError(f"{where}.rope_dims={part.rope_dims} must be even, and at most head_dim={part.head_dim}")
    if scaling.kind in ("longrope", "dynamic") and model.context > scaling.trained_context:
        raise ValueError(
            f"config.model.context={model.context} must be at most {where}.rope_scaling.trained_context="
            f"{scaling.trained_context}: beyond it, {scaling.kind} depends on the length of each text"
        )
    for name in ("short_factors", "long_factors") if scaling.kind == "longrope" else ():
        if len(getattr(scaling, name)) != pairs:
            raise ValueError(f"{where}.rope_scaling.{name} must have {pairs} numbers, one for each pair of dims")
    if model.experts.count and model.experts.count < model.experts.per_token:
        raise ValueError(
            f"config.model.experts: per_token={model.experts.per_token} must be at most count={model.experts.count}"
        )
    if model.experts.count and model.activation not in ("swiglu", "geglu"):
        raise ValueError(f"config.model.experts: activation={model.activation!r} must be swiglu or geglu")


def _from_scratch(name: str, stage: StageConfig, imported: bool) -> bool:
    return stage.init_from == "scratch" or (name == "pretrain" and stage.init_from == "parent" and not imported)


def _check_anchor(name: str, stage: StageConfig, imported: bool) -> None:
    where = f"config.{name}.anchor"
    if not stage.anchor.weight:
        for line in differences(AnchorConfig(), stage.anchor, where):
            raise ValueError(f"{line} does not apply to {where}.weight=0, no anchor; set weight to 1, say")
    elif _from_scratch(name, stage, imported):
        raise ValueError(
            f"{where}.weight={stage.anchor.weight}: an anchor needs a parent, and {name} starts from scratch; set "
            f"weight to 0, or config.{name}.init_from to WORKDIR/STAGE of another run"
        )
    elif stage.anchor.batch_size % stage.loop.accumulate:
        raise ValueError(
            f"{where}.batch_size={stage.anchor.batch_size} must be divisible by accumulate={stage.loop.accumulate}"
        )


def _check_lora(name: str, stage: StageConfig, imported: bool) -> None:
    lora, where = stage.lora, f"config.{name}.lora"
    if not lora.rank:
        for line in differences(LoraConfig(), lora, where):
            raise ValueError(f"{line} does not apply to {where}.rank=0, full fine-tuning; set rank to 8, say")
        return
    if not lora.targets:
        raise ValueError(f"{where}.targets is empty; name matrices to adapt, such as ('attention/query/kernel',)")
    if _from_scratch(name, stage, imported):
        raise ValueError(
            f"{where}.rank={lora.rank}: adapters need a base, and {name} starts from scratch; set rank to 0, or "
            f"config.{name}.init_from to WORKDIR/STAGE of another run"
        )
    if stage.optim.name == "muon":
        raise ValueError(f"config.{name}.optim.name='muon' is for whole matrices, not for adapters; take 'adamw'")


def validate(recipe: Recipe, imported: bool = False) -> None:
    """Raises ValueError, one line that names the field, its value and the remedy, for a recipe that can't be run.

    Args:
        imported: there are weights from elsewhere: it needs no stage.
    """
    _check_tree(recipe, "config")
    if not stages(recipe) and not imported:
        raise ValueError("the recipe has no stage; set pretrain, finetune or instruct")
    _check_model(recipe.model)
    attention = recipe.model.attention
    if attention.heads % attention.kv_heads:
        raise ValueError(
            f"config.model.attention: heads={attention.heads} must be divisible by kv_heads={attention.kv_heads}"
        )
    if attention.position == "rope" and attention.head_dim % 2:
        raise ValueError(f"config.model.attention.head_dim={attention.head_dim} must be even for rope")
    if recipe.tokenizer.kind == "file" and not recipe.tokenizer.path:
        raise ValueError('config.tokenizer.path is empty; kind "file" needs the path of a tokenizer.json or .model')
    names = tuple(stages(recipe))
    for place, (name, stage) in enumerate(stages(recipe).items()):
        _check_stage(name, stage, names[:place])
        _check_anchor(name, stage, imported)
        _check_lora(name, stage, imported)
        generates = recipe.prompts or (stage.data.task != "classify" and stage.evaluation.metrics)
        if generates and stage.evaluation.max_new_tokens >= recipe.model.context:
            raise ValueError(
                f"config.{name}.evaluation.max_new_tokens={stage.evaluation.max_new_tokens} must be less than "
                f"config.model.context={recipe.model.context}, which holds the prompt too"
            )
