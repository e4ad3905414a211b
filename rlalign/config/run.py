"""The whole of a run: its sections, the checks between them, the shipped configurations composed by Hydra, and `load`.

The only place that touches Hydra and OmegaConf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from rlalign.config.algo import PRESETS, AlgoConfig
from rlalign.config.reward import RewardConfig, require_that_it_matters
from rlalign.config.rollout import RolloutConfig
from rlalign.config.sections import (
    WIRE_TRANSPORTS,
    CheckpointConfig,
    Dtype,
    HeadDtype,
    MismatchConfig,
    ModelConfig,
    ScheduleConfig,
    ScheduleMode,
    TaskConfig,
    TrackingConfig,
    TrainerConfig,
    WeightsConfig,
    positive,
    require,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig


def require_exact_possible(head_dtype: HeadDtype, rollout: RolloutConfig, trainer: TrainerConfig) -> None:
    """Raise ValueError naming what stands against `exact: true`."""
    require(
        head_dtype is HeadDtype.float32,
        f"exact=true with head_dtype={head_dtype.value}: exact mode computes float32 logits from the published weights on both "
        "sides; use head_dtype=float32",
    )
    require(
        rollout.tensor_parallel_size == 1,
        f"exact=true with rollout.tensor_parallel_size={rollout.tensor_parallel_size}: the all-reduce adds partial products in "
        "another order than one trainer does; use 1",
    )
    require(
        rollout.enforce_eager and rollout.head_mode == "auto",
        f"exact=true with rollout.enforce_eager={rollout.enforce_eager}, rollout.head_mode={rollout.head_mode}: a compiled model "
        "rearranges the sums that exact mode fixes, and its head is its own; use enforce_eager=true and head_mode=auto",
    )
    require(
        trainer.lora.rank == 0,
        f"exact=true with trainer.lora.rank={trainer.lora.rank}: adapters are merged in the engine, not in the trainer; use rank=0",
    )
    require(
        trainer.pack_tokens == 0 and trainer.attention in ("auto", "sdpa"),
        f"exact=true with trainer.pack_tokens={trainer.pack_tokens}, trainer.attention={trainer.attention}: exact mode has an "
        "attention of its own, over padded rows; use pack_tokens=0 and attention=auto",
    )


def require_mirrored_possible(
    head_dtype: HeadDtype, model: ModelConfig, rollout: RolloutConfig, trainer: TrainerConfig
) -> None:
    """Raise ValueError naming what stands against `trainer.body=mirrored`."""
    require(
        head_dtype is not HeadDtype.model,
        "trainer.body=mirrored with head_dtype=model: 16-bit heads alone differ by more than the bodies; use head_dtype=float32",
    )
    require(
        model.dtype is Dtype.bfloat16,
        f"trainer.body=mirrored with model.dtype={model.dtype.value}: it is about where 16 bits are rounded; use body=model",
    )
    require(
        rollout.tensor_parallel_size == 1,
        f"trainer.body=mirrored with rollout.tensor_parallel_size={rollout.tensor_parallel_size}: the all-reduce adds and rounds "
        "partial products, one trainer does not; use 1",
    )
    require(
        rollout.enforce_eager,
        "trainer.body=mirrored with rollout.enforce_eager=false: a compiled engine fuses operations and rounds elsewhere; use "
        "rollout.enforce_eager=true",
    )
    require(
        trainer.lora.rank == 0,
        f"trainer.body=mirrored with trainer.lora.rank={trainer.lora.rank}: adapters are merged in the engine, not in the trainer; "
        "use trainer.body=model",
    )
    require(
        trainer.attention in ("auto", "sdpa"),
        f"trainer.body=mirrored with trainer.attention={trainer.attention}: a mirrored body attends through the engine's kernel; "
        "use trainer.attention=auto",
    )


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    name: str = "run"
    output_dir: str = "runs/${name}"
    overwrite: bool = False  # True: an older run of that directory is moved aside, never deleted
    seed: int = 0
    steps: int = 100  # batches of rollouts
    head_dtype: HeadDtype = HeadDtype.float32
    exact: bool = False  # both sides compute with rlalign.head.exact, equal in every bit: CPU, slow, for diagnosis
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
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

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
            self.head_dtype is not HeadDtype.master or self.trainer.lora.rank == 0,
            f"head_dtype=master with trainer.lora.rank={self.trainer.lora.rank}: the lm_head is frozen, its weight has no other "
            "master than itself; use head_dtype=float32",
        )
        require(
            self.trainer.zero_stage > 0 or self.model.dtype is Dtype.float32,
            "trainer.zero_stage=0 with model.dtype=bfloat16: DeepSpeed then trains the bf16 weights themselves, without an fp32 "
            "master copy (a step of AdamW measured 26 % too small); use zero_stage 1 or 2, or model.dtype=float32",
        )
        require(
            self.rollout.group_size >= 2 or self.algo.advantage == "gae",
            f"rollout.group_size={self.rollout.group_size}: group-relative advantages need at least 2 samples of a prompt "
            "(algo.advantage=gae does with one)",
        )
        require(
            self.trainer.pack_tokens == 0 or self.trainer.pack_tokens >= self.rollout.max_model_len,
            f"trainer.pack_tokens={self.trainer.pack_tokens} is less than one sequence may have (rollout.max_model_len="
            f"{self.rollout.max_model_len}), so it would bound no memory; choose at least that, or 0 for padded rows",
        )
        require(
            self.mismatch.accept_k3 == 0
            or (self.schedule.mode is ScheduleMode.synchronous and self.algo.advantage == "group"),
            f"mismatch.accept_k3={self.mismatch.accept_k3} with schedule.mode={self.schedule.mode.value}, algo.advantage="
            f"{self.algo.advantage}: an update is taken back before anybody samples with it, and a critic is not taken back with "
            "the policy; use schedule.mode=synchronous and algo.advantage=group",
        )
        self._check_sizes()
        require_that_it_matters(self.reward, self.algo)
        self._check_schedule()
        require(
            not self.exact or self.trainer.body != "mirrored",
            "exact=true with trainer.body=mirrored: choose one; exact computes both sides anew, mirrored follows the engine",
        )
        self.exact = self.exact or self.trainer.body == "exact"
        if self.exact:
            require_exact_possible(self.head_dtype, self.rollout, self.trainer)
        if self.mirrored:
            require_mirrored_possible(self.head_dtype, self.model, self.rollout, self.trainer)

    def _check_sizes(self) -> None:
        samples = self.rollout.prompts_per_step * self.rollout.group_size
        require(
            self.algo.kl_penalty.target == 0 or samples < 5 * self.algo.kl_penalty.horizon,
            f"algo.kl_penalty.horizon={self.algo.kl_penalty.horizon} with {samples} samples a step: "
            "coef could fall to 0 or below in one step; choose a horizon of at least as many sequences as a step has",
        )
        require(
            samples % self.algo.minibatches == 0,
            f"algo.minibatches={self.algo.minibatches} does not divide the {samples} samples of a step "
            "(rollout.prompts_per_step x rollout.group_size)",
        )
        require(
            self.rollout.prompts_per_step <= self.task.train_size,
            f"rollout.prompts_per_step={self.rollout.prompts_per_step} is more than task.train_size={self.task.train_size}",
        )
        require(
            self.weights.transport not in WIRE_TRANSPORTS or self.rollout.backend == "server",
            f"weights.transport={self.weights.transport} with rollout.backend={self.rollout.backend}: the embedded engine would "
            "receive inside the process that sends; use weights.transport=shared_memory, or rollout.backend=server",
        )

    def _check_schedule(self) -> None:
        require(
            self.schedule.mode is not ScheduleMode.in_flight or self.rollout.backend == "server",
            f"schedule.mode=in_flight with rollout.backend={self.rollout.backend}: only servers change their weights under running "
            "requests; use rollout.backend=server, or schedule.mode=one_step_off",
        )
        require(
            self.schedule.mode is ScheduleMode.synchronous or not self.algo.correction.off or self.schedule.uncorrected,
            f"schedule.mode={self.schedule.mode.value} without algo.correction: tokens that an older policy sampled would be "
            "trained on as if the current one had; set algo.correction.preset=tis (or algo=tis; docs/losses.md has the others), or "
            "schedule.uncorrected=true where that is what you want to see",
        )
        require(
            self.schedule.mode is ScheduleMode.synchronous or self.tracking.replay_every == 0,
            f"tracking.replay_every={self.tracking.replay_every} with schedule.mode={self.schedule.mode.value}: a step is "
            "repeated with the weights it trained, and these tokens were sampled by older ones; use schedule.mode=synchronous",
        )

    @property
    def mirrored(self) -> bool:
        """Does the trainer's body follow the engine's roundings, and the engine keep to one order of additions?"""
        return self.trainer.body == "mirrored"


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The shipped Hydra configuration with overrides applied. Raises ValueError with one readable line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    try:
        with initialize_config_module("rlalign.configs", version_base="1.3"):
            return hydra_compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"configuration: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line that says something: Hydra keeps the reason in the cause and appends search paths and advice."""
    what = str(error).split("Config search path")[0].split("To append to your config")[0]
    why = str(error.__cause__ or "").split("\n")[0]
    return f"{' '.join(what.split()).rstrip('.')}{': ' if why else ''}{why}"


