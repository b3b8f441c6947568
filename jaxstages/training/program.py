"""The program of a stage: mesh, model, optimizer, and the abstract state for which its step is compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from jaxstages.checkpoint.fingerprint import named_leaves
from jaxstages.config import ModelConfig, OptimConfig, Recipe, RulesConfig, StageConfig
from jaxstages.config.parts import ModelSpec
from jaxstages.data.prepare import Prepared
from jaxstages.models.attention import Attend
from jaxstages.models.kernels import Shape, choose_attend, has_kernels, machine_of
from jaxstages.models.layers import attention_specs
from jaxstages.models.sharding import (
    batch_sharding,
    check_batch,
    check_context,
    like_params,
    make_sharding_hooks,
    param_shardings,
)
from jaxstages.models.spmd import QUERY_BLOCK
from jaxstages.models.trainable import Trainable, make_trainable
from jaxstages.models.transformer import make_model
from jaxstages.runtime import multihost
from jaxstages.runtime.console import say
from jaxstages.training.optimizer import check_optimizer_paths, make_optimizer, make_schedule
from jaxstages.training.step import init_state
from jaxstages.types import Model, Params, ShardingHooks, TrainState


@dataclass(frozen=True)
class Program:
    """Everything that determines the compiled step of a stage. It contains no arrays.

    name: name of the stage.
    config: the stage's part of the recipe.
    seed: seed of the recipe.
    context: tokens per row, L.
    mesh: device mesh.
    rules: mesh axes that split each logical axis.
    hooks: sharding annotations for the model.
    remake: `remake(remat=..., neftune=...)` returns the model with other values of these options.
    model: the model, without rematerialization and NEFTune.
    tx: the optimizer.
    schedule: maps an optimizer step to a learning rate, without the factor of the plateau schedule.
    trainable: which parameters are trained: all of them, or adapters beside a frozen base.
    row_sharding: sharding of a batch [B, L].
    abstract_params: shapes, dtypes and shardings of the model's parameters.
    abstract_base: the same for the frozen base of adapters; () in full training.
    abstract_state: the same for the train state.
    """

    name: str
    config: StageConfig
    seed: int
    context: int
    mesh: Mesh
    rules: RulesConfig
    hooks: ShardingHooks
    remake: Callable[..., Model]
    model: Model
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    trainable: Trainable
    row_sharding: NamedSharding
    abstract_params: Params
    abstract_base: Any
    abstract_state: TrainState

    @property
    def abstract_reference(self) -> Params | None:
        """Abstract parameters of the anchor's reference, the parent or the base of adapters; None without anchor."""
        if not self.config.anchor.weight:
            return None
        return self.abstract_base or self.abstract_params


def make_program(
    recipe: Recipe,
    name: str,
    config: StageConfig,
    mesh: Mesh,
    vocab_size: int,
    attend: Attend | None = None,
    platform: str | None = None,
) -> Program:
    """Return the program of a stage on a mesh. The devices of the mesh need not be attached to this machine.

    Args:
        name: name of the stage.
        config: the stage's part of the recipe.
        vocab_size: number of tokens of the tokenizer.
        attend: attention over packed rows; by default that of the model.
        platform: platform of the mesh's devices; by default that of JAX.

    Raises:
        ValueError: a dim of a parameter can't be split over the mesh.
    """
    rules = recipe.mesh.rules
    hooks = make_sharding_hooks(mesh, rules)

    def remake(**options: Any) -> Model:
        if isinstance(recipe.model, ModelConfig):
            return make_model(recipe.model, vocab_size, platform=platform, attend=attend, hooks=hooks, **options)
        return _make_own_model(recipe.model, vocab_size)

    model = remake()
    params = jax.eval_shape(model.init, jax.random.key(0))
    if model.axes is None:
        model = model._replace(axes=jax.tree.map(lambda leaf: ("",) * leaf.ndim, params))
    trainable = make_trainable(model.axes, config.lora)
    tx = make_optimizer(config.optim, config.loop.steps, trainable.axes)

    base = jax.eval_shape(trainable.freeze, params)
    state = jax.eval_shape(lambda key: fresh_state(_init(key, model, trainable), tx, config.optim), jax.random.key(0))
    # Patterns may also match parameters of the base, although they are not trained.
    check_optimizer_paths(config.optim, named_leaves(params) | named_leaves(state.params))

    state_shardings = param_shardings(state.params, trainable.axes, mesh, rules)
    return Program(
        name=name,
        config=config,
        seed=recipe.seed,
        context=recipe.model.context,
        mesh=mesh,
        rules=rules,
        hooks=hooks,
        remake=remake,
        model=model,
        tx=tx,
        schedule=make_schedule(config.optim.schedule, config.loop.steps),
        trainable=trainable,
        row_sharding=batch_sharding(mesh, rules),
        abstract_params=_with_shardings(params, param_shardings(params, model.axes, mesh, rules)),
        abstract_base=_with_shardings(base, param_shardings(base, trainable.base_axes, mesh, rules)),
        abstract_state=_with_shardings(state, like_params(state, state.params, state_shardings, mesh)),
    )


