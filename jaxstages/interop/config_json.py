"""Conversion between `config.json` and `ModelConfig`, by the tables of `families.py`; no family has code of its own.

Kinds of layers (`Family.layers`):

| global            | all layers are global
| local             | all layers are local if there is a window
| switched          | if `use_sliding_window` is on, the layers in `layer_types` are local, or those from
|                   | `max_window_layers` on
| alternating       | local layers are given by `layer_types`, or by `Family.pattern`, or they are all but each
|                   | `sliding_window_pattern`-th, if the family reads that key
| alternating, nope | the same; if there is a window, only local layers have RoPE
| nope              | as switched; layers with a 0 in `no_rope_layers`, or each `no_rope_layer_interval`-th, lack RoPE

Defaults, and the precedence of keys with several names, are those of transformers.
"""

import copy
import dataclasses
import math
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxstages.config import AttentionConfig, ModelConfig, RopeScalingConfig, check_type, differences
from jaxstages.interop.families import (
    FAMILIES,
    GATED,
    GLOBAL,
    KEYS,
    LOCAL,
    PLAIN,
    REFUSED_ANYWHERE,
    SIZES,
    TEXT_PARTS,
    TIED_WRAPPERS,
    WRAPPERS,
    Family,
    Power,
)

DEFAULT_CONTEXT = 2048
"""Largest context of an imported model, in tokens, unless the recipe sets it."""

RECIPE_FIELDS = ("context", "dtype", "dropout", "unroll", "family")
"""Fields of the model that the recipe sets, not config.json; the last one does not change what the model computes."""

NULL = ("attention.kv_heads", "attention.head_dim", "attention.softcap", "logit_softcap")
"""Fields for which null is a value (as many as heads, width / heads, no cap); for others it means the default."""

ZERO = ("attention.softcap", "logit_softcap")
"""Fields that may be 0."""

LIMIT = 2**31
"""Exclusive bound of the integers in a config.json; also the reach of RoPE without a limit."""


class ModelDescription(NamedTuple):
    """A model according to its config.json.

    positions: context length that it was trained for.
    reach: longest context that it can have here.
    """

    family: Family
    model: ModelConfig
    positions: int
    reach: int


def read_config(config: Any, where: str) -> ModelDescription:
    """Convert a config.json.

    Args:
        where: location, for messages.

    Raises:
        ValueError: something is not supported; the message names key, value, and what is supported.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where} is no JSON object")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES | TEXT_PARTS:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{where}: model_type={reprlib.repr(kind)} is not supported; supported: {known}")
    family = (FAMILIES | TEXT_PARTS)[kind]
    for key, allowed in (REFUSED_ANYWHERE | family.only).items():
        value = config.get(key)
        each = value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value
        if value is not None and value not in allowed and each not in allowed:
            raise _refuse(where, key, value, allowed)
    config = config | {key: config[other] for other, key in family.also.items() if config.get(other) is not None}
    model = ModelConfig(family=family.model_type)
    for path, value in family.model.items():
        _put(model, path, value)
    for path, key in (KEYS | family.keys).items():
        if key:
            name = key.name if isinstance(key, Power) else key
            value = config.get(name)
            if value is None and not (name in config and path in NULL):
                value = family.defaults.get(name)
            value = family.values.get(name, {}).get(value, value) if isinstance(value, str) else value
            value = _to_field(model, path, value, f"{where}: {name}", "gate" in _parts(family))
            _put(model, path, _power(value, key) if isinstance(key, Power) else value)
    part, heads = model.attention, model.attention.heads
    if not key_of(family, "attention.kv_heads"):
        part.kv_heads = heads
    if not key_of(family, "attention.head_dim"):
        part.head_dim = model.width // heads
    if part.head_dim < 1:
        raise ValueError(f"{where}: num_attention_heads={heads} must be at most hidden_size={model.width}")
    if part.scale == part.head_dim**-0.5:
        part.scale = 0.0
    reach = _read_rope(model, config, family, where)
    _read_kinds(model, config, family, where)
    positions = model.context
    model.context = min(positions, reach, DEFAULT_CONTEXT)
    return ModelDescription(family, model, positions, reach)


def _power(value: float, key: Power) -> float:
    """Convert a value of config.json into our field's."""
    return float(value) ** key.exponent


