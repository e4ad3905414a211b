"""The recipe of a tiny policy: everything that decides which policy comes out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

Progress = Callable[[str], None]
RECIPE_VERSION = 1  # raised whenever this file makes another policy from the same recipe


def _two_digit_addition() -> dict[str, Any]:
    return {
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 2,
        "max_digits": 2,
        "operators": ["+"],
        "allow_parentheses": False,
        "prompt_field": "expression",
        "template": "{prompt} =",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyRecipe:
    """Everything that decides which policy comes out: two equal recipes give the same folder.

    task, task_params, train_size, eval_size, seed: as in `load_task`; only the train split is trained on.
    stop_at: expected accuracy on held-out prompts, sampled at temperature 1, at which training ends.
    accept_from: the least one accepted once max_steps are done.
    label_smoothing: keeps the policy less sure than it could be (greedy about 0.8 where sampling gets 0.4), which is
    what RL then has to earn.
    """

    tied: bool = False
    task: str = "basic_arithmetic"
    task_params: dict[str, Any] = field(default_factory=_two_digit_addition)
    train_size: int = 4096
    eval_size: int = 256
    seed: int = 0
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 2
    heads: int = 4
    head_dim: int = 32
    initializer_range: float = 0.12  # 0.02, the usual one, learns several times slower at this width
    context: int = 512
    batch_size: int = 64
    learning_rate: float = 3e-3
    label_smoothing: float = 0.15
    warmup_steps: int = 50
    max_steps: int = 600
    check_every: int = 20
    stop_at: float = 0.38
    accept_from: float = 0.25

    @property
    def folder(self) -> str:
        """The cache folder's name, which carries a hash of every field and of the transformers release."""
        release = ".".join(version("transformers").split(".")[:2])
        key = json.dumps([RECIPE_VERSION, release, asdict(self)], sort_keys=True)
        return f"tiny-qwen3-{'tied' if self.tied else 'untied'}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
