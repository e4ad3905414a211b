"""A new calibration from the labelled rows of a monitor, taken only when rows it has not seen say it is better."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlalign.calibration.calibrators import CalibrationWarning, IdentityCalibrator, PlattCalibrator
from rlalign.calibration.calibrators.cross_fit import ScoreRows, cross_fitted
from rlalign.calibration.drift.judgement import mean_interval

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats
    from rlalign.calibration.calibrators import Calibrator

FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitOutcome:
    """adopted: the new calibration is in force. reason: why it is not, "" when it is.

    brier_before: of the calibration in force on the rows; brier_after: of the new one, cross-fitted (None where nothing
    could be fitted). warnings: what the fit warned of.
    """

    adopted: bool
    reason: str
    before_id: str
    after_id: str
    version: int
    labels: int
    brier_before: float | None
    brier_after: float | None
    warnings: tuple[str, ...] = ()

    def message(self) -> str:
        """One line: what is in force now and why."""
        score = (
            ""
            if self.brier_after is None
            else f", Brier {self.brier_before:.4f} to {self.brier_after:.4f} cross-fitted"
        )
        if self.adopted:
            return f"refit on {self.labels} labels: {self.before_id} to {self.after_id} (version {self.version}){score}"
        return f"refit on {self.labels} labels: {self.before_id} stays, {self.reason}{score}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A fit on all rows and what says whether to take it; calibrator None and a reason where nothing could be fitted."""

    calibrator: Calibrator | None
    reason: str
    brier_before: float | None = None
    brier_after: float | None = None
    warnings: tuple[str, ...] = ()


def refitted(
    current: Calibrator, logit_N: Floats, label_N: Floats, weight_N: Floats, cluster_N: np.ndarray, *, drifted: bool
) -> Candidate:
    """A calibrator of the same kind on these rows. calibrator is None when the rows do not show that it is better.

    Better: the cross-fitted Brier score of the new one is lower. Beyond chance (95 %, one-sided, over clusters), or versions
    would change while nothing else does; where the current one is known to have drifted, lower is enough. Scores that fall
    with success, or labels that are all the same, leave Platt with a rate: the reward model then has no say until later
    labels give it one. The other kinds cannot follow such rows, which is a reason and not an exception: the run goes on with
    what it has. Raises ValueError for the identity.
    """
    if isinstance(current, IdentityCalibrator):
        raise ValueError("refit: the identity calibrator has nothing to fit; start from another method")
    _, group_N = np.unique(cluster_N, return_inverse=True)
    rows = ScoreRows(shape="binary", logits=logit_N, labels_N=label_N, weight_N=weight_N, group_N=group_N)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CalibrationWarning)
            calibrator = _like(current).fit(logit_N, label_N, sample_weight=weight_N)
        held_N = cross_fitted(lambda: _like(current), rows, folds=FOLDS)
    except ValueError as error:
        return Candidate(calibrator=None, reason=f"the rows cannot be fitted ({error})")
    calibrator.model_ = current.model_
    said = tuple(str(each.message) for each in caught if issubclass(each.category, CalibrationWarning))
    before_N, after_N = (current.transform(logit_N) - label_N) ** 2, (held_N - label_N) ** 2
    won = mean_interval(before_N - after_N, weight_N, cluster_N, level=0.9)
    better = won is not None and (won.value if drifted else won.low) > 0
    return Candidate(
        calibrator=calibrator if better else None,
        reason="" if better else f"the new fit is not better{'' if drifted else ' beyond chance'}",
        brier_before=float(np.average(before_N, weights=weight_N)),
        brier_after=float(np.average(after_N, weights=weight_N)),
        warnings=said,
    )


def _like(current: Calibrator) -> Calibrator:
    """Unfitted, of the same kind and options; a Platt that must not fall may become flat."""
    if isinstance(current, PlattCalibrator) and not current.allow_negative_scale:
        return PlattCalibrator(smooth_targets=current.smooth_targets, flat_if_falling=True)
    return current.unfitted()
