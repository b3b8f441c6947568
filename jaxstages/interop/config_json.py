"""`config.json` <-> `ModelConfig`, by the tables of `families.py`, without a line for any one family.

How layers differ (`Family.layers`): "global" they do not; "local" all are local where there is a window; "switched"
those that `layer_types` says, or from `max_window_layers` on, where `use_sliding_window` is on; "alternating" those
that `layer_types` says, or all but each `sliding_window_pattern`-th; "nope" as switched, and `no_rope_layers` (a 0 for
each that has none), or each `no_rope_layer_interval`-th, has no rope.
"""

import copy
import dataclasses
from typing import Any, NamedTuple

from jaxstages.config import ModelConfig, RopeScalingConfig, check_type, differences
from jaxstages.interop.families import FAMILIES, GATED, GLOBAL, KEYS, LOCAL, PLAIN, REFUSED_ANYWHERE, Family

MOST_CONTEXT = 2048
"""Tokens in a row, unless the user says otherwise."""

OURS = ("context", "dtype", "dropout", "unroll", "family")
"""Fields of the model that a folder has no say in, or, the last, that are no part of what it computes."""


class Described(NamedTuple):
    """positions: how many it was made for."""

    family: Family
    model: ModelConfig
    positions: int


def read_config(found: Any, where: str) -> Described:
    """The model that a config.json describes.

    Raises:
        ValueError: it has what we can't do; names key, value, and what is supported.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no JSON object")
    kind = found.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{where}: model_type={kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for key, allowed in (REFUSED_ANYWHERE | family.only).items():
        value = found.get(key)
        if value is not None and value not in allowed:
            raise _refuse(where, key, value, allowed)
    if (experts := found.get("num_local_experts")) is not None:  # transformers 5's name
        found = {"num_experts": experts} | found
    model = ModelConfig(family=family.model_type)
    for path, value in family.model.items():
        _put(model, path, value)
    for path, key in (KEYS | family.keys).items():
        if key:
            value = found.get(key)
            value = family.defaults.get(key) if value is None else value
            _put(model, path, _from_theirs(model, path, value, f"{where}: {key}", "gate" in _parts(family)))
    heads = model.attention.heads
    if not family_has(family, "attention.kv_heads"):
        model.attention.kv_heads = heads
    if not family_has(family, "attention.head_dim"):
        model.attention.head_dim = model.width // heads
    _read_rope(model, found, family, where)
    _read_kinds(model, found, family, where)
    positions = model.context
    model.context = min(positions, MOST_CONTEXT)
    return Described(family, model, positions)


def family_has(family: Family, path: str) -> bool:
    return bool((KEYS | family.keys).get(path))


def _refuse(where: str, key: str, value: Any, allowed: Any) -> ValueError:
    known = ", ".join(repr(one) for one in allowed) or "none"
    return ValueError(f"{where}: {key}={value!r} can't be represented here; supported: {known}")


def _parts(family: Family) -> set[str]:
    """What a family's feed-forward, or each of its experts, has."""
    return {part.split("/")[2] for row in family.rows for part in row.parts if "/ff/" in part or "/experts/" in part}


def _put(model: ModelConfig, path: str, value: Any) -> None:
    *owners, name = path.split(".")
    owner: Any = model
    for part in owners:
        owner = getattr(owner, part)
    hint = {field.name: field.type for field in dataclasses.fields(owner)}[name]
    value = float(value) if hint is float and isinstance(value, int) and not isinstance(value, bool) else value
    setattr(owner, name, value)


