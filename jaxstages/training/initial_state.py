"""The initial state of a stage, by the first rule that applies:

1. The stage has checkpoints: resume everything, that is parameters, optimizer, step and early stopping.
2. It has a parent (by default the best step of the previous stage): take parameters and metadata only, under the
   contract of `handoff.py`.
3. It starts from scratch, only if the recipe says so (`init_from="scratch"`) or for the first stage, "pretrain".

Otherwise it raises. A stage that trains adapters (`lora.rank`) reads its parent's parameters, the base, at every start.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxstages import config as recipes
from jaxstages.checkpoint.fingerprint import kind_of, named_leaves
from jaxstages.checkpoint.manager import Checkpoints, Restored
from jaxstages.checkpoint.metadata import read_meta, stored_shapes
from jaxstages.models.sharding import shardings_of
from jaxstages.runtime.console import say
from jaxstages.runtime.files import parse_path
from jaxstages.runtime.workdir import check_readable, checkpoint_folder, result_file
from jaxstages.training.anchor import Anchor, open_anchor
from jaxstages.training.early_stopping import EarlyStopping, EarlyStoppingState
from jaxstages.training.handoff import (
    SAME_STEPS,
    check_contract,
    check_lineage,
    lora_of,
    read_base,
    read_parent,
)
from jaxstages.training.loop import LoopProgress
from jaxstages.training.new_tokens import check_new_tokens
from jaxstages.training.program import freeze, fresh_state
from jaxstages.training.saved_items import from_items, to_items
from jaxstages.training.setup import StageSetup
from jaxstages.types import Params, TrainState


class InitialState(NamedTuple):
    """State in which a stage starts or resumes.

    state: train state.
    stopping: state of early stopping.
    parent: lineage of the stage: path, step and params_sha256 of its parent; None from scratch.
    progress: counters of a resumed loop; None at step 0.
    base: frozen parameters beside the adapters; () in full training.
    anchor: rows and parameters of the anchor; None without one.
    """

    state: TrainState
    stopping: EarlyStoppingState
    parent: dict[str, Any] | None
    progress: LoopProgress | None = None
    base: Any = ()
    anchor: Anchor | None = None


def restore_or_init(setup: StageSetup, checkpoints: Checkpoints, stopping: EarlyStopping) -> InitialState:
    """Return the initial state of a stage, by the rules at the top of this file.

    Raises:
        ValueError: no rule applies, or the contract is broken; the message names the remedy.
    """
    restored = checkpoints.restore_newest(to_items(setup.program.abstract_state, stopping.init()))
    if restored is not None:
        return _resume(setup, restored, stopping)
    parent = parent_folder(setup)
    if parent is not None:
        return _from_parent(setup, parent, stopping)
    assert not setup.config.lora.rank and not setup.config.anchor.weight, "`validate` refuses both without a parent"
    params = _init_params(setup)
    say(f"{setup.name}: starts from scratch with {_millions(params)} parameters", "cyan")
    return InitialState(_fresh_state(setup, params), stopping.init(), None)


def _resume(setup: StageSetup, restored: Restored, stopping: EarlyStopping) -> InitialState:
    meta, program = restored.meta, setup.program
    check_contract(setup.folder, meta, setup.contract, free=SAME_STEPS)
    _check_data(setup, meta)
    check_lineage(setup.folder, meta["parent"], setup.config)
    for line in recipes.differences(lora_of(meta), setup.config.lora, f"config.{setup.name}.lora"):
        raise ValueError(f"{setup.folder} was begun with other adapters: {line}; set it back, or remove it")
    base, anchor = (), None
    if setup.config.lora.rank or setup.config.anchor.weight:
        params = read_base(setup.folder, meta, program, setup.contract)
        base = freeze(program, params)
        anchor = _anchor(setup, base or params, meta["parent"])
    say(f"{setup.name}: resumes at step {meta['step']} of {setup.config.loop.steps}", "cyan")
    state, stopping_state = from_items(restored.items)
    progress = LoopProgress(**meta["carried"])
    if restored.best_lost:  # the newest step may be the best one left, so evaluate it again
        stopping_state = stopping.init()
        progress.best, progress.handed_on, progress.evaluated = {}, "params", meta["step"] - 1
    return InitialState(state, stopping_state, meta["parent"], progress, base, anchor)


def _from_parent(setup: StageSetup, parent: Path, stopping: EarlyStopping) -> InitialState:
    params, lineage = read_parent(parent, setup.program, setup.contract)
    say(f"{setup.name}: starts from {parent} at step {lineage['step']}, its best", "cyan")
    _report(setup, parent, lineage, params)
    check_new_tokens(setup.name, setup.config, setup.data.tokenizer, params)
    base = freeze(setup.program, params)
    reference = base
    if setup.config.anchor.weight and not base:
        reference = jax.tree.map(jnp.copy, params)  # `_fresh_state` donates `params`
    anchor = _anchor(setup, reference, lineage)
    state = _fresh_state(setup, _trained(setup, params, base))
    return InitialState(state, stopping.init(), lineage, base=base, anchor=anchor)


def _anchor(setup: StageSetup, reference: Params, lineage: dict[str, Any]) -> Anchor | None:
    if not setup.config.anchor.weight:
        return None
    return Anchor(open_anchor(setup, reference, lineage["params_sha256"]), reference)


def parent_folder(setup: StageSetup) -> Path | None:
    """Return the folder of the stage that this one starts from; None means scratch.

    Raises:
        ValueError: the recipe's first stage has no parent, or `init_from` is the stage itself or a later stage.
    """
    where, init_from = f"config.{setup.name}.init_from", setup.config.init_from
    names = list(recipes.stages(setup.recipe))
    if init_from == "scratch":
        return None
    if init_from == "parent":
        return _previous_stage(setup, names)
    if init_from.startswith("hf:"):
        return setup.workdir / recipes.IMPORT

    if init_from in names[: names.index(setup.name)]:
        return setup.workdir / init_from
    folder = parse_path(init_from, where)
    check_readable(folder)
    order = [*recipes.STAGES, *setup.recipe.extra_stages]
    later = [(setup.workdir / name).resolve() for name in order[order.index(setup.name) :]]
    if folder.resolve() in later or init_from in names:
        raise ValueError(
            f"{where}={init_from!r} is {setup.name} itself or a later stage; name an earlier stage, or "
            "WORKDIR/STAGE of another run"
        )
    return folder


def _previous_stage(setup: StageSetup, names: list[str]) -> Path | None:
    position = names.index(setup.name)
    if position:
        return setup.workdir / names[position - 1]
    if result_file(setup.workdir / recipes.IMPORT).exists():
        return setup.workdir / recipes.IMPORT
    if setup.name == "pretrain":
        return None
    raise ValueError(
        f"{setup.name} is the recipe's first stage and has no parent; set config.{setup.name}.init_from to "
        'WORKDIR/STAGE of another run, or to "scratch"'
    )


def _check_data(setup: StageSetup, meta: dict[str, Any]) -> None:
    fingerprints = setup.data.fingerprints
    if meta["data"] != fingerprints:
        raise ValueError(
            f"{setup.folder} was begun with other data: {meta['data']} there, {fingerprints} here (fingerprints of "
            "prepared rows); restore the files and the version of jaxstages, or use another --workdir"
        )


def _init_params(setup: StageSetup) -> Params:
    # Each device initializes its own shards, so no host ever holds all parameters.
    shardings = shardings_of(setup.program.abstract_params)
    return jax.jit(setup.program.model.init, out_shardings=shardings)(jax.random.key(setup.recipe.seed))


def _fresh_state(setup: StageSetup, params: Params) -> TrainState:
    program = setup.program
    make = jax.jit(
        lambda p: fresh_state(p, program.tx, program.config.optim),
        out_shardings=shardings_of(program.abstract_state),
        donate_argnums=0,
    )
    return make(params)


def _trained(setup: StageSetup, params: Params, base: Any) -> Params:
    """Return the initial trained parameters: those of the parent, or fresh adapters."""
    if not base:
        return params
    key = jax.random.fold_in(jax.random.key(setup.recipe.seed), recipes.stage_number(setup.recipe, setup.name))
    shardings = shardings_of(setup.program.abstract_state.params)
    return jax.jit(lambda k, b: setup.program.trainable.init(k, params, b), out_shardings=shardings)(key, base)


def _millions(params: Params) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f}M"


def _report(setup: StageSetup, parent: Path, lineage: dict[str, Any], params: Params) -> None:
    """Print what the stage inherits, and whether each parameter is restored, new or dropped."""
    meta, leaves = read_meta(checkpoint_folder(parent, lineage["step"])), named_leaves(params)
    stored = {path: kind_of(leaf) for path, leaf in leaves.items()} if meta["lora"] else stored_shapes(meta)
    tokenizer, model = setup.data.tokenizer, setup.recipe.model
    builtin = isinstance(model, recipes.ModelConfig)
    say(
        f"  inherited: tokenizer {tokenizer.sha256[:12]}…, {tokenizer.vocab_size} tokens, chat template, "
        f"model {f'{model.layers} layers x {model.width}' if builtin else type(model).__name__}, "
        f"params {lineage['params_sha256'][:12]}…{', adapters merged into their base' if meta['lora'] else ''}"
    )
    for path in sorted(stored.keys() | leaves):
        fate = "restored" if path in stored and path in leaves else "new" if path in leaves else "dropped"
        say(f"  {fate:8} {path}  {stored[path] if path in stored else kind_of(leaves[path])}")
    if setup.config.lora.rank:
        adapters, base = setup.program.abstract_state.params, setup.config.lora.base
        for path, leaf in named_leaves(adapters).items():
            say(f"  new      {path}  {kind_of(leaf)}")
        trained, total = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (adapters, (params, adapters)))
        say(f"  trains {trained:,} of {total:,} parameters ({trained / total:.2%}); the base is stored in {base}")
    say(f"  new: the optimizer state, step 0; {_millions(params)} parameters restored")
