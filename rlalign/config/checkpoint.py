"""Checkpoints: how often, how many, and whether a run goes on from one."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.checks import require


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 0  # steps; 0: only when a signal (SIGTERM, SIGUSR1) ends the run
    keep: int = 2  # newest ones kept; an older one goes only when a newer one is complete
    resume: str = "never"  # never | auto (from the newest whole checkpoint, else from the start) | must
    accept_changes: bool = False  # resume although the configuration differs from the checkpoint's

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every={self.every}: cannot be negative")
        require(self.keep >= 1, f"checkpoint.keep={self.keep}: at least one must stay")
        require(
            self.resume in ("never", "auto", "must"), f"checkpoint.resume={self.resume!r}: choose never, auto or must"
        )
