"""jaxstages: train a language model in three stages (pretrain, fine-tune, instruct), as pure JAX functions.

>>> import jaxstages
>>> recipe = jaxstages.Recipe(name="mine", model=jaxstages.ModelConfig(context=64, layers=2))
>>> recipe.model.layers
2

The names below are the public API; each is imported when it is first used.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from jaxstages.runtime.cpu import avoid_wrong_sums

avoid_wrong_sums()  # before anything imports a module that starts JAX's backend

if TYPE_CHECKING:
    from jaxstages.api import evaluate, generate, load_params, train
    from jaxstages.config import (
        AnchorConfig,
        AttentionConfig,
        DataConfig,
        DatasetConfig,
        EarlyStoppingConfig,
        EvaluationConfig,
        LoopConfig,
        LoraConfig,
        MeshConfig,
        Metric,
        ModelConfig,
        OptimConfig,
        Recipe,
        ScheduleConfig,
        StageConfig,
        TokenizerConfig,
    )
    from jaxstages.data.batches import batches_by_step
    from jaxstages.data.tasks import Encoded, Example, Question
    from jaxstages.generation.eval_step import make_eval_step
    from jaxstages.models.adapters import linen_model, nnx_model
    from jaxstages.models.losses import cross_entropy_loss, cross_entropy_sums
    from jaxstages.models.transformer import make_model
    from jaxstages.training.early_stopping import early_stopping
    from jaxstages.training.optimizer import make_optimizer, make_schedule
    from jaxstages.training.step import init_state, make_train_step
    from jaxstages.types import Batch, Decoder, HiddenAndHead, Model, TrackedStage, Tracker, TrainState

__version__ = importlib.metadata.version("jaxstages")

_CONFIG = (
    *("AnchorConfig", "AttentionConfig", "DataConfig", "DatasetConfig", "EarlyStoppingConfig", "EvaluationConfig"),
    *("LoopConfig", "LoraConfig", "MeshConfig", "Metric", "ModelConfig", "OptimConfig", "Recipe", "ScheduleConfig"),
    *("StageConfig", "TokenizerConfig"),
)

_HOMES = {
    "jaxstages.api": ("evaluate", "generate", "load_params", "train"),
    "jaxstages.config": _CONFIG,
    "jaxstages.data.batches": ("batches_by_step",),
    "jaxstages.data.tasks": ("Encoded", "Example", "Question"),
    "jaxstages.generation.eval_step": ("make_eval_step",),
    "jaxstages.models.adapters": ("linen_model", "nnx_model"),
    "jaxstages.models.losses": ("cross_entropy_loss", "cross_entropy_sums"),
    "jaxstages.models.transformer": ("make_model",),
    "jaxstages.training.early_stopping": ("early_stopping",),
    "jaxstages.training.optimizer": ("make_optimizer", "make_schedule"),
    "jaxstages.training.step": ("init_state", "make_train_step"),
    "jaxstages.types": ("Batch", "Decoder", "HiddenAndHead", "Model", "TrackedStage", "Tracker", "TrainState"),
}
"""Module -> its names in the public API."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AnchorConfig",
    "AttentionConfig",
    "Batch",
    "DataConfig",
    "DatasetConfig",
    "Decoder",
    "EarlyStoppingConfig",
    "Encoded",
    "EvaluationConfig",
    "Example",
    "HiddenAndHead",
    "LoopConfig",
    "LoraConfig",
    "MeshConfig",
    "Metric",
    "Model",
    "ModelConfig",
    "OptimConfig",
    "Question",
    "Recipe",
    "ScheduleConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrackedStage",
    "Tracker",
    "TrainState",
    "batches_by_step",
    "cross_entropy_loss",
    "cross_entropy_sums",
    "early_stopping",
    "evaluate",
    "generate",
    "init_state",
    "linen_model",
    "load_params",
    "make_eval_step",
    "make_model",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "nnx_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'jaxstages' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
