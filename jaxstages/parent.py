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
from jaxstages.checkpoint import read_params, stored_params
from jaxstages.config import LoraConfig, StageConfig
from jaxstages.data.chat import chat_name
from jaxstages.fingerprint import params_sha256
from jaxstages.manifest import Damaged
from jaxstages.models import lora
from jaxstages.record import finished, read_meta
from jaxstages.sharding import shardings_of
from jaxstages.types import Params
from jaxstages.workbench import Workbench, base_shapes
from jaxstages.workdir import checkpoint_folder, quarantine_folder, result_file

CONTRACT = ("tokenizer_sha256", "vocab_size", "special_ids", "model", "chat_template")
"""What a stage's metadata must have in common with its parent's."""

CHOSEN = ("dtype", "dropout", "unroll")
"""Fields of the model in which a stage may differ from its parent: they make no other parameters. From an import it may
also differ in its context."""

SAME_STEPS = ("unroll",)
"""Fields of the model in which a stage may differ from its own checkpoints: they change no number of its steps."""


def contract_of(bench: Workbench) -> dict[str, Any]:
    """What every checkpoint of this stage says of itself, and the next stage checks."""
    return {
        "tokenizer_sha256": bench.tokenizer.sha256,
        "vocab_size": bench.tokenizer.vocab_size,
        "special_ids": list(bench.tokenizer.specials),
        "model": recipes.to_dict(bench.recipe.model),
        "chat_template": chat_name(bench.tokenizer),
    }


def read_parent(
    folder: Path, bench: Workbench, contract: dict[str, Any], chosen: dict[str, Any] | None = None
) -> tuple[Params, dict[str, Any]]:
    """The best parameters of a finished stage, and its lineage: path, step, params_sha256. Of a stage that trained
    adapters these are merged into its base, and the digest is that of the adapters.

    Args:
        chosen: in the form of a result, of a stage that need not be finished, or of another step.

    Raises:
        ValueError: the stage, or the base of its adapters, is missing, unfinished, damaged or made for something else.
    """
    params, meta, lineage = read_trained(folder, bench, contract, chosen)
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
        if _is_finished(place) and finished(place)["params_sha256"] == parent["params_sha256"]:
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
    folder: Path, bench: Workbench, contract: dict[str, Any], chosen: dict[str, Any] | None = None
) -> tuple[Params, dict[str, Any], dict[str, Any]]:
    """What a finished stage trained, all parameters or adapters, as its best checkpoint has it; that checkpoint's
    metadata; and the lineage. Raises as `read_parent`."""
    result = chosen or finished(folder)
    step = result["best_step"]
    try:
        meta = read_meta(checkpoint_folder(folder, step))
        check_contract(folder, meta, contract)
        whole = NamedSharding(bench.mesh, PartitionSpec())
        target = stored_params(meta, whole) if meta["lora"] else bench.params
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
    now = [finished(place)["params_sha256"] for place in _places(stage_dir, parent, stage) if _is_finished(place)]
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


def _is_finished(place: Path) -> bool:
    return result_file(place).exists()


def _places(stage_dir: Path, parent: dict[str, Any], stage: StageConfig | None = None) -> tuple[Path, ...]:
    """Where a stage's parent may lie. A run may be moved or copied, and its own stages go with it: they are its
    lineage, and not what the original has at the recorded path. A parent in another run stays where it is."""
    recorded = Path(parent["path"])
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


def check_contract(folder: Path, theirs: dict[str, Any], ours: dict[str, Any], free: tuple[str, ...] = CHOSEN) -> None:
    """Raises ValueError, with both values, where a checkpoint was made for something else than this recipe.

    Args:
        theirs: the metadata of a checkpoint in `folder`.
        free: fields of the model that may differ.
    """
    # A field of the model that the checkpoint's version did not have yet: it did what is the default now.
    theirs = theirs | {"model": _flat(recipes.to_dict(recipes.ModelConfig())) | _flat(theirs["model"])}
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


def hold_base(bench: Workbench, params: Params, config: LoraConfig) -> Params:
    """Parameters that adapters lie beside, as these were trained beside them."""
    if config.base == "float32":
        return params
    held = base_shapes(bench.model, bench.params, config, bench.mesh, bench.recipe.mesh.rules)
    return jax.jit(lambda p: lora.hold(p, bench.model.axes, config.base), out_shardings=shardings_of(held))(params)
