"""Labelled rows, checked, and the optimisation behind the calibrators: convex, bounded, the same answer from any start.

Losses are weighted means of the logistic loss of f = feature . slope + intercept, targets anywhere in [0, 1].

N rows, D features, K classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlalign.calibration.arrays import as_rows, binary_labels, class_labels, numbers, require_rows, root, row_weights
from rlalign.calibration.calibrators.calibration_file import CalibrationWarning

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers

# Largest slope per standard deviation of the logits. Separable data have no finite optimum; 100 is a step, in practice.
SLOPE_LIMIT = 100.0
Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Logistic:
    """Slopes and intercept at the optimum inside the bounds.

    standard: the same in standard units, f = standard . ((feature - centre) / unit, 1), [D + 1]. influence: of every
    row on those, [D + 1, N]; its product with itself is the sandwich covariance (Huber 1967; White 1980), which holds
    for importance weights too. None at a bound. In raw units it would drown in rounding where the centre is far from 0.
    """

    slope_D: Floats
    intercept: float
    at_bound: bool
    standard: Floats
    influence: Floats | None
    centre_D: Floats
    unit: float


def is_separable(score_N: Floats, target_N: Floats) -> bool:
    """True when a threshold on the score splits hard labels, equality included: then no finite slope is the best."""
    positive_N, negative_N = target_N == 1, target_N == 0
    if not (positive_N | negative_N).all() or not positive_N.any() or not negative_N.any():
        return False
    return bool(score_N[positive_N].min() >= score_N[negative_N].max())


def fit_logistic(
    feature_ND: Floats, target_N: Floats, weight_N: Floats, *, unit: float, low: float, start_D: Floats, separable: bool
) -> Logistic:
    """Minimise the logistic loss over slopes in [low, SLOPE_LIMIT] / unit and a free intercept.

    unit: the standard deviation of the logits, in which slopes are bounded. start_D: kept along directions that the
    data do not determine. separable: take the upper bound for every slope, where the loss is smallest.
    L-BFGS-B finds the face of the box, Newton steps on the free slopes finish it to rounding.
    """
    from scipy.optimize import minimize

    share_N = weight_N / weight_N.sum()
    centre_D = share_N @ feature_ND
    z_ND = np.column_stack([(feature_ND - centre_D) / unit, np.ones(len(target_N))])
    bounds = [(low, SLOPE_LIMIT)] * feature_ND.shape[1] + [(None, None)]
    if separable:
        theta = np.r_[np.full(feature_ND.shape[1], SLOPE_LIMIT), 0.0]
    else:
        begin = np.r_[np.clip(start_D * unit, low, SLOPE_LIMIT), 0.0]
        begin[-1] = np.log(share_N @ target_N) - np.log(share_N @ (1 - target_N))
        options = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10}
        theta = minimize(
            _loss_and_slope, begin, (z_ND, target_N, share_N), jac=True, bounds=bounds, method="L-BFGS-B",
            options=options,
        ).x  # fmt: skip
    theta, at_bound = _polish(theta, z_ND, target_N, share_N, low)
    if at_bound:
        theta[-1] += best_intercept(z_ND @ theta, target_N, share_N)
    slope_D = theta[:-1] / unit
    return Logistic(
        slope_D=slope_D,
        intercept=float(theta[-1] - centre_D @ slope_D),
        at_bound=at_bound,
        standard=theta,
        influence=None if at_bound else _influence(theta, z_ND, target_N, weight_N),
        centre_D=centre_D,
        unit=unit,
    )


def best_intercept(offset_N: Floats, target_N: Floats, weight_N: Floats) -> float:
    """The intercept at which the mean of sigmoid(offset + intercept) equals the mean target.

    The two sides are compared as logarithms, so that it is exact even where every probability rounds to 0 or 1.
    """
    from scipy.special import log_expit, logsumexp

    def imbalance(intercept: float) -> float:
        missed = logsumexp(log_expit(-offset_N - intercept), b=weight_N * target_N)
        excess = logsumexp(log_expit(offset_N + intercept), b=weight_N * (1 - target_N))
        return missed - excess

    room = 50.0 + abs(np.log(weight_N @ target_N) - np.log(weight_N @ (1 - target_N)))
    return root(imbalance, -offset_N.max() - room, -offset_N.min() + room, xtol=1e-13, rtol=1e-14)


def _loss_and_slope(theta: Floats, z_ND: Floats, target_N: Floats, share_N: Floats) -> tuple[float, Floats]:
    from scipy.special import expit

    f_N = z_ND @ theta
    loss = share_N @ (target_N * np.logaddexp(0, -f_N) + (1 - target_N) * np.logaddexp(0, f_N))
    return float(loss), z_ND.T @ (share_N * (expit(f_N) - target_N))


def _polish(theta: Floats, z_ND: Floats, target_N: Floats, share_N: Floats, low: float) -> tuple[Floats, bool]:
    """Newton steps on the slopes strictly inside the box. Returns the point and whether an upper bound, or a negative
    lower one, holds a slope; a slope at 0 is an answer (beta calibration with one side flat), not a failure."""
    from scipy.special import expit

    slope_D = theta[:-1]
    at_top_D = slope_D >= SLOPE_LIMIT * (1 - 1e-9)
    free = np.r_[(slope_D > low) & ~at_top_D, True]
    loss, gradient = _loss_and_slope(theta, z_ND, target_N, share_N)
    for _ in range(50):
        p_N = expit(z_ND @ theta)
        free_ND = z_ND[:, free]
        hessian = (free_ND * (share_N * p_N * (1 - p_N))[:, None]).T @ free_ND
        step = np.zeros_like(theta)
        step[free] = -np.linalg.pinv(hessian, rcond=1e-12, hermitian=True) @ gradient[free]
        candidate = theta + step
        inside = (candidate[:-1] >= low).all() and (candidate[:-1] <= SLOPE_LIMIT).all()
        new_loss, new_gradient = _loss_and_slope(candidate, z_ND, target_N, share_N)
        closer = np.abs(new_gradient[free]).max() < np.abs(gradient[free]).max()
        if not inside or not closer or new_loss > loss + 1e-12 * abs(loss):
            break
        theta, loss, gradient = candidate, new_loss, new_gradient
    return theta, bool(at_top_D.any() or (low < 0 and (slope_D <= low * (1 - 1e-9)).any()))


def _influence(theta: Floats, z_ND: Floats, target_N: Floats, weight_N: Floats) -> Floats:
    from scipy.special import expit

    p_N = expit(z_ND @ theta)
    hessian = (z_ND * (weight_N * p_N * (1 - p_N))[:, None]).T @ z_ND
    return np.linalg.pinv(hessian, rcond=1e-12, hermitian=True) @ (z_ND * (weight_N * (p_N - target_N))[:, None]).T


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The inverse temperature at the optimum inside the bounds. standard_error: sandwich; None at a bound."""

    inverse_temperature: float
    at_bound: bool
    standard_error: float | None = None


