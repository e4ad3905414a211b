"""What a drift monitor reports, and which numbers make which state."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from rlalign.calibration.drift.judgement import Labels, Shift, distance_from_zero
from rlalign.calibration.drift.memory import Counts
from rlalign.calibration.metrics import Interval


class DriftState(StrEnum):
    """What to make of a report; `insufficient_data` says nothing in either direction."""

    ok = "ok"
    warn = "warn"
    drift = "drift"
    insufficient_data = "insufficient_data"


LOGGED = {DriftState.ok: 0.0, DriftState.warn: 1.0, DriftState.drift: 2.0, DriftState.insufficient_data: -1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftLimits:
    """How much is too much. Labels past a limit, chance excluded, are `drift`, past half of it `warn`; scores only warn.

    gap: |E[p] - E[y]|. tilt: half its difference between high and low scores. ece: debiased ECE. auroc: fall below the AUROC
    of the fit. psi: of the scores against the fit's deciles (0.25 is the usual "shifted"). out_of_support: share of scores
    outside the fitted range.
    Raises ValueError unless all are positive.
    """

    gap: float = 0.05
    tilt: float = 0.05
    ece: float = 0.05
    auroc: float = 0.1
    psi: float = 0.25
    out_of_support: float = 0.05

    def __post_init__(self) -> None:
        for each in fields(self):
            if not 0 < getattr(self, each.name) < float("inf"):
                raise ValueError(f"drift limit {each.name}: expected a positive number, got {getattr(self, each.name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One number against its limit. beyond: how far it is past 0 (or past chance) at least; rows: how many it is from."""

    name: str
    state: DriftState
    value: float
    beyond: float
    limit: float
    rows: int

    def sentence(self) -> str:
        """The number, what chance leaves of it, and the limit."""
        return (
            f"{_MEANS[self.name]} {self.value:+.3f} over {self.rows} rows, at least {self.beyond:.3f} beyond chance, "
            f"limit {self.limit:g}"
        )


_MEANS = {
    "gap": "E[p] - E[y]",
    "tilt": "half of E[p] - E[y] above the median score minus below",
    "ece": "debiased ECE",
    "auroc": "AUROC since the fit",
    "psi": "PSI of the scores",
    "out_of_support": "share of scores outside the fitted range",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """State, why, and every number behind it. labels: None without a labelled row. scores: rows that `shift` is from,
    labelled or not; shift: None without them, or where the calibration was never fitted on data. auroc_at_fit: None where
    the fit has none. waiting: scores whose label may still come. counts: over the monitor's life."""

    state: DriftState
    checks: tuple[Check, ...]
    calibration_id: str
    calibration_version: int
    min_labels: int
    labels: Labels | None
    scores: int
    shift: Shift | None
    auroc_at_fit: float | None
    waiting: int
    counts: Counts

    def metrics(self) -> dict[str, float]:
        """Numbers by name, without what is None. state: 0 ok, 1 warn, 2 drift, -1 insufficient."""
        found: dict[str, float | Interval | None] = {
            "state": LOGGED[self.state],
            "labels": float(self.labels.rows if self.labels else 0),
            "waiting": float(self.waiting),
            "calibration_version": float(self.calibration_version),
        }
        if labels := self.labels:
            found |= {"expected": labels.expected, "observed": labels.observed, "gap": labels.gap}
            recent = {"recent_gap": labels.recent_gap, "recent_tilt": labels.recent_tilt}
            found |= {name: None if each is None else each.interval for name, each in recent.items()}
            found |= {"ece": labels.ece, "ece_plain": labels.ece_plain}
            found |= {"ece_by_chance": labels.ece_by_chance.p95, "brier": labels.brier, "auroc": labels.auroc}
            found |= {f"brier_{name}": value for name, value in asdict(labels.brier_parts).items()}
        if shift := self.shift:
            found |= {"psi": shift.psi, "psi_by_chance": shift.psi_by_chance}
            found |= {"out_of_support": shift.out_of_support.value}
        flat: dict[str, float] = {}
        for name, value in found.items():
            if isinstance(value, Interval):
                flat |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            elif value is not None:
                flat[name] = value
        return flat

    def message(self) -> str:
        """One readable paragraph: the state and why."""
        rows, effective = (self.labels.rows, self.labels.effective) if self.labels else (0, 0.0)
        lines = [f"calibration {self.calibration_id}: {self.state.value} after {rows} labels"]
        if self.state is DriftState.insufficient_data:
            lines[0] += f" ({effective:.0f} effective, {self.min_labels} are needed to judge)"
        lines += [
            f"  {check.state.value}: {check.sentence()}" for check in self.checks if check.state is not DriftState.ok
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings, finite numbers and None, for a server's answer."""
        return asdict(self)


def judge(
    labels: Labels | None,
    shift: Shift | None,
    *,
    scores: int,
    auroc_at_fit: float | None,
    limits: DriftLimits,
    min_labels: int,
) -> tuple[DriftState, tuple[Check, ...]]:
    """The state and the checks behind it, each from what chance leaves of its number.

    Below min_labels effective labels, or two clusters, the state is `insufficient_data` whatever the checks say.
    """
    checks: list[Check] = []
    if labels is not None:
        for name, recent, limit in (("gap", labels.recent_gap, limits.gap), ("tilt", labels.recent_tilt, limits.tilt)):
            if recent is not None:
                beyond = distance_from_zero(recent.interval)
                checks.append(_check(name, recent.interval.value, beyond, limit, recent.rows))
        real = labels.ece_plain > labels.ece_by_chance.p95
        checks.append(_check("ece", labels.ece.value, labels.ece.low if real else 0.0, limits.ece, labels.rows))
        if labels.auroc is not None and auroc_at_fit is not None:
            beyond = max(auroc_at_fit - labels.auroc.high, 0.0)
            checks.append(_check("auroc", labels.auroc.value - auroc_at_fit, beyond, limits.auroc, labels.rows))
    enough = labels is not None and labels.effective >= min_labels and labels.gap is not None
    if shift is not None:
        beyond = shift.psi if shift.psi > shift.psi_by_chance else 0.0
        checks.append(_check("psi", shift.psi, beyond, limits.psi, scores, worst=DriftState.warn))
        outside, limit = shift.out_of_support, limits.out_of_support
        checks.append(_check("out_of_support", outside.value, outside.low, limit, scores, worst=DriftState.warn))
    if not enough:
        return DriftState.insufficient_data, tuple(checks)
    order = (DriftState.ok, DriftState.warn, DriftState.drift)
    return max((check.state for check in checks), key=order.index), tuple(checks)


def _check(
    name: str, value: float, beyond: float, limit: float, rows: int, *, worst: DriftState = DriftState.drift
) -> Check:
    nearly = worst is DriftState.drift and beyond > limit / 2
    state = worst if beyond > limit else DriftState.warn if nearly else DriftState.ok
    return Check(name=name, state=state, value=value, beyond=beyond, limit=limit, rows=rows)
