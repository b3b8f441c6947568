"""Which parameters a stage trains: all of them, or low-rank adapters beside a frozen base."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PRNGKeyArray

from jaxstages.config import LoraConfig
from jaxstages.models import lora
from jaxstages.types import Params


class Trainable(NamedTuple):
    """A choice of trained parameters, as functions of trees. Full training is the identity, and its base is ().

    axes: logical axes of the trained parameters.
    base_axes: logical axes of the base.
    freeze: `freeze(params) -> base`, the frozen parameters, in their storage dtype.
    init: `init(key, params, base) -> trained`.
    join: `join(base, trained) -> params`, the parameters that the model computes with.
    export: `export(base, trained) -> params`, plain float32 parameters that compute the same.
    """

    axes: Params
    base_axes: Any
    freeze: Callable[[Params], Any]
    init: Callable[[PRNGKeyArray, Params, Any], Params]
    join: Callable[[Any, Params], Params]
    export: Callable[[Any, Params], Params]


def make_trainable(axes: Params, config: LoraConfig) -> Trainable:
    """Return the adapters that `config` describes, or full training if its rank is 0.

    Args:
        axes: `Model.axes`.

    Raises:
        ValueError: a target of `config` matches no matrix.
    """
    if not config.rank:
        return full_training(axes)
    return Trainable(
        axes=lora.adapter_axes(axes, config),
        base_axes=lora.base_axes(axes, config.base),
        freeze=lambda params: lora.quantize_base(params, axes, config.base),
        init=lambda key, _params, base: lora.init(key, base, axes, config),
        join=lambda base, adapters: lora.apply_adapters(base, adapters, config),
        export=lambda base, adapters: lora.merge(base, adapters, config),
    )


def full_training(axes: Params) -> Trainable:
    """Train every parameter."""
    return Trainable(
        axes=axes,
        base_axes=(),
        freeze=lambda _params: (),
        init=lambda _key, params, _base: params,
        join=lambda _base, params: params,
        export=lambda _base, params: params,
    )