def fit_scale(logits_NK: Floats, target_NK: Floats, weight_N: Floats, *, low: float, high: float) -> Scale:
    """Minimise the cross-entropy of softmax(b * logits) over the inverse temperature b in [low, high].

    The loss is convex in b, so its slope has at most one root; it is bracketed on log b, for relative precision.
    A binary logit x is the row (0, x), which makes the softmax sigmoid(b * x).
    """
    from scipy.special import softmax

    share_N = weight_N / weight_N.sum()
    told_N = (target_NK * logits_NK).sum(1)

    def slope(log_b: float) -> float:
        expected_N = (softmax(np.exp(log_b) * logits_NK, axis=1) * logits_NK).sum(1)
        return float(share_N @ (expected_N - told_N))

    ends = np.log(low), np.log(high)
    if slope(ends[0]) >= 0:
        return Scale(inverse_temperature=low, at_bound=True)
    if slope(ends[1]) <= 0:
        return Scale(inverse_temperature=high, at_bound=True)
    b = float(np.exp(root(slope, *ends, xtol=1e-14, rtol=1e-14)))
    p_NK = softmax(b * logits_NK, axis=1)
    expected_N = (p_NK * logits_NK).sum(1)
    curvature = float(weight_N @ ((p_NK * logits_NK**2).sum(1) - expected_N**2))
    noise = float(np.sqrt((weight_N**2) @ (expected_N - told_N) ** 2))
    return Scale(inverse_temperature=b, at_bound=False, standard_error=noise / curvature if curvature > 0 else None)


def isotonic_knots(score_N: Floats, target_N: Floats, weight_N: Floats) -> tuple[Floats, Floats]:
    """Knots (x, y) of the increasing least-squares fit; linear in between, as in scikit-learn.

    Equal scores are averaged first (the pool-adjacent-violators algorithm of Ayer et al. 1955 does the rest); only the
    two ends of each level are kept.
    """
    from scipy.optimize import isotonic_regression

    x_M, index_N = np.unique(score_N, return_inverse=True)
    weight_M = np.bincount(index_N, weight_N)
    mean_M = np.bincount(index_N, weight_N * target_N) / weight_M
    y_M = np.clip(isotonic_regression(mean_M, weights=weight_M).x, 0.0, 1.0)
    keep_M = np.ones(len(x_M), dtype=bool)
    keep_M[1:-1] = (y_M[1:-1] != y_M[:-2]) | (y_M[1:-1] != y_M[2:])
    return x_M[keep_M], y_M[keep_M]


