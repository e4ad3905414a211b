"""The whole of a run: its sections, the checks between them, and `load`, the only place that touches OmegaConf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlalign.config.algo import AlgoConfig
from rlalign.config.checkpoint import CheckpointConfig
from rlalign.config.checks import positive, require
from rlalign.config.mismatch import MismatchConfig
from rlalign.config.model import Dtype, HeadDtype, ModelConfig
from rlalign.config.reward import RewardConfig, require_that_it_matters
from rlalign.config.rollout import RolloutConfig, WeightsConfig
from rlalign.config.task import TaskConfig
from rlalign.config.tracking import TrackingConfig
from rlalign.config.trainer import TrainerConfig


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    name: str = "run"
    output_dir: str = "runs/${name}"
    overwrite: bool = False  # True: an older run of that directory is moved aside, never deleted
    seed: int = 0
    steps: int = 100  # batches of rollouts
    head_dtype: HeadDtype = HeadDtype.float32
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        positive(self, "run", "steps")
        require(
            self.head_dtype is not HeadDtype.master
            or (self.model.dtype is not Dtype.float32 and self.rollout.head_mode == "auto"),
            f"head_dtype=master with model.dtype={self.model.dtype.value}, rollout.head_mode={self.rollout.head_mode}: the master "
            "is the fp32 weight behind a bfloat16 body, and has its own way through vLLM; use model.dtype=bfloat16 and "
            "rollout.head_mode=auto, or head_dtype=float32",
        )
        require(
            self.trainer.zero_stage > 0 or self.model.dtype is Dtype.float32,
            "trainer.zero_stage=0 with model.dtype=bfloat16: DeepSpeed then trains the bf16 weights themselves, without an fp32 "
            "master copy (a step of AdamW measured 26 % too small); use zero_stage 1 or 2, or model.dtype=float32",
        )
        samples = self.rollout.prompts_per_step * self.rollout.group_size
        require(
            samples % self.algo.minibatches == 0,
            f"algo.minibatches={self.algo.minibatches} does not divide the {samples} samples of a step "
            "(rollout.prompts_per_step x rollout.group_size)",
        )
        require(
            self.rollout.prompts_per_step <= self.task.train_size,
            f"rollout.prompts_per_step={self.rollout.prompts_per_step} is more than task.train_size={self.task.train_size}",
        )
        require_that_it_matters(self.reward, self.algo)


def load(overrides: Mapping[str, Any]) -> RunConfig:
    """Check a (possibly nested, OmegaConf or plain) mapping against the schema and return the run's configuration.

    Raises ValueError with one readable line: unknown key, wrong type, missing value, impossible combination.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), overrides))
    except OmegaConfBaseException as error:
        raise ValueError(_readable(error)) from error


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as JSON-able data."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)


def _readable(error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"configuration: {key}: {first}" if key else f"configuration: {first}"
