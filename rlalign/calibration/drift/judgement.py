"""What labelled rows say about a calibration, with the uncertainty of every number.

Responses to one prompt share its difficulty, so every range is taken over clusters, not over rows.

N rows, C clusters or blocks of them, M bins of p, L levels of p, B bins of the fit's scores, D draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlalign.calibration.drift.memory import NO_VERSION
from rlalign.calibration.metrics import (
    BrierDecomposition,
    Interval,
    NoiseFloor,
    auroc,
    brier_decomposition,
    brier_score,
    ece_noise_floor,
    expected_calibration_error,
)
from rlalign.calibration.metrics.ece import bin_stats, debiased
from rlalign.calibration.metrics.reliability import Bin, reliability_diagram, wilson

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats
    from rlalign.calibration.calibrators import Support


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """E[p] - E[y] of consecutive policy versions, merged until they have enough labels. Versions None: not given."""

    first_version: int | None
    last_version: int | None
    labels: int
    gap: Interval | None


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
    weight_N = rows.weight_N
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
        ece_plain=expected_calibration_error(rows.p_N, rows.y_N, n_bins=bins, sample_weight=weight_N),
        ece_by_chance=ece_noise_floor(rows.p_N, n_bins=bins, seed=seed, sample_weight=weight_N),
        brier=brier_score(rows.p_N, rows.y_N, sample_weight=weight_N),
        brier_parts=brier_decomposition(rows.p_N, rows.y_N, n_bins=bins, sample_weight=weight_N),
        auroc=auroc,
        reliability=reliability_diagram(rows.p_N, rows.y_N, n_bins=bins, sample_weight=weight_N),
        segments=segments(rows, least=min_labels),
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


LEVEL = 0.95
DRAWS, BLOCKS, LEVELS = 200, 500, 256
FEWEST_OF_A_LABEL = 10  # below it an AUROC's range says nothing, and draws without that label are likely
FEWEST_CLUSTERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Labelled rows by rising step, and the probability that the calibration gave each of them."""

    p_N: Floats
    y_N: Floats
    weight_N: Floats
    cluster_N: np.ndarray
    step_N: np.ndarray
    version_N: np.ndarray

    def __len__(self) -> int:
        return len(self.p_N)

    def part(self, rows: slice | np.ndarray) -> Judged:
        """Some of the rows."""
        return Judged(
            p_N=self.p_N[rows], y_N=self.y_N[rows], weight_N=self.weight_N[rows], cluster_N=self.cluster_N[rows],
            step_N=self.step_N[rows], version_N=self.version_N[rows],
        )  # fmt: skip

    @property
    def effective(self) -> float:
        """(sum w)^2 / sum w^2: as many rows of equal weight would say as much."""
        return kish(self.weight_N)

    @property
    def clusters(self) -> int:
        """Different clusters."""
        return len(np.unique(self.cluster_N))


def kish(weight_N: Floats) -> float:
    """(sum w)^2 / sum w^2 (Kish 1965); 0 without rows."""
    return float(weight_N.sum() ** 2 / (weight_N**2).sum()) if len(weight_N) else 0.0


def mean_interval(
    value_N: Floats, weight_N: Floats, cluster_N: np.ndarray, *, level: float = LEVEL, variance_N: Floats | None = None
) -> Interval | None:
    """The weighted mean with its cluster-robust range (Liang and Zeger 1986), Student's t on the clusters less one.

    variance_N: what the variance of each row is known to be at least; the range is never narrower than that, so that
    rows that happen to agree do not look certain. None below two clusters.
    """
    from scipy.stats import t

    share_N = weight_N / weight_N.sum()
    mean = float(share_N @ value_N)
    _, index_N = np.unique(cluster_N, return_inverse=True)
    clusters = int(index_N.max()) + 1
    if clusters < FEWEST_CLUSTERS:
        return None
    score_C = np.bincount(index_N, share_N * (value_N - mean))
    variance = clusters / (clusters - 1) * float(score_C @ score_C)
    if variance_N is not None:
        variance = max(variance, float(share_N**2 @ variance_N))
    half = float(t.ppf((1 + level) / 2, clusters - 1)) * np.sqrt(variance)
    return Interval(value=mean, low=float(mean - half), high=float(mean + half))


