"""A stage's adapters -> a folder that PEFT loads beside the base: adapter_config.json and adapter_model.safetensors.

Legend: N layers, R rank, I inputs, O outputs.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from jaxstages import config as recipes
from jaxstages import hosts
from jaxstages.config import LoraConfig, Recipe
from jaxstages.console import say
from jaxstages.disk import make_folder, read_json, sync, write_json, write_text
from jaxstages.fingerprint import named_leaves
from jaxstages.interop.card import licence_of, write_card
from jaxstages.interop.config_json import choose_family
from jaxstages.interop.families import Family, Row
from jaxstages.interop.hf_import import kept_source
from jaxstages.interop.tensors import Entry, header_of, read_rows, write_file
from jaxstages.models.lora import DOWN, MAGNITUDE, UP
from jaxstages.parent import contract_of, lora_of, read_trained
from jaxstages.workbench import open_workbench
from jaxstages.workdir import result_file

NAMES = {DOWN: "lora_A.weight", UP: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
"""Ours -> PEFT's: [I, R] -> [R, I], [R, O] -> [O, R], [O] as it is."""


def export_adapter(recipe: Recipe, workdir: Path, stage: str, to: Path, chosen: dict[str, Any] | None = None) -> None:
    """Write the adapters of a stage's best checkpoint, float32, into the folder `to`, which must not be there yet, or
    be empty. What they lie beside is not written.

    Raises:
        ValueError: the stage has no adapters, or PEFT can't have them where they are: it says what to do.
        OSError: what was written is not what is there; `to` is not made.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to={to} is there already, and not empty; name another folder")
    bench = open_workbench(recipe, stage, workdir, with_data=False)
    params, meta, lineage = read_trained(bench.stage_dir, bench, contract_of(bench), chosen)
    config = lora_of(meta)
    if not config.rank:
        raise ValueError(f"{stage} has no adapters, it trained all parameters; export it without --adapter")
    rows = bench.params["embedding"].shape[0]
    family, _ = choose_family(dataclasses.replace(recipe.model, vocab_size=rows))
    tensors, adapted = _tensors(family, {path: hosts.whole(leaf) for path, leaf in named_leaves(params).items()})
    fresh = to.with_name(f"{to.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    make_folder(fresh)
    entries = [Entry(name, value.shape, lambda value=value: [value]) for name, value in tensors.items()]
    write_file(fresh / "adapter_model.safetensors", entries, "F32", 0, lambda done: None)
    base = _base_of(workdir, meta)
    write_json(fresh / "adapter_config.json", _config(config, adapted, base))
    facts = {
        "adapters for": f"`{base}` ({family.model_type})",
        "rank, alpha": f"{config.rank}, {config.alpha:g}",
        "the base was held in": config.base,
        "params_sha256": f"`{lineage['params_sha256']}`",
    }
    write_text(
        fresh / "README.md", write_card(recipe, bench.stage_dir, facts, licence_of(kept_source(workdir)), chosen)
    )
    stored = header_of(fresh / "adapter_model.safetensors")
    for name, value in tensors.items():
        again = np.concatenate([piece for _, piece in read_rows(stored[name], 0, len(value))])
        if not np.array_equal(again, value):
            raise OSError(f"{fresh}: {name} is not what was to be written; is the disk in order?")
    if to.exists():
        to.rmdir()
    fresh.replace(to)
    sync(to.absolute().parent)
    say(f"export: adapters of {stage} at step {lineage['step']}, rank {config.rank}, for {base}, in {to}", "bold")


def _tensors(family: Family, leaves: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[Row]]:
    """PEFT's tensors, and the rows of the family's table that are adapted."""
    rows = {part: row for row in family.rows for part in row.parts}
    found: dict[str, np.ndarray] = {}
    chosen: dict[str, Row] = {}
    for path, stack in leaves.items():
        place, _, name = path.rpartition("/")
        row = rows.get(f"{place}/kernel")
        if row is None or len(row.parts) > 1 or "{n}" not in row.name:
            raise ValueError(
                f"PEFT has no adapter for {place} of {family.model_type} by itself; export without --adapter"
            )
        chosen[row.name] = row
        for n, leaf in enumerate(stack):
            module = row.name.format(n=n).removesuffix(".weight")
            found[f"base_model.model.{module}.{NAMES[name]}"] = np.ascontiguousarray(leaf.T)
    return found, list(chosen.values())


def _config(config: LoraConfig, rows: list[Row], base: str) -> dict[str, Any]:
    transposed = {row.transposed for row in rows}
    if len(transposed) > 1:
        raise ValueError("PEFT wants adapted tensors that all are [outputs, inputs], or none; export without --adapter")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(row.name.partition("{n}.")[2].removesuffix(".weight") for row in rows),
        "use_rslora": config.rank_stabilized,
        "use_dora": config.dora,
        "fan_in_fan_out": not transposed.pop(),
        "inference_mode": True,
    }


def _base_of(workdir: Path, meta: dict[str, Any]) -> str:
    """The folder that was imported, if the adapters lie beside that; else the parent, to be exported itself."""
    file = result_file(workdir / recipes.IMPORT)
    if file.exists():
        imported = read_json(file)
        if imported["params_sha256"] == meta["parent"]["params_sha256"]:
            return imported["source"]["folder"]
    return meta["parent"]["path"]
