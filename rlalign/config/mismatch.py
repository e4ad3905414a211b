"""What is done about a mismatch that is too large: the gate and the rules of the monitor."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from rlalign.config.checks import positive, require


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
        require(self.action in actions, f"mismatch.rules: action={self.action!r}: choose one of {', '.join(actions)}")


@dataclass(kw_only=True)
class MismatchConfig:
    k3_limit: float = 1e-2  # nats per token; checked on every batch before it is trained on
    action: GateAction = GateAction.stop
    accept_k3: float = (
        0.0  # nats per token on held-out completions of the updated weights; past it the update is undone; 0: off
    )
    accept_prompts: int = 8  # of those completions, one of each prompt
    head_every: int = 10  # steps between measurements of the head in isolation; 0: never
    floor: str = ""  # file of `rlalign parity --noise-floor --json FILE`: logs mismatch/excess/* beyond it
    rules: list[RuleConfig] = field(default_factory=list)  # of the monitor over steps; empty: its defaults

    def __post_init__(self) -> None:
        positive(self, "mismatch", "k3_limit", "accept_prompts")
        require(
            self.accept_k3 >= 0, f"mismatch.accept_k3={self.accept_k3}: cannot be negative (0: updates are not judged)"
        )
        require(self.head_every >= 0, f"mismatch.head_every={self.head_every}: cannot be negative")