def gap(rows: Judged, *, level: float = LEVEL) -> Interval | None:
    """E[p] - E[y]; no row is less uncertain than a coin of its own p."""
    return mean_interval(
        rows.p_N - rows.y_N, rows.weight_N, rows.cluster_N, level=level, variance_N=rows.p_N * (1 - rows.p_N)
    )


def tilt(rows: Judged, *, level: float = LEVEL) -> Interval | None:
    """Half of the gap among scores above the median p minus half of that below it.

    Positive: the scores promise more difference than there is, which is how a reward model fails under optimisation
    while its mean may still be right; 0 for a calibrated one.
    """
    side_N = np.sign(rows.p_N - np.median(rows.p_N))
    return mean_interval(
        side_N * (rows.p_N - rows.y_N), rows.weight_N, rows.cluster_N, level=level, variance_N=rows.p_N * (1 - rows.p_N)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recent:
    """A number over the newest rows that speak loudest, and how many they are."""

    interval: Interval
    rows: int


def loudest_recent(rows: Judged, *, least: int) -> tuple[Recent | None, Recent | None]:
    """Gap and tilt over the newest rows where each is furthest from 0 beyond chance; None below two clusters.

    Looks at the newest `least`, 2 * least, 4 * least ... and all rows, each filled up to whole steps (rows of one step have
    no order): a sudden change shows first in a short stretch, a slow one only in a long one. Every look costs: ranges are
    Bonferroni-widened by their number.
    """
    wanted = [least << k for k in range(64) if least << k < len(rows)] + [len(rows)]
    starts = sorted({int(np.searchsorted(rows.step_N, rows.step_N[len(rows) - size])) for size in wanted})
    level = 1 - (1 - LEVEL) / (2 * len(starts))
    parts = [rows.part(slice(start, None)) for start in starts]

    def loudest(number: Callable[..., Interval | None]) -> Recent | None:
        looks = [(number(part, level=level), len(part)) for part in parts]
        found = [Recent(interval=interval, rows=count) for interval, count in looks if interval is not None]
        return max(found, key=lambda recent: distance_from_zero(recent.interval), default=None)

    return loudest(gap), loudest(tilt)


def distance_from_zero(interval: Interval) -> float:
    """How far a range stays away from 0 on either side; 0 when it holds it."""
    return max(interval.low, -interval.high, 0.0)


def ece_and_auroc(rows: Judged, *, bins: int, seed: int) -> tuple[Interval, Interval | None]:
    """Debiased ECE and AUROC with ranges from one bootstrap over clusters.

    ECE: basic range (resamples of a binned error lie above it), cut at 0. AUROC: percentiles; None where one label has
    fewer than 10 rows. The cost hardly grows with the rows: resamples are of at most 500 blocks of whole clusters, put
    together at random, and their AUROC sees at most 256 levels of p; the values themselves are exact.
    """
    block_N = _blocks(rows.cluster_N, seed)
    blocks = int(block_N.max()) + 1
    random = np.random.default_rng(seed)
    drawn_DC = random.integers(blocks, size=(DRAWS, blocks))
    times_DC = np.stack([np.bincount(drawn_C, minlength=blocks) for drawn_C in drawn_DC]).astype(np.float64)
    weight_N = rows.weight_N
    value = expected_calibration_error(rows.p_N, rows.y_N, n_bins=bins, debias=True, sample_weight=weight_N)
    low, high = _range(_ece_of(times_DC, rows, block_N, bins))
    ece = Interval(value=value, low=max(2 * value - high, 0.0), high=max(2 * value - low, value))
    if min(rows.y_N.sum(), len(rows) - rows.y_N.sum()) < FEWEST_OF_A_LABEL:
        return ece, None
    area_D = _auroc_of(times_DC, rows, block_N)
    if not np.isfinite(area_D).all():
        return ece, None
    low, high = _range(area_D)
    return ece, Interval(value=auroc(rows.p_N, rows.y_N, sample_weight=weight_N), low=low, high=high)


def _blocks(cluster_N: np.ndarray, seed: int) -> np.ndarray:
    """The block of every row: its cluster, or one of BLOCKS to which clusters are dealt at random."""
    _, index_N = np.unique(cluster_N, return_inverse=True)
    clusters = int(index_N.max()) + 1
    if clusters <= BLOCKS:
        return index_N
    return np.random.default_rng(seed).permutation(np.arange(clusters) % BLOCKS)[index_N]


def _range(values_D: Floats) -> tuple[float, float]:
    low, high = np.quantile(values_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _sums(block_N: np.ndarray, cell_N: np.ndarray, value_N: Floats) -> Floats:
    """Sum of the values in every block and cell, [C, cells]."""
    blocks, cells = int(block_N.max()) + 1, int(cell_N.max()) + 1
    sums = np.bincount(block_N * cells + cell_N, value_N, minlength=blocks * cells)
    return sums.reshape(blocks, cells).astype(np.float64, copy=False)


def _ece_of(times_DC: Floats, rows: Judged, block_N: np.ndarray, bins: int) -> Floats:
    """Debiased ECE of every resample; a row drawn k times is k rows, as in a bootstrap that copies rows."""
    weight_N = rows.weight_N
    bin_N = bin_stats(rows.p_N, rows.y_N, n_bins=bins, sample_weight=weight_N).index_N
    columns = (weight_N, weight_N * rows.p_N, weight_N * rows.y_N, weight_N**2)
    weight_DM, p_DM, y_DM, square_DM = (times_DC @ _sums(block_N, bin_N, column) for column in columns)
    full_DM = weight_DM > 0
    mean_p_DM, mean_y_DM, effective_DM = (
        np.divide(top, below, out=np.zeros_like(top), where=full_DM)
        for top, below in ((p_DM, weight_DM), (y_DM, weight_DM), (weight_DM**2, square_DM))
    )
    share_DM = weight_DM / weight_DM.sum(1, keepdims=True)
    return debiased(np.abs(mean_y_DM - mean_p_DM), mean_y_DM, share_DM, effective_DM, norm="l1")


def _auroc_of(times_DC: Floats, rows: Judged, block_N: np.ndarray) -> Floats:
    """Of every resample; NaN where a label is missing."""
    _, level_N = np.unique(rows.p_N, return_inverse=True)
    levels = int(level_N.max()) + 1
    level_N = level_N * LEVELS // levels if levels > LEVELS else level_N
    positive_DL = times_DC @ _sums(block_N, level_N, rows.weight_N * rows.y_N)
    negative_DL = times_DC @ _sums(block_N, level_N, rows.weight_N * (1 - rows.y_N))
    won_D = (positive_DL * (np.cumsum(negative_DL, axis=1) - negative_DL / 2)).sum(1)
    pairs_D = positive_DL.sum(1) * negative_DL.sum(1)
    return np.divide(won_D, pairs_D, out=np.full(len(won_D), np.nan), where=pairs_D > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """PSI of the scores against the fit, its 99 % level by chance, and the share of scores outside the fitted range."""

    psi: float
    psi_by_chance: float
    out_of_support: Interval


def shift(logit_N: Floats, weight_N: Floats, cluster_N: np.ndarray, support: Support, fit_rows: float) -> Shift:
    """The scores against the fit's deciles.

    PSI is sum (q - r) ln(q / r) over the bins between deciles, half a row added to each bin so that an empty one stays
    finite. By chance it is chi-squared with B - 1 degrees of freedom times (1 / n + 1 / m) (Yurdakul and Naranjo 2020);
    n counts every cluster once, since its scores may all be alike. out_of_support: Wilson's range, clusters likewise.
    """
    from scipy.stats import chi2

    edge_B, first = np.unique(support.deciles[1:-1], return_index=True)
    reached_B = np.asarray(support.below[1:-1])[first]
    edge_B, reached_B = edge_B[reached_B < 1 - 1e-9], reached_B[reached_B < 1 - 1e-9]
    fit_B = np.diff(np.concatenate([[0.0], reached_B, [1.0]]))
    bins = len(fit_B)
    now_B = np.bincount(np.searchsorted(edge_B, logit_N, side="left"), weight_N, minlength=bins) / weight_N.sum()
    rows = kish(weight_N)
    now_B = (now_B * rows + 0.5) / (rows + 0.5 * bins)
    fit_B = (fit_B * fit_rows + 0.5) / (fit_rows + 0.5 * bins)
    independent = min(rows, float(len(np.unique(cluster_N))))
    outside_N = (logit_N < support.min) | (logit_N > support.max)
    outside = outside_N @ weight_N / weight_N.sum()
    low, high = wilson(outside, independent)
    return Shift(
        psi=float((now_B - fit_B) @ np.log(now_B / fit_B)),
        psi_by_chance=float(chi2.ppf(0.99, max(bins - 1, 1))) * (1 / independent + 1 / fit_rows),
        out_of_support=Interval(value=float(outside), low=float(low), high=float(high)),
    )