@cache
def register_schema() -> None:
    """Give Hydra the dataclasses, so that unknown keys and wrong types are refused while composing, and `correction=PRESET`.

    It stands beside `algo=NAME`, so that a loss and a correction can both be said.
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    for name in ("none", *PRESETS):  # none: what `algo` says stays
        chosen = {} if name == "none" else {"preset": name}
        store.store(group="correction", name=name, node=chosen, package="algo.correction")


def load(overrides: Mapping[str, Any]) -> RunConfig:
    """Check a (possibly nested, OmegaConf or plain) mapping against the schema and return the run's configuration.

    Raises ValueError with one readable line: unknown key, wrong type, missing value, impossible combination.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if OmegaConf.is_config(overrides):  # a key that +key=value added would pass as part of the schema
            overrides = cast("dict[str, Any]", OmegaConf.to_container(overrides, resolve=False))
        return cast("RunConfig", OmegaConf.to_object(OmegaConf.merge(_schema(), overrides)))
    except OmegaConfBaseException as error:
        raise ValueError(_readable(error)) from error


@cache
def _schema() -> Any:
    """The schema as OmegaConf has it, made once: a merge copies its first operand."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(RunConfig)


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as JSON-able data."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    return cast("dict[str, Any]", plain)


def _readable(error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"configuration: {key}: {first}" if key else f"configuration: {first}"
