"""What a stage works with, made from its part of the recipe: mesh, tokenizer, model, optimizer and prepared data."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from jaxstages import config as recipes
from jaxstages import hosts
from jaxstages.config import (
    AnchorConfig,
    DataConfig,
    EvaluationConfig,
    LoopConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    StageConfig,
)
from jaxstages.console import say
from jaxstages.data.mixture import Dataset, Mixed, mix, steps_for
from jaxstages.data.prepare import Engine, Prepared, find_gone, prepare, rows_folder
from jaxstages.data.shards import items_of
from jaxstages.data.sources import open_source
from jaxstages.data.tasks import texts
from jaxstages.data.tokenizer import SEPARATOR, Tokenizer, load_tokenizer, make_tokenizer, needed_tokens
from jaxstages.disk import local_path, make_folder, read_json, write_json, write_text
from jaxstages.fingerprint import named_leaves
from jaxstages.mesh_config import RulesConfig
from jaxstages.models import lora
from jaxstages.models.attention import AT_ONCE, Attend
from jaxstages.models.kernels import Shape, choose_attend, machine_of
from jaxstages.models.layers import reaches_of
from jaxstages.models.transformer import make_model
from jaxstages.optim import check_optimizer_paths, make_optimizer
from jaxstages.record import begun
from jaxstages.sharding import (
    RULES,
    batch_sharding,
    check_batch,
    check_context,
    like_params,
    make_mesh,
    make_placement,
    param_shardings,
)
from jaxstages.step import init_state
from jaxstages.types import Model, Params, Placement, TrainState
from jaxstages.workdir import result_file, tokenizer_file


@dataclass(frozen=True)
class Parts:
    """What a step is compiled from.

    place: which device holds what.
    remake: `remake(remat=..., neftune=...)`, the model with other settings of these.
    params, shapes: the model's parameters, and the train state, as shapes with shardings; nothing is computed for them.
    base: of a stage that trains adapters, which are the state's parameters, the parameters as they are held; else None.
    """

    recipe: Recipe
    name: str
    stage: StageConfig
    mesh: Mesh
    place: Placement
    remake: Callable[..., Model]
    model: Model
    tx: optax.GradientTransformationExtraArgs
    params: Params
    base: Params | None
    shapes: TrainState

    @property
    def reference(self) -> Params | None:
        """The parent's parameters, which the anchor keeps to, as shapes; with adapters that is their base, and without
        an anchor None."""
        if not self.stage.anchor.weight:
            return None
        return self.params if self.base is None else self.base

    @property
    def rows(self) -> NamedSharding:
        """How a batch is split."""
        return batch_sharding(self.mesh, self.recipe.mesh.rules)


class EvaluationSet(NamedTuple):
    """Held-out data that a stage is measured on.

    prefix: of its metrics: "" for the stage's own, "pairs/" for `mixture["pairs"]`, "watch/pretrain/" for a stage that
        is watched.
    task, config: what is scored, and on how much.
    train: of classes, whose labels are known from the training data too.
    """

    prefix: str
    task: str
    config: EvaluationConfig
    train: list[Prepared]
    held_out: list[Prepared]


@dataclass(frozen=True)
class Workbench(Parts):
    """What a stage works with: its `Parts`, and where it works on what.

    datasets: what it is trained on, its own first. sets: what it is measured on, its own first. Both are empty where
    the stage was opened without data.
    """

    workdir: Path
    tokenizer: Tokenizer
    datasets: list[Dataset]
    sets: list[EvaluationSet]

    @property
    def stage_dir(self) -> Path:
        return self.workdir / self.name

    @property
    def train(self) -> list[Prepared]:
        """The stage's own training rows."""
        return self.datasets[0].train

    @property
    def held_out(self) -> list[Prepared]:
        """The stage's own held-out rows."""
        return self.sets[0].held_out

    @property
    def mixed(self) -> Mixed:
        """All training rows, with the weights by which they are mixed."""
        loop = self.stage.loop
        return mix(self.datasets, round(self.stage.late_from * loop.steps) * loop.batch_size)


