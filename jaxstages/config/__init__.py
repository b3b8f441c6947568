"""Recipes as typed dataclasses, with the bounds of each field next to it, and their conversion to JSON."""

from jaxstages.config.data import TASKS, CleanConfig, DataConfig, DuplicatesConfig, TokenizerConfig
from jaxstages.config.mesh import MeshConfig, RulesConfig
from jaxstages.config.model import AttentionConfig, ExpertsConfig, ModelConfig, RopeScalingConfig
from jaxstages.config.optimizer import OptimConfig, ScheduleConfig
from jaxstages.config.parts import Metric, Part
from jaxstages.config.recipe import (
    CHECKPOINTED_STAGES,
    EARLIER,
    IMPORT,
    STAGES,
    AnchorConfig,
    DatasetConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    LoopConfig,
    LoraConfig,
    Recipe,
    StageConfig,
    all_metrics,
    builtin_model,
    stage_number,
    stages,
)
from jaxstages.config.serialize import check_type, differences, flat_fields, from_dict, lora_from, own_parts, to_dict

__all__ = [
    "AnchorConfig",
    "AttentionConfig",
    "CleanConfig",
    "DataConfig",
    "DatasetConfig",
    "DuplicatesConfig",
    "EARLIER",
    "EarlyStoppingConfig",
    "EvaluationConfig",
    "ExpertsConfig",
    "CHECKPOINTED_STAGES",
    "IMPORT",
    "LoopConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "RopeScalingConfig",
    "RulesConfig",
    "STAGES",
    "ScheduleConfig",
    "StageConfig",
    "TASKS",
    "TokenizerConfig",
    "check_type",
    "differences",
    "flat_fields",
    "from_dict",
    "lora_from",
    "Metric",
    "Part",
    "all_metrics",
    "builtin_model",
    "own_parts",
    "stage_number",
    "stages",
    "to_dict",
]
