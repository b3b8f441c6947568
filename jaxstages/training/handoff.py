"""Hand-over between stages: reading the best parameters of a finished stage under a contract.

By the contract, tokenizer, control tokens, architecture and chat template equal the parent's, the parent's result is
complete, and its parameters have the digest in that result. A stage that trained adapters hands on its base with the
adapters merged into it.
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
"""Metadata fields of a stage that must equal those of its parent."""

OVERRIDABLE_MODEL_FIELDS = ("dtype", "dropout", "unroll")
"""Model fields in which a stage may differ from its parent, because they do not change the parameters. It may also
differ from an import in its context."""

SAME_STEPS = ("unroll",)
"""Model fields in which a stage may differ from its own checkpoints, because they do not change its steps."""

Contract = dict[str, Any]
"""The fields in `CONTRACT`, with the values of a recipe and its tokenizer."""


def contract_of(recipe: Recipe, tokenizer: Tokenizer) -> Contract:
    """Return the contract of a run, which every checkpoint records and the next stage checks."""
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
    """Read the best parameters of a finished stage, and their lineage: path, step and params_sha256.

    Adapters are merged into their base; params_sha256 is then the digest of the adapters.

    Args:
        folder: folder of the stage.
        result: result to use instead of the stage's own, for an unfinished stage or another step.

    Raises:
        ValueError: the stage, or the base of its adapters, is missing, unfinished, damaged or breaks the contract.
    """
    params, meta, lineage = read_trained(folder, program, contract, result)
    if not meta["lora"]:
        return params, lineage
    # `freeze` and the merge are separate programs: in one, the compiler may skip a rounding to bfloat16 and back.
    trainable = trainable_of(meta, program)
    base = freeze(program, read_base(folder, meta, program, contract), trainable)
    merge = jax.jit(trainable.export, out_shardings=shardings_of(program.abstract_params))
    return merge(base, params), lineage


def read_base(stage_dir: Path, meta: dict[str, Any], program: Program, contract: Contract) -> Params:
    """Read the float32 parameters that a stage began from.

    Args:
        stage_dir: folder of the stage.
        meta: metadata of the stage's checkpoint.

    Raises:
        ValueError: they are neither at the recorded path nor beside the stage, or `read_parent` refuses them.
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
    """Return the LoRA config of a checkpoint; its rank is 0 if all parameters were trained."""
    return recipes.lora_from(meta["lora"]) or LoraConfig()


def trainable_of(meta: dict[str, Any], program: Program) -> Trainable:
    """Return the `Trainable` of a checkpoint: all parameters, or adapters."""
    return make_trainable(program.model.axes, lora_of(meta))


def read_trained(
    folder: Path, program: Program, contract: Contract, result: dict[str, Any] | None = None
) -> tuple[Params, dict[str, Any], dict[str, Any]]:
    """Read the trained parameters of a finished stage, or its adapters, at its best step.

    Returns:
        The parameters or adapters, the metadata of the checkpoint, and the lineage.

    Raises:
        ValueError: as for `read_parent`.
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
    """Describe how a stage's parent has changed since the stage began; "" if it has not.

    Args:
        parent: lineage of the stage: path, step and params_sha256 of its parent; None if it began from scratch.
        stage: config of the stage, which tells whether its parent is a stage of the same run.
    """
    if parent is None:
        return ""
    folders = [folder for folder in _parent_folders(stage_dir, parent, stage) if _is_finished(folder)]
    digests = [finished(folder)["params_sha256"] for folder in folders]
    if not digests or parent["params_sha256"] in digests:
        return ""
    return (
        f"{stage_dir} began from {parent['path']} with params_sha256 {parent['params_sha256'][:12]}…, which is now "
        f"{digests[0][:12]}…"
    )


def check_lineage(stage_dir: Path, parent: dict[str, Any] | None, stage: StageConfig | None = None) -> None:
    """Raise ValueError if a stage's parent has been trained again since the stage began."""
    if change := lineage_break(stage_dir, parent, stage):
        raise ValueError(f"{change}; remove {stage_dir} to train it from the new parameters")


def _is_finished(folder: Path) -> bool:
    return result_file(folder).exists()


def _parent_folders(stage_dir: Path, parent: dict[str, Any], stage: StageConfig | None = None) -> tuple[Path, ...]:
    """Return the folders that may contain a stage's parent.

    A run may be moved or copied with all its stages. A parent in the same run is therefore beside the stage, not at the
    recorded path, where the original run may have changed since. For a parent in another run that path comes first.
    """
    recorded = parse_path(parent["path"], "the parent's path")
    beside = stage_dir.parent / recorded.name
    if beside.is_dir() and stage is not None and (stage.init_from == "parent" or stage.init_from.startswith("hf:")):
        return (beside,)
    return recorded, beside


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"attention": {"heads": 4}} becomes {"attention.heads": 4}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def check_contract(
    folder: Path, theirs: dict[str, Any], ours: dict[str, Any], free: tuple[str, ...] = OVERRIDABLE_MODEL_FIELDS
) -> None:
    """Check a checkpoint's metadata against the contract of this recipe.

    Args:
        folder: folder of the stage, for the message.
        theirs: metadata of the checkpoint.
        ours: contract of this recipe.
        free: model fields that may differ.

    Raises:
        ValueError: a field differs; the message has both values.
    """
    # A model field that did not exist yet when the checkpoint was written had the effect of today's default.
    defaults = {} if "part" in theirs["model"] else _flat(recipes.to_dict(recipes.ModelConfig()))
    theirs = theirs | {"model": defaults | _flat(theirs["model"])}
    ours = ours | {"model": _flat(ours["model"])}
    free = (*free, "context") if theirs["stage"] == recipes.IMPORT else free
    theirs["model"] |= {name: ours["model"][name] for name in free if name in ours["model"]}
    for name in CONTRACT:
        old, new = theirs[name], ours[name]
        if old != new:
            difference = f"{name} is {old!r} there, {new!r} here"
            if isinstance(new, dict):
                parts = [
                    f"{key} {old.get(key)!r} there, {new.get(key)!r} here"
                    for key in old | new
                    if old.get(key) != new.get(key)
                ]
                difference = f"{name} differs: {'; '.join(parts)}"
            raise ValueError(
                f"{folder} does not fit this recipe: {difference}; use the recipe that it was trained with, or another "
                "--workdir for a new run"
            )
