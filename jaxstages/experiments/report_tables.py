"""The sections of a report that are tables: cost, recipe, lineage and versions."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxstages import config as recipes
from jaxstages.checkpoint.metadata import stored_shapes
from jaxstages.config import STAGES, DatasetConfig, Recipe, StageConfig
from jaxstages.config.parts import Part
from jaxstages.experiments.markup import Markup, Section, percent, short_digest, table, tag
from jaxstages.experiments.runs import Run
from jaxstages.runtime.console import duration


def cost_section(run: Run) -> Section:
    rows, total_tokens, total_seconds = [], 0, 0.0
    for name in run.stages:
        train = [line for line in run.metrics[name] if line["kind"] == "train"]
        spent = _spent(train)
        result = run.results.get(name, {})
        tokens, seconds = result.get("tokens", spent.tokens), result.get("seconds", spent.seconds)
        total_tokens, total_seconds = total_tokens + tokens, total_seconds + seconds
        memory = [_peak_memory(run, name, kind) for kind in ("host_gb", "device_gb")]
        utilization = percent(spent.utilization) if spent.utilization is not None else "–"
        steps = result.get("steps", run.last_step(name))
        rows.append([name, f"{steps:,}", *_tokens_and_time(tokens, seconds), utilization, *memory])
    if len(rows) > 1:
        rows.append(["all", "", *_tokens_and_time(total_tokens, total_seconds), "", "", ""])
    heads = ["stage", "steps", "tokens", "time", "tokens/s", "MFU", "host memory", "device memory"]
    text = (
        "Time is training alone, without evaluation, saving and compilation. MFU, model FLOPs utilization, is known "
        "where the peak of the chip is. Memory is the peak of the fullest process and device."
    )
    return Section("cost", "Cost", [tag("p", text), table("Cost of each stage", heads, rows)])


class Spent(NamedTuple):
    """Tokens and seconds of the train lines; mean model FLOPs utilization over that time, None if it is not known."""

    tokens: int
    seconds: float
    utilization: float | None


def _spent(lines: list[dict[str, Any]]) -> Spent:
    tokens, seconds, used = 0, 0.0, None
    for line in lines:
        rate = line.get("tokens_per_second")
        if rate:
            interval = max(line["tokens"] - tokens, 0) / rate
            seconds += interval
            if line.get("mfu") is not None:
                used = (used or 0.0) + interval * line["mfu"]
        tokens = line["tokens"]
    return Spent(tokens, seconds, used / seconds if used is not None and seconds else None)


def _tokens_and_time(tokens: int, seconds: float) -> list[str]:
    return [f"{tokens:,}", duration(seconds), f"{tokens / seconds:,.0f}" if seconds else "–"]


def _peak_memory(run: Run, name: str, kind: str) -> str:
    """Return the largest value of all processes and saves."""
    values = [value for event in run.events(name, "peak memory") for value in event.get(kind, [])]
    return f"{max(values):.2f} GB" if values else "–"


def recipe_section(recipe: Recipe) -> Section:
    changes, names = changed_fields(recipe), list(recipes.stages(recipe))
    rows = [[tag("code", path), *map(_code, setting)] for path, setting in changes.run.items()]
    parts = [tag("p", "Fields that differ from their defaults.")]
    if rows:
        parts.append(table("Fields of the run, as config.FIELD", ["field", "value", "default"], rows, numbers=False))
    if changes.stages:
        text = "Fields of the stages, as config.STAGE.FIELD; values that differ are bold"
        heads = ["field", *names, "default"]
        rows = [[tag("code", path), *_stage_values(values, names)] for path, values in changes.stages.items()]
        parts.append(table(text, heads, rows, numbers=False))
    whole = json.dumps(recipes.to_dict(recipe), indent=1, ensure_ascii=False)
    parts.append(tag("details", tag("summary", "The whole recipe"), tag("pre", whole, tabindex="0")))
    return Section("recipe", "Recipe", parts)


class Setting(NamedTuple):
    """Value and default of a field."""

    value: Any
    default: Any


class Changes(NamedTuple):
    """Fields that differ from their defaults.

    run: path below `config` -> setting, for fields that belong to no stage.
    stages: path below a stage -> stage -> setting, for fields that differ in at least one stage.
    """

    run: dict[str, Setting]
    stages: dict[str, dict[str, Setting]]


def changed_fields(recipe: Recipe) -> Changes:
    """Compare a recipe with the defaults of its fields. The name has none."""
    stages = recipes.stages(recipe)
    run = _settings(replace(recipe, **dict.fromkeys(STAGES), extra_stages={}), Recipe(name=recipe.name))
    settings = {name: _settings(stage, _default_stage(stage)) for name, stage in stages.items()}
    changed = dict.fromkeys(path for each in settings.values() for path, setting in each.items() if _differs(setting))
    by_path = {path: {name: settings[name][path] for name in stages if path in settings[name]} for path in changed}
    return Changes({path: setting for path, setting in run.items() if _differs(setting)}, by_path)


def _settings(config: Any, default: Any) -> dict[str, Setting]:
    defaults = recipes.flat_fields(recipes.to_dict(default), "")
    fields = recipes.flat_fields(recipes.to_dict(config), "")
    return {path.lstrip("."): Setting(value, defaults.get(path)) for path, value in fields.items()}


def _differs(setting: Setting) -> bool:
    return setting.value != setting.default


def _default_stage(stage: StageConfig) -> StageConfig:
    return StageConfig(mixture={key: DatasetConfig() for key in stage.mixture})


def _stage_values(values: dict[str, Setting], names: Sequence[str]) -> list[str]:
    """Return the value of a field in each stage, and its default."""
    cells: list[str] = []
    for name in names:
        setting = values.get(name)
        text = _code(setting.value) if setting is not None else "–"
        cells.append(tag("strong", text) if setting is not None and _differs(setting) else text)
    default = next(iter(values.values())).default
    return [*cells, _code(default)]


def _code(value: Any) -> Markup:
    return tag("code", _literal(value))


def _literal(value: Any) -> str:
    """Write the value of a field as JSON; an own part as its name, fields and digest."""
    if isinstance(value, dict) and value.keys() == {"part", "fields", "sha256"}:
        return str(Part(**value))
    return json.dumps(value, ensure_ascii=False)


def lineage_section(run: Run, metas: Mapping[str, dict[str, Any] | str]) -> Section:
    """Return what each stage began from.

    Args:
        metas: metadata of each stage's checkpoint, or why it can't be read.
    """
    rows = []
    for name in run.stages:
        meta = metas[name]
        result = run.results.get(name, {})
        parent = result.get("parent") if result or isinstance(meta, str) else meta["parent"]
        origin = "scratch"
        if parent is not None:
            origin = f"{parent['path']}, step {parent['step']:,}, {short_digest(parent['params_sha256'])}"
        size, tokenizer = "–", "–"
        if not isinstance(meta, str):
            size, tokenizer = f"{_parameters(meta):,}", short_digest(meta["tokenizer_sha256"])
        rows.append([name, origin, short_digest(result.get("params_sha256", "")), size, tokenizer])
    heads = ["stage", "began from", "params_sha256", "trained parameters", "tokenizer_sha256"]
    return Section("lineage", "Lineage", [table("What each stage began from", heads, rows, numbers=False)])


def _parameters(meta: dict[str, Any]) -> int:
    """Count the parameters that a checkpoint has trained."""
    shapes = [kind.partition("[")[2].rstrip("]") for kind in stored_shapes(meta).values()]
    return sum(math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes)


def versions_section(run: Run) -> Section:
    rows = [[name, version] for name, version in run.versions.items()]
    packages = table("Packages that the run was last started with", ["package", "version"], rows, numbers=False)
    return Section("versions", "Versions", [packages])