def key_of(family: Family, path: str) -> str:
    """Return the key of config.json for one of our fields; "" if there is none."""
    key = (KEYS | family.keys).get(path, "")
    return key.name if isinstance(key, Power) else key


def text_config(config: Any, where: str, has_head: Callable[[], bool]) -> tuple[Any, str]:
    """Return the config of the text part of a multimodal model, and its location; for other models, both arguments.

    Args:
        has_head: returns whether the folder has weights of a head.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return config, where
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise ValueError(f"{where}: text_config={reprlib.repr(text)} must be an object")
    where = where if text is None else f"{where}: text_config"
    text = {key: value for key, value in config.items() if key != "model_type"} if text is None else text
    text = {"model_type": WRAPPERS[kind]} | text
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = dict(zip(sizes, SIZES.get(text["model_type"], ()), strict=False)) | text
    tied = config.get("tie_word_embeddings")
    if tied is None:
        tied = kind in TIED_WRAPPERS and not has_head()
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", *REFUSED_ANYWHERE)
    outer = {key: config[key] for key in shared if key in config}
    return outer | text | {"tie_word_embeddings": tied or text.get("tie_word_embeddings") is True}, where


def _refuse(where: str, key: str, value: Any, allowed: Any) -> ValueError:
    supported = ", ".join(map(repr, allowed)) or "none"
    return ValueError(f"{where}: {key}={reprlib.repr(value)} can't be represented here; supported: {supported}")


def _parts(family: Family) -> set[str]:
    """Return the names of the matrices in a family's feed-forward, or in each of its experts."""
    return {part.split("/")[2] for row in family.rows for part in row.parts if "/ff/" in part or "/experts/" in part}


def _put(model: ModelConfig, path: str, value: Any) -> None:
    *owners, name = path.split(".")
    owner: Any = model
    for part in owners:
        owner = getattr(owner, part)
    hint = {field.name: field.type for field in dataclasses.fields(owner)}[name]
    value = float(value) if hint is float and isinstance(value, int) and not isinstance(value, bool) else value
    setattr(owner, name, value)


def get_field(model: ModelConfig, path: str) -> Any:
    """Return the value of a field by its path, such as `attention.heads`."""
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _to_field(model: ModelConfig, path: str, value: Any, where: str, gated: bool) -> Any:
    """Convert the value of a key into our field's, except for a power."""
    part = model.attention
    if value is None:
        match path:
            case "attention.kv_heads":
                return part.heads
            case "attention.head_dim":
                return model.width // part.heads
            case "attention.scale":
                return part.head_dim**-0.5
            case "ff_width":
                return 4 * model.width
            case "attention.softcap" | "logit_softcap":
                return 0.0
            case _:
                raise ValueError(f"{where} is missing")
    if path == "activation":
        known = GATED if gated else PLAIN
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{where}={reprlib.repr(value)} can't be represented here; supported: {', '.join(known)}")
        return known[value]
    return _number(value, type(get_field(ModelConfig(), path)), where, least=0 if path in ZERO else None)


def _number(value: Any, kind: type, where: str, least: float | None = None) -> Any:
    """Check the type and the bounds of a number: larger than 0, or at least `least`. Bools pass as well."""
    check_type(value, kind, where)
    if kind is bool:
        return value
    limit = LIMIT if kind is int else float(np.finfo(np.float32).max)
    if not (value > 0 or least is not None and least <= value) or value >= limit:
        raise ValueError(f"{where}={value!r} must be larger than 0" + (f", and below {limit:g}" if value > 0 else ""))
    return value


