"""Calibrators that bend the curve beyond a sigmoid: isotonic and beta calibration.

N rows, M knots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from rlalign.calibration.arrays import numbers, one_of
from rlalign.calibration.calibrators.affine import platt_fit
from rlalign.calibration.calibrators.calibrator import Calibrator, Outcome, number
from rlalign.calibration.calibrators.labelled_data import Labelled, require_increasing, require_two_classes
from rlalign.calibration.calibrators.solvers import fit_logistic, is_separable, isotonic_knots

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats
    from rlalign.calibration.calibrators.calibration_file import Json


class IsotonicCalibrator(Calibrator):
    """The best increasing step curve, linear between steps (Zadrozny and Elkan 2002). For monitoring and thresholds.

    Its plateaus tie scores that differed, so for rewards prefer Platt. out_of_bounds: `clip` gives the nearest knot's
    value outside the support, `raise` a ValueError. Fitted: x_, y_, the knots [M], rising.
    """

    method = "isotonic"

    def __init__(self, *, out_of_bounds: Literal["clip", "raise"] = "clip") -> None:
        super().__init__()
        one_of(out_of_bounds, ("clip", "raise"), "out_of_bounds")
        self.out_of_bounds = out_of_bounds

    def _solve(self, data: Labelled) -> Outcome:
        require_two_classes(data, type(self).__name__)
        require_increasing(data, type(self).__name__)
        self._set(*isotonic_knots(data.logits, data.labels_N, data.weight_N))
        return Outcome(separable=is_separable(data.logits, data.labels_N))

    def _set(self, x_M: Floats, y_M: Floats) -> None:
        self.x_, self.y_, self.fitted = x_M, y_M, True

    def _apply(self, x: Floats) -> Floats:
        self._require_one_logit(x)
        outside = int(((x < self.x_[0]) | (x > self.x_[-1])).sum())
        if outside and self.out_of_bounds == "raise":
            raise ValueError(
                f"IsotonicCalibrator: {outside} of {x.size} logits lie outside [{self.x_[0]:g}, {self.x_[-1]:g}], the "
                "range that was fitted"
            )
        return np.interp(x, self.x_, self.y_)

    def parameters(self) -> Json:
        return {"x": self.x_.tolist(), "y": self.y_.tolist()}

    def _restore(self, params: Json) -> None:
        x_M, y_M = (numbers(params[name], f"knots {name}") for name in ("x", "y"))
        if x_M.ndim != 1 or x_M.shape != y_M.shape or len(x_M) == 0 or (np.diff(x_M) <= 0).any():
            raise ValueError(
                f"isotonic knots: expected two equally long, rising lists, got {x_M.shape} and {y_M.shape}"
            )
        self._set(x_M, y_M)

    def _options(self) -> Json:
        return {"out_of_bounds": self.out_of_bounds}


class BetaCalibrator(Calibrator):
    """sigmoid(a log p - b log(1 - p) + c) with p = sigmoid(logit): Kull, Silva Filho and Flach 2017, a, b >= 0.

    In the logit it is a smooth bend from slope a on the left to slope b on the right; a = b is Platt, a = b = 1, c = 0
    the identity. Where all logits lie on one side the data do not determine the other slope: it stays at Platt's.
    Fitted: a_, b_, c_.
    """

    method = "beta"

    def _solve(self, data: Labelled) -> Outcome:
        who = type(self).__name__
        require_two_classes(data, who)
        require_increasing(data, who)
        separable = is_separable(data.logits, data.labels_N)
        start = platt_fit(data, data.labels_N, negative=False)
        fitted = fit_logistic(
            np.column_stack(_sides(data.logits)),
            data.labels_N,
            data.weight_N,
            unit=float(np.sqrt(np.cov(data.logits, aweights=data.weight_N, ddof=0))),
            low=0.0,
            start_D=np.repeat(start.slope_D, 2),
            separable=separable,
        )
        self._set(float(fitted.slope_D[0]), float(fitted.slope_D[1]), fitted.intercept)
        return Outcome(at_bound=fitted.at_bound, separable=separable)

    def _set(self, a: float, b: float, c: float) -> None:
        self.a_, self.b_, self.c_, self.fitted = a, b, c, True

    def _apply(self, x: Floats) -> Floats:
        from scipy.special import expit

        self._require_one_logit(x)
        left_N, right_N = _sides(x)
        return expit(self.a_ * left_N + self.b_ * right_N + self.c_)

    def parameters(self) -> Json:
        return {"a": self.a_, "b": self.b_, "c": self.c_}

    def _restore(self, params: Json) -> None:
        self._set(number(params, "a"), number(params, "b"), number(params, "c"))


def _sides(x_N: Floats) -> tuple[Floats, Floats]:
    """log p and -log(1 - p): each carries the slope on one side of 0, and they sum to the logit."""
    from scipy.special import log_expit

    return log_expit(x_N), -log_expit(-x_N)
