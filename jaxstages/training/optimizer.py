"""Learning-rate schedules and optimizers, composed from optax. Weight decay, rates and freezing go by parameter path.

Every optimizer's update is `-lr * rate * (direction + weight_decay * param)`:

| name      | direction                                                                                         |
| --------- | ------------------------------------------------------------------------------------------------- |
| adamw     | m / (sqrt(v) + 1e-8), bias-corrected (Loshchilov & Hutter 2019)                                   |
| adafactor | rms(param) * clip(g / sqrt(v)), v factored over each matrix (Shazeer & Stern 2018)                |
| lion      | sign(beta1 * m + (1 - beta1) * g) (Chen et al. 2023)                                              |
| muon      | muon_lr_factor * orthogonalized momentum of each matrix (Jordan et al. 2024); otherwise as adamw  |
| sgd       | beta1 * m + g                                                                                     |

`lr` is the value of the schedule (times the factor of the plateau schedule), `rate` comes from `optim.rates` and is 0
where `optim.freeze` matches, and `weight_decay` is 0 where `optim.no_decay` matches. Weight decay is decoupled: it
never enters a moment.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax import contrib

from jaxstages.config.optimizer import OptimConfig, ScheduleConfig
from jaxstages.config.parts import Makes
from jaxstages.models.lora_layer import ADAPTER
from jaxstages.models.select import global_norm
from jaxstages.types import Params


def make_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Return the learning-rate schedule of a stage with `steps` steps: linear warm-up to `peak_lr`, then by name.

    "constant" and "plateau" stay at the peak (`reduce_on_plateau` in the optimizer reduces the latter); "linear" and
    "cosine" (Loshchilov & Hutter 2017) decay to `peak_lr * end_factor`; "wsd" stays at the peak, then decays linearly
    over the last `decay_share` of the steps (Hu et al. 2024); "rsqrt" decays as `sqrt(warmup / step)` (Vaswani et al.
    2017).

    Raises:
        ValueError: the name is not known.
    """
    if config.own is not None:
        return config.own(steps)
    peak, end, warmup = config.peak_lr, config.peak_lr * config.end_factor, min(config.warmup_steps, steps)
    remaining = max(steps - warmup, 1)
    after: optax.Schedule
    match config.name:
        case "constant" | "plateau":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, end, remaining)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, remaining, alpha=config.end_factor)
        case "wsd":
            decay = min(max(round(steps * config.decay_share), 1), remaining)
            after = optax.join_schedules(
                [optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)], [remaining - decay]
            )
        case "rsqrt":
            anchor = max(warmup, 1)

            def rsqrt(step: jax.typing.ArrayLike) -> Any:
                # join_schedules evaluates this schedule before its boundary too.
                return peak * (anchor / (anchor + jnp.maximum(step, 0))) ** 0.5

            after = rsqrt
        case _:
            raise ValueError(f"schedule.name={config.name!r}; known: constant, linear, cosine, wsd, rsqrt, plateau")
    if not warmup:
        return after
    # (step + 1) / warmup: the first step already learns, and the last warm-up step uses the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def path_of(path: Any) -> str:
    """Return the path of a parameter in its tree, such as `layers/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _paths_of(path: Any) -> tuple[str, ...]:
    """Return the paths by which patterns can name a parameter: an adapter also goes by that of its matrix."""
    own = path_of(path)
    parent, _, leaf = own.rpartition("/")
    return (own, f"{parent}/kernel") if leaf in ADAPTER else (own,)


def path_matches(patterns: tuple[str, ...], params: Params) -> Params:
    """Return a tree of bools: whether a path of each parameter contains a match of one of the regular expressions. An
    adapter also goes by the path of its matrix."""

    def matches(path: Any, _: Any) -> bool:
        return any(re.search(pattern, name) for pattern in patterns for name in _paths_of(path))

    return jax.tree_util.tree_map_with_path(matches, params)


def check_patterns(name: str, patterns: Iterable[str], params: Params) -> None:
    """Raise ValueError for a pattern that matches no parameter, so that a typo does not go unnoticed."""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"{name}: {pattern!r} matches no parameter; there are {', '.join(paths)}")


def check_optimizer_paths(config: OptimConfig, params: Params) -> None:
    """Check the path patterns of a recipe. The defaults of `no_decay` need not match: not every model has biases.

    Raises:
        ValueError: a pattern of `freeze`, `rates` or `no_decay` matches no parameter.
    """
    defaults = OptimConfig().no_decay
    check_patterns("optim.freeze", config.freeze, params)
    check_patterns("optim.rates", [pattern for pattern, _ in config.rates], params)
    check_patterns("optim.no_decay", [pattern for pattern in config.no_decay if pattern not in defaults], params)


class MatrixDims(NamedTuple):
    """Dims of a kernel, seen as a batch of matrices.

    batch: the dims "layers" and "expert".
    rows: the dim of the residual stream, "embed".
    columns: all other dims, flattened, such as heads x head_dim, or ff.
    """

    batch: tuple[int, ...]
    rows: int
    columns: tuple[int, ...]


def matrix_dims(names: tuple[str, ...]) -> MatrixDims | None:
    """Return the matrix dims of a parameter with these logical axes; None for vectors and scalars."""
    if "embed" not in names:
        return None
    batch = tuple(dim for dim, name in enumerate(names) if name in ("layers", "expert"))
    rows = names.index("embed")
    columns = tuple(dim for dim in range(len(names)) if dim != rows and dim not in batch)
    return MatrixDims(batch, rows, columns) if columns else None


def _map_axes(function: Callable[..., Any], axes: Params, *trees: Any) -> Any:
    return jax.tree.map(function, axes, *trees, is_leaf=lambda node: isinstance(node, tuple))


def _muon(config: OptimConfig, axes: Params) -> optax.GradientTransformation:
    """Return Muon's direction for the matrices inside the layers, and Adam's for embeddings, head, routers and vectors.

    `optax.contrib.muon` has no decay mask for its inner AdamW, which it also gives Nesterov momentum, so its parts are
    composed here.
    """

    def in_layers(names: tuple[str, ...]) -> MatrixDims | None:
        return matrix_dims(names) if names[:1] == ("layers",) else None

    def dimension_numbers_of(names: tuple[str, ...]) -> Any:
        dims = in_layers(names)
        if dims is None:
            return optax.MaskedNode()
        if dims.rows < dims.columns[0]:
            return contrib.MuonDimensionNumbers(reduction_axis=dims.rows, output_axis=dims.columns)
        return contrib.MuonDimensionNumbers(reduction_axis=dims.columns, output_axis=dims.rows)

    def scale_by_shape(names: tuple[str, ...], update: Array) -> Array:
        """Multiply by sqrt(max(1, fan_out / fan_in)), so that one rate fits every width (Bernstein et al. 2024)."""
        dims = in_layers(names)
        assert dims is not None
        rows, columns = update.shape[dims.rows], math.prod(update.shape[dim] for dim in dims.columns)
        fan_in, fan_out = (rows, columns) if dims.rows < dims.columns[0] else (columns, rows)
        return update * math.sqrt(max(1.0, fan_out / fan_in))

    def scale_all(updates: Any, params: Any) -> Any:
        del params
        return _map_axes(lambda n, u: u if isinstance(u, optax.MaskedNode) else scale_by_shape(n, u), axes, updates)

    dimension_numbers = _map_axes(dimension_numbers_of, axes)
    labels = _map_axes(lambda names: "adam" if in_layers(names) is None else "muon", axes)
    matrices = optax.chain(
        contrib.scale_by_muon(mu_dtype=config.moment_dtype, weight_dimension_numbers=lambda _: dimension_numbers),
        optax.stateless(scale_all),
        optax.scale(config.muon_lr_factor),
    )
    adam = optax.scale_by_adam(config.beta1, config.beta2, mu_dtype=config.moment_dtype)
    return optax.partition({"muon": matrices, "adam": adam}, labels)


def _adafactor(axes: Params) -> optax.GradientTransformation:
    """Return Adafactor's direction, computed for each matrix separately.

    `optax.adafactor` factors the two largest dims of an array, so it does not see kernels as matrices that are stacked
    over layers and split into heads. T5X declares which dims are rows, columns and batches; here the logical axes do.
    """
    direction = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )

    def as_matrices(names: tuple[str, ...], x: Array) -> Array:
        """Reshape to [batch, rows, columns]; a vector to [batch, size]."""
        dims = matrix_dims(names)
        if dims is None:
            return x.reshape(x.shape[0] if names[:1] == ("layers",) else 1, -1)
        batch = math.prod(x.shape[dim] for dim in dims.batch)
        return x.transpose(*dims.batch, dims.rows, *dims.columns).reshape(batch, x.shape[dims.rows], -1)

    def from_matrices(names: tuple[str, ...], matrices: Array, x: Array) -> Array:
        """Invert `as_matrices`, for an array like `x`."""
        dims = matrix_dims(names)
        if dims is None:
            return matrices.reshape(x.shape)
        order = (*dims.batch, dims.rows, *dims.columns)
        ordered = matrices.reshape([x.shape[dim] for dim in order])
        return ordered.transpose([order.index(dim) for dim in range(x.ndim)])

    def init(params: Any) -> Any:
        return _map_axes(lambda names, p: jax.vmap(direction.init)(as_matrices(names, p)), axes, params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        assert params is not None, "Adafactor scales by the size of its parameters"
        matrices, weights = (_map_axes(as_matrices, axes, tree) for tree in (updates, params))
        pairs = _map_axes(lambda _, g, s, p: jax.vmap(direction.update)(g, s, p), axes, matrices, state, weights)
        directions = _map_axes(lambda names, pair, x: from_matrices(names, pair[0], x), axes, pairs, updates)
        return directions, _map_axes(lambda _, pair: pair[1], axes, pairs)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimConfig, steps: int, axes: Params) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a stage: clipping, direction, decoupled decay, schedule, then factors by path.

    Its update takes `value=loss`, which only the plateau schedule reads, and optionally `grad_norm`, the global norm of
    the gradient, if it is already computed.

    Args:
        steps: length of the stage in optimizer steps, for the schedule.
        axes: logical axes of the trained parameters, which tell Muon and Adafactor where the matrices are.

    Raises:
        ValueError: the name of the optimizer or of the schedule is not known.
    """
    schedule, dtype = make_schedule(config.schedule, steps), config.moment_dtype

    def decayed(params: Params) -> Params:
        # DoRA's magnitudes are scales like those of a norm, so they do not decay either.
        return jax.tree.map(lambda excluded: not excluded, path_matches((*config.no_decay, "magnitude$"), params))

    match config.name:
        case "own":
            assert config.own is not None, "`validate` refuses this"
            direction = config.own.make(schedule) if isinstance(config.own, Makes) else config.own(schedule)
        case "adamw":
            direction = optax.scale_by_adam(config.beta1, config.beta2, mu_dtype=dtype)
        case "adafactor":
            direction = _adafactor(axes)
        case "lion":
            direction = optax.scale_by_lion(config.beta1, config.beta2, mu_dtype=dtype)
        case "muon":
            direction = _muon(config, axes)
        case "sgd":
            direction = optax.trace(config.beta1, accumulator_dtype=dtype)
        case _:
            raise ValueError(f"optim.name={config.name!r}; known: adamw, adafactor, lion, muon, sgd")
    core = optax.with_extra_args_support(direction)
    if config.name != "own":
        core = optax.chain(
            direction,
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.scale_by_learning_rate(schedule),
        )
    # `update` below clips. The empty state of the identity keeps the structure that checkpoints have.
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
        # Freezing comes last, so that neither decay nor momentum moves a frozen parameter.
        parts.append(optax.masked(optax.set_to_zero(), functools.partial(path_matches, config.freeze)))
    chain = optax.with_extra_args_support(optax.chain(*parts))

    def update(updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **extra: Any) -> Any:
        if config.clip_norm:  # by global norm (Pascanu et al. 2013)
            scale = jnp.minimum(1.0, config.clip_norm / (global_norm(updates) if grad_norm is None else grad_norm))
            updates = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), updates)
        # optax mixes int counts with floats, and ranks. The tests run our own arithmetic with strict promotion.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = chain.update(updates, state, params, **extra)
        if config.rates:
            updates = jax.tree.map(lambda u, rate: u * jnp.asarray(rate, u.dtype), updates, _rates(config, updates))
        return updates, state

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _rates(config: OptimConfig, params: Params) -> Params:
    """Return a tree of floats, the learning-rate factor of each parameter: the first match in `config.rates`, or 1."""

    def rate(path: Any, _: Any) -> float:
        names = _paths_of(path)
        matching = (float(rate) for pattern, rate in config.rates if any(re.search(pattern, name) for name in names))
        return next(matching, 1.0)

    return jax.tree_util.tree_map_with_path(rate, params)
