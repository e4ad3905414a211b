"""Who waits for whom: whether the next steps' completions are sampled while this one trains, and how old they may become."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from rlalign.config.checks import positive, require


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
        require(self.probe_every >= 0, f"schedule.probe_every={self.probe_every}: cannot be negative")