def make_parts(
    recipe: Recipe,
    name: str,
    stage: StageConfig,
    mesh: Mesh,
    vocab: int,
    attend: Attend | None = None,
    platform: str | None = None,
) -> Parts:
    """Those of a stage on a mesh, whose devices need not be here.

    Raises:
        ValueError: a dim of a parameter can't be split over the mesh.
    """
    rules = recipe.mesh.rules
    place = make_placement(mesh, rules)
    remake = functools.partial(make_model, recipe.model, vocab, platform=platform, attend=attend, place=place)
    model = remake()
    axes = lora.adapter_axes(model.axes, stage.lora) if stage.lora.rank else model.axes
    tx = make_optimizer(stage.optim, stage.loop.steps, axes)
    params = params_shapes(model, mesh, rules)
    base = base_shapes(model, params, stage.lora, mesh, rules) if stage.lora.rank else None
    shapes = state_shapes(model, tx, stage, mesh, rules)
    return Parts(recipe, name, stage, mesh, place, remake, model, tx, params, base, shapes)


def check_fit(recipe: Recipe, name: str, stage: StageConfig, mesh: Mesh) -> None:
    """Raises ValueError unless batches and rows can be split evenly over the mesh."""
    rules = recipe.mesh.rules
    check_batch(f"config.{name}.loop.batch_size", stage.loop.batch_size, stage.loop.accumulate, mesh, rules)
    check_batch(f"config.{name}.evaluation.batch_size", stage.evaluation.batch_size, 1, mesh, rules)
    if stage.anchor.weight:
        check_batch(f"config.{name}.anchor.batch_size", stage.anchor.batch_size, stage.loop.accumulate, mesh, rules)
    check_context(recipe.model.context, mesh, rules)


def cache_folder(recipe: Recipe, workdir: Path) -> Path:
    return local_path(recipe.cache, "config.cache") if recipe.cache else workdir / "cache"


def open_tokenizer(recipe: Recipe, workdir: Path, engine: Engine | None = None) -> Tokenizer:
    """The run's tokenizer: trained, or taken over, on first use; afterwards the one in the workdir. As long as nothing
    was trained with it, it is made again when what it was made from has changed."""
    path = tokenizer_file(workdir)
    origin = path.with_name("made_from.json")
    if path.exists() and (any(begun(workdir / name) for name in recipes.HELD) or not origin.exists()):
        return load_tokenizer(path)
    taken = _taken_over(recipe)
    made_from = {"inputs": _tokenizer_inputs(recipe, workdir, taken)}
    if path.exists():
        if read_json(origin) == made_from:
            return load_tokenizer(path)
        say(f"tokenizer: made again, what {path} was made from has changed", "yellow")
        path.unlink()
    if taken is not None:
        _copy_tokenizer(taken, path)
        write_json(origin, made_from)
        tokenizer = load_tokenizer(path)
        say(f"tokenizer: that of the run which this one starts from, {tokenizer.vocab_size} tokens, from {taken}")
        return tokenizer
    write_json(origin, made_from)
    tasks = {data.task for data in _all_data(recipe)}
    tokenizer = make_tokenizer(recipe.tokenizer, _tokenizer_texts(recipe, workdir, engine), path, tasks)
    how = "its own chat template" if tokenizer.template else "our chat template"
    pairs = tokenizer.template and needed_tokens(tasks, template=True)
    how += f", {SEPARATOR} for pairs" if pairs else ""
    say(f"tokenizer: {recipe.tokenizer.kind}, {tokenizer.vocab_size} tokens, {how}, {path}")
    return tokenizer


def _taken_over(recipe: Recipe) -> Path | None:
    """The tokenizer of the other run that a stage of this one starts from; None where none does, or it has none."""
    for stage in recipes.stages(recipe).values():
        if stage.init_from not in ("parent", "scratch") and not stage.init_from.startswith("hf:"):
            file = tokenizer_file(local_path(stage.init_from, "init_from").parent)
            if file.is_file():
                return file
    return None


