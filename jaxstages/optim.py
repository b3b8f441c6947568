"""Learning-rate schedules and optimizers, all of them optax's; what is frozen or decayed is chosen by path."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax import contrib

from jaxstages.config import OptimConfig, ScheduleConfig
from jaxstages.types import Params


def make_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Learning rate at a step, of `steps` in all: linear warm-up to `peak_lr`, then what the name says.

    "constant" and "plateau" stay (plateau is cut by `reduce_on_plateau` inside the optimizer); "linear" and "cosine"
    (Loshchilov & Hutter 2017) fall to `peak_lr * end_factor`; "wsd" stays, and falls linearly over the last
    `decay_share` (Hu et al. 2024); "rsqrt" falls as `sqrt(warmup / step)` (Vaswani et al. 2017).
    """
    peak, end, warmup = config.peak_lr, config.peak_lr * config.end_factor, min(config.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    after: optax.Schedule
    match config.name:
        case "constant" | "plateau":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, end, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.end_factor)
        case "wsd":
            decay = min(max(round(steps * config.decay_share), 1), rest)
            after = optax.join_schedules(
                [optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)], [rest - decay]
            )
        case "rsqrt":
            anchor = max(warmup, 1)

            def rsqrt(step: jax.typing.ArrayLike) -> Any:
                # join_schedules also asks for steps before its boundary.
                return peak * (anchor / (anchor + jnp.maximum(step, 0))) ** 0.5

            after = rsqrt
        case _:
            raise ValueError(f"schedule.name={config.name!r}; known: constant, linear, cosine, wsd, rsqrt, plateau")
    if not warmup:
        return after
    # (step + 1) / warmup: the first step already learns, and the last of the warm-up is at the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def path_matches(patterns: tuple[str, ...], params: Params) -> Params:
    """Tree of bools: does the parameter's path (`layers/attention/query/kernel`) contain one of the patterns?"""

    def one(path: Any, _: Any) -> bool:
        return any(re.search(pattern, jax.tree_util.keystr(path, simple=True, separator="/")) for pattern in patterns)

    return jax.tree_util.tree_map_with_path(one, params)


def check_patterns(name: str, patterns: tuple[str, ...], params: Params) -> None:
    """Raises ValueError for a pattern without a parameter: nothing is frozen by a typo in silence."""
    for pattern in patterns:
        if not any(jax.tree.leaves(path_matches((pattern,), params))):
            leaves = jax.tree_util.tree_leaves_with_path(params)
            paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
            raise ValueError(f"{name}: {pattern!r} matches no parameter; there are {', '.join(paths)}")


def _muon_dims(axes: Params) -> Params:
    """Which dims Muon orthogonalises: matrices inside the layers, "layers" and "expert" being batches of them.

    Embeddings, the head, routers and vectors get None, which is AdamW (Jordan et al. 2024). A dim named "embed" is the
    side of the residual stream; the other dims of a kernel are its other side, flattened (heads x head_dim, or ff).
    """

    def one(names: tuple[str, ...]) -> contrib.MuonDimensionNumbers | None:
        if names[:1] != ("layers",) or "embed" not in names or len(names) < 3:
            return None
        residual = names.index("embed")
        others = tuple(dim for dim in range(1, len(names)) if dim != residual and names[dim] != "expert")
        if not others:  # a router
            return None
        if residual < others[0]:
            return contrib.MuonDimensionNumbers(reduction_axis=residual, output_axis=others)
        return contrib.MuonDimensionNumbers(reduction_axis=others, output_axis=residual)

    return jax.tree.map(one, axes, is_leaf=lambda node: isinstance(node, tuple))


def global_norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm of all leaves together, in float32."""
    squares = [jnp.atleast_1d(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    total = functools.partial(jax.lax.platform_dependent, cpu=_sum_by_rows, default=jnp.sum)
    return jnp.sqrt(sum(map(total, squares), jnp.zeros(())))


def _sum_by_rows(x: Array) -> Float[Array, ""]:
    """Some rows, at most 32, are made one first: of a sum to a single number XLA:CPU makes a scalar loop."""
    at_once = max(k for k in range(1, 33) if x.shape[0] % k == 0)
    return jnp.sum(jax.lax.optimization_barrier(x.reshape(-1, at_once, *x.shape[1:]).sum(axis=1)))


def make_optimizer(config: OptimConfig, steps: int, axes: Params) -> optax.GradientTransformationExtraArgs:
    """Clip, then the named optimizer under its schedule, decay and freezing by path.

    Args:
        steps: of the whole stage, for the schedule.
        axes: `Model.axes`, from which Muon learns which parameters are matrices.

    The update takes `value=loss`, which only the plateau schedule reads, and may take the `grad_norm` to clip by.
    """
    schedule = make_schedule(config.schedule, steps)

    def decayed(params: Params) -> Params:
        # DoRA's magnitudes are lengths, as a norm's scale is.
        return jax.tree.map(lambda excepted: not excepted, path_matches((*config.no_decay, "magnitude$"), params))

    b1, b2, decay = config.beta1, config.beta2, config.weight_decay
    match config.name:
        case "adamw":
            core = optax.adamw(schedule, b1, b2, weight_decay=decay, mask=decayed)
        case "adafactor":
            core = optax.adafactor(schedule, weight_decay_rate=decay or None, weight_decay_mask=decayed)
        case "lion":
            core = optax.lion(schedule, b1, b2, weight_decay=decay, mask=decayed)
        case "muon":
            core = contrib.muon(
                lambda step: config.muon_lr_factor * schedule(step),
                # Decay is multiplied by the learning rate, so Muon's larger rate would decay more for the same recipe.
                weight_decay=decay / config.muon_lr_factor,
                weight_decay_mask=decayed,
                adam_b1=b1,
                adam_b2=b2,
                adam_weight_decay=decay,
                adam_learning_rate=schedule,
                muon_weight_dimension_numbers=_muon_dims(axes),
            )
        case "sgd":
            core = optax.chain(optax.add_decayed_weights(decay, decayed), optax.sgd(schedule, momentum=b1))
        case _:
            raise ValueError(f"optim.name={config.name!r}; known: adamw, adafactor, lion, muon, sgd")

    # Clipping is in `update`, below; in the state its place stays, for checkpoints have it.
    parts = [optax.identity()] if config.clip_norm else []
    parts.append(core)
    if config.schedule.name == "plateau":
        parts.append(
            contrib.reduce_on_plateau(
                factor=config.schedule.plateau_factor,
                patience=config.schedule.plateau_patience,
                accumulation_size=config.schedule.plateau_window,
            )
        )
    if config.freeze:
        # Last, so that neither decay nor momentum can move what is frozen.
        parts.append(optax.masked(optax.set_to_zero(), functools.partial(path_matches, config.freeze)))
    chain = optax.with_extra_args_support(optax.chain(*parts))

    def update(updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **extra: Any) -> Any:
        if config.clip_norm:  # by global norm (Pascanu et al. 2013)
            scale = jnp.minimum(1.0, config.clip_norm / (global_norm(updates) if grad_norm is None else grad_norm))
            updates = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), updates)
        # optax's own arithmetic mixes int counts with floats, and ranks; ours stays strict under test.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return chain.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(chain.init, update)
