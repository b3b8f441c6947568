"""What a finished stage hands on: its result, its best parameters, and the contract under which another takes them.

The contract: tokenizer, control tokens, architecture and chat template are the parent's, its result is complete, and
its parameters are those that its result names. A stage that trained adapters hands on its base, with the adapters
merged into it.
"""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import params_sha256
from jaxstages.checkpoint.manager import read_params, stored_params
from jaxstages.checkpoint.metadata import finished, read_meta
from jaxstages.config import LoraConfig, Recipe, StageConfig
from jaxstages.data.chat import chat_name
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.models.sharding import shardings_of
from jaxstages.models.trainable import Trainable, make_trainable
from jaxstages.runtime.files import parse_path
from jaxstages.runtime.manifest import Damaged
from jaxstages.runtime.workdir import checkpoint_folder, quarantine_folder, result_file
from jaxstages.training.program import Program, freeze
from jaxstages.types import Params

CONTRACT = ("tokenizer_sha256", "vocab_size", "special_ids", "model", "chat_template")
"""What a stage's metadata must have in common with its parent's."""

OVERRIDABLE_MODEL_FIELDS = ("dtype", "dropout", "unroll")
"""Fields of the model in which a stage may differ from its parent: they make no other parameters. From an import it may
also differ in its context."""

SAME_STEPS = ("unroll",)
"""Fields of the model in which a stage may differ from its own checkpoints: they change no number of its steps."""

Contract = dict[str, Any]
"""The fields of `CONTRACT`, of a recipe and its tokenizer."""


def contract_of(recipe: Recipe, tokenizer: Tokenizer) -> Contract:
    """Return what every checkpoint of a run records about itself, and the next stage checks."""
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "special_ids": list(tokenizer.specials),
        "model": recipes.to_dict(recipe.model),
        "chat_template": chat_name(tokenizer),
    }


def read_parent(
    folder: Path, program: Program, contract: Contract, result: dict[str, Any] | None = None
) -> tuple[Params, dict[str, Any]]:
    """Read the best parameters of a finished stage, and its lineage: path, step and params_sha256.

    Adapters are merged into their base; the digest is then that of the adapters.

    Args:
        result: the stage's result, where it is not finished, or another step is meant.

    Raises:
        ValueError: the stage, or the base of its adapters, is missing, unfinished, damaged or made for something else.
    """
    params, meta, lineage = read_trained(folder, program, contract, result)
    if not meta["lora"]:
        return params, lineage
    # A program of its own: fused with the merge, the compiler may skip a rounding to bfloat16 and back.
    trainable = trainable_of(meta, program)
    base = freeze(program, read_base(folder, meta, program, contract), trainable)
    merge = jax.jit(trainable.export, out_shardings=shardings_of(program.abstract_params))
    return merge(base, params), lineage


def read_base(stage_dir: Path, meta: dict[str, Any], program: Program, contract: Contract) -> Params:
    """Read the float32 parameters that `stage_dir`, whose checkpoint has the metadata `meta`, began from.

    Raises:
        ValueError: they are neither where they were, nor beside the stage; or as of `read_parent`.
    """
    parent = meta["parent"]
    for folder in _parent_folders(stage_dir, parent):
        if _is_finished(folder) and finished(folder)["params_sha256"] == parent["params_sha256"]:
            return read_parent(folder, program, contract)[0]
    needs = "has adapters only; their base" if meta["lora"] else "keeps close to its parent by an anchor; that parent"
    raise ValueError(
        f"{stage_dir} {needs}, {parent['path']} with params_sha256 {parent['params_sha256'][:12]}…, is neither there "
        "nor beside it; put it back"
    )


def lora_of(meta: dict[str, Any]) -> LoraConfig:
    """Return the configuration of a checkpoint's adapters; its rank is 0 where all parameters were trained."""
    return recipes.lora_from(meta["lora"]) or LoraConfig()


def trainable_of(meta: dict[str, Any], program: Program) -> Trainable:
    """Return what a checkpoint has trained, all parameters or adapters."""
    return make_trainable(program.model.axes, lora_of(meta))