MIN_ROWS = 50  # below it intervals are wide enough that a fit is a hint
LARGEST = 1e100


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Rows with positive weight. logits: [N], or [N, K] with K > 1; labels_N: in [0, 1], or classes 0..K-1.

    seen: every logit of those rows, in any shape; for pairs, where `logits` are margins, both sides.
    """

    logits: Floats
    labels_N: np.ndarray
    weight_N: Floats
    seen: Floats

    @property
    def binary(self) -> bool:
        """One logit per row, for label 1."""
        return self.logits.ndim == 1


def labelled(
    logits: Numbers, labels: Numbers, sample_weight: Numbers | None, *, soft_labels: bool, classes: bool, who: str
) -> Labelled:
    """Check rows for `fit`. classes: [N, K] logits are welcome.

    Raises ValueError on shapes, non-finite entries, labels, weights, and scores that are all equal. Warns when the
    logits look like probabilities and when there are fewer than MIN_ROWS rows.
    """
    x = as_rows(logits, "logits")
    if x.ndim == 2 and not classes:
        raise ValueError(
            f"{who}: takes one logit per row, got shape {x.shape}. A scalar bias cannot act under a softmax; use "
            "TemperatureCalibrator, or pass the log-odds of one class"
        )
    if x.ndim == 2 and soft_labels:
        raise ValueError(f"{who}: soft_labels is for one logit per row, got shape {x.shape}")
    y_N = numbers(labels, "labels", booleans=True)
    y_N = y_N[:, 0] if y_N.ndim == 2 and y_N.shape[1] == 1 else y_N
    require_rows(x, y_N, "logits", "labels")
    y_N = binary_labels(y_N, soft=soft_labels) if x.ndim == 1 else class_labels(y_N, x.shape[1])
    weight_N = row_weights(sample_weight, len(x))
    counted_N = weight_N > 0
    x, y_N, weight_N = x[counted_N], y_N[counted_N], weight_N[counted_N]
    _require_moderate(x, who)
    spread = np.ptp(x) if x.ndim == 1 else np.ptp(x, axis=1).max()
    if spread == 0:
        raise ValueError(f"{who}: all {len(x)} scores are equal ({x.flat[0]}); there is nothing to fit")
    if x.min() >= 0 and x.max() <= 1:
        warn(
            f"{who}: every logit lies in [0, 1], which looks like probabilities. They are taken as logits; if they are "
            "probabilities, pass log(p / (1 - p))"
        )
    if len(x) < MIN_ROWS:
        warn(f"{who}: {len(x)} rows; below {MIN_ROWS} the fit is a hint, see diagnostics_.intervals")
    return Labelled(logits=x, labels_N=y_N, weight_N=weight_N, seen=x)


def margins(chosen: Numbers, rejected: Numbers, sample_weight: Numbers | None, *, who: str) -> Labelled:
    """Check pairs for `fit_pairs`: chosen minus rejected as logits, every label 1. Raises and warns as `labelled`."""
    chosen_N, rejected_N = as_rows(chosen, "chosen"), as_rows(rejected, "rejected")
    if chosen_N.ndim != 1:
        raise ValueError(f"{who}: pairs need one logit per response, got chosen of shape {chosen_N.shape}")
    require_rows(chosen_N, rejected_N, "chosen", "rejected")
    weight_N = row_weights(sample_weight, len(chosen_N))
    counted_N = weight_N > 0
    margin_N, weight_N = (chosen_N - rejected_N)[counted_N], weight_N[counted_N]
    seen = np.concatenate([chosen_N[counted_N], rejected_N[counted_N]])
    _require_moderate(seen, who)
    if not margin_N.any():
        raise ValueError(f"{who}: chosen and rejected score the same in all {len(margin_N)} pairs; nothing to fit")
    if len(margin_N) < MIN_ROWS:
        warn(f"{who}: {len(margin_N)} pairs; below {MIN_ROWS} the fit is a hint, see diagnostics_.intervals")
    return Labelled(logits=margin_N, labels_N=np.ones(len(margin_N)), weight_N=weight_N, seen=seen)


def _require_moderate(x: Floats, who: str) -> None:
    if np.abs(x).max() > LARGEST:
        raise ValueError(f"{who}: a logit of {np.abs(x).max():g} in size is not a score; squares of it overflow")


def require_two_classes(data: Labelled, who: str) -> None:
    """Raise ValueError when every label is the same."""
    if np.ptp(data.labels_N) == 0:
        raise ValueError(
            f"{who}: all {len(data.labels_N)} labels are {data.labels_N[0]:g}; both outcomes are needed to fit"
        )


def rise_with_success(data: Labelled) -> float:
    """The covariance of score and label; its sign is exactly that of the best slope, the loss being convex."""
    share_N = data.weight_N / data.weight_N.sum()
    return float((share_N * (data.labels_N - share_N @ data.labels_N)) @ (data.logits - share_N @ data.logits))


def require_increasing(data: Labelled, who: str, *, advice: str = "") -> None:
    """Raise ValueError when higher scores do not come with more successes."""
    covariance = rise_with_success(data)
    if covariance <= 0:
        raise ValueError(
            f"{who}: higher scores come with fewer successes (covariance {covariance:.3g}). Check that label 1 means "
            f"good and that the scores belong to these rows{advice}"
        )


def warn(message: str) -> None:
    """A CalibrationWarning that points at the caller of `fit`."""
    warnings.warn(message, CalibrationWarning, stacklevel=4)
