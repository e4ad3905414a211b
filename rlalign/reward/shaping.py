"""From scores to rewards worth optimising: bounded and centred, free of length bias, cautious where labels were few.

Pure functions of NumPy arrays. N samples, M references or calibrators.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlalign.calibration.arrays import numbers, whole
from rlalign.calibration.calibrators.calibration_file import CalibrationWarning

if TYPE_CHECKING:
    from typing import Self

    from rlalign.calibration.arrays import Floats, Numbers
    from rlalign.calibration.calibrators import Calibrator
    from rlalign.calibration.calibrators.cross_fit import ScoreRows

SPAN = 2 / 3  # share of the points that a local line looks at, as in Cleveland 1979 and R's lowess
DRAWS = 100


def centred_sigmoid(score: float, references: Numbers) -> float:
    """Mean over references of sigmoid(score - reference): 0.5 for a sample as good as the reference, within (0, 1).

    references: [M] scores of the initial policy's completions of the same prompt, or one number for all prompts. Bounded,
    steep where samples are near the reference and flat where a score is suspiciously high, so that there is little to gain
    from exploiting the model. Raises ValueError without references. Reference: PAR, arXiv 2502.18770.
    """
    from scipy.special import expit

    references_M = np.atleast_1d(numbers(references, "references"))
    if references_M.size == 0:
        raise ValueError("centred_sigmoid: no reference score")
    return float(expit(score - references_M).mean())


def without_length_bias(scores: Numbers, lengths: Numbers, *, strength: float = 1.0, span: float = SPAN) -> Floats:
    """score - strength * (curve(length) - mean of the curve): [N] float64; the mean of the scores stays.

    lengths: tokens. curve: `loess` of the scores over length, over these samples. What the score owes to length alone is
    taken off, the right part of it too: where long answers are better, choose a strength below 1.
    Raises ValueError on shapes that differ or a strength outside [0, 1]. Reference: arXiv 2409.17407.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"without_length_bias: strength must lie in [0, 1], got {strength}")
    scores_N, lengths_N = numbers(scores, "scores"), numbers(lengths, "lengths")
    curve_N = loess(lengths_N, scores_N, span=span)
    return scores_N - strength * (curve_N - curve_N.mean())


def loess(x: Numbers, y: Numbers, *, span: float = SPAN) -> Floats:
    """Locally weighted linear regression of y on x, at every x: [N] float64 (Cleveland 1979, no robustness passes).

    Each local line looks at the `span` nearest share of the points, with tricube weights of their distance. Where all of
    those lie at one x, it is their mean. Raises ValueError on shapes that differ, no points, or a span outside (0, 1].
    """
    x_N, y_N = numbers(x, "x"), numbers(y, "y")
    if x_N.ndim != 1 or x_N.shape != y_N.shape or x_N.size == 0:
        raise ValueError(f"loess: x and y must be [N] with N >= 1, got shapes {x_N.shape} and {y_N.shape}")
    if not 0 < span <= 1:
        raise ValueError(f"loess: span must lie in (0, 1], got {span}")
    nearest = max(1, int(span * len(x_N) + 1e-10))  # as statsmodels and R count them
    points_K, place_N = np.unique(x_N, return_inverse=True)
    return np.array([_local_line(point, x_N, y_N, nearest) for point in points_K])[place_N]


def _local_line(point: float, x_N: Floats, y_N: Floats, nearest: int) -> float:
    distance_N = np.abs(x_N - point)
    width = np.partition(distance_N, nearest - 1)[nearest - 1]
    if width == 0:
        return float(y_N[distance_N == 0].mean())
    weight_N = np.clip(1 - (distance_N / width) ** 3, 0, None) ** 3
    share_N = weight_N / weight_N.sum()
    centre, level = share_N @ x_N, share_N @ y_N
    variance = share_N @ (x_N - centre) ** 2
    if variance <= 1e-12 * width**2:  # every weight sits at one x
        return float(level)
    slope = share_N @ ((x_N - centre) * (y_N - level)) / variance
    return float(level + slope * (point - centre))


class BootstrapCalibration:
    """The same calibration fitted on resampled labels: how much of a probability is known, from one reward model.

    Resamples whole groups (prompts) where the rows have them: samples of one prompt are not independent.
    """

    def __init__(self, calibrators: Sequence[Calibrator]) -> None:
        self.calibrators = tuple(calibrators)

    @classmethod
    def fit(cls, like: Calibrator, rows: ScoreRows, *, draws: int = DRAWS, seed: int = 0) -> Self:
        """Refit a copy of `like` on each of `draws` resamples of labelled rows.

        Raises ValueError where a resample cannot be fitted (one outcome only, scores that fall with success): then the
        labels do not say enough for a bound.
        """
        if rows.labels_N is None or rows.logits.ndim != 1:
            raise ValueError(f"a lower bound needs one logit and one label per row, got {rows.shape} rows")
        random = np.random.default_rng(seed)
        calibrators = []
        for draw in range(whole(draws, "draws", at_least=2)):
            picked = rows.rows(_resample(rows, random))
            calibrator = copy.deepcopy(like)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CalibrationWarning)  # the calibration itself has given them
                    calibrator.fit(picked.logits, picked.labels, sample_weight=picked.weight_N)
            except ValueError as error:
                raise ValueError(
                    f"bootstrap draw {draw} of {len(rows)} labelled scores cannot be fitted ({error}): too few labels for a "
                    "bound; label more, or use shape=probability"
                ) from error
            calibrators.append(calibrator)
        return cls(calibrators)

    def lower(self, logits: Numbers, confidence: float = 0.95) -> Floats:
        """The probability that the calibration exceeds with this one-sided confidence: [N] float64.

        Optimising it earns nothing where the reward model was hardly tested (in the spirit of ensembles, arXiv 2310.02743).
        """
        if not 0.5 <= confidence < 1:
            raise ValueError(f"lower: confidence must lie in [0.5, 1), got {confidence}")
        p_MN = np.stack([calibrator.probabilities(logits) for calibrator in self.calibrators])
        return np.quantile(p_MN, 1 - confidence, axis=0)


def _resample(rows: ScoreRows, random: np.random.Generator) -> np.ndarray:
    """Row indices of one resample with replacement, whole groups at a time."""
    if rows.group_N is None:
        return random.integers(len(rows), size=len(rows))
    groups = int(rows.group_N.max()) + 1
    order_N = np.argsort(rows.group_N, kind="stable")
    members = np.split(order_N, np.cumsum(np.bincount(rows.group_N, minlength=groups))[:-1])
    return np.concatenate([members[g] for g in random.integers(groups, size=groups)])


def tied_share(before: Numbers, after: Numbers, group: Sequence[int]) -> float:
    """Share of samples that share their reward with another sample of the group whose score differs. 0.0 for no samples.

    Such ties have no advantage between them: isotonic calibration and thresholds make them.
    """
    before_N, after_N, group_N = numbers(before, "before"), numbers(after, "after"), np.asarray(group)
    tied = 0
    for g in np.unique(group_N):
        pairs = set(zip(before_N[group_N == g].tolist(), after_N[group_N == g].tolist(), strict=True))
        scores_of: dict[float, int] = {}
        for _, value in pairs:
            scores_of[value] = scores_of.get(value, 0) + 1
        tied += sum(scores_of[value] > 1 for value in after_N[group_N == g].tolist())
    return tied / len(after_N) if len(after_N) else 0.0
