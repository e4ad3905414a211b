"""What chance alone does to a metric: confidence intervals by resampling, and the ECE of perfectly calibrated scores.

N rows, M non-empty bins, D draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Unpack

import numpy as np

from rlalign.calibration.arrays import binary_rows, numbers, one_of, probabilities, require_rows, whole
from rlalign.calibration.metrics.ece import bin_stats

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers
    from rlalign.calibration.metrics.ece import Binning

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
    bins = bin_stats(p_N, np.zeros(len(p_N)), **{**binning, "sample_weight": weight_N})
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
