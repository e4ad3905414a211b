"""The schema of a run: what can be set, its default, its unit. YAML files and the command line only override.

`load` turns a composed configuration into plain dataclasses, which nobody changes afterwards
(not frozen: OmegaConf would make their nodes read-only and refuse every override).
"""

from rlalign.config.algo import LOSSES, PRESETS, AlgoConfig, CorrectionConfig, CriticConfig, GaeConfig, KlPenaltyConfig
from rlalign.config.reward import DriftConfig, RewardConfig, RewardModelConfig, ScoringServerConfig
from rlalign.config.rollout import RolloutConfig
from rlalign.config.run import RunConfig, compose, load, register_schema, to_plain
from rlalign.config.sections import (
    CheckpointConfig,
    Dtype,
    GateAction,
    HeadDtype,
    LoraConfig,
    MismatchConfig,
    ModelConfig,
    RuleConfig,
    ScheduleConfig,
    ScheduleMode,
    TaskConfig,
    TrackingConfig,
    TrainerConfig,
    WeightsConfig,
)

__all__ = [
    "LOSSES",
    "PRESETS",
    "AlgoConfig",
    "CheckpointConfig",
    "CorrectionConfig",
    "CriticConfig",
    "DriftConfig",
    "Dtype",
    "GaeConfig",
    "GateAction",
    "HeadDtype",
    "KlPenaltyConfig",
    "LoraConfig",
    "MismatchConfig",
    "ModelConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RuleConfig",
    "RunConfig",
    "ScheduleConfig",
    "ScheduleMode",
    "ScoringServerConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainerConfig",
    "WeightsConfig",
    "compose",
    "load",
    "register_schema",
    "to_plain",
]