def _entry(config: dict[str, Any], key: str, kind: type, before: str, default: Any = None) -> Any:
    """Return the positive number, or the bool, of a key. Raises ValueError with the key after the text `before`."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{before}{key} is missing")
    value = _number(value, kind, f"{before}{key}")
    return value if kind is bool else kind(value)


def _table(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return the object of a key, {} for null."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: {key}={reprlib.repr(value)} must be an object")
    return value or {}


def _read_rope(model: ModelConfig, config: dict[str, Any], family: Family, where: str) -> int:
    """Read RoPE's parameters into the model.

    There are two spellings: `rope_scaling` and `rope_theta` (transformers 4), which takes precedence, and
    `rope_parameters` (5), for all layers or for each kind.

    Returns the longest context in which positions do not depend on the length of the text.
    """
    part = model.attention
    if part.position != "rope":
        return model.context
    scaling, parameters = _table(config, "rope_scaling", where), _table(config, "rope_parameters", where)
    default = _entry(config, "rope_theta", float, f"{where}: ", family.defaults["rope_theta"])
    if family.nested is None:
        entry = scaling or parameters or family.defaults.get("rope_parameters", {})
        name = f"{where}: {'rope_scaling' if scaling else 'rope_parameters'}"
        part.rope_theta = _entry(entry, "rope_theta", float, f"{name}.", default)
        part.rope_dims = _rope_dims(config, entry, part.head_dim, name, where, family.partial_rope)
        original = config.get(
            "original_max_position_embeddings", family.defaults.get("original_max_position_embeddings")
        )
        part.rope_scaling, reach = _read_scaling(entry, model, original, name)
        return reach
    name = f"{where}: rope_parameters"
    entry, local = (_table(parameters, kind, name) for kind in (GLOBAL, LOCAL))
    entry = entry | {key: value for key, value in scaling.items() if value is not None and key != "truncate"}
    part.rope_theta = _entry(entry, "rope_theta", float, f"{name}.{GLOBAL}.", default)
    partial = family.partial_rope
    part.rope_dims = _rope_dims(config, entry, part.head_dim, f"{name}.{GLOBAL}", where, partial)
    if _rope_dims(config, local, part.head_dim, f"{name}.{LOCAL}", where, partial) != part.rope_dims:
        raise ValueError(f"{name} must have one partial_rotary_factor for {GLOBAL} and {LOCAL}")
    part.rope_scaling, reach = _read_scaling(entry, model, None, f"{name}.{GLOBAL}")
    other, _ = _read_scaling(local, model, None, f"{name}.{LOCAL}")
    theta = _entry(config, family.nested.key, float, f"{where}: ", family.nested.theta)
    theta = _entry(local, "rope_theta", float, f"{name}.{LOCAL}.", theta)
    if (theta, other) == (part.rope_theta, part.rope_scaling):
        part.local_rope_theta = 0.0
    elif other.kind == "none":
        part.local_rope_theta = theta
    else:
        raise _refuse(f"{name}.{LOCAL}", "rope_type", other.kind, ("default",))
    return reach


def _rope_dims(
    config: dict[str, Any], entry: dict[str, Any], head_dim: int, name: str, where: str, partial: bool
) -> int:
    share = _entry(config, "partial_rotary_factor", float, f"{where}: ", 1.0)
    share = _entry(entry, "partial_rotary_factor", float, f"{name}.", share)
    if share != 1.0 and not partial:
        raise _refuse(name, "partial_rotary_factor", share, (1.0,))
    dims = int(head_dim * share)
    if share > 1 or dims < 2 or dims % 2:
        raise ValueError(
            f"{name}.partial_rotary_factor={share} of head_dim={head_dim} must give an even number of dims"
        )
    return 0 if dims == head_dim else dims


def _read_scaling(
    entry: dict[str, Any], model: ModelConfig, original: Any, where: str
) -> tuple[RopeScalingConfig, int]:
    """Return the scaling of RoPE, and the longest context in which it does not depend on the length of the text.

    Args:
        original: the trained context if it stands beside the entry; it takes precedence.
    """
    kind = entry.get("rope_type", entry.get("type", "default"))
    kind = "longrope" if kind in ("su", "yarn") and "short_factor" in entry else kind  # Phi-3's earlier names

    def number(key: str, default: float | None = None) -> float:
        return _entry(entry, key, float, f"{where}.", default)

    def trained() -> int:
        key = "original_max_position_embeddings"
        return _entry({key: original} if original is not None else entry, key, int, f"{where}.", model.context)

    match kind:
        case "default" | "mrope" | None:  # mrope: the three positions of a text token are equal
            return RopeScalingConfig(), LIMIT
        case "linear":
            return RopeScalingConfig(kind="linear", factor=number("factor")), LIMIT
        case "llama3":
            low, high = (number(f"{name}_freq_factor") for name in ("low", "high"))
            scaling = RopeScalingConfig(kind="llama3", factor=number("factor"), trained_context=trained())
            return dataclasses.replace(scaling, low_frequency_factor=low, high_frequency_factor=high), LIMIT
        case "dynamic":
            scaling = RopeScalingConfig(kind="dynamic", factor=number("factor"), trained_context=model.context)
            return scaling, model.context
        case "yarn":
            scaling = RopeScalingConfig(
                kind="yarn",
                factor=number("factor", model.context / trained()),
                trained_context=trained(),
                beta_fast=number("beta_fast", 32.0),
                beta_slow=number("beta_slow", 1.0),
                truncate=_entry(entry, "truncate", bool, f"{where}.", True),
            )
            if entry.get("attention_factor") is not None:
                scaling.attention_factor = number("attention_factor")
            elif entry.get("mscale") and entry.get("mscale_all_dim"):
                over, under = (number(name) for name in ("mscale", "mscale_all_dim"))
                scaling.attention_factor = _mscale(scaling.factor, over) / _mscale(scaling.factor, under)
            # Ministral 3 also scales queries beyond `trained_context`.
            return scaling, scaling.trained_context if entry.get("llama_4_scaling_beta") else LIMIT
        case "longrope":
            short, long = (_factors(entry, f"{name}_factor", model.attention, where) for name in ("short", "long"))
            scaling = RopeScalingConfig(
                kind="longrope",
                factor=number("factor", model.context / trained()),
                trained_context=trained(),
                short_factors=short,
                long_factors=long,
            )
            if entry.get("attention_factor") is not None:
                scaling.attention_factor = number("attention_factor")
            return scaling, scaling.trained_context
        case _:
            known = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
            raise _refuse(where, "rope_type", kind, known)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _factors(entry: dict[str, Any], key: str, part: AttentionConfig, where: str) -> tuple[float, ...]:
    value, pairs = entry.get(key), (part.rope_dims or part.head_dim) // 2
    if not isinstance(value, list) or len(value) != pairs:
        raise ValueError(f"{where}.{key}={reprlib.repr(value)} must be a list of {pairs} numbers")
    return tuple(float(_number(number, float, f"{where}.{key}")) for number in value)


def _read_kinds(model: ModelConfig, config: dict[str, Any], family: Family, where: str) -> None:
    layers, names = model.layers, family.defaults | {k: v for k, v in config.items() if v is not None}
    window, types = names.get("sliding_window"), names.get("layer_types")
    window = None if "sliding_window" in config and config["sliding_window"] is None else window
    if ("switched" in family.layers or family.layers == "nope") and not names.get("use_sliding_window"):
        window = None
    rope = [1] * layers
    match family.layers:
        case "global":
            local, window = [False] * layers, None
        case "local" | "local, switched":
            local = [window is not None] * layers
        case "switched":
            first = _entry(names, "max_window_layers", int, f"{where}: ") if names.get("max_window_layers") != 0 else 0
            local = [window is not None and n >= first for n in range(layers)]
        case "alternating" | "alternating, nope":
            kinds = [] if types is not None else _pattern(names, family, layers, where)
            local = [kind == "local" and window is not None for kind in kinds]
        case "nope":
            rope = names.get("no_rope_layers")
            if rope is None:
                interval = _entry(names, "no_rope_layer_interval", int, f"{where}: ")
                rope = [int((n + 1) % interval > 0) for n in range(layers)]
            _check_list(rope, layers, f"{where}: no_rope_layers")
            local = [window is not None and not has_rope for has_rope in rope]
        case _:
            raise ValueError(f"layers={family.layers!r}")
    if types is not None and family.layers in ("switched", "alternating", "alternating, nope", "nope"):
        _check_list(types, layers, f"{where}: layer_types")
        if bad := [kind for kind in types if kind not in (GLOBAL, LOCAL)]:
            raise _refuse(where, "layer_types", bad[0], (GLOBAL, LOCAL))
        local = [kind == LOCAL for kind in types]
    if family.layers == "alternating, nope" and window is not None:
        rope = [int(is_local) for is_local in local]
    if any(is_local and not has_rope for is_local, has_rope in zip(local, rope, strict=True)):
        raise ValueError(f"{where}: a layer that is local and without rope can't be represented here; supported: one")
    if any(local) and (type(window) is not int or window < 1):
        raise _refuse(where, "sliding_window", window, ("a number from 1 on",))
    kinds = [
        "local" if is_local else "global" if has_rope else "nope"
        for is_local, has_rope in zip(local, rope, strict=True)
    ]
    model.attention.window = int(window) if any(local) and window else 0
    model.attention.pattern = _shortest(kinds)
    if not any(local):
        model.attention.local_rope_theta = 0.0


def _pattern(names: dict[str, Any], family: Family, layers: int, where: str) -> list[str]:
    """Return the kinds of layers if config.json does not name them."""
    if "sliding_window_pattern" not in family.defaults:
        return [family.pattern[n % len(family.pattern)] for n in range(layers)]
    period = _entry(names, "sliding_window_pattern", int, f"{where}: ")
    return ["local" if (n + 1) % period else "global" for n in range(layers)]


def _check_list(value: Any, layers: int, where: str) -> None:
    if not isinstance(value, list) or len(value) != layers:
        raise ValueError(f"{where}={reprlib.repr(value)} must name {layers} layers")


def _shortest(kinds: list[str]) -> tuple[str, ...]:
    """Return the shortest pattern that gives these kinds when repeated; () if it is the default."""
    period = next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[n % p] for n, kind in enumerate(kinds)))
    pattern = tuple(kinds[:period])
    return () if pattern in (("global",), ("local",)) else pattern


def layer_kinds(model: ModelConfig) -> list[str]:
    """Return the kind of each layer."""
    part = model.attention
    pattern = part.pattern or ("local" if part.window else "global",)
    return [pattern[n % len(pattern)] for n in range(model.layers)]


def plain_model(model: ModelConfig) -> ModelConfig:
    """Return the same model in a canonical form, with fields that have no effect at their defaults."""
    model = copy.deepcopy(model)
    part, default = model.attention, ModelConfig()
    for name in RECIPE_FIELDS:
        setattr(model, name, getattr(default, name))
    kinds = layer_kinds(model)
    local = "local" in kinds
    part.pattern, part.window = _shortest(kinds), part.window if local else 0
    if part.position != "rope":
        part.rope_theta, part.rope_scaling, part.local_rope_theta = 0.0, RopeScalingConfig(), 0.0
        part.pattern = _shortest(["local" if kind == "local" else "global" for kind in kinds])
    if not local or (part.local_rope_theta == part.rope_theta and part.rope_scaling.kind == "none"):
        part.local_rope_theta = 0.0
    if part.rope_dims == part.head_dim:
        part.rope_dims = 0
    if part.scale == part.head_dim**-0.5:
        part.scale = 0.0
    if not part.qk_norm:
        part.qk_norm_over = default.attention.qk_norm_over
    if model.bias and model.norm != "layernorm":  # the norms have none, so it is that of the linear layers
        model.bias, part.qkv_bias, part.out_bias, model.ff_bias = False, True, True, True
    part.qkv_bias, part.out_bias = part.qkv_bias and not model.bias, part.out_bias and not model.bias
    model.experts = model.experts if model.experts.count else default.experts
    model.ff_bias = model.ff_bias and not model.bias and not model.experts.count
    return model


def write_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model. `read_config` gives the same model if the family can express it."""
    part, gated = model.attention, "gate" in _parts(family)
    plain = plain_model(model)
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for path, key in (KEYS | family.keys).items():
        if key:
            value: Any = get_field(plain if path.endswith("bias") else model, path)
            match path:
                case "activation":
                    names = GATED if gated else PLAIN
                    value = next((name for name, ours in names.items() if ours == value), next(iter(names)))
                case "attention.softcap" | "logit_softcap":
                    value = value or None
                case "attention.scale":
                    value = value or part.head_dim**-0.5
            config |= {key.name: _unpower(value, key, family)} if isinstance(key, Power) else {key: value}
    config |= {"pad_token_id": None}  # the default of transformers may have no row here
    if part.position == "rope":
        config |= _write_rope(family, model)
    if part.rope_scaling.kind == "dynamic":
        config[key_of(family, "context")] = part.rope_scaling.trained_context
    kinds = layer_kinds(model)
    window = part.window if "local" in kinds else None
    types = [LOCAL if kind == "local" else GLOBAL for kind in kinds]
    if family.layers in ("switched", "local, switched", "nope"):
        config |= {"use_sliding_window": window is not None, "sliding_window": window}
    if family.layers in ("switched", "alternating", "alternating, nope", "nope"):
        config |= {"layer_types": types}
    match family.layers:
        case "local" | "alternating, nope":
            config |= {"sliding_window": window}
        case "switched":
            config |= {"max_window_layers": types.index(LOCAL) if LOCAL in types else model.layers}
        case "alternating":
            config |= {"sliding_window": window or family.defaults["sliding_window"]}
        case "nope":
            config |= {"no_rope_layers": [int(kind != "nope") for kind in kinds]}
    return config


