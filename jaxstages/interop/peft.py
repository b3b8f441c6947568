"""Export of a stage's adapters to a PEFT folder: adapter_config.json and adapter_model.safetensors.

Legend: N layers, R rank, I inputs, O outputs.
"""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import named_leaves
from jaxstages.config import LoraConfig, Recipe, builtin_model
from jaxstages.interop.config_json import choose_family
from jaxstages.interop.families import Family, Row
from jaxstages.interop.hf_export import write_tokenizer
from jaxstages.interop.hf_import import source_folder
from jaxstages.interop.model_card import licence_field, write_card
from jaxstages.interop.peft_import import NAMES
from jaxstages.interop.tensors import Entry, header_of, read_rows, write_file
from jaxstages.models.lora_layer import DOWN, MAGNITUDE, UP
from jaxstages.runtime import multihost
from jaxstages.runtime.console import say
from jaxstages.runtime.files import make_folder, read_json, sync, write_json, write_text
from jaxstages.runtime.workdir import result_file
from jaxstages.training.handoff import lora_of, read_trained
from jaxstages.training.setup import setup_stage


def export_adapter(recipe: Recipe, workdir: Path, stage: str, to: Path, chosen: dict[str, Any] | None = None) -> None:
    """Write the adapters of a checkpoint, in float32, and its tokenizer into the folder `to`. The base is not written.

    Args:
        to: must be empty, or not exist.

    Raises:
        ValueError: the stage has no adapters, or PEFT does not support adapters of these matrices.
        OSError: the folder, read back, has other values. `to` is not created then.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to={to} is there already, and not empty; name another folder")
    setup = setup_stage(recipe, stage, workdir, with_data=False)
    params, meta, lineage = read_trained(setup.folder, setup.program, setup.contract, chosen)
    config = lora_of(meta)
    if not config.rank:
        raise ValueError(f"{stage} has no adapters, it trained all parameters; export it without --adapter")
    base = _base_of(workdir, meta)
    rows = setup.program.abstract_params["embedding"].shape[0]
    family, _ = choose_family(dataclasses.replace(builtin_model(recipe, "export"), vocab_size=rows))
    leaves = {path: multihost.gather_to_host(leaf) for path, leaf in named_leaves(params).items()}
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(setup.program.abstract_params).items()}
    tensors, adapted = _tensors(family, leaves, shapes)

    fresh = to.with_name(f"{to.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    make_folder(fresh)
    entries = [Entry(name, value.shape, lambda value=value: [value]) for name, value in tensors.items()]
    write_file(fresh / "adapter_model.safetensors", entries, "F32", 0, lambda done: None)
    write_json(fresh / "adapter_config.json", _config(config, adapted, base))
    write_tokenizer(setup, stage, fresh)  # with the control tokens of training in the base's spare rows
    facts = {
        "adapters for": f"`{base}` ({family.model_type})",
        "rank, alpha": f"{config.rank}, {config.alpha:g}",
        "the base was held in": config.base,
        "params_sha256": f"`{lineage['params_sha256']}`",
    }
    licence = licence_field(source_folder(workdir))
    write_text(fresh / "README.md", write_card(recipe, setup.folder, facts, licence, chosen))

    stored = header_of(fresh / "adapter_model.safetensors")
    for name, value in tensors.items():
        written = np.concatenate([rows for _, rows in read_rows(stored[name], 0, len(value))])
        if not np.array_equal(written, value):
            raise OSError(f"{fresh}: {name} is not what was to be written; is the disk in order?")
    if to.exists():
        to.rmdir()
    fresh.replace(to)
    sync(to.absolute().parent)
    say(f"export: adapters of {stage} at step {lineage['step']}, rank {config.rank}, for {base}, in {to}", "bold")


def _tensors(
    family: Family, leaves: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], dict[Row, int]]:
    """Return PEFT's tensors by name, and the adapted rows of the family's table with the number of adapters in each.

    If a tensor of the family holds several of our kernels, its adapter combines theirs: `lora_a` stacked, and `lora_b`
    block-diagonal, so that each kernel keeps its own product.

    | kernels      | lora_A         | lora_B          |
    | query, value | A of the query | B of query, 0   |
    | in one       | A of the value | 0, 0 (the key)  |
    |              |                | 0, B of value   |

    Args:
        shapes: shape of each parameter of the base, by path.
    """
    rows = {part: row for row in family.rows for part in row.parts}
    adapters: dict[str, dict[str, np.ndarray]] = {}
    counts: dict[Row, int] = {}
    for path, stack in leaves.items():
        layer, _, name = path.rpartition("/")
        row = rows.get(f"{layer}/kernel")
        if row is None or "{n}" not in row.name:
            raise ValueError(
                f"PEFT has no adapter for {layer} of {family.model_type} by itself; export without --adapter"
            )
        adapters.setdefault(f"{layer}/kernel", {})[name] = stack
        counts[row] = counts.get(row, 0) + (name == DOWN)

    tensors: dict[str, np.ndarray] = {}
    for row in counts:
        if any(MAGNITUDE in adapters.get(part, {}) for part in row.parts) and counts[row] < len(row.parts):
            missing = next(part for part in row.parts if part not in adapters)
            raise ValueError(
                f"PEFT needs DoRA of {missing} too, which shares a tensor with others; adapt it, or export without "
                "--adapter"
            )
        widths = [math.prod(shapes[part][1 + row.inputs :]) for part in row.parts]
        for n in range(shapes[row.parts[0]][0]):
            module = row.name.format(n=n).removesuffix(".weight")
            for name, value in _fused_adapter([adapters.get(part) for part in row.parts], widths, n).items():
                tensors[f"base_model.model.{module}.{NAMES[name]}"] = np.ascontiguousarray(value)
    return tensors, counts


def _fused_adapter(adapters: list[dict[str, np.ndarray] | None], widths: list[int], n: int) -> dict[str, np.ndarray]:
    """Return PEFT's adapter of a tensor in layer n.

    Args:
        adapters: the adapter of each part of the tensor, None if the part has none.
        widths: outputs of each part.
    """
    present = [adapter for adapter in adapters if adapter is not None]
    fused = {DOWN: np.concatenate([adapter[DOWN][n].T for adapter in present])}
    fused[UP] = np.zeros((sum(widths), len(fused[DOWN])), np.float32)
    row = column = 0
    for adapter, width in zip(adapters, widths, strict=True):
        if adapter is not None:
            up_OR = adapter[UP][n].T
            fused[UP][row : row + width, column : column + up_OR.shape[1]] = up_OR
            column += up_OR.shape[1]
        row += width
    if MAGNITUDE in present[0]:
        fused[MAGNITUDE] = np.concatenate([adapter[MAGNITUDE][n] for adapter in present])
    return fused


def _config(config: LoraConfig, rows: dict[Row, int], base: str) -> dict[str, Any]:
    transposed = {row.transposed for row in rows}
    if len(transposed) > 1:
        raise ValueError("PEFT wants adapted tensors that all are [outputs, inputs], or none; export without --adapter")
    names = {row.name.partition("{n}.")[2].removesuffix(".weight"): count for row, count in rows.items()}
    # A fused adapter has a larger rank; a larger alpha keeps the scale.
    larger = {name: count for name, count in sorted(names.items()) if count > 1}
    power = 0.5 if config.rank_stabilized else 1.0
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "rank_pattern": {name: count * config.rank for name, count in larger.items()},
        "alpha_pattern": {name: count**power * config.alpha for name, count in larger.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(names),
        "use_rslora": config.rank_stabilized,
        "use_dora": config.dora,
        "fan_in_fan_out": not transposed.pop(),
        "inference_mode": True,
    }


def _base_of(workdir: Path, meta: dict[str, Any]) -> str:
    """Return the imported folder if the adapters were trained on it; else the parent, which has to be exported too.

    Raises:
        ValueError: the import added tokens, for which the folder has no rows, or the base is multimodal.
    """
    file = result_file(workdir / recipes.IMPORT)
    if file.exists():
        imported = read_json(file)
        plain = not imported["source"].get("adapters")
        if plain and imported["params_sha256"] == meta["parent"]["params_sha256"]:
            if wrapper := imported["source"].get("wrapper"):
                raise ValueError(
                    f"the imported base is a {wrapper}, in which PEFT names the text model's matrices differently; "
                    "export the merged model, without --adapter"
                )
            if added := imported["source"]["new_tokens"]:
                raise ValueError(
                    f"the imported base has no rows for {' '.join(added[:5])}, which this run added, so that its "
                    "adapters fit no base elsewhere; export the merged model, without --adapter"
                )
            return imported["source"]["folder"]
    return meta["parent"]["path"]
