"""Calibration error, binned with every convention as an argument, or smooth; the bins that all metrics share.

N rows, K classes, M non-empty bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, cast

import numpy as np

from rlalign.calibration.arrays import binary_rows, class_rows, one_of, root, whole

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers


class Binning(TypedDict, total=False):
    """How `bin_stats` sorts rows, which says what each means; every binned metric takes these."""

    n_bins: int
    strategy: Literal["uniform", "quantile"]
    closed: Literal["right", "left"]
    sample_weight: Numbers | None
    soft_labels: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BinStats:
    """Sums per non-empty bin, in rising order of p.

    index_N: the non-empty bin each row is in. weight_M sums to the total weight; confidence_M and outcome_M are the
    weighted means of p and y; effective_M is (sum w)^2 / sum w^2, the bin's row count where weights are equal.
    """

    index_N: np.ndarray
    weight_M: Floats
    confidence_M: Floats
    outcome_M: Floats
    effective_M: Floats

    @property
    def share_M(self) -> Floats:
        """Fraction of the weight in each bin."""
        return self.weight_M / self.weight_M.sum()


def bin_stats(
    p: Numbers,
    y: Numbers,
    *,
    n_bins: int = 15,
    strategy: Literal["uniform", "quantile"] = "uniform",
    closed: Literal["right", "left"] = "right",
    sample_weight: Numbers | None = None,
    soft_labels: bool = False,
) -> BinStats:
    """Sort rows into bins of p; every row lies in exactly one, p = 0, p = 1 and p on an edge included.

    strategy: `uniform` bins have equal width; `quantile` bins have equal weight, and equal p are never split, so with
    ties there may be fewer of them. closed: `right` bins are (lo, hi], the first also has 0 (Guo et al. 2017,
    scikit-learn); `left` bins are [lo, hi), the last also has 1 (torchmetrics).
    Raises ValueError on bad input, n_bins below 1 or not a whole number.
    """
    p_N, y_N, weight_N = binary_rows(p, y, sample_weight, soft_labels=soft_labels)
    n_bins = whole(n_bins, "n_bins", at_least=1)
    one_of(closed, ("right", "left"), "closed")
    one_of(strategy, ("uniform", "quantile"), "strategy")
    share = np.arange(1, n_bins) / n_bins
    if strategy == "uniform":
        edges = share
    else:
        order_N = np.argsort(p_N, kind="stable")
        reached_N = np.cumsum(weight_N[order_N])
        wanted = share * reached_N[-1] * (1 - 1e-12)  # 1/3 of 3 rows is one row, whichever way it was rounded
        edges = np.unique(p_N[order_N][np.searchsorted(reached_N, wanted)])
    bin_N = np.searchsorted(edges, p_N, side="left" if closed == "right" else "right")
    _, index_N = np.unique(bin_N, return_inverse=True)
    weight_M = np.asarray(np.bincount(index_N, weight_N), np.float64)
    return BinStats(
        index_N=index_N,
        weight_M=weight_M,
        confidence_M=np.bincount(index_N, weight_N * p_N) / weight_M,
        outcome_M=np.bincount(index_N, weight_N * y_N) / weight_M,
        effective_M=weight_M**2 / np.bincount(index_N, weight_N**2),
    )


Norm = Literal["l1", "l2", "max"]


def expected_calibration_error(
    p: Numbers, y: Numbers, *, norm: Norm = "l1", debias: bool = False, **binning: Unpack[Binning]
) -> float:
    """Binned calibration error in [0, 1]; the defaults are those of Guo et al. 2017 (1706.04599).

    norm: `l1` sum of share * |mean y - mean p|; `l2` root of the share-weighted squares; `max` the worst bin (MCE).
    binning: as `bin_stats`. debias (Kumar et al. 2019, 1909.10155): take off what chance alone adds
    in bins of this size. For l2 the variance of the mean outcome; for l1 the expected rise of |gap| under normal noise
    of that variance, which is a part of it only. A bin of one row has no variance estimate.
    Perfectly calibrated scores do not reach 0 without it: compare with `ece_noise_floor`.
    Raises ValueError on bad input, and on debias with norm `max`.
    """
    one_of(norm, ("l1", "l2", "max"), "norm")
    if debias and norm == "max":
        raise ValueError("expected_calibration_error: debias is defined for norm 'l1' and 'l2', got 'max'")
    bins = bin_stats(p, y, **binning)
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
    p_NK: Numbers, y: Numbers, *, norm: Norm = "l1", debias: bool = False, **binning: Unpack[Binning]
) -> float:
    """Mean over the K classes of the binary ECE of each column (Nixon et al. 2019, 1904.01685). y: classes 0..K-1.

    Raises ValueError as `expected_calibration_error` does, and when p is not [N, K] with rows that sum to 1.
    """
    p_NK, y_N = class_rows(p_NK, y)
    columns = ((p_N, y_N == k) for k, p_N in enumerate(p_NK.T))
    return float(np.mean([expected_calibration_error(*each, norm=norm, debias=debias, **binning) for each in columns]))


CELLS = 8192  # a cell is 1.2e-4 wide
NARROWEST = 4 / CELLS  # below this the grid, not the data, would decide


def smooth_ece(
    p: Numbers,
    y: Numbers,
    *,
    bandwidth: float | None = None,
    sample_weight: Numbers | None = None,
    soft_labels: bool = False,
) -> float:
    """Smooth calibration error in [0, 1]: continuous in p, no bins, far less biased upward by chance than ECE.

    bandwidth: None finds the bandwidth that equals the error it gives, as the paper defines it; a number in
    (0, 1] fixes it. Errors under 5e-4 are below the grid's resolution and are returned at the narrowest bandwidth.
    Raises ValueError on bad input.
    """
    from scipy.fft import dct

    p_N, y_N, weight_N = binary_rows(p, y, sample_weight, soft_labels=soft_labels)
    if bandwidth is not None and not 0 < bandwidth <= 1:
        raise ValueError(f"smooth_ece: bandwidth must be in (0, 1], got {bandwidth}")
    wave_G = cast("Floats", dct(_residual_cells(p_N, weight_N * (y_N - p_N) / weight_N.sum()), type=2))
    if bandwidth is not None:
        return _mass(wave_G, max(bandwidth, NARROWEST))
    if _mass(wave_G, NARROWEST) <= NARROWEST:
        return _mass(wave_G, NARROWEST)
    # The mass falls with the bandwidth, so the two meet exactly once; at bandwidth 1 it is at most 1.
    return root(lambda width: _mass(wave_G, width) - width, NARROWEST, 1.0 + 1e-9, xtol=1e-10)


def _residual_cells(p_N: Floats, residual_N: Floats) -> Floats:
    """Residual mass per cell; a row is shared between the two nearest cell centres, so nothing jumps with p."""
    position_N = np.clip(p_N * CELLS - 0.5, 0, CELLS - 1)
    left_N = np.minimum(position_N.astype(np.int64), CELLS - 2)
    right_share_N = position_N - left_N
    cells_G = np.bincount(left_N, residual_N * (1 - right_share_N), minlength=CELLS).astype(np.float64)
    return cells_G + np.bincount(left_N + 1, residual_N * right_share_N, minlength=CELLS)


def _mass(wave_G: Floats, bandwidth: float) -> float:
    from scipy.fft import idct

    damping_G = np.exp(-((np.arange(CELLS) * np.pi * bandwidth) ** 2) / 2)
    return float(np.abs(cast("Floats", idct(wave_G * damping_G, type=2))).sum())
