"""The schema of a run: what can be set, its default, its unit. YAML files and the command line only override.

One file a section; `load` turns a composed configuration into plain dataclasses, which nobody changes afterwards
(not frozen: OmegaConf would make their nodes read-only and refuse every override).
"""

from rlalign.config.algo import LOSSES, PRESETS, AlgoConfig, CorrectionConfig
from rlalign.config.checkpoint import CheckpointConfig
from rlalign.config.drift import DriftConfig
from rlalign.config.mismatch import GateAction, MismatchConfig, RuleConfig
from rlalign.config.model import Dtype, HeadDtype, ModelConfig
from rlalign.config.reward import RewardConfig, RewardModelConfig, ScoringServerConfig
from rlalign.config.rollout import RolloutConfig, WeightsConfig
from rlalign.config.run import RunConfig, load, to_plain
from rlalign.config.task import TaskConfig
from rlalign.config.tracking import TrackingConfig
from rlalign.config.trainer import TrainerConfig

__all__ = [
    "LOSSES",
    "PRESETS",
    "AlgoConfig",
    "CheckpointConfig",
    "CorrectionConfig",
    "DriftConfig",
    "Dtype",
    "GateAction",
    "HeadDtype",
    "MismatchConfig",
    "ModelConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RuleConfig",
    "RunConfig",
    "ScoringServerConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainerConfig",
    "WeightsConfig",
    "load",
    "to_plain",
]
