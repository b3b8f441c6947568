"""The program of a stage: mesh, model, optimizer, and the abstract state that its step is compiled for."""

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
    """Everything that a stage's step is compiled from. No array is allocated for it.

    name, config, seed, context: of the stage, and of its recipe.
    mesh, rules: the devices, and which logical axes they split.
    hooks: how the model annotates shardings.
    remake: `remake(remat=..., neftune=...)`, the model with other values of these.
    schedule: optimizer step -> learning rate, before a plateau's factor.
    trainable: all parameters, or adapters beside a base.
    row_sharding: of a batch [B, L].
    abstract_params, abstract_base, abstract_state: shapes, dtypes and shardings of the model's parameters, of the base
        that adapters lie beside (() without adapters), and of the train state.
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
        """The parent's parameters that the anchor keeps to; with adapters their base, and None without an anchor."""
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
    """Return the program of a stage on a mesh, whose devices need not be attached to this machine.

    Args:
        attend: attention over packed rows; by default the model's own.
        platform: of the mesh's devices; by default JAX's.

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
    # Patterns may also name parameters of the base, which are not trained anyway.
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
    """Return the base that a stage's adapters lie beside, in its storage dtype; () for full training.

    Args:
        trainable: of another stage; by default the program's own.
    """
    trainable = trainable or program.trainable
    base = jax.eval_shape(trainable.freeze, params)
    shardings = param_shardings(base, trainable.base_axes, program.mesh, program.rules)
    return jax.jit(trainable.freeze, out_shardings=shardings)(params)


def fresh_state(params: Params, tx: optax.GradientTransformation, optim: OptimConfig) -> TrainState:
    """Return the train state at step 0 of a stage."""
    return init_state(params, tx, optim.spike_window, average=optim.average > 0)


def check_fit(recipe: Recipe, name: str, stage: StageConfig, mesh: Mesh) -> None:
    """Raises ValueError unless batches and rows can be split evenly over the mesh."""
    rules = recipe.mesh.rules
    check_batch(f"config.{name}.loop.batch_size", stage.loop.batch_size, stage.loop.accumulate, mesh, rules)
    check_batch(f"config.{name}.evaluation.batch_size", stage.evaluation.batch_size, 1, mesh, rules)
    if stage.anchor.weight:
        check_batch(f"config.{name}.anchor.batch_size", stage.anchor.batch_size, stage.loop.accumulate, mesh, rules)
    check_context(recipe.model.context, mesh, rules)


def choose_attention(config: ModelSpec, parts: int, rows: list[Prepared]) -> Attend | None:
    """Return the fastest attention for these rows on this machine, and say which it is.

    None is the model's own: for a platform without kernels, for rows split over several `parts`, and without rows, when
    nothing attends over them.
    """
    machine = machine_of(jax.local_devices()[0])
    if not isinstance(config, ModelConfig) or not rows or not has_kernels(machine):
        return None
    if parts > 1:
        say(f"attention: the formula, {QUERY_BLOCK} queries at a time, for mesh.context={parts} splits the rows")
        return None
    part = config.attention
    shape = Shape(
        length=config.context,
        heads=part.heads,
        kv_heads=part.kv_heads,
        head_dim=part.head_dim,
        dtype=config.dtype,
        runs=max(prepared.max_segments() for prepared in rows) + 1,  # and padding
    )
    # Layers that see differently far may need different kernels.
    choices = {spec: choose_attend(shape._replace(spec=spec), machine) for spec in attention_specs(config)}
    reasons = "; ".join(dict.fromkeys(choice.reason for choice in choices.values()))
    multihost.assert_same_on_all_hosts({"attention": reasons})
    say(reasons)
    return lambda query, key, value, segments, spec: choices[spec].attend(query, key, value, segments, spec)
