"""What a stage works with, made from its part of the recipe: mesh, tokenizer, model, optimizer and prepared data."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from jaxstages import config as recipes
from jaxstages import hosts
from jaxstages.config import DataConfig, EvaluationConfig, LoopConfig, LoraConfig, ModelConfig, Recipe, StageConfig
from jaxstages.console import say
from jaxstages.data.prepare import Prepared, items_of, prepare
from jaxstages.data.sources import open_source
from jaxstages.data.tasks import texts
from jaxstages.data.tokenizer import SEPARATOR, Tokenizer, load_tokenizer, make_tokenizer
from jaxstages.fingerprint import named_leaves
from jaxstages.models import lora
from jaxstages.models.attention import Attend
from jaxstages.models.kernels import Shape, choose_attend, machine_of
from jaxstages.models.transformer import make_model, reaches_of
from jaxstages.optim import check_patterns, make_optimizer
from jaxstages.sharding import check_batch_size, like_params, make_mesh, param_shardings
from jaxstages.step import init_state
from jaxstages.types import Model, Params, TrainState
from jaxstages.workdir import tokenizer_file


class Workbench(NamedTuple):
    """attend: what the model attends with. params, shapes: the model's parameters, and the train state, as shapes with
    shardings; nothing is computed for them. base: of a stage that trains adapters, which are the state's parameters,
    the parameters as they are held; else None."""

    name: str
    recipe: Recipe
    stage: StageConfig
    workdir: Path
    mesh: Mesh
    tokenizer: Tokenizer
    attend: Attend | None
    model: Model
    tx: optax.GradientTransformationExtraArgs
    params: Params
    base: Params | None
    shapes: TrainState
    train: list[Prepared]
    held_out: list[Prepared]

    @property
    def stage_dir(self) -> Path:
        return self.workdir / self.name


def cache_folder(recipe: Recipe, workdir: Path) -> Path:
    return Path(recipe.cache) if recipe.cache else workdir / "cache"


def open_tokenizer(recipe: Recipe, workdir: Path) -> Tokenizer:
    """The run's tokenizer: trained, or taken over, on first use; afterwards the one in the workdir."""
    path = tokenizer_file(workdir)
    if path.exists():
        return load_tokenizer(path)
    pairs = any(stage.data.task in ("seq2seq", "classify") for stage in recipes.stages(recipe).values())
    tokenizer = make_tokenizer(recipe.tokenizer, _tokenizer_texts(recipe, workdir), path, separator=pairs)
    how = "its own chat template" + f", {SEPARATOR} for pairs" * pairs if tokenizer.template else "our chat template"
    say(f"tokenizer: {recipe.tokenizer.kind}, {tokenizer.vocab_size} tokens, {how}, {path}")
    return tokenizer


def _tokenizer_texts(recipe: Recipe, workdir: Path) -> Iterator[str]:
    """An equal share of `max_bytes` from each source. Held-out records are left out by the same rule as in training."""
    chosen = {source: stage for stage in recipes.stages(recipe).values() for source in stage.data.train}
    if recipe.tokenizer.sources:
        unknown = [name for name in recipe.tokenizer.sources if name not in chosen]
        if unknown:
            raise ValueError(
                f"config.tokenizer.sources: {unknown[0]!r} is no stage's training source; known: {[*chosen]}"
            )
        chosen = {name: chosen[name] for name in recipe.tokenizer.sources}
    for name, stage in chosen.items():
        left = recipe.tokenizer.max_bytes // len(chosen)
        source = open_source(name, cache_folder(recipe, workdir))
        for item in items_of(source, "train", stage.data):
            if item.record is None:
                continue
            try:
                found = texts(item.record, stage.data)
            except ValueError:
                continue  # counted and named when the source is prepared
            yield from found
            left -= sum(len(text.encode()) for text in found)
            if left <= 0:
                break


def prepare_stage(
    stage: StageConfig, tokenizer: Tokenizer, context: int, cache: Path
) -> tuple[list[Prepared], list[Prepared]]:
    """The stage's training and held-out rows, from the cache where they are there."""
    data = stage.data

    def rows(names: tuple[str, ...], part: str) -> list[Prepared]:
        return [prepare(open_source(name, cache), part, data, tokenizer, context, cache) for name in names]

    return rows(data.train, "train"), rows(data.validation or data.train, "validation")


def prepare_stages(recipe: Recipe, workdir: Path, names: Iterable[str]) -> dict[str, list[Prepared]]:
    """The tokenizer, and all rows of each stage, made where they are not there yet."""
    tokenizer, cache = open_tokenizer(recipe, workdir), cache_folder(recipe, workdir)
    stages, context = recipes.stages(recipe), recipe.model.context
    return {name: [*itertools.chain(*prepare_stage(stages[name], tokenizer, context, cache))] for name in names}


def _check_numbers() -> None:
    """Some jaxlib builds return wrong sums on CPU (jax#39103); a run that would be wrong does not start."""
    rows = jnp.stack((jnp.arange(32769.0), jnp.zeros(32769), jnp.zeros(32769)), axis=1)
    square = jax.vmap(lambda row: jnp.sum(jnp.square(jnp.eye(3) @ row)))
    if float(jax.jit(square)(rows)[-1]) != 32768.0**2:
        raise ValueError(
            "this jaxlib computes wrong sums here; add --xla_cpu_experimental_ynn_fusion_type=-reduce to XLA_FLAGS"
        )