def read_trained(
    folder: Path, program: Program, contract: Contract, result: dict[str, Any] | None = None
) -> tuple[Params, dict[str, Any], dict[str, Any]]:
    """Read what a finished stage has trained, all parameters or adapters, at its best step.

    Returns these, the checkpoint's metadata, and the lineage. Raises as `read_parent`.
    """
    result = result or finished(folder)
    step = result["best_step"]
    try:
        meta = read_meta(checkpoint_folder(folder, step))
        check_contract(folder, meta, contract)
        replicated = NamedSharding(program.mesh, PartitionSpec())
        target = stored_params(meta, replicated) if meta["lora"] else program.abstract_params
        params = read_params(folder, step, target, result.get("handed_on", "params"))
        digest = params_sha256(params)
        if result["params_sha256"] not in ("", digest):
            raise Damaged(
                f"{folder} at step {step} is damaged: params_sha256 is {digest[:12]}…, its result.json says "
                f"{result['params_sha256'][:12]}…"
            )
    except Damaged as error:
        moved = [path for path in sorted(quarantine_folder(folder).glob(f"{step}.*")) if path.is_dir()]
        where = f" (it was moved to {moved[-1]})" if moved else ""
        raise Damaged(f"{error}{where}; put a good copy there, or remove {folder} to train that stage anew") from error
    return params, meta, {"path": str(folder), "step": step, "params_sha256": digest}


def lineage_break(stage_dir: Path, parent: dict[str, Any] | None, stage: StageConfig | None) -> str:
    """What to say where the parent that a stage began from has been trained anew since; else "".

    Args:
        stage: as the recipe has it, which says whether its parent is a stage of the same run.
    """
    if parent is None:
        return ""
    now = [finished(f)["params_sha256"] for f in _parent_folders(stage_dir, parent, stage) if _is_finished(f)]
    if not now or parent["params_sha256"] in now:
        return ""
    return (
        f"{stage_dir} began from {parent['path']} with params_sha256 {parent['params_sha256'][:12]}…, which is now "
        f"{now[0][:12]}…"
    )


def check_lineage(stage_dir: Path, parent: dict[str, Any] | None, stage: StageConfig | None = None) -> None:
    """Raises ValueError if the parent that a stage began from has been trained anew since."""
    if why := lineage_break(stage_dir, parent, stage):
        raise ValueError(f"{why}; remove {stage_dir} to train it on from there")


def _is_finished(folder: Path) -> bool:
    return result_file(folder).exists()


def _parent_folders(stage_dir: Path, parent: dict[str, Any], stage: StageConfig | None = None) -> tuple[Path, ...]:
    """Where a stage's parent may lie. A run may be moved or copied, and its own stages go with it: they are its
    lineage, and not what the original has at the recorded path. A parent in another run stays where it is."""
    recorded = parse_path(parent["path"], "the parent's path")
    beside = stage_dir.parent / recorded.name
    if beside.is_dir() and stage is not None and (stage.init_from == "parent" or stage.init_from.startswith("hf:")):
        return (beside,)
    return recorded, beside


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"attention": {"heads": 4}} -> {"attention.heads": 4}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def check_contract(
    folder: Path, theirs: dict[str, Any], ours: dict[str, Any], free: tuple[str, ...] = OVERRIDABLE_MODEL_FIELDS
) -> None:
    """Raises ValueError, with both values, where a checkpoint was made for something else than this recipe.

    Args:
        theirs: the metadata of a checkpoint in `folder`.
        free: fields of the model that may differ.
    """
    # A field of the model that the checkpoint's version did not have yet: it did what is the default now.
    defaults = {} if "part" in theirs["model"] else _flat(recipes.to_dict(recipes.ModelConfig()))
    theirs = theirs | {"model": defaults | _flat(theirs["model"])}
    ours = ours | {"model": _flat(ours["model"])}
    free = (*free, "context") if theirs["stage"] == recipes.IMPORT else free
    theirs["model"] |= {name: ours["model"][name] for name in free if name in ours["model"]}
    for name in CONTRACT:
        old, new = theirs[name], ours[name]
        if old != new:
            what = f"{name} is {old!r} there, {new!r} here"
            if isinstance(new, dict):
                parts = [
                    f"{key} {old.get(key)!r} there, {new.get(key)!r} here"
                    for key in old | new
                    if old.get(key) != new.get(key)
                ]
                what = f"{name} differs: {'; '.join(parts)}"
            raise ValueError(
                f"{folder} does not fit this recipe: {what}; use the recipe that it was trained with, or another "
                "--workdir for a new run"
            )
