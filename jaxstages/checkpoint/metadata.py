"""Metadata of a checkpoint and results of a stage. Only JSON is read: nothing here needs jax."""

import re
from pathlib import Path
from typing import Any

from jaxstages import config as recipes
from jaxstages.config import lora_from
from jaxstages.runtime.files import Fields, read_json
from jaxstages.runtime.manifest import Damaged
from jaxstages.runtime.workdir import checkpoints_folder, result_file

FORMAT = 1
"""Version of the checkpoint format; incremented when older versions of jaxstages can't read it."""

META: Fields = {
    "format": (int,),
    "stage": (str,),
    "step": (int,),
    "best_step": (int,),
    "fingerprint": (dict,),
    "tokenizer_sha256": (str,),
    "vocab_size": (int,),
    "special_ids": (list,),
    "model": (dict,),
    "chat_template": (str,),
    "parent": (dict, type(None)),
    "data": (dict,),
    "carried": (dict,),
}
"""Fields of a checkpoint's metadata."""

RESULT: Fields = {
    "status": (str,),
    "steps": (int,),
    "best_step": (int,),
    "params_sha256": (str,),
    "parent": (dict, type(None)),
}
"""Fields of a stage's `result.json` that are read later."""


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the metadata of a checkpoint.

    Args:
        folder: `STAGE/checkpoints/STEP`.

    Raises:
        Damaged: it can't be read.
        ValueError: a newer version wrote it.
    """
    file = folder / "meta" / "metadata"
    try:
        version = read_json(file, {"format": (int,)})["format"]
        meta: dict[str, Any] = read_json(file, META if version <= FORMAT else None)
    except ValueError as error:
        raise Damaged(f"{folder} is damaged, or no checkpoint of jaxstages: {error}") from error
    if version > FORMAT:
        raise ValueError(f"{folder} has format {version}, this version reads up to {FORMAT}; install a newer jaxstages")

    digests = meta["fingerprint"].values()
    if not all(isinstance(text, str) and re.fullmatch(r"[0-9a-f]+ \w+\[[\d, ]*\]", text) for text in digests):
        raise Damaged(f"{folder} is no checkpoint of jaxstages: its fingerprint has another form")

    meta = {"lora": None} | meta  # the field is younger than the format
    try:
        if lora_from(meta["lora"]) is not None and meta["parent"] is None:
            raise ValueError("it has adapters without a base")
    except ValueError as error:
        raise Damaged(f"{folder} is damaged, or of a newer jaxstages: {error}") from error
    if str(meta["step"]) != folder.name:
        raise Damaged(f"{folder} is damaged: it says that it is of step {meta['step']}, not {folder.name}")
    return meta


def stored_shapes(meta: dict[str, Any]) -> dict[str, str]:
    """Return path -> dtype and shape ("float32[16, 32]") of each parameter in a checkpoint."""
    return {
        path.removeprefix("params/"): saved_kind(text)
        for path, text in meta["fingerprint"].items()
        if path.startswith("params/")
    }


def saved_kind(digest: str) -> str:
    """Return dtype and shape ("float32[16, 32]") of a leaf, from its digest in a checkpoint."""
    return digest.split(" ", 1)[1]


def finished(folder: Path) -> dict[str, Any]:
    """Read the result of a finished stage. Raises ValueError with the command to run if there is none."""
    file = result_file(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the parent {folder} is no folder; name WORKDIR/STAGE of a run")
    if not file.exists():
        if folder.name not in recipes.CHECKPOINTED_STAGES:
            raise ValueError(f"the parent {folder} is no finished stage, it has no {file.name}; name WORKDIR/STAGE")
        state = "is not finished" if checkpoints_folder(folder).exists() else "was not trained"
        raise ValueError(
            f"the parent {folder} {state}; run `jaxstages {folder.name}` with --workdir={folder.parent} first"
        )
    remedy = f"remove it, and run `jaxstages {folder.name}` again"
    try:
        return read_json(file, RESULT)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
