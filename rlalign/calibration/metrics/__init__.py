"""How calibrated and how sharp probabilities are. Conventions differ between packages, so every one is an argument.

p_N: probabilities; y_N: what happened, 0 or 1 (numbers in [0, 1] with `soft_labels=True`). Binary p is the
probability of label 1; for top-label calibration pass the confidence and whether the prediction was right.
`sample_weight` are importance weights: a row of weight 2 counts as two equal rows.
Empty, NaN, out of range: ValueError, never a number. docs/calibration.md compares the conventions of other packages.

N rows, K classes, M non-empty bins, D draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Unpack

import numpy as np

from rlalign.calibration.arrays import (
    binary_labels,
    binary_rows,
    class_rows,
    numbers,
    one_of,
    probabilities,
    require_rows,
    row_weights,
    whole,
)
from rlalign.calibration.metrics.ece import Norm, bin_stats, classwise_ece, expected_calibration_error, smooth_ece

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers
    from rlalign.calibration.metrics.ece import Binning


__all__ = [
    "BrierDecomposition", "Interval", "NoiseFloor", "Norm", "auroc", "bootstrap_ci", "brier_decomposition", "brier_score",
    "classwise_ece", "ece_noise_floor", "expected_calibration_error", "negative_log_likelihood", "smooth_ece",
]  # fmt: skip


def brier_score(p: Numbers, y: Numbers, *, sample_weight: Numbers | None = None, soft_labels: bool = False) -> float:
    """Mean squared error of the probability: (p - y)^2 for [N], in [0, 1]; sum over classes for [N, K], in [0, 2]."""
    if np.ndim(p_rows := probabilities(p)) == 2:
        p_NK, y_N = class_rows(p_rows, y)
        error_N = ((p_NK - np.eye(p_NK.shape[1])[y_N]) ** 2).sum(1)
        return float(np.average(error_N, weights=row_weights(sample_weight, len(y_N))))
    p_N, y_N, weight_N = binary_rows(p_rows, y, sample_weight, soft_labels=soft_labels)
    return float(np.average((p_N - y_N) ** 2, weights=weight_N))


@dataclass(frozen=True, slots=True, kw_only=True)
class BrierDecomposition:
    """brier = reliability - resolution + uncertainty + within_bin, exactly.

    reliability: how far bins are from their outcomes (0 is best). resolution: how far outcomes differ between bins
    (more is better). uncertainty: variance of the label. within_bin: what the spread of p inside bins adds; 0 when
    every bin has one value of p, as for isotonic calibration binned by its levels.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float


def brier_decomposition(p: Numbers, y: Numbers, **binning: Unpack[Binning]) -> BrierDecomposition:
    """The parts of the binary Brier score (Murphy 1973; within-bin terms of Stephenson et al. 2008). Bins as in ECE."""
    soft = binning.get("soft_labels", False)
    p_N, y_N, weight_N = binary_rows(p, y, binning.get("sample_weight"), soft_labels=soft)
    binning["sample_weight"] = weight_N
    bins = bin_stats(p_N, y_N, **binning)
    share_N = weight_N / weight_N.sum()
    base = float(share_N @ y_N)
    p_inside_N = p_N - bins.confidence_M[bins.index_N]
    y_inside_N = y_N - bins.outcome_M[bins.index_N]
    return BrierDecomposition(
        reliability=float(bins.share_M @ (bins.confidence_M - bins.outcome_M) ** 2),
        resolution=float(bins.share_M @ (bins.outcome_M - base) ** 2),
        uncertainty=float(share_N @ (y_N - base) ** 2),
        within_bin=float(share_N @ (p_inside_N**2 - 2 * p_inside_N * y_inside_N)),
    )


def negative_log_likelihood(
    p: Numbers, y: Numbers, *, sample_weight: Numbers | None = None, soft_labels: bool = False
) -> float:
    """Mean -log of the probability given to what happened, nats; [N] binary or [N, K] with classes 0..K-1.

    inf where that probability is exactly 0: nothing is clipped, a certain mistake is infinitely surprising.
    """
    if np.ndim(p_rows := probabilities(p)) == 2:
        p_NK, y_N = class_rows(p_rows, y)
        weight_N = row_weights(sample_weight, len(y_N))
        given_N, share_N = p_NK[np.arange(len(y_N)), y_N], weight_N
    else:
        p_N, y_N, weight_N = binary_rows(p_rows, y, sample_weight, soft_labels=soft_labels)
        given_N, share_N = np.r_[p_N, 1 - p_N], np.r_[weight_N * y_N, weight_N * (1 - y_N)]
    counted_N = share_N > 0
    with np.errstate(divide="ignore"):
        return float(-(share_N[counted_N] @ np.log(given_N[counted_N])) / weight_N.sum())