def _unpower(value: float, key: Power, family: Family) -> float | int:
    """Convert our field's value into that of config.json, without the rounding error of power and inverse."""
    converted = float(f"{value ** (1 / key.exponent):.12g}")
    return round(converted) if isinstance(family.defaults[key.name], int) else converted


def _write_rope(family: Family, model: ModelConfig) -> dict[str, Any]:
    part, scaling = model.attention, model.attention.rope_scaling
    entry = family.rope | {"rope_type": "default" if scaling.kind == "none" else scaling.kind}
    if scaling.kind != "none":
        entry |= {"factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn", "longrope"):
        entry |= {"original_max_position_embeddings": scaling.trained_context}
    if scaling.kind in ("yarn", "longrope") and scaling.attention_factor:
        entry |= {"attention_factor": scaling.attention_factor}
    match scaling.kind:
        case "llama3":
            entry |= {
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
            }
        case "yarn":
            entry |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        case "longrope":
            entry |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
    if part.rope_dims:
        entry |= {"partial_rotary_factor": part.rope_dims / part.head_dim}
    config: dict[str, Any] = {"rope_theta": part.rope_theta}
    if "original_max_position_embeddings" in family.defaults:
        config |= {"original_max_position_embeddings": scaling.trained_context}
    all_ = entry | {"rope_theta": part.rope_theta}
    if family.nested is None:
        # Both spellings, for transformers 4 and 5, which read the first that exists.
        return config | {"rope_scaling": all_ if len(entry) > 1 else None, "rope_parameters": all_}
    own = {"rope_type": "default", "rope_theta": part.local_rope_theta} if part.local_rope_theta else all_
    config |= {"rope_parameters": {GLOBAL: all_, LOCAL: own}}
    if family.nested.both:
        config |= {"rope_scaling": entry if len(entry) > 1 else None}
    return config | ({family.nested.key: own["rope_theta"]} if family.nested.key else {})


