"""The labelled rows of a monitor put into numbers: the gap overall, of late and by policy version, ECE, Brier, AUROC."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlalign.calibration.drift.judgement import Judged, Recent, ece_and_auroc, gap, loudest_recent
from rlalign.calibration.drift.memory import NO_VERSION
from rlalign.calibration.metrics import (
    BrierDecomposition,
    Interval,
    NoiseFloor,
    brier_decomposition,
    brier_score,
    ece_noise_floor,
    expected_calibration_error,
)
from rlalign.calibration.metrics.reliability import reliability_diagram


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """E[p] - E[y] of consecutive policy versions, merged until they have enough labels. Versions None: not given."""

    first_version: int | None
    last_version: int | None
    labels: int
    gap: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A point of the reliability diagram: mean p, observed rate with its 95 % range, share of the weight."""

    confidence: float
    outcome: float
    low: float
    high: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What the labelled rows of the calibration in force say.

    effective: (sum w)^2 / sum w^2. steps: first and last. expected: E[p]; observed: E[y]; gap: their difference with its
    cluster-robust 95 % range, None below two clusters. recent_gap, recent_tilt: see `loudest_recent`. ece: debiased, with
    its bootstrap range; ece_by_chance: what plain ECE (ece_plain) of perfect calibration shows. auroc: None where one label
    is rare. reliability: one point per bin that has rows.
    """

    rows: int
    effective: float
    clusters: int
    steps: tuple[int, int]
    policy_versions: tuple[int, int] | None
    expected: float
    observed: float
    gap: Interval | None
    recent_gap: Recent | None
    recent_tilt: Recent | None
    ece: Interval
    ece_plain: float
    ece_by_chance: NoiseFloor
    brier: float
    brier_parts: BrierDecomposition
    auroc: Interval | None
    reliability: tuple[Bin, ...]
    segments: tuple[Segment, ...]


def describe(rows: Judged, *, bins: int, min_labels: int, seed: int) -> Labels:
    """Every number of at least one row."""
    weights = {"sample_weight": rows.weight_N}
    recent_gap, recent_tilt = loudest_recent(rows, least=min_labels)
    ece, auroc = ece_and_auroc(rows, bins=bins, seed=seed)
    given_N = rows.version_N[rows.version_N != NO_VERSION]
    return Labels(
        rows=len(rows),
        effective=rows.effective,
        clusters=rows.clusters,
        steps=(int(rows.step_N.min()), int(rows.step_N.max())),
        policy_versions=(int(given_N.min()), int(given_N.max())) if len(given_N) else None,
        expected=float(np.average(rows.p_N, weights=rows.weight_N)),
        observed=float(np.average(rows.y_N, weights=rows.weight_N)),
        gap=gap(rows),
        recent_gap=recent_gap,
        recent_tilt=recent_tilt,
        ece=ece,
        ece_plain=expected_calibration_error(rows.p_N, rows.y_N, n_bins=bins, **weights),
        ece_by_chance=ece_noise_floor(rows.p_N, n_bins=bins, seed=seed, **weights),
        brier=brier_score(rows.p_N, rows.y_N, **weights),
        brier_parts=brier_decomposition(rows.p_N, rows.y_N, n_bins=bins, **weights),
        auroc=auroc,
        reliability=_reliability(rows, bins),
        segments=segments(rows, least=min_labels),
    )


def _reliability(rows: Judged, bins: int) -> tuple[Bin, ...]:
    diagram = reliability_diagram(rows.p_N, rows.y_N, n_bins=bins, sample_weight=rows.weight_N)
    columns = (diagram.confidence_M, diagram.outcome_M, diagram.low_M, diagram.high_M, diagram.share_M)
    return tuple(
        Bin(confidence=confidence, outcome=outcome, low=low, high=high, share=share)
        for confidence, outcome, low, high, share in zip(*(column.tolist() for column in columns), strict=True)
    )


def segments(rows: Judged, *, least: int) -> tuple[Segment, ...]:
    """One per policy version, the oldest first; a version with fewer than `least` rows is merged with its next ones, and
    what is left at the end with the one before."""
    version_V, count_V = np.unique(rows.version_N, return_counts=True)
    ends, held = [], 0
    for v, count in enumerate(count_V):
        held += count
        if held >= least:
            ends, held = [*ends, v], 0
    ends = [*ends[:-1], len(version_V) - 1] if ends else [len(version_V) - 1]
    found, start = [], 0
    for end in ends:
        inside_N = (rows.version_N >= version_V[start]) & (rows.version_N <= version_V[end])
        first, last = (None if v == NO_VERSION else int(v) for v in (version_V[start], version_V[end]))
        part = rows.part(inside_N)
        found.append(Segment(first_version=first, last_version=last, labels=len(part), gap=gap(part)))
        start = end + 1
    return tuple(found)