def _get(model: ModelConfig, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _from_theirs(model: ModelConfig, path: str, value: Any, where: str, gated: bool) -> Any:
    part = model.attention
    if value is None:
        match path:
            case "attention.kv_heads":
                return part.heads
            case "attention.head_dim":
                return model.width // part.heads
            case "ff_width":
                return 4 * model.width
            case "attention.softcap" | "logit_softcap":
                return 0.0
            case _:
                raise ValueError(f"{where} is missing")
    if path == "activation":
        known = GATED if gated else PLAIN
        if value not in known:
            raise ValueError(f"{where}={value!r} can't be represented here; supported: {', '.join(known)}")
        return known[value]
    default = _get(ModelConfig(), path)
    check_type(value, type(default), where)
    if type(default) is not bool and value <= 0 and path not in ("attention.softcap", "logit_softcap"):
        raise ValueError(f"{where}={value!r} must be larger than 0")
    if path == "attention.scale":
        return 0.0 if value == part.head_dim else float(value) ** -0.5
    return value


def _read_rope(model: ModelConfig, found: dict[str, Any], family: Family, where: str) -> None:
    """Both spellings: `rope_parameters` (transformers 5), one for each kind of layer or for all, and `rope_theta`,
    `rope_scaling` (4)."""
    part = model.attention
    given = found.get("rope_parameters") or {}
    own = {kind: given[kind] or {} for kind in (GLOBAL, LOCAL) if kind in given}
    scaling = (found.get("rope_scaling") or {}) | (own.get(GLOBAL, {}) if own else given)
    default = found.get("rope_theta") or family.defaults["rope_theta"]
    part.rope_theta = float(scaling.get("rope_theta") or default)
    part.rope_scaling = _read_scaling(scaling, model, where)
    if own.get(LOCAL):
        local = own[LOCAL]
        if _read_scaling(local, model, where).kind != "none":
            raise ValueError(f"{where}: rope_parameters.{LOCAL} is scaled; supported: rope_type 'default' there")
        theta = float(local.get("rope_theta") or part.local_rope_theta or part.rope_theta)
        same = theta == part.rope_theta and part.rope_scaling.kind == "none"
        part.local_rope_theta = 0.0 if same and not family_has(family, "attention.local_rope_theta") else theta


def _read_scaling(given: dict[str, Any], model: ModelConfig, where: str) -> RopeScalingConfig:
    kind = given.get("rope_type", given.get("type", "default"))
    partial = given.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise _refuse(where, "partial_rotary_factor", partial, (1.0,))
    try:
        match kind:
            case "default" | None:
                return RopeScalingConfig()
            case "linear":
                return RopeScalingConfig(kind="linear", factor=float(given["factor"]))
            case "llama3":
                return RopeScalingConfig(
                    kind="llama3",
                    factor=float(given["factor"]),
                    low_frequency_factor=float(given["low_freq_factor"]),
                    high_frequency_factor=float(given["high_freq_factor"]),
                    trained_context=int(given.get("original_max_position_embeddings") or model.context),
                )
            case _:
                raise _refuse(where, "rope_scaling.rope_type", kind, ("default", "linear", "llama3"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: the rope scaling {given!r} lacks {error}") from error


def _read_kinds(model: ModelConfig, found: dict[str, Any], family: Family, where: str) -> None:
    layers, names = model.layers, family.defaults | {k: v for k, v in found.items() if v is not None}
    window, types = names.get("sliding_window"), names.get("layer_types")
    window = None if "sliding_window" in found and found["sliding_window"] is None else window
    if ("switched" in family.layers or family.layers == "nope") and not names.get("use_sliding_window"):
        window = None
    rope = [1] * layers
    match family.layers:
        case "global":
            local, window = [False] * layers, None
        case "local" | "local, switched":
            local = [window is not None] * layers
        case "switched":
            local = [window is not None and n >= names["max_window_layers"] for n in range(layers)]
        case "alternating":
            period = found.get("_sliding_window_pattern") or names["sliding_window_pattern"]
            local = [(n + 1) % period > 0 for n in range(layers)]
        case "nope":
            interval = names["no_rope_layer_interval"]
            rope = names.get("no_rope_layers") or [int((n + 1) % interval > 0) for n in range(layers)]
            local = [window is not None and not has for has in rope]
        case _:
            raise ValueError(f"layers={family.layers!r}")
    if types is not None and family.layers in ("switched", "alternating", "nope"):
        if bad := sorted({str(kind) for kind in types} - {GLOBAL, LOCAL}):
            raise _refuse(where, "layer_types", bad[0], (GLOBAL, LOCAL))
        local = [kind == LOCAL for kind in types]
    if len(local) != layers or len(rope) != layers:
        raise ValueError(f"{where}: layer_types and no_rope_layers must name {layers} layers each")
    if any(here and not has for here, has in zip(local, rope, strict=True)):
        raise ValueError(f"{where}: a layer that is local and without rope can't be represented here; supported: one")
    if any(local) and (type(window) is not int or window < 1):
        raise _refuse(where, "sliding_window", window, ("a number from 1 on",))
    kinds = ["local" if here else "global" if has else "nope" for here, has in zip(local, rope, strict=True)]
    model.attention.window = int(window) if any(local) and window else 0
    model.attention.pattern = _shortest(kinds)
    if not any(local):
        model.attention.local_rope_theta = 0.0


def _shortest(kinds: list[str]) -> tuple[str, ...]:
    """The least that gives these kinds when it is repeated; nothing, where that is the default."""
    period = next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[n % p] for n, kind in enumerate(kinds)))
    pattern = tuple(kinds[:period])
    return () if pattern in (("global",), ("local",)) else pattern


def kinds_of(model: ModelConfig) -> list[str]:
    part = model.attention
    pattern = part.pattern or ("local" if part.window else "global",)
    return [pattern[n % len(pattern)] for n in range(model.layers)]


def plain_model(model: ModelConfig) -> ModelConfig:
    """The same model, in the one way of several that a config.json gives: what has no effect is as by default."""
    model = copy.deepcopy(model)
    part, default = model.attention, ModelConfig()
    for name in OURS:
        setattr(model, name, getattr(default, name))
    kinds = kinds_of(model)
    local = "local" in kinds
    part.pattern, part.window = _shortest(kinds), part.window if local else 0
    if part.position != "rope":
        part.rope_theta, part.rope_scaling, part.local_rope_theta = 0.0, RopeScalingConfig(), 0.0
        part.pattern = _shortest(["local" if kind == "local" else "global" for kind in kinds])
    if not local:
        part.local_rope_theta = 0.0
    if part.scale == part.head_dim**-0.5:
        part.scale = 0.0
    if not part.qk_norm:
        part.qk_norm_over = default.attention.qk_norm_over
    part.qkv_bias = part.qkv_bias and not model.bias
    model.experts = model.experts if model.experts.count else default.experts
    return model


def write_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, of which `read_config` makes the same one, if the family can express it."""
    part, gated = model.attention, "gate" in _parts(family)
    found: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for path, key in (KEYS | family.keys).items():
        if key:
            value = _get(model, path)
            match path:
                case "activation":
                    known = GATED if gated else PLAIN
                    value = next((theirs for theirs, ours in known.items() if ours == value), next(iter(known)))
                case "attention.softcap" | "logit_softcap":
                    value = value or None
                case "attention.scale":
                    value = round(value**-2) if value else part.head_dim
            found[key] = value
    found |= {key: allowed[0] for key, allowed in family.only.items()}
    if part.position == "rope":
        found |= _write_rope(family, model)
    kinds = kinds_of(model)
    window = part.window if "local" in kinds else None
    types = [LOCAL if kind == "local" else GLOBAL for kind in kinds]
    if family.layers in ("switched", "local, switched", "nope"):
        found |= {"use_sliding_window": window is not None, "sliding_window": window}
    if family.layers in ("switched", "alternating", "nope"):
        found |= {"layer_types": types}
    match family.layers:
        case "local":
            found |= {"sliding_window": window}
        case "switched":
            found |= {"max_window_layers": types.index(LOCAL) if LOCAL in types else model.layers}
        case "alternating":
            found |= {"sliding_window": window or family.defaults["sliding_window"]}
        case "nope":
            found |= {"no_rope_layers": [int(kind != "nope") for kind in kinds]}
    return found


def _write_rope(family: Family, model: ModelConfig) -> dict[str, Any]:
    part = model.attention
    scaling: dict[str, Any] = {}
    match part.rope_scaling.kind:
        case "linear":
            scaling = {"rope_type": "linear", "factor": part.rope_scaling.factor}
        case "llama3":
            scaling = {
                "rope_type": "llama3",
                "factor": part.rope_scaling.factor,
                "low_freq_factor": part.rope_scaling.low_frequency_factor,
                "high_freq_factor": part.rope_scaling.high_frequency_factor,
                "original_max_position_embeddings": part.rope_scaling.trained_context,
            }
    all_ = {"rope_type": "default"} | scaling | {"rope_theta": part.rope_theta}
    found: dict[str, Any] = {"rope_theta": part.rope_theta, "rope_scaling": scaling or None, "rope_parameters": all_}
    if family_has(family, "attention.local_rope_theta"):
        theta = part.local_rope_theta or part.rope_theta
        local = {"rope_type": "default", "rope_theta": theta}
        found |= {"rope_local_base_freq": theta, "rope_parameters": {GLOBAL: all_, LOCAL: local}}
    return found


def choose_family(model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The model's own family, or else the first that can express it, and its config.json.

    Raises:
        ValueError: none can; it names the fields that keep it from the nearest.
    """
    nearest: list[str] | None = None
    known = [FAMILIES[model.family]] if model.family in FAMILIES else []
    for family in (*known, *FAMILIES.values()):
        found = write_config(family, model)
        try:
            again = read_config(found, family.model_type).model
        except ValueError as error:
            lines = [str(error)]
        else:
            lines = differences(plain_model(again), plain_model(model), "model")
        if not lines:
            return family, found
        lines = [f"{family.model_type} has {line.replace(' -> ', ', this model ')}" for line in lines]
        nearest = lines if nearest is None or len(lines) < len(nearest) else nearest
    raise ValueError(f"no family of transformers can express this model: {'; '.join(nearest or [])}; change these")