def _copy_tokenizer(source: Path, path: Path) -> None:
    make_folder(path.parent)
    beside = "tokenizer_config.json"
    (path.parent / beside).unlink(missing_ok=True)
    for name in (beside, source.name):  # the tokenizer last: where it is, what belongs to it is
        if (source.parent / name).is_file():
            write_text(path.parent / name, (source.parent / name).read_text(encoding="utf-8"))


def _tokenizer_inputs(recipe: Recipe, workdir: Path, taken: Path | None) -> str:
    """SHA-256 of all that a tokenizer is made from: settings, and the bytes of files and sources."""
    config = recipe.tokenizer
    parts: list[Any] = [recipes.to_dict(config), sorted({data.task for data in _all_data(recipe)})]
    file = taken or (Path(config.path) if config.kind == "file" else None)
    if file is not None:
        names = (file.name, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
        names += ("config.json", "generation_config.json", "additional_chat_templates/tool_use.jinja")
        files = [file.parent / name for name in names if (file.parent / name).is_file()]
        parts += [hashlib.sha256(each.read_bytes()).hexdigest() for each in files]
    else:
        cache = cache_folder(recipe, workdir)
        parts += [
            [open_source(name, cache).fingerprint, recipes.to_dict(data)]
            for name, data in _tokenizer_sources(recipe).items()
        ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _all_data(recipe: Recipe) -> list[DataConfig]:
    """All data sets of a recipe."""
    stages = recipes.stages(recipe).values()
    return [data for stage in stages for data in (stage.data, *(part.data for part in stage.mixture.values()))]


def _tokenizer_sources(recipe: Recipe) -> dict[str, DataConfig]:
    """The sources that a tokenizer is trained on, each with how its records are read."""
    chosen = {source: data for data in _all_data(recipe) for source in data.train}
    if recipe.tokenizer.sources:
        unknown = [name for name in recipe.tokenizer.sources if name not in chosen]
        if unknown:
            raise ValueError(
                f"config.tokenizer.sources: {unknown[0]!r} is no stage's training source; known: {[*chosen]}"
            )
        chosen = {name: chosen[name] for name in recipe.tokenizer.sources}
    return chosen


def _tokenizer_texts(recipe: Recipe, workdir: Path, engine: Engine | None) -> Iterator[str]:
    """An equal share of `max_bytes` from each source. Held-out and removed records are left out by the same rule as in
    training.

    Raises:
        ValueError: no record of any source gives a text.
    """
    chosen, faults, read = _tokenizer_sources(recipe), [], 0
    for name, data in chosen.items():
        left = recipe.tokenizer.max_bytes // len(chosen)
        cache = cache_folder(recipe, workdir)
        source = open_source(name, cache)
        for item in items_of(source, "train", data, find_gone(source, data, cache, engine)):
            fault, found = item.fault, []
            if item.record is not None:
                try:
                    found = texts(item.record, data)
                except ValueError as error:
                    fault = str(error)
            if not found:  # counted and named when the source is prepared
                faults = faults or ([f"{item.where}: {fault}"] if fault else [])
                continue
            read += 1
            yield from found
            left -= sum(len(text.encode()) for text in found)
            if left <= 0:
                break
    if faults and not read:
        raise ValueError(f"no record has a text to make a tokenizer from; the first: {faults[0]}")


def _rows(
    data: DataConfig, part: str, tokenizer: Tokenizer, context: int, cache: Path, engine: Engine | None = None
) -> list[Prepared]:
    """The rows of a data set, a cache for each source, made where they are not there yet."""
    names = data.train if part == "train" else data.validation or data.train
    return [prepare(open_source(name, cache), part, data, tokenizer, context, cache, engine) for name in names]


def data_names(
    recipe: Recipe, name: str, stage: StageConfig, tokenizer: Tokenizer, workdir: Path
) -> dict[str, list[str]]:
    """Fingerprints of the rows that a stage is trained on, and judged by, in the form of a checkpoint's metadata; no
    rows are made."""
    context, cache = recipe.model.context, cache_folder(recipe, workdir)

    def names(data: DataConfig, part: str, sources: tuple[str, ...]) -> list[str]:
        return [
            rows_folder(open_source(source, cache), part, data, tokenizer, context, cache).name for source in sources
        ]

    judged = (stage.data, *(part.data for part in stage.mixture.values()))
    trained = [data for data, _, _ in shares_of(recipe, name, stage).values()]
    return {
        "train": [each for data in trained for each in names(data, "train", data.train)],
        "held_out": [each for data in judged for each in names(data, "validation", data.validation or data.train)],
    }


def shares_of(recipe: Recipe, name: str, stage: StageConfig) -> dict[str, tuple[DataConfig, float, float]]:
    """Name -> data, share and late share of each data set that a stage trains on: its own, which fills the rest of the
    rows, then `mixture` and `replay`."""
    others = {key: (part.data, part.share[0], part.share[-1]) for key, part in stage.mixture.items()}
    others |= {earlier: (recipes.stages(recipe)[earlier].data, share, share) for earlier, share in stage.replay}
    early = 1 - sum(share for _, share, _ in others.values())
    late = 1 - sum(share for _, _, share in others.values())
    return {name: (stage.data, early, late)} | others


def watched(recipe: Recipe, name: str, stage: StageConfig, workdir: Path) -> list[str]:
    """The earlier stages that this one is measured on too, in the recipe's order."""
    names = list(recipes.stages(recipe))
    earlier = names[: names.index(name)] if name in names else []
    descends = stage.init_from != "scratch"
    there = [each for each in earlier if descends and result_file(workdir / each).exists()]
    asked = stage.evaluation.watch
    return [each for each in earlier if each in asked or (recipes.EARLIER in asked and each in there)]


def prepare_stage(
    recipe: Recipe, name: str, stage: StageConfig, tokenizer: Tokenizer, workdir: Path, engine: Engine | None = None
) -> tuple[list[Dataset], list[EvaluationSet]]:
    """What a stage is trained on and measured on, from the cache where it is there."""
    context, cache = recipe.model.context, cache_folder(recipe, workdir)
    datasets = []
    for key, (data, share, late) in shares_of(recipe, name, stage).items():
        train = _rows(data, "train", tokenizer, context, cache, engine)
        weights = data.weights or tuple(source.index["rows"] for source in train)
        datasets.append(Dataset(key, train, weights, share, late))

    def held_out(prefix: str, data: DataConfig, config: EvaluationConfig, train: list[Prepared]) -> EvaluationSet:
        return EvaluationSet(
            prefix, data.task, config, train, _rows(data, "validation", tokenizer, context, cache, engine)
        )

    sets = [held_out("", stage.data, stage.evaluation, datasets[0].train)]
    sets += [
        held_out(f"{key}/", stage.mixture[key].data, stage.mixture[key].evaluation, dataset.train)
        for key, dataset in zip(stage.mixture, datasets[1:], strict=False)
    ]
    limits = {"max_rows": stage.evaluation.watch_max_rows, "max_examples": stage.evaluation.watch_max_examples}
    for earlier in watched(recipe, name, stage, workdir):
        other = recipes.stages(recipe)[earlier]
        train = _rows(other.data, "train", tokenizer, context, cache, engine) if other.data.task == "classify" else []
        sets.append(held_out(f"watch/{earlier}/", other.data, replace(other.evaluation, **limits), train))
    return datasets, sets


def prepare_stages(
    recipe: Recipe, workdir: Path, names: Iterable[str], engine: Engine | None = None
) -> dict[str, list[Prepared]]:
    """The tokenizer, and all rows of each stage, made where they are not there yet.

    Args:
        engine: who makes the rows; by default this process.
    """
    tokenizer, stages = open_tokenizer(recipe, workdir, engine), recipes.stages(recipe)
    rows = {}
    for name in names:
        datasets, sets = prepare_stage(recipe, name, stages[name], tokenizer, workdir, engine)
        parts = [source for dataset in datasets for source in dataset.train]
        rows[name] = parts + [source for each in sets for source in each.held_out]
    return rows


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
        first = next(iter(known.values()))
        return replace(first, lora=LoraConfig(), anchor=AnchorConfig(), replay=(), mixture={})
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
    check_fit(recipe, name, stage, mesh)
    tokenizer = open_tokenizer(recipe, workdir)
    datasets, sets = prepare_stage(recipe, name, stage, tokenizer, workdir) if with_data else ([], [])
    stage = with_steps(stage, datasets)
    rows = [source for dataset in datasets for source in dataset.train]
    rows += [source for each in sets for source in each.held_out]
    attend = _attend(recipe.model, mesh.shape["context"], rows)
    parts = make_parts(recipe, name, stage, mesh, tokenizer.vocab_size, attend)
    return Workbench(**vars(parts), workdir=workdir, tokenizer=tokenizer, datasets=datasets, sets=sets)


def with_steps(stage: StageConfig, datasets: list[Dataset]) -> StageConfig:
    """The stage with its length in steps, where the recipe has it in epochs or tokens. Without data it has none."""
    loop = stage.loop
    if loop.steps or not datasets:
        return stage
    steps = steps_for(datasets, loop.batch_size, stage.late_from, epochs=loop.epochs, tokens=loop.tokens)
    return replace(stage, loop=replace(loop, steps=steps))


def _attend(config: ModelConfig, parts: int, rows: list[Prepared]) -> Attend | None:
    """The fastest attention for these rows, on this machine; None, the model's own, on CPU, which has no other, where a
    row is split over several `parts`, which take the formula, and without rows, for then nothing attends over them."""
    machine = machine_of(jax.local_devices()[0])
    if not rows or machine.platform == "cpu":
        return None
    if parts > 1:
        say(f"attention: the formula, {AT_ONCE} queries at a time, for mesh.context={parts} splits the rows")
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
    choices = {reach: choose_attend(shape._replace(reach=reach), machine) for reach in reaches_of(config)}
    said = "; ".join(dict.fromkeys(choice.said for choice in choices.values()))
    hosts.compare({"attention": said})
    say(said)
    return lambda query, key, value, segments, reach: choices[reach].attend(query, key, value, segments, reach)


def params_shapes(model: Model, mesh: Mesh, rules: RulesConfig = RULES) -> Params:
    """The model's parameters as shapes with shardings."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return _placed(shapes, param_shardings(shapes, model.axes, mesh, rules))


def base_shapes(model: Model, params: Params, config: LoraConfig, mesh: Mesh, rules: RulesConfig = RULES) -> Params:
    """The same, of the parameters that adapters lie beside, as they are held."""
    held = jax.eval_shape(lambda p: lora.hold(p, model.axes, config.base), params)
    return _placed(held, param_shardings(held, lora.held_axes(model.axes, config.base), mesh, rules))


def fresh_state(params: Params, tx: optax.GradientTransformation, optim: OptimConfig) -> TrainState:
    """Step 0 of a stage."""
    return init_state(params, tx, optim.spike_window, average=optim.average > 0)


def state_shapes(
    model: Model, tx: optax.GradientTransformationExtraArgs, stage: StageConfig, mesh: Mesh, rules: RulesConfig = RULES
) -> TrainState:
    """The train state as shapes with shardings; the optimizer's state is split as its parameters are."""
    config = stage.lora

    def trained(key: Array) -> Params:
        params = model.init(key)
        return lora.init(key, params, model.axes, config) if config.rank else params

    state = jax.eval_shape(lambda key: fresh_state(trained(key), tx, stage.optim), jax.random.key(0))
    # What adapters lie beside may be named too: it stays as it is anyway.
    beside = jax.eval_shape(model.init, jax.random.key(0)) if config.rank else {}
    check_optimizer_paths(stage.optim, named_leaves(state.params) | named_leaves(beside))
    axes = lora.adapter_axes(model.axes, config) if config.rank else model.axes
    return _placed(state, like_params(state, state.params, param_shardings(state.params, axes, mesh, rules), mesh))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
