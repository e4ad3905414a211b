"""The task: prompts and their verifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlalign.config.checks import positive, require


@dataclass(kw_only=True)
class TaskConfig:
    name: str = "???"  # reasoning-gym task, jsonl:FILE or hf:DATASET
    params: dict[str, Any] = field(default_factory=dict)  # the task's own parameters
    train_size: int = 512  # distinct prompts
    chat_template: bool = False  # wrap each prompt in the tokenizer's chat template
    eval_size: int = 128  # distinct prompts, none of them in the training split
    seed: int = 0
    unusable_prompts: str = "stop"  # stop | drop: those too long for the engine, all looked at before the first step

    def __post_init__(self) -> None:
        positive(self, "task", "train_size", "eval_size")
        require(
            self.unusable_prompts in ("stop", "drop"),
            f"task.unusable_prompts={self.unusable_prompts!r}: choose stop or drop",
        )
