"""The schema of a run: what can be set, its default, its unit. YAML files and the command line only override.

`load()` is the only place that touches OmegaConf; everything behind it sees these plain dataclasses and never changes them
(not frozen: OmegaConf would make their nodes read-only and refuse every override).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class HeadDtype(enum.Enum):
    """Dtype of the logits on both sides. There is one for the run: a one-sided float32 head can be worse than none."""

    float32 = "float32"
    master = "master"  # float32 with the optimizer's unrounded fp32 lm_head on both sides; 16-bit bodies only
    model = "model"  # the body's dtype: rlalign's head is off


class Dtype(enum.Enum):
    """Dtype of the model's body, on both sides."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class GateAction(enum.Enum):
    """What happens when a limit is passed."""

    stop = "stop"
    warn = "warn"


@dataclass(kw_only=True)
class ModelConfig:
    path: str = "???"  # Hugging Face folder, or tiny:untied / tiny:tied (built and cached on first use)
    dtype: Dtype = Dtype.bfloat16


@dataclass(kw_only=True)
class RolloutConfig:
    prompts_per_step: int = 16
    group_size: int = 8  # completions of one prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    max_tokens: int = 512  # sampled tokens of one completion
    max_model_len: int = 2048  # prompt + completion, tokens
    max_num_seqs: int = 128  # sequences the engine decodes at once
    max_num_batched_tokens: int = (
        0  # tokens of one engine step; 0: vLLM's choice. Below max_model_len prefills are chunked
    )
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.4  # the trainer shares the device
    cpu_kv_cache_gib: int = 1
    enforce_eager: bool = False
    prefix_caching: bool = True
    head_mode: str = "auto"  # auto | native | cached: how vLLM reaches float32 logits

    def __post_init__(self) -> None:
        _positive(
            self, "rollout", "prompts_per_step", "max_tokens", "max_model_len", "max_num_seqs", "tensor_parallel_size"
        )
        _require(
            self.group_size >= 2,
            f"rollout.group_size={self.group_size}: group-relative advantages need at least 2 samples",
        )
        _require(
            self.temperature > 0,
            f"rollout.temperature={self.temperature}: must be positive; greedy rollouts carry no exploration and no usable ratio",
        )
        _require(
            self.top_p == 1.0 and self.top_k == 0 and self.min_p == 0.0,
            f"rollout.top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p}: a truncated sampler renormalises over tokens "
            "that the trainer cannot see, so every ratio would be biased; use top_p=1, top_k=0, min_p=0",
        )
        _require(
            self.max_tokens < self.max_model_len,
            f"rollout.max_tokens={self.max_tokens} leaves no room for a prompt in rollout.max_model_len={self.max_model_len}",
        )
        _require(
            self.head_mode in ("auto", "native", "cached"),
            f"rollout.head_mode={self.head_mode!r}: choose auto, native or cached",
        )


@dataclass(kw_only=True)
class TrainerConfig:
    zero_stage: int = 1  # DeepSpeed ZeRO 1 or 2; 0 with a float32 body only
    micro_batch_size: int = 16  # sequences in one forward
    grad_clip: float = 1.0  # 2-norm
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    threads: int = 0  # torch threads; 0 leaves torch's choice. Two busy cores are faster with 1
    logprob_chunk: int = 0  # tokens projected at once; 0 chooses

    def __post_init__(self) -> None:
        _positive(self, "trainer", "micro_batch_size", "grad_clip")
        _require(
            self.zero_stage in (0, 1, 2), f"trainer.zero_stage={self.zero_stage}: 0, 1 or 2 (3 is not supported yet)"
        )
        _require(
            self.threads >= 0 and self.logprob_chunk >= 0,
            "trainer.threads and trainer.logprob_chunk cannot be negative",
        )


