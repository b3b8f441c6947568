"""Check a recipe: `validate` refuses one that cannot run, in one line with the field, its value and the remedy.

The first part of this file walks over the recipe and applies the rules declared beside the fields (`config.setting`).
The second part contains the rules that involve several fields.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import string
import typing
from pathlib import Path
from typing import Any

from jaxstages.config import (
    CHECKPOINTED_STAGES,
    EARLIER,
    IMPORT,
    AnchorConfig,
    DataConfig,
    DuplicatesConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    StageConfig,
    all_metrics,
    check_type,
    differences,
    stages,
)
from jaxstages.config.data import TASKS
from jaxstages.config.metrics import FITS, LOSSES, higher_is_better
from jaxstages.config.parts import Makes, ModelSpec, is_part, metric_name, tracker_name
from jaxstages.config.setting import Rules, rules_of

LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3e38
"""Limits of int32 and float32, the dtypes of numbers on the device."""


# Rules of single fields -------------------------------------------------------------------------------------------


def _check_tree(config: Any, path: str) -> None:
    """Check the type and the rules of every field of a dataclass, recursively."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{path}.{field.name}"
        check_type(value, hints[field.name], where)

        if is_part(value):
            _check_applies(config, field, rules_of(field), where)
        elif dataclasses.is_dataclass(value):
            _check_tree(value, where)
        elif isinstance(value, dict):
            for key, item in value.items():
                _check_tree(item, f"{where}.{key}")
        else:
            rules = rules_of(field)
            _check_applies(config, field, rules, where)
            limit = LARGEST_INT if hints[field.name] is int else LARGEST_FLOAT
            for item in _leaves(value):
                _check_value(item, rules, limit, where)


def _leaves(value: Any) -> list[Any]:
    """Flatten nested tuples."""
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, tuple) else [value]


def _check_applies(config: Any, field: dataclasses.Field[Any], rules: Rules, where: str) -> None:
    value = getattr(config, field.name)
    for neighbour, values in rules.only_for.items():
        current = getattr(config, neighbour)
        if value != field.default and current not in values:
            raise ValueError(
                f"{where}={reprlib.repr(value)} does not apply to {neighbour}={current!r}; leave it at "
                f"{field.default!r}, or set {neighbour} to {' or '.join(map(repr, values))}"
            )


def _check_value(value: Any, rules: Rules, limit: float, where: str) -> None:
    if isinstance(value, str):
        _check_text(value, rules, where)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value != rules.special:
        _check_number(value, rules, limit, where)


