"""Rules over mismatch metrics as a run goes on: windows, hysteresis, an action, and the likely causes in order.

The monitor sees numbers and reports; it stops nothing itself. The loop carries out the action of the alert.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from rlalign.mismatch.causes import Cause, Evidence, likely_causes

__all__ = ["Action", "Alert", "Monitor", "Rule"]


class Action(StrEnum):
    """What the loop does on an alert, mildest first."""

    log = "log"
    warn = "warn"
    stop = "stop"
    checkpoint_stop = "checkpoint+stop"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Alert when the median of a metric's last `window` values is past `limit`; clear when it is back past `release`.

    metric: the logged key, e.g. mismatch/lag0/k3. above: True alerts over the limit, False under it (Pearson, ESS).
    release: where the alert ends, on the safe side of limit, so that noise around it gives one alert and not fifty;
    None is the limit itself. A median needs more than half of a window to be bad: one outlier step raises nothing,
    unless window is 1. NaN is past every limit. every: steps between two values of a metric that is not measured at each.
    Raises ValueError on a release beyond the limit, window < 1 or every < 1.
    """

    metric: str
    limit: float
    above: bool = True
    window: int = 5
    every: int = 1
    release: float | None = None
    action: Action = Action.warn

    def __post_init__(self) -> None:
        if self.window < 1 or self.every < 1:
            raise ValueError(
                f"monitor rule on {self.metric}: window and every must be at least 1 step, got {self.window}, {self.every}"
            )
        if not math.isfinite(self.limit) or (self.release is not None and self._past(self.release, self.limit)):
            raise ValueError(
                f"monitor rule on {self.metric}: limit must be finite and release on its safe side, "
                f"got limit={self.limit}, release={self.release}, above={self.above}"
            )

    def _past(self, value: float, bound: float) -> bool:
        return math.isnan(value) or (value > bound if self.above else value < bound)

    def trips(self, value: float) -> bool:
        """Past the limit."""
        return self._past(value, self.limit)

    def holds(self, value: float) -> bool:
        """Not yet back past the release, once tripped."""
        return self._past(value, self.limit if self.release is None else self.release)


DEFAULT_RULES = (
    Rule(metric="mismatch/nonfinite", limit=0.0, window=1, action=Action.warn),
    Rule(metric="mismatch/lag0/k3", limit=1e-2, release=5e-3, action=Action.checkpoint_stop),
    Rule(metric="mismatch/lag0/k3_trimmed", limit=5e-3, release=2e-3),  # what no single token can move
    Rule(metric="mismatch/lag0/p99", limit=0.5, release=0.3),
    Rule(metric="mismatch/lag0/ess", limit=0.3, release=0.5, above=False),
    Rule(metric="mismatch/lag0/pearson_prob", limit=0.98, release=0.99, above=False),
    Rule(metric="correction/masked_share", limit=0.2, release=0.1),
)
"""For a bf16 dense model. Add one on `mismatch/excess/k3` where a floor was measured, and on `staleness/policy/max` where
rollouts are asynchronous. Anchors: dense bf16 k3 lies in 1e-5..1e-3, mixtures of experts in 1e-3..1e-1."""


@dataclass(frozen=True)
class Alert:
    """A rule that tripped or cleared at `step`; value is the window's median, causes come most likely first."""

    step: int
    rule: Rule
    value: float
    cleared: bool = False
    causes: tuple[Cause, ...] = ()
    unjudged: bool = False

    @property
    def action(self) -> Action:
        """What to do now; an alert that cleared, or that only says a metric is absent, asks for no more than a line."""
        return Action.log if self.cleared else Action.warn if self.unjudged else self.rule.action

    def message(self) -> str:
        """One readable paragraph: what, limit, causes and the commands that would confirm them."""
        rule = self.rule
        if self.unjudged:
            return (
                f"step {self.step}: {rule.metric} has not been reported for {rule.window * rule.every} steps, so its rule "
                "cannot be judged; check the name, or remove the rule"
            )
        side = "over" if rule.above else "under"
        if self.cleared:
            return f"step {self.step}: {rule.metric} = {self.value:.4g}, no longer {side} {rule.limit:g}"
        values = "steps" if rule.every == 1 else "measurements"
        lines = [
            f"step {self.step}: {rule.metric} = {self.value:.4g} over {rule.window} {values}, {side} {rule.limit:g}"
        ]
        lines += [f"  {i}. {c.name}: {c.why}. Confirm: {c.command}" for i, c in enumerate(self.causes, 1)]
        return "\n".join(lines)


@dataclass
class _State:
    values: deque[float]
    missing: int = 0
    active: bool = False


@dataclass
class Monitor:
    """Feed it every step's metrics in order; it keeps one window and one on/off state per rule."""

    rules: Sequence[Rule] = DEFAULT_RULES
    _states: list[_State] = field(init=False)
    _k3: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._states = [_State(deque(maxlen=rule.window)) for rule in self.rules]

    def observe(self, step: int, metrics: Mapping[str, float], evidence: Evidence | None = None) -> list[Alert]:
        """Alerts of this step: rules that tripped or cleared now. An alert that goes on is not repeated.

        metrics: keys as logged. evidence: what the run knows of itself; without it causes come from metrics alone.
        A metric absent this step (no lag-0 token, say) neither trips nor clears; absent for a whole window it is
        reported once, since a rule that is never judged protects nothing.
        """
        if "mismatch/lag0/k3" in metrics:
            self._k3.append(metrics["mismatch/lag0/k3"])
        alerts = []
        for rule, state in zip(self.rules, self._states, strict=True):
            if rule.metric not in metrics:
                state.missing += 1
                if state.missing == rule.window * rule.every:
                    alerts.append(Alert(step, rule, math.nan, unjudged=True))
                continue
            state.missing = 0
            state.values.append(metrics[rule.metric])
            value = _robust(state.values)
            if not state.active and len(state.values) == rule.window and rule.trips(value):
                state.active = True
                causes = likely_causes(metrics, evidence or Evidence(), k3_history=self._k3)
                alerts.append(Alert(step, rule, value, causes=causes))
            elif state.active and not rule.holds(value):
                state.active = False
                alerts.append(Alert(step, rule, value, cleared=True))
        return alerts


def _robust(values: Sequence[float]) -> float:
    """Median; NaN when at least half of the values are NaN."""
    finite = [v for v in values if not math.isnan(v)]
    return median(finite) if 2 * len(finite) > len(values) else math.nan
