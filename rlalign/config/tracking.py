"""What a run writes down, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.checks import positive, require


@dataclass(kw_only=True)
class TrackingConfig:
    wandb: str = "auto"  # auto (online when logged in) | online | offline | disabled
    project: str = "rlalign"
    eval_every: int = 10  # steps; the first and the last are always evaluated
    eval_samples: int = 2  # completions of each held-out prompt, sampled as in training
    tokens_every: int = 10  # steps between per-token parquet files; 0: never
    replay_every: int = 0  # steps between those that `rlalign replay` can repeat; each saves the weights; 0: never

    def __post_init__(self) -> None:
        require(
            self.wandb in ("auto", "online", "offline", "disabled"),
            f"tracking.wandb={self.wandb!r}: choose auto, online, offline or disabled",
        )
        positive(self, "tracking", "eval_every", "eval_samples")
        require(self.tokens_every >= 0, f"tracking.tokens_every={self.tokens_every}: cannot be negative")
        require(self.replay_every >= 0, f"tracking.replay_every={self.replay_every}: cannot be negative")
