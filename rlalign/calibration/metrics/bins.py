"""Rows sorted into bins of p: what ECE, the Brier parts, the noise floor and the reliability diagram share.

N rows, M non-empty bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rlalign.calibration.arrays import binary_rows, one_of, whole

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers

Strategy = Literal["uniform", "quantile"]
Closed = Literal["right", "left"]


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
    strategy: Strategy = "uniform",
    closed: Closed = "right",
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
    weight_M = np.bincount(index_N, weight_N)
    return BinStats(
        index_N=index_N,
        weight_M=weight_M,
        confidence_M=np.bincount(index_N, weight_N * p_N) / weight_M,
        outcome_M=np.bincount(index_N, weight_N * y_N) / weight_M,
        effective_M=weight_M**2 / np.bincount(index_N, weight_N**2),
    )
