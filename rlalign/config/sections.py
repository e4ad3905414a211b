"""The smaller sections of a run. Each refuses what it can see by itself, with one readable line that names the key."""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"configuration: {message}")


def positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(value > 0, f"{prefix}.{name}={value}: must be positive")


def one_of(section: object, prefix: str, name: str, choices: Collection[str]) -> None:
    value = getattr(section, name)
    require(value in choices, f"{prefix}.{name}={value!r}: choose one of {', '.join(choices)}")


def not_negative(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(value >= 0, f"{prefix}.{name}={value}: cannot be negative")


class HeadDtype(enum.Enum):
    """Dtype of the logits on both sides. There is one for the run: a one-sided float32 head can be worse than none."""

    float32 = "float32"
    master = "master"  # float32 with the optimizer's unrounded fp32 lm_head on both sides; 16-bit bodies only
    model = "model"  # the body's dtype: rlalign's head is off


class Dtype(enum.Enum):
    """Dtype of the model's body, on both sides."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(kw_only=True)
class ModelConfig:
    """The model: where it is, and its dtype."""

    path: str = "???"  # Hugging Face folder, or tiny:untied / tiny:tied (built and cached on first use)
    dtype: Dtype = Dtype.bfloat16


class ScheduleMode(enum.Enum):
    """When completions are sampled, and with which weights."""

    synchronous = "synchronous"  # sample, train, publish, in turn: every token has lag 0
    one_step_off = "one_step_off"  # the next step's are sampled while this one trains; publishing waits for them
    in_flight = "in_flight"  # weights change under running requests; servers only


@dataclass(kw_only=True)
class ScheduleConfig:
    """Outside `synchronous` tokens are older than the policy they train: algo.correction is asked for."""

    mode: ScheduleMode = ScheduleMode.synchronous
    max_lag: int = 1  # steps that sampling may run ahead of the published weights; more than 1 with in_flight only
    uncorrected: bool = False  # train on older tokens without algo.correction, as if they were the current policy's
    k3_limit: float = 0.1  # nats per token: old against rollout on tokens of older versions; mismatch.action past it
    probe_every: int = 10  # steps between samples at lag 0, which alone measure the engine mismatch; 0: never
    probe_prompts: int = 4  # one completion each; rounded up to a multiple of the trainer ranks

    def __post_init__(self) -> None:
        positive(self, "schedule", "max_lag", "k3_limit", "probe_prompts")
        require(
            self.mode is ScheduleMode.in_flight or self.max_lag == 1,
            f"schedule.max_lag={self.max_lag} with schedule.mode={self.mode.value}: only in_flight samples further ahead "
            "than one step",
        )
        not_negative(self, "schedule", "probe_every")


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints: how often, how many, and whether a run goes on from one."""

    every: int = 0  # steps; 0: only when a signal (SIGTERM, SIGUSR1) ends the run
    keep: int = 2  # newest ones kept; an older one goes only when a newer one is complete
    resume: str = "never"  # never | auto (from the newest whole checkpoint, else from the start) | must
    accept_changes: bool = False  # resume although the configuration differs from the checkpoint's

    def __post_init__(self) -> None:
        not_negative(self, "checkpoint", "every")
        require(self.keep >= 1, f"checkpoint.keep={self.keep}: at least one must stay")
        one_of(self, "checkpoint", "resume", ("never", "auto", "must"))


@dataclass(kw_only=True)
class TaskConfig:
    """The task: prompts and their verifier."""

    name: str = "???"  # reasoning-gym task, jsonl:FILE or hf:DATASET
    params: dict[str, Any] = field(default_factory=dict)  # the task's own parameters
    train_size: int = 512  # distinct prompts
    chat_template: bool = False  # wrap each prompt in the tokenizer's chat template
    eval_size: int = 128  # distinct prompts, none of them in the training split
    seed: int = 0
    # answers between turns: calculator | higher_lower | module:attribute; "": one answer, no turns
    environment: str = ""
    max_turns: int = 8  # answers of one conversation
    turn_timeout_s: float = 60.0  # of one answer of the environment; afterwards the conversation has no reward
    unusable_prompts: str = "stop"  # stop | drop: those too long for the engine, all looked at before the first step

    def __post_init__(self) -> None:
        positive(self, "task", "train_size", "eval_size", "max_turns", "turn_timeout_s")
        require(
            not (self.environment and self.chat_template),
            f"task.environment={self.environment!r} with task.chat_template=true: its messages always go through the tokenizer's "
            "chat template; leave task.chat_template out",
        )
        one_of(self, "task", "unusable_prompts", ("stop", "drop"))


BACKENDS = {  # of tracking, each in rlalign.tracking.NAME_run: the package it needs, and the extra of ours that brings it
    "wandb": ("wandb", "train"), "tensorboard": ("tensorboard", "tensorboard"), "trackio": ("trackio", "trackio"),
}  # fmt: skip


@dataclass(kw_only=True)
class TrackingConfig:
    """What a run writes down, how often, and where else it shows."""

    backends: list[str] = field(
        default_factory=lambda: ["wandb"]
    )  # any of wandb, tensorboard, trackio; [] for the files alone
    wandb: str = "auto"  # auto (online when logged in) | online | offline | disabled
    project: str = "rlalign"
    group: str = ""  # runs of one experiment, such as both sides of an A/B (wandb, trackio)
    job_type: str = ""  # what this run is in its group, such as baseline (wandb)
    tags: list[str] = field(default_factory=list)  # wandb
    prometheus_port: int = 0  # GET /metrics while the run lives; 0: none
    prometheus_host: str = "127.0.0.1"  # 0.0.0.0 for scrapers on other machines
    eval_every: int = 10  # steps; the first and the last are always evaluated
    eval_samples: int = 2  # completions of each held-out prompt, sampled as in training
    tokens_every: int = 10  # steps between per-token parquet files; 0: never
    trace_every: int = 0  # steps between looks at what a growing mismatch may follow (trace/*); 0: never
    replay_every: int = 0  # steps between those that `rlalign replay` can repeat; each saves the weights; 0: never

    def __post_init__(self) -> None:
        unknown = [name for name in self.backends if name not in BACKENDS]
        require(not unknown, f"tracking.backends: unknown {unknown}; choose from {', '.join(BACKENDS)}")
        require(len(set(self.backends)) == len(self.backends), f"tracking.backends={self.backends}: one is there twice")
        one_of(self, "tracking", "wandb", ("auto", "online", "offline", "disabled"))
        require(
            0 <= self.prometheus_port < 2**16,
            f"tracking.prometheus_port={self.prometheus_port}: a port is 1 to 65535, and 0 is none",
        )
        positive(self, "tracking", "eval_every", "eval_samples")
        not_negative(self, "tracking", "tokens_every", "trace_every", "replay_every")


FILE_TRANSPORTS = ("shared_memory", "folder")


WIRE_TRANSPORTS = ("gloo", "nccl")


MEMORY_OF_ONE_BOX = "/dev/shm"


@dataclass(kw_only=True)
class WeightsConfig:
    """Where and how published weights travel from the trainer to the rollout engines."""

    transport: str = "shared_memory"  # shared_memory (one box) | folder (a shared filesystem) | gloo (CPU) | nccl (GPU)
    # shared_memory, folder: where buckets lie; every rollout rank must be able to read it
    shared: str = MEMORY_OF_ONE_BOX
    # MiB carried at once; a larger tensor is a bucket of its own. At most two exist at any moment
    bucket_mib: int = 256
    timeout_s: float = 120.0  # longest wait for one bucket, for a worker to join, for a file to be seen on another node
    address: str = ""  # gloo, nccl: the first trainer rank's host as the rollout nodes reach it; empty: found
    port: int = 0  # gloo, nccl: TCP port on that host where the workers meet; 0: any free one

    def __post_init__(self) -> None:
        positive(self, "weights", "bucket_mib", "timeout_s")
        one_of(self, "weights", "transport", FILE_TRANSPORTS + WIRE_TRANSPORTS)
        require(
            self.transport != "folder" or self.shared != MEMORY_OF_ONE_BOX,
            f"weights.transport=folder with weights.shared={self.shared}: that is the memory of one box; name a folder of a "
            "filesystem that every node mounts, or use weights.transport=shared_memory",
        )
        require(0 <= self.port < 2**16, f"weights.port={self.port}: a TCP port is 1 to 65535; 0 takes any free one")


class GateAction(enum.Enum):
    """What happens when a limit is passed."""

    stop = "stop"
    warn = "warn"


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
        one_of(self, "mismatch.rules", "action", actions)


@dataclass(kw_only=True)
class MismatchConfig:
    """What is done about a mismatch that is too large: the gate and the rules of the monitor."""

    k3_limit: float = 1e-2  # nats per token; checked on every batch before it is trained on
    action: GateAction = GateAction.stop
    # nats per token on held-out completions of the updated weights; past it the update is undone; 0: off
    accept_k3: float = 0.0
    accept_prompts: int = 8  # of those completions, one of each prompt
    head_every: int = 10  # steps between measurements of the head in isolation; 0: never
    floor: str = ""  # file of `rlalign parity --noise-floor --json FILE`: logs mismatch/excess/* beyond it
    rules: list[RuleConfig] = field(default_factory=list)  # of the monitor over steps; empty: its defaults

    def __post_init__(self) -> None:
        positive(self, "mismatch", "k3_limit", "accept_prompts")
        not_negative(self, "mismatch", "accept_k3", "head_every")


@dataclass(kw_only=True)
class LoraConfig:
    rank: int = 0  # of each adapter; 0: the whole model is trained
    alpha: float = 32.0  # an adapter's product is scaled by alpha / rank
    rank_stabilised: bool = False  # by alpha / sqrt(rank) instead, arXiv 2312.03732
    dropout: float = 0.0  # of an adapter's input, in forward_backward alone: scoring has none, so ratios start off 1
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # endings of module names; all but the lm_head

    def __post_init__(self) -> None:
        positive(self, "trainer.lora", "alpha")
        not_negative(self, "trainer.lora", "rank")
        require(0.0 <= self.dropout < 1.0, f"trainer.lora.dropout={self.dropout}: must be at least 0 and below 1")
        require(
            bool(self.targets) and ("all-linear" not in self.targets or len(self.targets) == 1),
            f"trainer.lora.targets={self.targets}: give endings of module names such as q_proj, or all-linear alone",
        )


BODIES = ("model", "mirrored", "exact")


ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(kw_only=True)
class TrainerConfig:
    """The trainer: DeepSpeed and its optimizer."""

    zero_stage: int = 1  # DeepSpeed ZeRO 1, 2 or 3; 0 with a float32 body only
    micro_batch_size: int = 16  # sequences in one forward, where rows are padded
    pack_tokens: int = 0  # tokens in one forward, in a row without padding; 0: padded rows
    # auto: transformers' choice (sdpa), eager where that would drop a soft cap; or one of ATTENTION by name
    attention: str = "auto"
    # model: as transformers rounds; mirrored: where the rollout engine rounds (CPU, bf16); exact: the same as exact=true
    body: str = "model"
    grad_clip: float = 1.0  # 2-norm
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_checkpointing: bool = False  # recompute activations in the backward pass instead of keeping them
    threads: int = 0  # torch threads; 0 leaves torch's choice. Two busy cores are faster with 1
    logprob_chunk: int = 0  # tokens projected at once; 0 chooses
    logprob_keep_mib: int = 0  # MiB of logits kept from the forward to the backward pass; 0 forms all of them again
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        positive(self, "trainer", "micro_batch_size", "grad_clip")
        require(self.zero_stage in (0, 1, 2, 3), f"trainer.zero_stage={self.zero_stage}: choose 0, 1, 2 or 3")
        one_of(self, "trainer", "body", BODIES)
        one_of(self, "trainer", "attention", ATTENTION)
        not_negative(self, "trainer", "threads", "logprob_chunk", "logprob_keep_mib", "pack_tokens")
