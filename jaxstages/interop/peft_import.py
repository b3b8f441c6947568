"""Adapters by PEFT, a folder with adapter_config.json and adapter_model.safetensors: their base, and what they add to
its parameters.

Legend: N layers, R rank, I inputs, O outputs.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxstages.config import LoraConfig
from jaxstages.interop.layout import GROWS, Place, by_plain_names, parts_of
from jaxstages.interop.tensors import Stored, header_of, read_rows
from jaxstages.models.lora_layer import DOWN, KERNEL, MAGNITUDE, UP
from jaxstages.runtime.files import read_json
from jaxstages.types import Params

NAMES = {DOWN: "lora_A.weight", UP: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
"""Ours -> PEFT's: [I, R] -> [R, I], [R, O] -> [O, R], [O] as it is."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.\w+)?")
"""A module, and what of its adapter."""

UNSUPPORTED = (
    *("modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "lora_bias"),
    *("use_qalora", "alora_invocation_tokens", "exclude_biases"),
)
"""Keys of adapter_config.json that must be absent, or false."""

ORDINARY = (None, True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base as it was."""


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def model_folder(folder: Path) -> Path:
    """The folder of the base, where `folder` has adapters; else itself.

    Raises:
        ValueError: the base is no folder here.
    """
    if not is_adapter(folder):
        return folder
    name = read_json(folder / CONFIG, {"peft_type": (str,)}).get("base_model_name_or_path")
    for base in (Path(name), folder / name) if isinstance(name, str) and name else ():
        if base.is_dir():
            return base.absolute()
    raise ValueError(
        f"{folder / CONFIG}: base_model_name_or_path={name!r} is no folder here; fetch the model that the adapters lie "
        "beside, and write its folder there"
    )


def read_adapter(folder: Path, places: list[Place], shapes: dict[str, tuple[int, ...]]) -> tuple[Params, LoraConfig]:
    """Adapters as `lora.merge` takes them, each with its own scale in `lora_b`; layers without one have zeros.

    Args:
        places: the tensors of the base.
        shapes: of the base's parameters, by path.

    Raises:
        ValueError: it is no LoRA, or one with what we can't do: names file and key, or the tensors.
    """
    config = _checked(folder)
    modules = _modules(folder)
    ranks = [tensors["lora_A"].shape[0] for tensors in modules.values()]
    found: dict[str, dict[str, np.ndarray]] = {}
    seen: dict[str, int] = {}
    by_name = {place.name.removesuffix(".weight"): place for place in places}
    for module, tensors in modules.items():
        place = by_name.get(module)
        if place is None or not place.row.inputs or place.row.parts == ("embedding",):
            raise ValueError(f"{folder / WEIGHTS} adapts {module}, which can't be adapted here; train it without")
        down_RI, up_OR = (_values(tensors[name]) for name in ("lora_A", "lora_B"))
        up_OR = up_OR * _scale(config, module, len(down_RI))
        first = 0
        for part, inputs, outputs in parts_of(place, shapes):
            if part in GROWS:  # rows are tokens, which are the outputs of PEFT's
                inputs, outputs, down_IR, up_RO = outputs, inputs, up_OR, down_RI
                lead, sides = (), (outputs, inputs)
            else:
                down_IR, up_RO = down_RI.T, up_OR[first : first + outputs].T
                lead, sides = shapes[part][: len(place.at)], (inputs, outputs)
            if down_IR.shape[0] > sides[0] or up_RO.shape[1] != sides[1] or down_RI.shape[1] != inputs:
                raise ValueError(f"{folder / WEIGHTS}: the adapter of {module} does not fit its base")
            entry = found.setdefault(part, _empty(lead, sides, max(ranks)))
            entry[DOWN][place.at][: len(down_IR), : len(down_RI)] = down_IR
            entry[UP][place.at][: len(down_RI)] = up_RO
            if "lora_magnitude_vector" in tensors:
                magnitude_O = _values(tensors["lora_magnitude_vector"]).reshape(-1)[first : first + outputs]
                entry.setdefault(MAGNITUDE, np.zeros((*lead, outputs), np.float32))[place.at] = magnitude_O
                seen[part] = seen.get(part, 0) + 1
            first += outputs
    for part, times in seen.items():
        if times != int(np.prod(shapes[part][:1] if part.startswith("layers/") else ())):
            raise ValueError(f"{folder / WEIGHTS}: DoRA of {part} in some layers only can't be read here")
    return _tree(found), LoraConfig(rank=max(ranks), alpha=float(max(ranks)))


def _checked(folder: Path) -> dict[str, Any]:
    """Its adapter_config.json."""
    file = folder / CONFIG
    config = read_json(file, {"peft_type": (str,), "r": (int,), "lora_alpha": (int, float)})
    wanted = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": ORDINARY}
    for key, allowed in (wanted | dict.fromkeys(UNSUPPORTED, (None, False, [], {}))).items():
        if config.get(key) not in allowed:
            raise ValueError(f"{file}: {key}={config[key]!r} can't be read here; supported: {allowed[0]!r}")
    if not isinstance(config.get("alpha_pattern") or {}, dict):
        raise ValueError(f"{file}: alpha_pattern={config['alpha_pattern']!r} must be an object")
    return config


def _modules(folder: Path) -> dict[str, dict[str, Stored]]:
    """Module -> its tensors."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; save the adapters as safetensors")
    found: dict[str, dict[str, Stored]] = {}
    for name, tensor in header_of(file).items():
        match = TENSOR.fullmatch(name.removesuffix(".weight"))
        if match is None:
            raise ValueError(f"{file} has {name}, which is no part of LoRA or DoRA of a linear map; train without it")
        (module,) = by_plain_names({match[1]: tensor}, str(file))
        found.setdefault(module, {})[match[2]] = tensor
    for module, tensors in found.items():
        if not {"lora_A", "lora_B"} <= tensors.keys() or any(len(tensors[n].shape) != 2 for n in ("lora_A", "lora_B")):
            raise ValueError(f"{file}: the adapter of {module} is not whole")
    if not found:
        raise ValueError(f"{file} has no adapters")
    return found


def _values(tensor: Stored) -> np.ndarray:
    return np.concatenate([rows for _, rows in read_rows(tensor, 0, tensor.shape[0])])


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies the product of a module's adapter by."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next((a for name, a in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{name})", module)), None)
    return (config["lora_alpha"] if alpha is None else alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _empty(lead: tuple[int, ...], sides: tuple[int, int], rank: int) -> dict[str, np.ndarray]:
    return {
        DOWN: np.zeros((*lead, sides[0], rank), np.float32),
        UP: np.zeros((*lead, rank, sides[1]), np.float32),
    }


def _tree(found: dict[str, dict[str, np.ndarray]]) -> Params:
    """Adapters beside their kernels, or below the name of another matrix, as `lora.py` has them."""
    tree: Params = {}
    for part, adapter in found.items():
        node = tree
        for name in part.removesuffix(f"/{KERNEL}").split("/"):
            node = node.setdefault(name, {})
        node.update(adapter)
    return tree
