"""What a run writes down, how often, and where else it shows."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlalign.config.checks import positive, require

BACKENDS = ("wandb", "tensorboard", "trackio")


@dataclass(kw_only=True)
class TrackingConfig:
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
    replay_every: int = 0  # steps between those that `rlalign replay` can repeat; each saves the weights; 0: never

    def __post_init__(self) -> None:
        unknown = [name for name in self.backends if name not in BACKENDS]
        require(not unknown, f"tracking.backends: unknown {unknown}; choose from {', '.join(BACKENDS)}")
        require(len(set(self.backends)) == len(self.backends), f"tracking.backends={self.backends}: one is there twice")
        require(
            self.wandb in ("auto", "online", "offline", "disabled"),
            f"tracking.wandb={self.wandb!r}: choose auto, online, offline or disabled",
        )
        require(
            0 <= self.prometheus_port < 2**16,
            f"tracking.prometheus_port={self.prometheus_port}: a port is 1 to 65535, and 0 is none",
        )
        positive(self, "tracking", "eval_every", "eval_samples")
        require(self.tokens_every >= 0, f"tracking.tokens_every={self.tokens_every}: cannot be negative")
        require(self.replay_every >= 0, f"tracking.replay_every={self.replay_every}: cannot be negative")
