"""How calibrated and how sharp probabilities are. Conventions differ between packages, so every one is an argument.

p_N: probabilities; y_N: what happened, 0 or 1 (numbers in [0, 1] with `soft_labels=True`). Binary p is the
probability of label 1; for top-label calibration pass the confidence and whether the prediction was right.
`sample_weight` are importance weights: a row of weight 2 counts as two equal rows.
Empty, NaN, out of range: ValueError, never a number. docs/calibration.md compares the conventions of other packages.

N rows, K classes, M non-empty bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np

from rlalign.calibration.arrays import (
    binary_labels,
    binary_rows,
    class_rows,
    numbers,
    probabilities,
    require_rows,
    row_weights,
)
from rlalign.calibration.metrics.bootstrap import Interval, NoiseFloor, bootstrap_ci, ece_noise_floor
from rlalign.calibration.metrics.ece import Norm, bin_stats, classwise_ece, expected_calibration_error, smooth_ece

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Numbers
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
    bins = bin_stats(p_N, y_N, **{**binning, "sample_weight": weight_N})
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
