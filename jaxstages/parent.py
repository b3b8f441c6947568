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
from jaxstages.checkpoint import read_meta, read_params, stored_params
from jaxstages.config import LoraConfig
from jaxstages.data.chat import chat_name
from jaxstages.disk import Form, read_json
from jaxstages.fingerprint import params_sha256
from jaxstages.manifest import Damaged
from jaxstages.models import lora
from jaxstages.sharding import shardings_of
from jaxstages.types import Params
from jaxstages.workbench import Workbench, base_shapes
from jaxstages.workdir import checkpoint_folder, checkpoints_folder, quarantine_folder, result_file

CONTRACT = ("tokenizer_sha256", "vocab_size", "special_ids", "model", "chat_template")
"""What a stage's metadata must have in common with its parent's."""

CHOSEN = ("context", "dtype", "dropout", "unroll")
"""Fields of the model in which a stage may differ from the import that it starts from."""

RESULT: Form = {
    "status": (str,),
    "steps": (int,),
    "best_step": (int,),
    "params_sha256": (str,),
    "parent": (dict, type(None)),
}
"""What is read later of a stage's `result.json`."""


def contract_of(bench: Workbench) -> dict[str, Any]:
    """What every checkpoint of this stage says of itself, and the next stage checks."""
    return {
        "tokenizer_sha256": bench.tokenizer.sha256,
        "vocab_size": bench.tokenizer.vocab_size,
        "special_ids": list(bench.tokenizer.specials),
        "model": recipes.to_dict(bench.recipe.model),
        "chat_template": chat_name(bench.tokenizer),
    }


def read_parent(folder: Path, bench: Workbench, contract: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
    """The best parameters of a finished stage, and its lineage: path, step, params_sha256. Of a stage that trained
    adapters these are merged into its base, and the digest is that of the adapters.

    Raises:
        ValueError: the stage, or the base of its adapters, is missing, unfinished, damaged or made for something else.
    """
    params, meta, lineage = read_trained(folder, bench, contract)
    config = lora_of(meta)
    if not config.rank:
        return params, lineage
    # A program of its own: in one with the merge, the compiler may leave out a rounding to bfloat16 and back.
    base = hold_base(bench, read_base(folder, meta, bench, contract), config)
    merge = jax.jit(lambda b, a: lora.merge(b, a, config), out_shardings=shardings_of(bench.params))
    return merge(base, params), lineage


def read_base(stage_dir: Path, meta: dict[str, Any], bench: Workbench, contract: dict[str, Any]) -> Params:
    """The float32 parameters that `stage_dir`, whose checkpoint says `meta`, began from.

    Raises:
        ValueError: they are not where they were, nor beside the stage; or as of `read_parent`.
    """
    parent = meta["parent"]
    for place in _places(stage_dir, parent):
        if result_file(place).exists() and finished(place)["params_sha256"] == parent["params_sha256"]:
            return read_parent(place, bench, contract)[0]
    needs = "has adapters only; their base" if meta["lora"] else "keeps close to its parent by an anchor; that parent"
    raise ValueError(
        f"{stage_dir} {needs}, {parent['path']} with params_sha256 {parent['params_sha256'][:12]}…, is neither there "
        "nor beside it; put it back"
    )


def lora_of(meta: dict[str, Any]) -> LoraConfig:
    """How a checkpoint's adapters were made; rank 0 where it has none."""
    return recipes.lora_from(meta["lora"]) or LoraConfig()


def read_trained(
    folder: Path, bench: Workbench, contract: dict[str, Any]
) -> tuple[Params, dict[str, Any], dict[str, Any]]:
    """What a finished stage trained, all parameters or adapters, as its best checkpoint has it; that checkpoint's
    metadata; and the lineage. Raises as `read_parent`."""
    result = finished(folder)
    step = result["best_step"]
    try:
        meta = read_meta(checkpoint_folder(folder, step))
        check_contract(folder, meta, contract)
        whole = NamedSharding(bench.mesh, PartitionSpec())
        target = stored_params(meta, whole) if meta["lora"] else bench.params
        params = read_params(folder, step, target, result.get("handed_on", "params"))
        digest = params_sha256(params)
        if digest != result["params_sha256"]:
            raise Damaged(
                f"{folder} at step {step} is damaged: params_sha256 is {digest[:12]}…, its result.json says "
                f"{result['params_sha256'][:12]}…"
            )
    except Damaged as error:
        moved = [path for path in sorted(quarantine_folder(folder).glob(f"{step}.*")) if path.is_dir()]
        where = f" (it was moved to {moved[-1]})" if moved else ""
        raise Damaged(f"{error}{where}; put a good copy there, or remove {folder} to train that stage anew") from error
    return params, meta, {"path": str(folder), "step": step, "params_sha256": digest}


def finished(folder: Path) -> dict[str, Any]:
    """The result of a finished stage. Raises ValueError, which says what to run, if there is none."""
    file = result_file(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the parent {folder} is no folder; name WORKDIR/STAGE of a run")
    if not file.exists():
        if folder.name not in recipes.HELD:
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


def last_finished(recipe: recipes.Recipe, workdir: Path) -> str:
    """The latest stage of the recipe that is finished, or else the import. Raises ValueError if there is none."""
    done = [name for name in (recipes.IMPORT, *recipes.stages(recipe)) if result_file(workdir / name).exists()]
    if not done:
        raise ValueError(f"{workdir} has no finished stage; train one with `jaxstages run --workdir={workdir}`")
    return done[-1]


def check_lineage(stage_dir: Path, parent: dict[str, Any] | None) -> None:
    """Raises ValueError if the parent that a stage began from has been trained anew since."""
    if parent is None:
        return
    now = [finished(place)["params_sha256"] for place in _places(stage_dir, parent) if result_file(place).exists()]
    if now and parent["params_sha256"] not in now:
        raise ValueError(
            f"{stage_dir} began from {parent['path']} with params_sha256 {parent['params_sha256'][:12]}…, which is now "
            f"{now[0][:12]}…; remove {stage_dir} to train it on from there"
        )


def _places(stage_dir: Path, parent: dict[str, Any]) -> tuple[Path, Path]:
    """The run may have been moved, or is called from another folder: its parent then lies beside it."""
    return Path(parent["path"]), stage_dir.parent / Path(parent["path"]).name


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"attention": {"heads": 4}} -> {"attention.heads": 4}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def check_contract(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    # A field of the model that the checkpoint's version did not have yet: it did what is the default now.
    theirs = theirs | {"model": _flat(recipes.to_dict(recipes.ModelConfig())) | _flat(theirs["model"])}
    ours = ours | {"model": _flat(ours["model"])}
    if theirs["stage"] == recipes.IMPORT:  # what makes no other parameters is the stage's own choice
        theirs["model"] |= {name: ours["model"][name] for name in CHOSEN}
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


def hold_base(bench: Workbench, params: Params, config: LoraConfig) -> Params:
    """Parameters that adapters lie beside, as these were trained beside them."""
    if config.base == "float32":
        return params
    held = base_shapes(bench.model, bench.params, config, bench.mesh, bench.recipe.mesh.rules)
    return jax.jit(lambda p: lora.hold(p, bench.model.axes, config.base), out_shardings=shardings_of(held))(params)