MULTIPLE_OF_HEADS = (
    *("llama", "gemma2", "gemma3_text", "vaultgemma", "cwm", "hyperclovax", "arcee", "jais2", "internlm3"),
    "iquestcoder",
)
"""Families whose config transformers refuses unless the width is a multiple of the number of heads."""

OWN_TOKENIZER = ("qwen2",)
"""Families for which transformers rebuilds the tokenizer, and does not read the tokenizer.json of another model."""


def _obstacles(family: Family, model: ModelConfig) -> list[str]:
    """Return why transformers would not load a model of this family as it is, although its config.json expresses it."""
    part, obstacles = model.attention, []
    if family.model_type in OWN_TOKENIZER and model.family != family.model_type:
        obstacles.append("a tokenizer of its own")
    if family.model_type in MULTIPLE_OF_HEADS and model.width % part.heads:
        obstacles.append(f"a width that is a multiple of the heads, this model {model.width} and {part.heads}")
    if family.model_type == "olmoe" and part.qk_norm and part.heads * part.head_dim != model.width:
        obstacles.append(f"heads * head_dim equal to the width, this model {part.heads * part.head_dim}")
    return obstacles


def choose_family(model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """Return the model's own family, or the first other one that can express it, and its config.json.

    Raises:
        ValueError: no family can; the message names the fields in which the nearest one differs.
    """
    nearest: list[str] | None = None
    own = [FAMILIES[model.family]] if model.family in FAMILIES else []
    for family in (*own, *FAMILIES.values()):
        config = write_config(family, model)
        try:
            expressed = read_config(config, family.model_type).model
        except ValueError as error:
            lines = [str(error)]
        else:
            lines = differences(plain_model(expressed), plain_model(model), "model")
        lines = lines or _obstacles(family, model)
        if not lines:
            return family, config
        lines = [f"{family.model_type} has {line.replace(' -> ', ', this model ')}" for line in lines]
        nearest = lines if nearest is None or len(lines) < len(nearest) else nearest
    raise ValueError(f"no family of transformers can express this model: {'; '.join(nearest or [])}; change these")