def _check_text(value: str, rules: Rules, where: str) -> None:
    if re.search("[\0\ud800-\udfff]", value):
        raise ValueError(f"{where}={reprlib.repr(value)} must be text that UTF-8 can encode, without NUL")

    if rules.choices is not None and value not in rules.choices:
        near = difflib.get_close_matches(value, rules.choices, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{where}={reprlib.repr(value)}: {hint}known: {', '.join(rules.choices)}")

    try:
        if rules.syntax == "regex":
            re.compile(value)
        elif rules.syntax == "format":
            list(string.Formatter().parse(value))
    except (ValueError, re.error) as error:
        kind = {"regex": "regular expression", "format": "format string"}[rules.syntax or ""]
        raise ValueError(f"{where}={reprlib.repr(value)}: {error}; it must be a valid {kind}") from error


def _check_number(value: int | float, rules: Rules, limit: float, where: str) -> None:
    upper = next((bound for bound in (rules.at_most, rules.below) if bound is not None), limit)

    if isinstance(value, float) and not math.isfinite(value):
        complaint = "must be a finite number"
    elif (rules.at_least, upper) == (0, 1) and not 0 <= value <= 1:
        complaint = "must be between 0 and 1"
    elif rules.at_least is not None and value < rules.at_least:
        complaint = f"must be at least {rules.at_least}" if rules.at_least else "must not be negative"
    elif rules.above is not None and value <= rules.above:
        complaint = f"must be larger than {rules.above}"
    elif rules.below is not None and value >= rules.below:
        complaint = f"must be less than {rules.below}"
    elif value > upper:
        complaint = f"must be at most {upper}"
    else:
        return

    raise ValueError(f"{where}={value} {complaint}")


# Rules of several fields ------------------------------------------------------------------------------------------


TASKS_OF_STAGE = {"pretrain": ("lm", "own"), "finetune": ("seq2seq", "classify", "own"), "instruct": ("chat", "own")}
"""Tasks that each of the three stages accepts; an extra stage accepts any task."""

FOLDERS = ("cache", "tensorboard", "tokenizer")
"""Folders of a workdir that are not stages."""

RESERVED_NAMES = (*CHECKPOINTED_STAGES, "watch", "average", "choice", "loss")
"""Names with a meaning in metric names, which the data sets of a mixture cannot have."""


def _check_stage(name: str, stage: StageConfig, recipe: Recipe, earlier: tuple[str, ...]) -> None:
    where = f"config.{name}"
    _check_data(stage.data, f"{where}.data")
    _check_own(stage.optim.name, stage.optim.own, f"{where}.optim", "name")
    _check_own(stage.optim.schedule.name, stage.optim.schedule.own, f"{where}.optim.schedule", "name")

    tasks = TASKS_OF_STAGE.get(name, TASKS)
    if stage.data.task not in tasks:
        raise ValueError(
            f"{where}.data.task={stage.data.task!r}; this stage's tasks: {', '.join(tasks)} (add data of other tasks "
            f"with {where}.mixture)"
        )
    _check_metrics(stage.evaluation.metrics, stage.data.task, f"{where}.evaluation.metrics")
    _check_replay(name, stage, earlier)
    _check_mixture(name, stage, recipe)
    _check_watch(name, stage, earlier)
    _check_early_stopping(name, stage, recipe, earlier)
    for field in ("label_smoothing", "z_loss"):
        if stage.loss is not None and (value := getattr(stage.optim, field)):
            raise ValueError(f"{where}.optim.{field}={value} does not apply to {where}.loss; set it to 0")

    choices = [Path(source).name.partition(".")[0] for source in stage.evaluation.choice]
    if repeated := [choice for choice in choices if choices.count(choice) > 1]:
        raise ValueError(f"{where}.evaluation.choice: two files are named {repeated[0]!r}; rename one of them")

    lengths = {"steps": stage.loop.steps, "epochs": stage.loop.epochs, "tokens": stage.loop.tokens}
    if sum(value > 0 for value in lengths.values()) != 1:
        listed = ", ".join(f"{field}={value}" for field, value in lengths.items())
        raise ValueError(f"{where}.loop: {listed}; set one of them, and the others to 0")

    if stage.loop.batch_size % stage.loop.accumulate:
        raise ValueError(
            f"{where}.loop.batch_size={stage.loop.batch_size} must be divisible by accumulate={stage.loop.accumulate}"
        )


def _check_own(choice: str, own: Any, where: str, field: str) -> None:
    """Raise ValueError if a custom part is selected but missing."""
    if choice == "own" and own is None:
        raise ValueError(f"{where}.{field}='own' needs {where}.own, which only the recipe's file can set")


def _check_data(data: DataConfig, where: str) -> None:
    _check_own(data.task, data.own, where, "task")
    if not data.train:
        raise ValueError(f"{where}.train is empty; name a source, such as --{where}.train='data/*.jsonl'")
    if data.weights and len(data.weights) != len(data.train):
        raise ValueError(f"{where}.weights has {len(data.weights)} shares for {len(data.train)} training sources")
    if data.weights and not sum(data.weights):
        raise ValueError(f"{where}.weights={data.weights} must not all be 0")
    if bool(data.validation) == bool(data.holdout):
        raise ValueError(f"{where}: set either validation (held-out sources) or holdout (a share of train)")

    overlap = [source for source in data.train if source in data.validation]
    if overlap:
        raise ValueError(f"{where}: {overlap[0]!r} is in train and in validation; use holdout, or another source")

    low, high = data.clean.min_characters, data.clean.max_characters
    if high and high < low:
        raise ValueError(f"{where}.clean: max_characters={high} must be at least min_characters={low}, or 0 (no limit)")

    duplicates = data.duplicates
    if not duplicates.threshold:
        _check_unchanged(
            DuplicatesConfig(), duplicates, f"{where}.duplicates", "threshold=0; set threshold to 0.8, say"
        )
    if duplicates.permutations % duplicates.bands:
        raise ValueError(
            f"{where}.duplicates: permutations={duplicates.permutations} must be divisible by bands={duplicates.bands}"
        )


def _check_unchanged(default: Any, config: Any, where: str, switch: str) -> None:
    """Raise ValueError if a field is set although its feature is off."""
    for change in differences(default, config, where):
        raise ValueError(f"{change} does not apply to {where}.{switch}")


def _check_metrics(metrics: tuple[Any, ...], task: str, where: str) -> None:
    names = [metric_name(metric) for metric in metrics]
    if repeated := [name for name in names if names.count(name) > 1 or (name in LOSSES)]:
        raise ValueError(f"{where}: {repeated[0]!r} is already reported; name each metric once")
    for metric, name in zip(metrics, names, strict=True):
        if not isinstance(metric, str) and task == "lm":
            raise ValueError(f"{where}: {name!r} scores answers, and task 'lm' has none; put it into another stage")
        if isinstance(metric, str) and metric not in FITS[task]:
            raise ValueError(f"{where}: {metric!r} does not apply to task {task!r}; known for it: {FITS[task]}")


def _check_replay(name: str, stage: StageConfig, earlier: tuple[str, ...]) -> None:
    where = f"config.{name}.replay"
    for replayed, share in stage.replay:
        if replayed == IMPORT:
            raise ValueError(f"{where}: imported weights come without their data; set config.{name}.anchor.weight")
        if replayed not in earlier:
            raise ValueError(
                f"{where}: {replayed!r} is not a stage of this recipe before {name}; known: "
                f"{', '.join(earlier) or 'none'}"
            )
        if not 0 <= share < 1:
            raise ValueError(f"{where}: the share of {replayed} is {share}; it must be at least 0, and below 1")

    names = [replayed for replayed, _ in stage.replay]
    if repeated := [replayed for replayed in names if names.count(replayed) > 1]:
        raise ValueError(f"{where} names {repeated[0]} twice; add the shares up")


def _check_mixture(name: str, stage: StageConfig, recipe: Recipe) -> None:
    where = f"config.{name}"
    datasets = stage.mixture.values()
    for key, dataset in stage.mixture.items():
        path = f"{where}.mixture.{key}"
        if not key.isidentifier() or key in (*RESERVED_NAMES, *stages(recipe)):
            raise ValueError(f"{where}.mixture: {key!r} can't be the name of a data set; use another word")
        if len(dataset.share) not in (1, 2):
            raise ValueError(f"{path}.share={dataset.share} must be one share, or two: (0.0, 0.2)")
        _check_data(dataset.data, f"{path}.data")
        _check_metrics(dataset.evaluation.metrics, dataset.data.task, f"{path}.evaluation.metrics")

    for phase in (0, -1):
        total = sum(share for _, share in stage.replay) + sum(dataset.share[phase] for dataset in datasets)
        if total >= 1:
            raise ValueError(f"{where}: replay and mixture take {total:.0%} of the rows, and leave none for data")

    changes = any(len(set(dataset.share)) == 2 for dataset in datasets)
    if changes == (stage.late_from == 1):
        raise ValueError(
            f"{where}.late_from={stage.late_from} is the share of the steps after which the second number of "
            f"{where}.mixture.NAME.share applies; set both or neither"
        )


def _check_watch(name: str, stage: StageConfig, earlier: tuple[str, ...]) -> None:
    for watched in stage.evaluation.watch:
        if watched not in (EARLIER, *earlier):
            raise ValueError(
                f"config.{name}.evaluation.watch: {watched!r} is not a stage of this recipe before {name}; known: "
                f"{', '.join((EARLIER, *earlier))}"
            )


def _check_early_stopping(name: str, stage: StageConfig, recipe: Recipe, earlier: tuple[str, ...]) -> None:
    metric, where = stage.early_stopping.metric, f"config.{name}.early_stopping"
    evaluated = (*LOSSES, *map(metric_name, stage.evaluation.metrics))
    prefixes = tuple(f"{key}/" for key in stage.mixture) + tuple(f"watch/{key}/" for key in earlier)
    prefixes += ("choice/",) if stage.evaluation.choice else ()
    if metric not in evaluated and not metric.startswith(prefixes):
        raise ValueError(
            f"{where}.metric={metric!r} is not evaluated in this stage; known: {', '.join(evaluated)} (or add it to "
            "evaluation.metrics)"
        )

    better, mode = ("higher", "max") if higher_is_better(metric, all_metrics(recipe)) else ("lower", "min")
    if stage.early_stopping.mode != mode:
        raise ValueError(f'{where}: {metric} is better when {better}; set mode="{mode}"')


def _check_extra_stages(recipe: Recipe) -> None:
    for name in recipe.extra_stages:
        if not name.isidentifier() or name in (*CHECKPOINTED_STAGES, *FOLDERS):
            raise ValueError(f"config.extra_stages: {name!r} can't be the name of a stage; use another word")


def _check_trackers(trackers: tuple[Any, ...]) -> None:
    names = list(map(tracker_name, trackers))
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"config.trackers: {repeated[0]!r} is there twice; name each tracker once")


