"""Where a stage starts, by rules in this order:

1. its own checkpoints: resume everything, parameters, optimizer, step and early stopping;
2. a parent (by default the stage before, at its best step): parameters and metadata only, under the contract of
   `parent.py`;
3. scratch, only where the recipe says so (`init_from="scratch"`; the first stage of a recipe has no parent).

Anything else raises. Of a stage that trains adapters (`lora.rank`), the parent's parameters are the base, which it
reads anew at each start.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxstages import config as recipes
from jaxstages.anchor import Anchor, open_anchor
from jaxstages.checkpoint import Checkpoints
from jaxstages.console import say
from jaxstages.disk import local_path
from jaxstages.early_stopping import EarlyStopping, EarlyStoppingState
from jaxstages.fingerprint import kind_of, named_leaves
from jaxstages.models import lora
from jaxstages.new_tokens import check_new_tokens
from jaxstages.parent import (
    SAME_STEPS,
    check_contract,
    check_lineage,
    contract_of,
    hold_base,
    lora_of,
    read_base,
    read_parent,
)
from jaxstages.record import read_meta, stored_shapes
from jaxstages.sharding import shardings_of
from jaxstages.types import Params, TrainState
from jaxstages.workbench import Workbench, fresh_state
from jaxstages.workdir import check_readable, checkpoint_folder, result_file


class Start(NamedTuple):
    """parent: path, step and params_sha256 as they were read, or None from scratch. carried: totals of a resumed
    loop. base: what the adapters of the state lie beside, as it is held; None where all parameters are trained.
    anchor: what the stage is kept close to."""

    state: TrainState
    stopping: EarlyStoppingState
    parent: dict[str, Any] | None
    carried: dict[str, Any] | None = None
    base: Params | None = None
    anchor: Anchor | None = None


def find_start(bench: Workbench, checkpoints: Checkpoints, stopping: EarlyStopping) -> Start:
    """The starting state of a stage, by the rules above.

    Raises:
        ValueError: no rule applies, or the contract is broken; it says what to do.
    """
    found = checkpoints.restore_newest(bench.shapes, stopping.init())
    if found is not None:
        check_contract(bench.stage_dir, found.meta, contract_of(bench), free=SAME_STEPS)
        _check_data(bench, found.meta)
        check_lineage(bench.stage_dir, found.meta["parent"], bench.stage)
        for line in recipes.differences(lora_of(found.meta), bench.stage.lora, f"config.{bench.name}.lora"):
            raise ValueError(f"{bench.stage_dir} was begun with other adapters: {line}; set it back, or remove it")
        base = anchor = None
        if bench.base is not None or bench.reference is not None:
            begun = read_base(bench.stage_dir, found.meta, bench, contract_of(bench))
            base = hold_base(bench, begun, bench.stage.lora) if bench.base is not None else None
            anchor = _anchor(bench, begun if base is None else base, found.meta["parent"])
        say(f"{bench.name}: resumes at step {found.meta['step']} of {bench.stage.loop.steps}", "cyan")
        carried = found.meta["carried"]
        if found.best_lost:  # this step may be the best that is left: it is evaluated again where it was
            carried = carried | {"best": {}, "handed_on": "params", "evaluated": found.meta["step"] - 1}
        return Start(found.state, found.stopping, found.meta["parent"], carried, base, anchor)
    parent = parent_folder(bench)
    if parent is None:
        assert bench.base is None and bench.reference is None, "validate refuses adapters and anchors without a parent"
        params = _from_scratch(bench)
        say(f"{bench.name}: starts from scratch, {_millions(params)} parameters new", "cyan")
        return Start(_fresh_state(bench, params), stopping.init(), None)
    params, lineage = read_parent(parent, bench, contract_of(bench))
    say(f"{bench.name}: starts from {parent} at step {lineage['step']}, its best", "cyan")
    _report(bench, parent, lineage, params)
    check_new_tokens(bench.name, bench.stage, bench.tokenizer, params)
    if bench.base is None:
        # A copy, for the state takes the memory of the parameters that it starts from.
        anchor = _anchor(bench, jax.tree.map(jnp.copy, params) if bench.reference is not None else params, lineage)
        return Start(_fresh_state(bench, params), stopping.init(), lineage, anchor=anchor)
    base = hold_base(bench, params, bench.stage.lora)
    anchor = _anchor(bench, base, lineage)
    return Start(_fresh_state(bench, _adapters(bench, base)), stopping.init(), lineage, base=base, anchor=anchor)


def _anchor(bench: Workbench, reference: Params, lineage: dict[str, Any]) -> Anchor | None:
    if bench.reference is None:
        return None
    return Anchor(open_anchor(bench, reference, lineage["params_sha256"]), reference)


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
            folder = local_path(path, f"config.{bench.name}.init_from")
            check_readable(folder)
            later = recipes.STAGES[recipes.STAGES.index(bench.name) :]
            if folder.resolve() in [(bench.workdir / name).resolve() for name in later]:
                raise ValueError(
                    f"config.{bench.name}.init_from={path!r} is {bench.name} itself, or a stage after it; name a stage "
                    "before it, or WORKDIR/STAGE of another run"
                )
            return folder


def data_of(bench: Workbench) -> dict[str, list[str]]:
    """Fingerprints of the prepared rows that a checkpoint was trained on, and judged by."""
    return {
        "train": [source.folder.name for dataset in bench.datasets for source in dataset.train],
        # What is only watched judges no step, and may be there or not.
        "held_out": [
            source.folder.name
            for each in bench.sets
            if not each.prefix.startswith("watch/")
            for source in each.held_out
        ],
    }


def _check_data(bench: Workbench, meta: dict[str, Any]) -> None:
    if meta["data"] != data_of(bench):
        raise ValueError(
            f"{bench.stage_dir} was begun with other data: {meta['data']} there, {data_of(bench)} here (fingerprints "
            "of prepared rows); put the files, and the version of jaxstages, back, or take another --workdir"
        )


def _from_scratch(bench: Workbench) -> Params:
    # Each device makes its own part: no host ever holds the whole.
    return jax.jit(bench.model.init, out_shardings=shardings_of(bench.shapes.params))(jax.random.key(bench.recipe.seed))


def _fresh_state(bench: Workbench, params: Params) -> TrainState:
    shardings = shardings_of(bench.shapes)
    make = jax.jit(lambda p: fresh_state(p, bench.tx, bench.stage.optim), out_shardings=shardings, donate_argnums=0)
    return make(params)


def _adapters(bench: Workbench, base: Params) -> Params:
    """Fresh ones, as the recipe says."""
    key = jax.random.fold_in(jax.random.key(bench.recipe.seed), recipes.STAGES.index(bench.name))
    shardings = shardings_of(bench.shapes.params)
    return jax.jit(lambda k, b: lora.init(k, b, bench.model.axes, bench.stage.lora), out_shardings=shardings)(key, base)


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
