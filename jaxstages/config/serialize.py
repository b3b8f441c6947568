"""Conversion of recipes to and from JSON, with checks of names and types, and comparison of recipes."""

import dataclasses
import difflib
import json
import reprlib
import typing
from typing import Any

from jaxstages.config.model import ModelConfig
from jaxstages.config.parts import Metric, ModelSpec, Part, describe, is_part
from jaxstages.config.recipe import LoraConfig, Recipe


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as JSON values: dicts, lists and scalars. A custom part becomes its description (`Part`)."""
    return json.loads(json.dumps(_to_plain(config)))


def _to_plain(value: Any) -> Any:
    if is_part(value):
        part = describe(value, _to_plain)
        return {"part": part.part, "fields": part.fields, "sha256": part.sha256}
    if isinstance(value, Metric):
        return {"metric": _to_plain(value.score), "better": value.better}
    if dataclasses.is_dataclass(value):
        return {field.name: _to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _from_plain(value: Any) -> Any:
    """Return the `Part` or `Metric` that a dict describes; None for other values."""
    if isinstance(value, dict) and value.keys() == {"part", "fields", "sha256"}:
        return Part(**value)
    if isinstance(value, dict) and value.keys() == {"metric", "better"}:
        return Metric(Part(**value["metric"]), value["better"])
    return None


def _item_types(kind: Any, length: int) -> tuple[Any, ...] | None:
    """Return the type of each item of a tuple of type `kind`, such as `tuple[str, ...]` or `tuple[str, float]`; None if
    the type does not allow this length."""
    options = typing.get_args(kind)
    if options[-1] is Ellipsis:
        return options[:1] * length
    return options if len(options) == length else None


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(value, Part):
        return kind not in (int, float, str, bool)
    options = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            isinstance(k, str) and _has_type(v, options[1]) for k, v in value.items()
        )
    if typing.get_origin(kind) is tuple:
        types = _item_types(kind, len(value)) if isinstance(value, tuple) else None
        return types is not None and all(map(_has_type, value, types))
    if options:  # a union, such as StageConfig | None
        return any(_has_type(value, option) for option in options)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_type(value: Any, kind: Any, path: str) -> None:
    """Raise ValueError if a field's value is not of its type."""
    if not _has_type(value, kind):
        expected = str(getattr(kind, "__name__", kind))
        if kind == tuple[tuple[str, float], ...]:
            expected = "a tuple of pairs, such as (('name', 0.5),)"
        elif expected.startswith("tuple"):
            expected = "a tuple, such as ('one',)"
        raise ValueError(f"{path}={reprlib.repr(value)} is of type {type(value).__name__}; it must be {expected}")


def _from_dict(kind: Any, value: Any, path: str) -> Any:
    if (part := _from_plain(value)) is not None:
        check_type(part, kind, path)
        return part
    kind = ModelConfig if kind is ModelSpec else kind
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
    return float(str(value)) if kind is float else value  # float(value) overflows for a very large integer


def from_dict(value: Any) -> Recipe:
    """Return the Recipe that `to_dict` converted.

    Raises:
        ValueError: a field is unknown, or has a wrong type.
    """
    return _from_dict(Recipe, value, "recipe")


def lora_from(value: dict[str, Any] | None) -> LoraConfig | None:
    """Return the LoRA config in a checkpoint's metadata, None if all parameters were trained.

    Raises:
        ValueError: a field is unknown, or has a wrong type.
    """
    return None if value is None else _from_dict(LoraConfig, value, "lora")


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """Return one line, `path: old -> new`, for each field in which two configs differ."""
    if is_part(old) and is_part(new):
        parts = [describe(part, _to_plain) for part in (old, new)]
        return [] if parts[0] == parts[1] else [f"{path}: {parts[0]} -> {parts[1]}"]
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        return [
            line
            for item in dataclasses.fields(old)
            for line in differences(getattr(old, item.name), getattr(new, item.name), f"{path}.{item.name}")
        ]
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for name in old | new for line in differences(old.get(name), new.get(name), f"{path}.{name}")]
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new) and own_parts((old, new)):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{path}[{index}]")]
    return [] if _to_plain(old) == _to_plain(new) else [f"{path}: {old!r} -> {new!r}"]


def own_parts(config: Any, path: str = "config") -> dict[str, Part]:
    """Return the custom parts of a recipe by the path of their field."""
    if is_part(config):
        return {path: describe(config, _to_plain)}
    if dataclasses.is_dataclass(config):
        items = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    elif isinstance(config, dict):
        items = config
    elif isinstance(config, tuple):
        items = {str(index): item for index, item in enumerate(config)}
    else:
        return {}
    return {key: part for name, item in items.items() for key, part in own_parts(item, f"{path}.{name}").items()}


def flat_fields(recipe: dict[str, Any], prefix: str = "config") -> dict[str, Any]:
    """Map the path of each field of a recorded recipe, "config.seed", to its value. An own part is one value."""
    fields: dict[str, Any] = {}
    for name, value in recipe.items():
        inner = isinstance(value, dict) and "part" not in value
        fields |= flat_fields(value, f"{prefix}.{name}") if inner else {f"{prefix}.{name}": value}
    return fields