def auroc(p: Numbers, y: Numbers, *, sample_weight: Numbers | None = None) -> float:
    """Chance that a row of label 1 scores above one of label 0, ties one half. Any finite score, logits included.

    Raises ValueError when only one class has weight: the area is undefined there.
    """
    score_N, y_N = numbers(p, "p"), binary_labels(y, soft=False, what="y")
    require_rows(score_N, y_N, "p", "y")
    weight_N = row_weights(sample_weight, len(y_N))
    _, level_N = np.unique(score_N, return_inverse=True)
    positive_M = np.bincount(level_N, weight_N * y_N)
    negative_M = np.bincount(level_N, weight_N * (1 - y_N))
    if positive_M.sum() == 0 or negative_M.sum() == 0:
        raise ValueError("auroc: only one class has weight; the area is undefined")
    below_M = np.cumsum(negative_M) - negative_M / 2
    return float(positive_M @ below_M / (positive_M.sum() * negative_M.sum()))


DRAWN_AT_ONCE = 1 << 20  # labels: bounds the memory, not the result

Metric = Callable[["Floats", "Floats"], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A number on all rows, and the range that resampling gives it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloor:
    """ECE that perfectly calibrated scores of this size and shape show by chance: its mean and 95th percentile."""

    mean: float
    p95: float


def bootstrap_ci(
    metric: Metric,
    p: Numbers,
    y: Numbers,
    *,
    cluster: Numbers | None = None,
    n_resamples: int = 1000,
    level: float = 0.95,
    method: Literal["percentile", "basic"] = "percentile",
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of `metric(p, y)` (Efron 1979); p is passed as given, [N] or [N, K].

    cluster: [N] ids, such as the prompt; rows of one cluster are drawn together, since responses to one prompt are not
    independent. method: `basic` reflects the percentiles about the value, which also undoes a bias of the resamples:
    prefer it for binned ECE, whose resamples lie above the value; it can leave [0, 1].
    Raises ValueError on bad input and when the metric is not finite on a resample (for instance one class only).
    """
    p_rows, y_N = numbers(p, "p"), numbers(y, "y", booleans=True)
    require_rows(p_rows, y_N, "p", "y")
    one_of(method, ("percentile", "basic"), "method")
    n_resamples = whole(n_resamples, "n_resamples", at_least=2)
    if not 0 < level < 1:
        raise ValueError(f"bootstrap_ci: level must be in (0, 1), got {level}")
    members = _members(cluster, len(y_N))
    random = np.random.default_rng(seed)
    drawn = np.empty(n_resamples)
    for i in range(n_resamples):
        picked = random.integers(len(members), size=len(members))
        index_N = np.concatenate([members[c] for c in picked]) if cluster is not None else picked
        drawn[i] = metric(p_rows[index_N], y_N[index_N])
        if not np.isfinite(drawn[i]):
            raise ValueError(f"bootstrap_ci: the metric is {drawn[i]} on resample {i}; an interval would hide that")
    value = float(metric(p_rows, y_N))
    low, high = (float(q) for q in np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]))
    if method == "basic":
        low, high = 2 * value - high, 2 * value - low
    return Interval(value=value, low=low, high=high)


def _members(cluster: Numbers | None, rows: int) -> list[np.ndarray] | range:
    if cluster is None:
        return range(rows)
    cluster_N = numbers(cluster, "cluster")
    if cluster_N.shape != (rows,):
        raise ValueError(f"cluster: expected shape ({rows},), got {cluster_N.shape}")
    _, index_N = np.unique(cluster_N, return_inverse=True)
    order_N = np.argsort(index_N, kind="stable")
    return np.split(order_N, np.flatnonzero(np.diff(index_N[order_N])) + 1)


def ece_noise_floor(p: Numbers, *, n_draws: int = 200, seed: int = 0, **binning: Unpack[Binning]) -> NoiseFloor:
    """ECE (l1) of labels drawn from p itself, so with no miscalibration at all. An ECE below its p95 shows nothing.

    Labels are independent draws; bins and weights as in `expected_calibration_error`. For p uniform on [0, 1] and 15
    bins, 100 rows give about 0.125 and 5000 rows 0.018. Raises ValueError on bad input.
    """
    n_draws = whole(n_draws, "n_draws", at_least=2)
    p_N = probabilities(p)
    p_N, _, weight_N = binary_rows(p_N, np.zeros(len(p_N)), binning.get("sample_weight"))
    binning["sample_weight"] = weight_N
    bins = bin_stats(p_N, np.zeros(len(p_N)), **binning)
    random = np.random.default_rng(seed)
    order_N = np.argsort(bins.index_N, kind="stable")
    start_M = np.flatnonzero(np.diff(bins.index_N[order_N], prepend=-1))
    p_N, weight_N = p_N[order_N], weight_N[order_N]
    draws: list[float] = []
    while len(draws) < n_draws:
        at_once = min(n_draws - len(draws), max(1, DRAWN_AT_ONCE // len(p_N)))
        y_DN = random.random((at_once, len(p_N))) < p_N
        outcome_DM = np.add.reduceat(y_DN * weight_N, start_M, axis=1) / bins.weight_M
        draws += (np.abs(outcome_DM - bins.confidence_M) @ bins.share_M).tolist()
    return NoiseFloor(mean=float(np.mean(draws)), p95=float(np.quantile(draws, 0.95)))