@dataclass(kw_only=True)
class TaskConfig:
    name: str = "???"  # reasoning-gym task, jsonl:FILE or hf:DATASET
    params: dict[str, Any] = field(default_factory=dict)  # the task's own parameters
    train_size: int = 512  # distinct prompts
    chat_template: bool = False  # wrap each prompt in the tokenizer's chat template
    eval_size: int = 128  # distinct prompts, none of them in the training split
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "task", "train_size", "eval_size")


PRESETS = {  # and the bounds each of them takes
    "tis": ("high",),
    "icepop": ("low", "high"),
    "mis": ("high",),
    "seq_tis": ("high",),
    "geo_mask": ("low", "high"),
    "veto": ("low",),
    "opsm": (),
    "dppo_tv": ("low", "high"),
    "m2po": (),
}
LOSSES = ("grpo", "grpo_sequence", "dr_grpo", "dapo", "gspo", "cispo", "ppo")


@dataclass(kw_only=True)
class CorrectionConfig:
    """A preset by name, or a level and a mode; see rlalign.presets and rlalign.corrections.correct. Off: weights of one."""

    preset: str = ""  # tis | icepop | mis | seq_tis | geo_mask | veto | opsm | dppo_tv | m2po
    level: str = ""  # token | sequence | geometric | segment
    mode: str = ""  # truncate | clip | mask
    low: float | None = None  # bounds on the ratio old / rollout; a preset's own where not given
    high: float | None = None
    veto: float | None = None  # with level and mode: a token ratio under this rejects its sequence
    normalize: bool = False  # with level and mode: weights divided by their mean over the batch

    @property
    def off(self) -> bool:
        """True when nothing was asked for."""
        return not (self.preset or self.level or self.mode)

    def __post_init__(self) -> None:
        _require(
            bool(self.level) == bool(self.mode) and not (self.preset and self.level),
            f"algo.correction: give either a preset or both level and mode, got preset={self.preset!r}, "
            f"level={self.level!r}, mode={self.mode!r}",
        )
        _require(
            not self.off or (self.low, self.high, self.veto, self.normalize) == (None, None, None, False),
            "algo.correction: bounds are set, but neither a preset nor level and mode",
        )
        if self.preset:
            _require(
                self.preset in PRESETS, f"algo.correction.preset={self.preset!r}: choose one of {', '.join(PRESETS)}"
            )
            _require(
                self.veto is None and not self.normalize,
                "algo.correction: veto and normalize go with level and mode; presets are fixed recipes",
            )
            for name in ("low", "high"):
                _require(
                    getattr(self, name) is None or name in PRESETS[self.preset],
                    f"algo.correction.{name}: the preset {self.preset} has no such bound "
                    f"(it takes {', '.join(PRESETS[self.preset]) or 'none'})",
                )


@dataclass(kw_only=True)
class AlgoConfig:
    loss: str = "grpo"  # grpo | grpo_sequence | dr_grpo | dapo | gspo | cispo | ppo
    lr: float = 1e-6
    warmup_steps: int = 0  # linear, optimizer steps
    minibatches: int = 1  # optimizer steps on one batch of rollouts
    clip_low: float | None = None  # the loss's own default where not given
    clip_high: float | None = None
    kl_coef: float = 0.0  # k3 to the initial policy; 0: no reference model is kept
    normalize_std: bool = True  # divide advantages by the group's standard deviation (False: Dr. GRPO)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)

    def __post_init__(self) -> None:
        _positive(self, "algo", "minibatches")
        _require(self.loss in LOSSES, f"algo.loss={self.loss!r}: choose one of {', '.join(LOSSES)}")
        _require(self.lr >= 0, f"algo.lr={self.lr}: cannot be negative (0 is the weight-sync self-test)")
        _require(self.kl_coef >= 0 and self.warmup_steps >= 0, "algo.kl_coef and algo.warmup_steps cannot be negative")
        _require(
            self.kl_coef == 0 or self.loss in ("grpo", "grpo_sequence", "dr_grpo"),
            f"algo.kl_coef={self.kl_coef}: algo.loss={self.loss} has no reference term",
        )