def _check_model(model: ModelSpec) -> None:
    if not isinstance(model, ModelConfig):
        if not isinstance(model, Makes):
            raise ValueError(f"config.model={model!r} has no method make(vocab_size); see docs/extending.md")
        return
    _check_attention(model)
    where = "config.model.experts"
    if model.experts.count and model.experts.count < model.experts.per_token:
        raise ValueError(f"{where}: per_token={model.experts.per_token} must be at most count={model.experts.count}")
    if model.experts.count and model.activation not in ("swiglu", "geglu"):
        raise ValueError(f"{where}: activation={model.activation!r} must be swiglu or geglu")


def _check_attention(model: ModelConfig) -> None:
    attention, scaling, where = model.attention, model.attention.rope_scaling, "config.model.attention"
    if attention.heads % attention.kv_heads:
        raise ValueError(f"{where}: heads={attention.heads} must be divisible by kv_heads={attention.kv_heads}")
    if "local" in attention.pattern and not attention.window:
        raise ValueError(f"{where}.pattern has local layers; set {where}.window to the number of keys they see")
    if attention.local_rope_theta and not attention.window:
        raise ValueError(f"{where}.local_rope_theta={attention.local_rope_theta} does not apply without local layers")

    if attention.position == "rope" and attention.head_dim % 2:
        raise ValueError(f"{where}.head_dim={attention.head_dim} must be even for rope")
    if attention.rope_dims % 2 or attention.rope_dims > attention.head_dim:
        raise ValueError(
            f"{where}.rope_dims={attention.rope_dims} must be even, and at most head_dim={attention.head_dim}"
        )

    if scaling.high_frequency_factor <= scaling.low_frequency_factor:
        raise ValueError(f"{where}.rope_scaling: high_frequency_factor must be larger than low_frequency_factor")
    if scaling.kind in ("longrope", "dynamic") and model.context > scaling.trained_context:
        raise ValueError(
            f"config.model.context={model.context} must be at most {where}.rope_scaling.trained_context="
            f"{scaling.trained_context}: beyond it, {scaling.kind} depends on the length of each text"
        )
    if scaling.kind == "longrope":
        pairs = (attention.rope_dims or attention.head_dim) // 2
        for name, factors in (("short_factors", scaling.short_factors), ("long_factors", scaling.long_factors)):
            if len(factors) != pairs:
                raise ValueError(f"{where}.rope_scaling.{name} must have {pairs} numbers, one for each pair of dims")


