"""Binned calibration error, with every convention that differs between packages as an argument.

N rows, K classes, M non-empty bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from rlalign.calibration.arrays import class_rows, one_of
from rlalign.calibration.metrics.bins import BinStats, Closed, Strategy, bin_stats

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers

Norm = Literal["l1", "l2", "max"]


def expected_calibration_error(
    p: Numbers,
    y: Numbers,
    *,
    n_bins: int = 15,
    strategy: Strategy = "uniform",
    norm: Norm = "l1",
    closed: Closed = "right",
    debias: bool = False,
    sample_weight: Numbers | None = None,
    soft_labels: bool = False,
) -> float:
    """Binned calibration error in [0, 1]; the defaults are those of Guo et al. 2017 (1706.04599).

    norm: `l1` sum of share * |mean y - mean p|; `l2` root of the share-weighted squares; `max` the worst bin (MCE).
    strategy, closed, n_bins: see `bin_stats`. debias (Kumar et al. 2019, 1909.10155): take off what chance alone adds
    in bins of this size. For l2 the variance of the mean outcome; for l1 the expected rise of |gap| under normal noise
    of that variance, which is a part of it only. A bin of one row has no variance estimate.
    Perfectly calibrated scores do not reach 0 without it: compare with `ece_noise_floor`.
    Raises ValueError on bad input, and on debias with norm `max`.
    """
    one_of(norm, ("l1", "l2", "max"), "norm")
    if debias and norm == "max":
        raise ValueError("expected_calibration_error: debias is defined for norm 'l1' and 'l2', got 'max'")
    bins = bin_stats(
        p, y, n_bins=n_bins, strategy=strategy, closed=closed, sample_weight=sample_weight, soft_labels=soft_labels
    )
    return error_of_bins(bins, norm=norm, debias=debias)


def error_of_bins(bins: BinStats, *, norm: Norm = "l1", debias: bool = False) -> float:
    """The error of rows already sorted into bins; `expected_calibration_error` says what the arguments mean."""
    gap_M = np.abs(bins.outcome_M - bins.confidence_M)
    if norm == "max":
        return float(gap_M.max())
    if debias:
        return float(debiased(gap_M, bins.outcome_M, bins.share_M, bins.effective_M, norm=norm))
    return float(bins.share_M @ gap_M) if norm == "l1" else float(np.sqrt(bins.share_M @ gap_M**2))


def debiased(gap_M: Floats, outcome_M: Floats, share_M: Floats, effective_M: Floats, *, norm: Norm) -> Floats:
    """The debiased error of one set of bins, [M], or of many, [..., M]: reduces the last axis."""
    from scipy.special import ndtr

    several_M = effective_M > 1 + 1e-9
    spread_M = outcome_M * (1 - outcome_M)
    variance_M = np.divide(spread_M, effective_M - (norm == "l2"), out=np.zeros_like(spread_M), where=several_M)
    if norm == "l2":
        return np.sqrt(np.maximum((share_M * np.where(several_M, gap_M**2 - variance_M, 0.0)).sum(-1), 0.0))
    sd_M = np.sqrt(variance_M)
    z_M = np.divide(gap_M, sd_M, out=np.zeros_like(gap_M), where=sd_M > 0)
    folded_M = sd_M * np.sqrt(2 / np.pi) * np.exp(-(z_M**2) / 2) + gap_M * (1 - 2 * ndtr(-z_M))
    expected_M = np.where(sd_M > 0, folded_M, gap_M)
    return np.maximum((share_M * (2 * gap_M - expected_M)).sum(-1), 0.0)


def classwise_ece(
    p_NK: Numbers,
    y: Numbers,
    *,
    n_bins: int = 15,
    strategy: Strategy = "uniform",
    norm: Norm = "l1",
    closed: Closed = "right",
    debias: bool = False,
    sample_weight: Numbers | None = None,
) -> float:
    """Mean over the K classes of the binary ECE of each column (Nixon et al. 2019, 1904.01685). y: classes 0..K-1.

    Raises ValueError as `expected_calibration_error` does, and when p is not [N, K] with rows that sum to 1.
    """
    p_NK, y_N = class_rows(p_NK, y)
    each = [
        expected_calibration_error(
            p_NK[:, k], y_N == k, n_bins=n_bins, strategy=strategy, norm=norm, closed=closed, debias=debias,
            sample_weight=sample_weight,
        )
        for k in range(p_NK.shape[1])
    ]  # fmt: skip
    return float(np.mean(each))