def _make_own_model(spec: Any, vocab_size: int) -> Model:
    model = spec.make(vocab_size)
    if not isinstance(model, Model):
        raise ValueError(
            f"config.model: make(vocab_size) of {type(spec).__name__} returned {type(model).__name__}; return a "
            "jaxstages.Model, as linen_model and nnx_model do"
        )
    return model


def _init(key: Array, model: Model, trainable: Trainable) -> Params:
    params = model.init(key)
    return trainable.init(key, params, trainable.freeze(params))


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def freeze(program: Program, params: Params, trainable: Trainable | None = None) -> Any:
    """Return the frozen base of a stage's adapters in its storage dtype; () in full training.

    Args:
        params: parameters of the parent, in float32.
        trainable: trainable of another stage; by default that of the program.
    """
    trainable = trainable or program.trainable
    base = jax.eval_shape(trainable.freeze, params)
    shardings = param_shardings(base, trainable.base_axes, program.mesh, program.rules)
    return jax.jit(trainable.freeze, out_shardings=shardings)(params)


def fresh_state(params: Params, tx: optax.GradientTransformation, optim: OptimConfig) -> TrainState:
    """Return the train state of a stage at step 0."""
    return init_state(params, tx, optim.spike_window, average=optim.average > 0)


def check_fit(recipe: Recipe, name: str, stage: StageConfig, mesh: Mesh) -> None:
    """Raise ValueError unless batches and rows can be split evenly over the mesh."""
    rules = recipe.mesh.rules
    check_batch(f"config.{name}.loop.batch_size", stage.loop.batch_size, stage.loop.accumulate, mesh, rules)
    check_batch(f"config.{name}.evaluation.batch_size", stage.evaluation.batch_size, 1, mesh, rules)
    if stage.anchor.weight:
        check_batch(f"config.{name}.anchor.batch_size", stage.anchor.batch_size, stage.loop.accumulate, mesh, rules)
    check_context(recipe.model.context, mesh, rules)


def choose_attention(config: ModelSpec, parts: int, rows: list[Prepared]) -> Attend | None:
    """Return the fastest attention for these rows on this machine, and print which one it is.

    None stands for the attention of the model. It is returned on a platform without kernels, if rows are split over the
    mesh, and if there are no rows.

    Args:
        parts: number of devices that split a row.
        rows: all prepared rows of the stage.
    """
    machine = machine_of(jax.local_devices()[0])
    if not isinstance(config, ModelConfig) or not rows or not has_kernels(machine):
        return None
    if parts > 1:
        say(f"attention: the formula, {QUERY_BLOCK} queries at a time, because mesh.context={parts} splits the rows")
        return None
    attention = config.attention
    shape = Shape(
        length=config.context,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        dtype=config.dtype,
        runs=max(prepared.max_segments() for prepared in rows) + 1,  # the last run is padding
    )
    # Layers with different windows may need different kernels.
    choices = {spec: choose_attend(shape._replace(spec=spec), machine) for spec in attention_specs(config)}
    reasons = "; ".join(dict.fromkeys(choice.reason for choice in choices.values()))
    multihost.assert_same_on_all_hosts({"attention": reasons})
    say(reasons)
    return lambda query, key, value, segments, spec: choices[spec].attend(query, key, value, segments, spec)