def _starts_from_scratch(name: str, stage: StageConfig, imported: bool) -> bool:
    return stage.init_from == "scratch" or (name == "pretrain" and stage.init_from == "parent" and not imported)


def _check_anchor(name: str, stage: StageConfig, imported: bool) -> None:
    where = f"config.{name}.anchor"
    if not stage.anchor.weight:
        _check_unchanged(AnchorConfig(), stage.anchor, where, "weight=0, no anchor; set weight to 1, say")
    elif _starts_from_scratch(name, stage, imported):
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
        _check_unchanged(LoraConfig(), lora, where, "rank=0, full fine-tuning; set rank to 8, say")
        return
    if not lora.targets:
        raise ValueError(f"{where}.targets is empty; name matrices to adapt, such as ('attention/query/kernel',)")
    if _starts_from_scratch(name, stage, imported):
        raise ValueError(
            f"{where}.rank={lora.rank}: adapters need a base, and {name} starts from scratch; set rank to 0, or "
            f"config.{name}.init_from to WORKDIR/STAGE of another run"
        )
    if stage.optim.name == "muon":
        raise ValueError(f"config.{name}.optim.name='muon' is for whole matrices, not for adapters; use 'adamw'")


def _check_generation(name: str, stage: StageConfig, recipe: Recipe) -> None:
    generates = recipe.prompts or (stage.data.task != "classify" and stage.evaluation.metrics)
    if generates and stage.evaluation.max_new_tokens >= recipe.model.context:
        raise ValueError(
            f"config.{name}.evaluation.max_new_tokens={stage.evaluation.max_new_tokens} must be less than "
            f"config.model.context={recipe.model.context}, which holds the prompt too"
        )


def validate(recipe: Recipe, imported: bool = False) -> None:
    """Check a recipe before anything runs.

    Args:
        imported: whether the workdir has imported weights, so that a recipe without stages is valid.

    Raises:
        ValueError: the recipe cannot run. The message is one line with the field, its value and the remedy.
    """
    _check_tree(recipe, "config")
    names = tuple(stages(recipe))
    if not names and not imported:
        raise ValueError("the recipe has no stage; set pretrain, finetune or instruct")

    _check_model(recipe.model)
    _check_extra_stages(recipe)
    _check_trackers(recipe.trackers)
    if recipe.tokenizer.kind == "file" and not recipe.tokenizer.path:
        raise ValueError('config.tokenizer.path is empty; kind "file" needs the path of a tokenizer.json or .model')

    for index, (name, stage) in enumerate(stages(recipe).items()):
        _check_stage(name, stage, recipe, names[:index])
        _check_anchor(name, stage, imported)
        _check_lora(name, stage, imported)
        _check_generation(name, stage, recipe)
        if not isinstance(recipe.model, ModelConfig) and (stage.neftune_alpha or stage.loop.remat != "none"):
            raise ValueError(f"config.{name}: neftune_alpha and loop.remat do not apply to your own model; reset them")