@dataclass(kw_only=True)
class RuleConfig:
    """One rule of the monitor; see rlalign.mismatch.monitor.Rule."""

    metric: str = "???"  # a logged key, such as mismatch/lag0/p99 or mismatch/excess/k3
    limit: float = "???"  # type: ignore[assignment]
    above: bool = True  # alert over the limit; False: under it
    window: int = 5  # steps whose median is judged
    release: float | None = None  # where the alert ends; the limit itself when not given
    action: str = "warn"  # log | warn | stop | checkpoint+stop

    def __post_init__(self) -> None:
        actions = ("log", "warn", "stop", "checkpoint+stop")
        _require(self.action in actions, f"mismatch.rules: action={self.action!r}: choose one of {', '.join(actions)}")


@dataclass(kw_only=True)
class MismatchConfig:
    k3_limit: float = 1e-2  # nats per token; checked on every batch before it is trained on
    action: GateAction = GateAction.stop
    head_every: int = 10  # steps between measurements of the head in isolation; 0: never
    floor: str = ""  # file of `rlalign parity --noise-floor --json FILE`: logs mismatch/excess/* beyond it
    rules: list[RuleConfig] = field(default_factory=list)  # of the monitor over steps; empty: its defaults

    def __post_init__(self) -> None:
        _positive(self, "mismatch", "k3_limit")
        _require(self.head_every >= 0, f"mismatch.head_every={self.head_every}: cannot be negative")


@dataclass(kw_only=True)
class TrackingConfig:
    wandb: str = "auto"  # auto (online when logged in) | online | offline | disabled
    project: str = "rlalign"
    eval_every: int = 10  # steps; the first and the last are always evaluated
    eval_samples: int = 2  # completions of each held-out prompt, sampled as in training
    tokens_every: int = 10  # steps between per-token parquet files; 0: never

    def __post_init__(self) -> None:
        _require(
            self.wandb in ("auto", "online", "offline", "disabled"),
            f"tracking.wandb={self.wandb!r}: choose auto, online, offline or disabled",
        )
        _positive(self, "tracking", "eval_every", "eval_samples")
        _require(self.tokens_every >= 0, f"tracking.tokens_every={self.tokens_every}: cannot be negative")


@dataclass(kw_only=True)
class WeightsConfig:
    shared: str = "/dev/shm"  # folder every rollout rank can read; holds one copy of the weights during a publish


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
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)

    def __post_init__(self) -> None:
        _positive(self, "run", "steps")
        _require(
            self.head_dtype is not HeadDtype.master
            or (self.model.dtype is not Dtype.float32 and self.rollout.head_mode == "auto"),
            f"head_dtype=master with model.dtype={self.model.dtype.value}, rollout.head_mode={self.rollout.head_mode}: the master "
            "is the fp32 weight behind a bfloat16 body, and has its own way through vLLM; use model.dtype=bfloat16 and "
            "rollout.head_mode=auto, or head_dtype=float32",
        )
        _require(
            self.trainer.zero_stage > 0 or self.model.dtype is Dtype.float32,
            "trainer.zero_stage=0 with model.dtype=bfloat16: DeepSpeed then trains the bf16 weights themselves, without an fp32 "
            "master copy (a step of AdamW measured 26 % too small); use zero_stage 1 or 2, or model.dtype=float32",
        )
        samples = self.rollout.prompts_per_step * self.rollout.group_size
        _require(
            samples % self.algo.minibatches == 0,
            f"algo.minibatches={self.algo.minibatches} does not divide the {samples} samples of a step "
            "(rollout.prompts_per_step x rollout.group_size)",
        )
        _require(
            self.rollout.prompts_per_step <= self.task.train_size,
            f"rollout.prompts_per_step={self.rollout.prompts_per_step} is more than task.train_size={self.task.train_size}",
        )


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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"configuration: {message}")


def _positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value > 0, f"{prefix}.{name}={value}: must be positive")