def _import_stage(known: dict[str, StageConfig], tokenizer: Tokenizer, with_data: bool) -> StageConfig:
    """What was imported is looked at as the recipe's first stage would; without one it answers, if it has a chat
    template, or goes on with a text."""
    if known:
        return dataclasses.replace(next(iter(known.values())), lora=LoraConfig())
    if with_data:
        raise ValueError("the recipe has no stage, and so no data; name a recipe that has with --config=FILE")
    devices = jax.device_count()
    return StageConfig(
        data=DataConfig(task="chat" if tokenizer.template else "lm"),
        loop=LoopConfig(batch_size=devices),
        evaluation=EvaluationConfig(batch_size=devices),
    )


def open_workbench(recipe: Recipe, name: str, workdir: Path, with_data: bool = True) -> Workbench:
    """Everything that stage `name` needs but its starting state; without data it serves to generate only.

    Raises:
        ValueError: the recipe has no such stage, or a part of it does not fit the mesh or the data.
    """
    known = recipes.stages(recipe)
    if name == recipes.IMPORT:
        known = {recipes.IMPORT: _import_stage(known, open_tokenizer(recipe, workdir), with_data)}
    if name not in known:
        raise ValueError(f"recipe {recipe.name!r} has no stage {name}; it has {', '.join(known)}")
    stage = known[name]
    _check_numbers()
    mesh = make_mesh(recipe.mesh)
    check_batch_size(f"config.{name}.loop.batch_size", stage.loop.batch_size, stage.loop.accumulate, mesh)
    check_batch_size(f"config.{name}.evaluation.batch_size", stage.evaluation.batch_size, 1, mesh)
    tokenizer = open_tokenizer(recipe, workdir)
    cache = cache_folder(recipe, workdir)
    train, held_out = prepare_stage(stage, tokenizer, recipe.model.context, cache) if with_data else ([], [])
    attend = _attend(recipe.model, mesh, [*train, *held_out])
    model = make_model(recipe.model, tokenizer.vocab_size, attend=attend)
    tx = make_optimizer(stage.optim, stage.loop.steps, model.axes)
    params = params_shapes(model, mesh)
    return Workbench(
        name=name,
        recipe=recipe,
        stage=stage,
        workdir=workdir,
        mesh=mesh,
        tokenizer=tokenizer,
        attend=attend,
        model=model,
        tx=tx,
        params=params,
        base=base_shapes(model, params, stage.lora, mesh) if stage.lora.rank else None,
        shapes=state_shapes(model, tx, stage, mesh),
        train=train,
        held_out=held_out,
    )


def _attend(config: ModelConfig, mesh: Mesh, rows: list[Prepared]) -> Attend | None:
    """The fastest attention for these rows, on this machine; None, the model's own, on CPU, which has no other, and
    without rows, for then nothing attends over them."""
    machine = machine_of(jax.local_devices()[0])
    if not rows or machine.platform == "cpu":
        return None
    part = config.attention
    shape = Shape(
        length=config.context,
        heads=part.heads,
        kv_heads=part.kv_heads,
        head_dim=part.head_dim,
        dtype=config.dtype,
        runs=max(prepared.most_segments() for prepared in rows) + 1,  # and padding
    )
    # Layers that see differently far may need different kernels.
    choices = {reach: choose_attend(shape._replace(reach=reach), mesh, machine) for reach in reaches_of(config)}
    said = "; ".join(dict.fromkeys(choice.said for choice in choices.values()))
    hosts.compare({"attention": said})
    say(said)
    return lambda query, key, value, segments, reach: choices[reach].attend(query, key, value, segments, reach)


def params_shapes(model: Model, mesh: Mesh) -> Params:
    """The model's parameters as shapes with shardings."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return _placed(shapes, param_shardings(shapes, model.axes, mesh))


def base_shapes(model: Model, params: Params, config: LoraConfig, mesh: Mesh) -> Params:
    """The same, of the parameters that adapters lie beside, as they are held."""
    held = jax.eval_shape(lambda p: lora.hold(p, model.axes, config.base), params)
    return _placed(held, param_shardings(held, lora.held_axes(model.axes, config.base), mesh))


def state_shapes(model: Model, tx: optax.GradientTransformationExtraArgs, stage: StageConfig, mesh: Mesh) -> TrainState:
    """The train state as shapes with shardings; the optimizer's state is split as its parameters are."""
    config = stage.lora

    def trained(key: Array) -> Params:
        params = model.init(key)
        return lora.init(key, params, model.axes, config) if config.rank else params

    state = jax.eval_shape(lambda key: init_state(trained(key), tx, stage.optim.spike_window), jax.random.key(0))
    # What adapters lie beside may be named too: it stays as it is anyway.
    beside = jax.eval_shape(model.init, jax.random.key(0)) if config.rank else {}
    check_patterns("optim.freeze", stage.optim.freeze, named_leaves(state.params) | named_leaves(beside))
    axes = lora.adapter_axes(model.axes, config) if config.rank else model.axes
    return _placed(state, like_params(state, state.params, param_shardings(state.params, axes, mesh), mesh))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
