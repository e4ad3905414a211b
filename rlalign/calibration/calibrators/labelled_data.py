"""What a calibrator is fitted on: rows checked once, before any mathematics.

N rows, K classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlalign.calibration.arrays import as_rows, binary_labels, class_labels, numbers, require_rows, row_weights
from rlalign.calibration.calibrators.calibration_file import CalibrationWarning

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers

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
