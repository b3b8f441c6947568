"""Where a stage starts, by rules in this order:

1. its own checkpoints: resume everything, parameters, optimizer, step and early stopping;
2. a parent (by default the stage before, at its best step): parameters and metadata only, under the contract below;
3. scratch, only where the recipe says so (`init_from="scratch"`; the first stage of a recipe has no parent).

Of a stage that trains adapters (`lora.rank`), the parent's parameters are the base, which it reads anew at each start.
As a parent, such a stage gives its base with the adapters merged into it.

Anything else raises. The contract: tokenizer, control tokens, architecture and chat template are the parent's, its
result is complete, and its parameters are those that its result names.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxstages import config as recipes
from jaxstages.checkpoint import Checkpoints, read_meta, read_params, stored_params, stored_shapes
from jaxstages.config import LoraConfig
from jaxstages.console import say
from jaxstages.data.chat import chat_name
from jaxstages.disk import Form, read_json
from jaxstages.early_stopping import EarlyStopping, EarlyStoppingState
from jaxstages.fingerprint import kind_of, named_leaves, params_sha256
from jaxstages.manifest import Damaged
from jaxstages.models import lora
from jaxstages.step import init_state
from jaxstages.types import Params, TrainState
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


class Start(NamedTuple):
    """parent: path, step and params_sha256 as they were read, or None from scratch. carried: totals of a resumed
    loop. base: what the adapters of the state lie beside, as it is held; None where all parameters are trained."""

    state: TrainState
    stopping: EarlyStoppingState
    parent: dict[str, Any] | None
    carried: dict[str, Any] | None = None
    base: Params | None = None


def contract_of(bench: Workbench) -> dict[str, Any]:
    """What every checkpoint of this stage says of itself, and the next stage checks."""
    return {
        "tokenizer_sha256": bench.tokenizer.sha256,
        "vocab_size": bench.tokenizer.vocab_size,
        "special_ids": list(bench.tokenizer.specials),
        "model": recipes.to_dict(bench.recipe.model),
        "chat_template": chat_name(bench.tokenizer),
    }


def find_start(bench: Workbench, checkpoints: Checkpoints, stopping: EarlyStopping) -> Start:
    """The starting state of a stage, by the rules above.

    Raises:
        ValueError: no rule applies, or the contract is broken; it says what to do.
    """
    found = checkpoints.restore_newest(bench.shapes, stopping.init())
    if found is not None:
        _check_contract(bench.stage_dir, found.meta, contract_of(bench))
        _check_data(bench, found.meta)
        check_lineage(bench.stage_dir, found.meta["parent"])
        for line in recipes.differences(lora_of(found.meta), bench.stage.lora, f"config.{bench.name}.lora"):
            raise ValueError(f"{bench.stage_dir} was begun with other adapters: {line}; set it back, or remove it")
        base = None
        if bench.base is not None:
            base = _held(bench, read_base(bench.stage_dir, found.meta, bench, contract_of(bench)), bench.stage.lora)
        say(f"{bench.name}: resumes at step {found.meta['step']} of {bench.stage.loop.steps}", "cyan")
        return Start(found.state, found.stopping, found.meta["parent"], found.meta["carried"], base)
    parent = parent_folder(bench)
    if parent is None:
        assert bench.base is None, "validate refuses adapters without a base"
        params = _from_scratch(bench)
        say(f"{bench.name}: starts from scratch, {_millions(params)} parameters new", "cyan")
        return Start(_fresh_state(bench, params), stopping.init(), None)
    params, lineage = read_parent(parent, bench, contract_of(bench))
    say(f"{bench.name}: starts from {parent} at step {lineage['step']}, its best", "cyan")
    _report(bench, parent, lineage, params)
    if bench.base is None:
        return Start(_fresh_state(bench, params), stopping.init(), lineage)
    base = _held(bench, params, bench.stage.lora)
    return Start(_fresh_state(bench, _adapters(bench, base)), stopping.init(), lineage, base=base)


def parent_folder(bench: Workbench) -> Path | None:
    """The folder of the stage that this one starts from; None means scratch.

    Raises:
        ValueError: the first stage of a recipe has none, or it is to start from itself, or from a later one.
    """
    match bench.stage.init_from:
        case "scratch":
            return None
        case "parent":
            names = list(recipes.stages(bench.recipe))
            place = names.index(bench.name)
            if not place and result_file(bench.workdir / recipes.IMPORT).exists():
                return bench.workdir / recipes.IMPORT
            if not place and bench.name == "pretrain":
                return None
            if not place:
                raise ValueError(
                    f"{bench.name} is the recipe's first stage and has no parent; set config.{bench.name}.init_from to "
                    'WORKDIR/STAGE of another run, or to "scratch"'
                )
            return bench.workdir / names[place - 1]
        case path if path.startswith("hf:"):
            return bench.workdir / recipes.IMPORT
        case path:
            later = recipes.STAGES[recipes.STAGES.index(bench.name) :]
            if Path(path).resolve() in [(bench.workdir / name).resolve() for name in later]:
                raise ValueError(
                    f"config.{bench.name}.init_from={path!r} is {bench.name} itself, or a stage after it; name a stage "
                    "before it, or WORKDIR/STAGE of another run"
                )
            return Path(path)


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
    base = _held(bench, read_base(folder, meta, bench, contract), config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, bench.params)
    return jax.jit(lambda b, a: lora.merge(b, a, config), out_shardings=shardings)(base, params), lineage


def read_base(stage_dir: Path, meta: dict[str, Any], bench: Workbench, contract: dict[str, Any]) -> Params:
    """The float32 parameters that the adapters of `stage_dir`, whose checkpoint says `meta`, began from.

    Raises:
        ValueError: they are not where they were, nor beside the stage; or as of `read_parent`.
    """
    parent = meta["parent"]
    for place in _places(stage_dir, parent):
        if result_file(place).exists() and finished(place)["params_sha256"] == parent["params_sha256"]:
            return read_parent(place, bench, contract)[0]
    raise ValueError(
        f"{stage_dir} has adapters only; their base, {parent['path']} with params_sha256 "
        f"{parent['params_sha256'][:12]}…, is neither there nor beside it; put it back"
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
        _check_contract(folder, meta, contract)
        whole = NamedSharding(bench.mesh, PartitionSpec())
        params = read_params(folder, step, stored_params(meta, whole) if meta["lora"] else bench.params)
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


def data_of(bench: Workbench) -> dict[str, list[str]]:
    """Fingerprints of the prepared rows that a checkpoint was trained on, and judged by."""
    return {
        "train": [source.folder.name for source in bench.train],
        "held_out": [source.folder.name for source in bench.held_out],
    }


def _check_data(bench: Workbench, meta: dict[str, Any]) -> None:
    if meta["data"] != data_of(bench):
        raise ValueError(
            f"{bench.stage_dir} was begun with other data: {meta['data']} there, {data_of(bench)} here (fingerprints "
            "of prepared rows); put the files, and the version of jaxstages, back, or take another --workdir"
        )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"attention": {"heads": 4}} -> {"attention.heads": 4}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def _check_contract(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
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


def _from_scratch(bench: Workbench) -> Params:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, bench.shapes.params)
    # Each device makes its own part: no host ever holds the whole.
    return jax.jit(bench.model.init, out_shardings=shardings)(jax.random.key(bench.recipe.seed))


def _fresh_state(bench: Workbench, params: Params) -> TrainState:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, bench.shapes)
    return jax.jit(
        lambda p: init_state(p, bench.tx, bench.stage.optim.spike_window), out_shardings=shardings, donate_argnums=0
    )(params)


def _held(bench: Workbench, params: Params, config: LoraConfig) -> Params:
    """Parameters that adapters lie beside, as these were trained beside them."""
    if config.base == "float32":
        return params
    shardings = jax.tree.map(lambda leaf: leaf.sharding, base_shapes(bench.model, bench.params, config, bench.mesh))
    return jax.jit(lambda p: lora.hold(p, bench.model.axes, config.base), out_shardings=shardings)(params)


def _adapters(bench: Workbench, base: Params) -> Params:
    """Fresh ones, as the recipe says."""
    key = jax.random.fold_in(jax.random.key(bench.recipe.seed), recipes.STAGES.index(bench.name))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, bench.shapes.params)
    make = jax.jit(lambda k, b: lora.init(k, b, bench.model.axes, bench.stage.lora), out_shardings=shardings)
    return make(key, base)


def _millions(params: Params) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f}M"


def _report(bench: Workbench, parent: Path, lineage: dict[str, Any], params: Params) -> None:
    """Say what is inherited, and for each parameter that it was restored, or is new, or dropped."""
    meta, ours = read_meta(checkpoint_folder(parent, lineage["step"])), named_leaves(params)
    stored = {path: kind_of(leaf) for path, leaf in ours.items()} if meta["lora"] else stored_shapes(meta)
    say(
        f"  inherited: tokenizer {bench.tokenizer.sha256[:12]}…, {bench.tokenizer.vocab_size} tokens, chat template, "
        f"model {bench.recipe.model.layers} layers x {bench.recipe.model.width}, "
        f"params {lineage['params_sha256'][:12]}…{', adapters merged into their base' if meta['lora'] else ''}"
    )
    for path in sorted(stored.keys() | ours):
        fate = "restored" if path in stored and path in ours else "new" if path in ours else "dropped"
        say(f"  {fate:8} {path}  {stored[path] if path in stored else kind_of(ours[path])}")
    if bench.base is not None:
        adapters, base = bench.shapes.params, bench.stage.lora.base
        for path, leaf in named_leaves(adapters).items():
            say(f"  new      {path}  {kind_of(leaf)}")
        trained, whole = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (adapters, (params, adapters)))
        say(f"  trains {trained:,} of {whole:,} parameters ({trained / whole:.2%}); the base is held in {base}")
    say(f"  new: the optimizer's state, step 0; {_millions(params)} parameters restored")
