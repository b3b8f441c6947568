"""Import of adapters from a PEFT folder (adapter_config.json, adapter_model.safetensors), to be merged into their base.

Legend: N layers, R rank, I inputs, O outputs.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxstages.config import LoraConfig
from jaxstages.interop.layout import TOKEN_ROWS, TensorSlot, by_plain_names, parts_of
from jaxstages.interop.tensors import INDEX, SINGLE, StoredTensor, header_of, read_rows
from jaxstages.models.lora_layer import DOWN, KERNEL, MAGNITUDE, UP
from jaxstages.runtime.files import read_json
from jaxstages.types import Params

NAMES = {DOWN: "lora_A.weight", UP: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
"""PEFT's names of our arrays: [I, R] -> [R, I], [R, O] -> [O, R], [O] unchanged."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.\w+)?")
"""Name of a tensor: the module, and the part of its adapter."""

UNSUPPORTED = (
    *("modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "lora_bias"),
    *("use_qalora", "alora_invocation_tokens", "exclude_biases"),
)
"""Keys of adapter_config.json that must be absent, or false."""

ORDINARY = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base unchanged."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder has adapters; transformers applies them to a model in the same folder, too."""
    return (folder / CONFIG).is_file()


def model_folder(folder: Path) -> Path:
    """Return the folder of the base if `folder` has adapters and no model, else `folder` itself.

    Raises:
        ValueError: the base is not on this machine.
    """
    if not is_adapter(folder) or any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return folder
    name = read_json(folder / CONFIG, {"peft_type": (str,)}).get("base_model_name_or_path")
    for base in (Path(name), folder / name) if isinstance(name, str) and name else ():
        if base.is_dir():
            return base.absolute()
    raise ValueError(
        f"{folder / CONFIG}: base_model_name_or_path={name!r} is no folder here; fetch the model that the adapters "
        "belong to, and write its folder there"
    )


def read_adapter(
    folder: Path, slots: list[TensorSlot], shapes: dict[str, tuple[int, ...]]
) -> tuple[Params, LoraConfig]:
    """Read adapters for `lora.merge`, with the scale of each in `lora_b`; layers without an adapter have zeros.

    Args:
        slots: the tensors of the base.
        shapes: shape of each parameter of the base, by path.

    Raises:
        ValueError: it is not LoRA, or an unsupported kind of it; the message names the key or the tensors.
    """
    config = _checked(folder)
    modules, names = _modules(folder)
    ranks = [tensors["lora_A"].shape[0] for tensors in modules.values()]
    adapters: dict[str, dict[str, np.ndarray]] = {}
    magnitudes: dict[str, int] = {}
    by_name = {slot.name.removesuffix(".weight"): slot for slot in slots}
    for module, tensors in modules.items():
        slot = by_name.get(module)
        if slot is None or not slot.row.inputs or slot.row.parts == ("embedding",):
            raise ValueError(f"{folder / WEIGHTS} adapts {module}, which can't be adapted here; train it without")
        down_RI, up_OR = (_values(tensors[name]) for name in ("lora_A", "lora_B"))
        up_OR = up_OR * _scale(config, names[module], len(down_RI))
        if slot.row.parts[0] in TOKEN_ROWS and "lora_magnitude_vector" in tensors:
            raise ValueError(f"{folder / WEIGHTS} has DoRA of {module}, which can't be read here; train it without")
        first = 0
        for part, inputs, outputs in parts_of(slot, shapes):
            if part in TOKEN_ROWS:  # our rows are tokens, which PEFT treats as outputs
                inputs, outputs, down_IR, up_RO = outputs, inputs, up_OR, down_RI
                lead, sides = (), (outputs, inputs)
            else:
                down_IR, up_RO = down_RI.T, up_OR[first : first + outputs].T
                lead, sides = shapes[part][: len(slot.stack_index)], (inputs, outputs)
            if down_IR.shape[0] > sides[0] or up_RO.shape[1] != sides[1] or down_RI.shape[1] != inputs:
                raise ValueError(f"{folder / WEIGHTS}: the adapter of {module} does not fit its base")
            entry = adapters.setdefault(part, _empty(lead, sides, max(ranks)))
            entry[DOWN][slot.stack_index][: len(down_IR), : len(down_RI)] = down_IR
            entry[UP][slot.stack_index][: len(down_RI)] = up_RO
            if "lora_magnitude_vector" in tensors:
                magnitude_O = _values(tensors["lora_magnitude_vector"]).reshape(-1)[first : first + outputs]
                entry.setdefault(MAGNITUDE, np.zeros((*lead, outputs), np.float32))[slot.stack_index] = magnitude_O
                magnitudes[part] = magnitudes.get(part, 0) + 1
            first += outputs
    for part, layers in magnitudes.items():
        if layers != int(np.prod(shapes[part][:1] if part.startswith("layers/") else ())):
            raise ValueError(f"{folder / WEIGHTS}: DoRA of {part} in some layers only can't be read here")
    return _tree(adapters), LoraConfig(rank=max(ranks), alpha=float(max(ranks)))


def _checked(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises ValueError if it has what is not supported."""
    file = folder / CONFIG
    config = read_json(file, {"peft_type": (str,), "r": (int,), "lora_alpha": (int, float)})
    supported = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": ORDINARY}
    for key, allowed in (supported | dict.fromkeys(UNSUPPORTED, (None, False, [], {}))).items():
        if config.get(key) not in allowed:
            raise ValueError(f"{file}: {key}={config[key]!r} can't be read here; supported: {allowed[0]!r}")
    if not isinstance(config.get("alpha_pattern") or {}, dict):
        raise ValueError(f"{file}: alpha_pattern={config['alpha_pattern']!r} must be an object")
    return config


def _modules(folder: Path) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, str]]:
    """Return the tensors of each adapted module, and the name that PEFT has for it."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; save the adapters as safetensors")
    modules: dict[str, dict[str, StoredTensor]] = {}
    names = {}
    for name, tensor in header_of(file).items():
        match = TENSOR.fullmatch(name.removesuffix(".weight"))
        if match is None:
            raise ValueError(f"{file} has {name}, which is no part of LoRA or DoRA of a linear map; train without it")
        (module,) = by_plain_names({match[1]: tensor}, str(file))
        modules.setdefault(module, {})[match[2]] = tensor
        names[module] = match[1]
    for module, tensors in modules.items():
        if not {"lora_A", "lora_B"} <= tensors.keys() or any(len(tensors[n].shape) != 2 for n in ("lora_A", "lora_B")):
            raise ValueError(f"{file}: the adapter of {module} is not whole")
    if not modules:
        raise ValueError(f"{file} has no adapters")
    return modules, names


def _values(tensor: StoredTensor) -> np.ndarray:
    return np.concatenate([rows for _, rows in read_rows(tensor, 0, tensor.shape[0])])


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """Return PEFT's scale of a module's adapter."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next((a for name, a in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{name})", module)), None)
    return (config["lora_alpha"] if alpha is None else alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _empty(lead: tuple[int, ...], sides: tuple[int, int], rank: int) -> dict[str, np.ndarray]:
    return {
        DOWN: np.zeros((*lead, sides[0], rank), np.float32),
        UP: np.zeros((*lead, rank, sides[1]), np.float32),
    }


def _tree(adapters: dict[str, dict[str, np.ndarray]]) -> Params:
    """Arrange adapters as `lora.py` does: beside their kernel, or below the name of another matrix."""
    tree: Params = {}
    for part, adapter in adapters.items():
        node = tree
        for name in part.removesuffix(f"/{KERNEL}").split("/"):
            node = node.setdefault(name, {})
        node.update(adapter)
    return tree
