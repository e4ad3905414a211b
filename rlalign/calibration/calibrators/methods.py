"""The methods: Platt and temperature scaling (an activation of an affine map of the logit), beta and isotonic curves, identity.

N rows, K classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from rlalign.calibration.arrays import as_rows, numbers, one_of
from rlalign.calibration.calibrators.calibrator import Calibrator, Outcome, PoolerFields, plain_probabilities
from rlalign.calibration.calibrators.solvers import (
    SLOPE_LIMIT,
    Z95,
    Labelled,
    Logistic,
    fit_logistic,
    fit_scale,
    is_separable,
    isotonic_knots,
    require_increasing,
    require_two_classes,
    rise_with_success,
    warn,
)

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers
    from rlalign.calibration.calibrators.calibration_file import Json


class AffineCalibrator(Calibrator):
    """activation(scale * (logit - bias)): what vLLM's pooler and OpenRLHF can apply themselves."""

    scale_: float
    bias_: float
    intercept_: float
    num_classes_: int = 1

    @property
    def activation(self) -> str:
        """sigmoid for one logit per row, softmax for K."""
        self._require_fitted()
        return "sigmoid" if self.num_classes_ == 1 else "softmax"

    def to_vllm_pooler_config(self, fields: PoolerFields = "logit_mean, logit_sigma") -> dict[str, float | bool]:
        """See `Calibrator.to_vllm_pooler_config`."""
        one_of(fields, ("logit_mean, logit_sigma", "logit_bias, logit_scale"), "fields")
        scale, bias = self._affine()
        if fields == "logit_mean, logit_sigma":
            return {"logit_mean": bias, "logit_sigma": 1 / scale, "use_activation": True}
        return {"logit_bias": bias, "logit_scale": scale, "use_activation": True}

    def to_openrlhf(self) -> dict[str, float]:
        """See `Calibrator.to_openrlhf`."""
        scale, bias = self._affine()
        return {"mean": bias, "std": 1 / scale}

    def log_odds(self, logits: Numbers) -> Floats:
        """scale * (logit - bias), without the activation: for mixtures. A constant where the scale is 0."""
        self._require_fitted()
        return self.scale_ * as_rows(logits, "logits") + self.intercept_

    def _affine(self) -> tuple[float, float]:
        self._require_fitted()
        if self.scale_ == 0:
            raise ValueError(
                f"{type(self).__name__}: the scale is 0 (a rate, whatever the score), which no mean and sigma express"
            )
        return self.scale_, self.bias_


class PlattCalibrator(AffineCalibrator):
    """sigmoid(scale * (logit - bias)): Platt 1999, the default for rewards.

    smooth_targets: fit to (n1 + 1) / (n1 + 2) and 1 / (n0 + 2) instead of 1 and 0 (n1, n0: weight of each label), which
    keeps the slope finite on separable labels and is what scikit-learn does. Pairs are never smoothed.
    allow_negative_scale: accept scores that fall with success instead of raising ValueError. flat_if_falling: give them
    the best curve that does not fall, scale 0: every score gets the smoothed rate of success.
    Fitted: scale_, bias_ (nan where scale_ is 0), intercept_ = -scale_ * bias_.
    Raises ValueError when both are asked for.
    """

    method = "platt"
    parameter_names = ("scale", "intercept")
    option_names = ("smooth_targets", "allow_negative_scale", "flat_if_falling")

    def __init__(
        self, *, smooth_targets: bool = True, allow_negative_scale: bool = False, flat_if_falling: bool = False
    ) -> None:
        super().__init__()
        if allow_negative_scale and flat_if_falling:
            raise ValueError("PlattCalibrator: allow_negative_scale and flat_if_falling contradict each other")
        self.smooth_targets = smooth_targets
        self.allow_negative_scale = allow_negative_scale
        self.flat_if_falling = flat_if_falling

    def _solve(self, data: Labelled) -> Outcome:
        who = type(self).__name__
        up, down = float(data.weight_N @ data.labels_N), float(data.weight_N @ (1 - data.labels_N))
        one_class = np.ptp(data.labels_N) == 0 and (self.smooth_targets or self.flat_if_falling)
        if one_class or (self.flat_if_falling and rise_with_success(data) <= 0):
            said = f"every label is {data.labels_N[0]:g}" if one_class else "higher scores come with fewer successes"
            warn(f"{who}: {said}; the smoothed rate is all that can be learned, scale 0")
            self._set(0.0, float(np.log(up + 1) - np.log(down + 1)))
            return Outcome()
        high, low = ((up + 1) / (up + 2), 1 / (down + 2)) if self.smooth_targets else (1.0, 0.0)
        require_two_classes(data, who)
        if not self.allow_negative_scale:
            require_increasing(data, who, advice=", or pass allow_negative_scale=True (--allow-negative-scale)")
        target_N = data.labels_N * high + (1 - data.labels_N) * low
        fitted = platt_fit(data, target_N, negative=self.allow_negative_scale)
        self._set(float(fitted.slope_D[0]), fitted.intercept)
        separable = is_separable(data.logits, data.labels_N)
        intervals = {} if separable else _affine_intervals(fitted)
        return Outcome(at_bound=fitted.at_bound, separable=separable, intervals=intervals)

    def _solve_pairs(self, data: Labelled) -> Outcome:
        unit = float(np.sqrt(np.average(data.logits**2, weights=data.weight_N)))
        who = f"{type(self).__name__}.fit_pairs"
        outcome, scale = _scale_of(data, low=1e-9 / unit, high=SLOPE_LIMIT / unit, who=who)
        self._set(scale, 0.0)
        return outcome

    def _set(self, scale: float, intercept: float) -> None:
        self.scale_, self.intercept_, self.fitted = scale, intercept, True
        self.bias_ = float("nan") if scale == 0 else -intercept / scale + 0.0

    def _apply(self, x: Floats) -> Floats:
        from scipy.special import expit

        self._require_one_logit(x)
        return expit(self.scale_ * x + self.intercept_)


class TemperatureCalibrator(AffineCalibrator):
    """sigmoid(logit / T) or softmax(logits / T): Guo et al. 2017 (1706.04599). T > 1 softens, the argmax never moves.

    bounds: smallest and largest T. A binary logit x is the pair (0, x); scikit-learn takes (-x, x), so its inverse
    temperature is half of ours. Fitted: temperature_, scale_ = 1 / T, bias_ = intercept_ = 0, num_classes_ (1 for [N] logits).
    """

    method = "temperature"
    parameter_names = ("temperature", "num_classes")
    option_names = ("bounds",)
    takes_classes = True

    def __init__(self, *, bounds: tuple[float, float] = (1e-2, 1e2)) -> None:
        super().__init__()
        low, high = numbers(bounds, "bounds")
        if not 0 < low < high:
            raise ValueError(f"bounds: expected 0 < lowest < highest temperature, got {tuple(bounds)}")
        self.bounds = (float(low), float(high))

    def _solve(self, data: Labelled) -> Outcome:
        require_two_classes(data, type(self).__name__)
        return self._scaled(data, type(self).__name__)

    def _solve_pairs(self, data: Labelled) -> Outcome:
        return self._scaled(data, f"{type(self).__name__}.fit_pairs")

    def _scaled(self, data: Labelled, who: str) -> Outcome:
        outcome, scale = _scale_of(data, low=1 / self.bounds[1], high=1 / self.bounds[0], who=who)
        self._set(1 / scale, 1 if data.binary else data.logits.shape[1])
        if "scale" in outcome.intervals:
            low, high = outcome.intervals["scale"]
            intervals = {"temperature": (1 / high, 1 / low if low > 0 else float(np.finfo(np.float64).max))}
            return replace(outcome, intervals=intervals)
        return outcome

    def _set(self, temperature: float, num_classes: float) -> None:
        self.temperature_, self.num_classes_ = temperature, int(num_classes)
        self.scale_, self.bias_, self.intercept_, self.fitted = 1 / temperature, 0.0, 0.0, True

    def _apply(self, x: Floats) -> Floats:
        from scipy.special import expit, softmax

        columns = 1 if x.ndim == 1 else x.shape[1]
        if columns != self.num_classes_:
            raise ValueError(f"TemperatureCalibrator: fitted on {self.num_classes_} logits per row, got {columns}")
        return expit(x / self.temperature_) if columns == 1 else softmax(x / self.temperature_, axis=1)


def platt_fit(data: Labelled, target_N: Floats, *, negative: bool) -> Logistic:
    """The affine logistic fit; also where beta calibration starts."""
    unit = float(np.sqrt(np.cov(data.logits, aweights=data.weight_N, ddof=0)))
    separable = is_separable(data.logits, target_N)
    return fit_logistic(
        data.logits[:, None], target_N, data.weight_N, unit=unit, low=-SLOPE_LIMIT if negative else 0.0,
        start_D=np.array([1 / unit]), separable=separable,
    )  # fmt: skip


def _affine_intervals(fitted: Logistic) -> dict[str, tuple[float, float]]:
    """95 % of the scale, and of the bias, centre - unit * intercept / slope in standard units, by the delta method."""
    if fitted.influence is None:
        return {}
    slope, intercept = fitted.standard
    gradient = fitted.unit * np.array([intercept / slope**2, -1 / slope])
    scale, scale_half = slope / fitted.unit, Z95 * np.linalg.norm(fitted.influence[0]) / fitted.unit
    bias = fitted.centre_D[0] - fitted.unit * intercept / slope
    bias_half = Z95 * np.linalg.norm(gradient @ fitted.influence)
    return {
        "scale": (float(scale - scale_half), float(scale + scale_half)),
        "bias": (float(bias - bias_half), float(bias + bias_half)),
    }


def _scale_of(data: Labelled, *, low: float, high: float, who: str) -> tuple[Outcome, float]:
    """The best inverse temperature in [low, high]. Raises ValueError where flat beats every positive scale."""
    if data.binary:
        x_NK = np.column_stack([np.zeros(len(data.logits)), data.logits])
        target_NK = np.column_stack([1 - data.labels_N, data.labels_N])
    else:
        x_NK, target_NK = data.logits, np.eye(data.logits.shape[1])[data.labels_N]
    told_N = (target_NK * x_NK).sum(1)
    gain = float(data.weight_N @ (told_N - x_NK.mean(1)))
    if gain <= 0:
        raise ValueError(
            f"{who}: right answers do not score higher than the rest (mean advantage {gain / data.weight_N.sum():.3g}), "
            "so no positive scale helps. Check labels and order; PlattCalibrator has a bias, if the scores have an offset"
        )
    fitted = fit_scale(x_NK, target_NK, data.weight_N, low=low, high=high)
    hard = bool(((target_NK == 0) | (target_NK == 1)).all())
    intervals = {}
    if fitted.standard_error is not None:
        b, half = fitted.inverse_temperature, Z95 * fitted.standard_error
        intervals["scale"] = (b - half, b + half)
    separable = hard and bool((told_N >= x_NK.max(1)).all())
    return Outcome(at_bound=fitted.at_bound, separable=separable, intervals=intervals), fitted.inverse_temperature


class IsotonicCalibrator(Calibrator):
    """The best increasing step curve, linear between steps (Zadrozny and Elkan 2002). For monitoring and thresholds.

    Its plateaus tie scores that differed, so for rewards prefer Platt. out_of_bounds: `clip` gives the nearest knot's
    value outside the support, `raise` a ValueError. Fitted: x_, y_, the knots [M], rising.
    """

    method = "isotonic"
    option_names = ("out_of_bounds",)

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


class BetaCalibrator(Calibrator):
    """sigmoid(a log p - b log(1 - p) + c) with p = sigmoid(logit): Kull, Silva Filho and Flach 2017, a, b >= 0.

    In the logit it is a smooth bend from slope a on the left to slope b on the right; a = b is Platt, a = b = 1, c = 0
    the identity. Where all logits lie on one side the data do not determine the other slope: it stays at Platt's.
    Fitted: a_, b_, c_.
    """

    method = "beta"
    parameter_names = ("a", "b", "c")

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


def _sides(x_N: Floats) -> tuple[Floats, Floats]:
    """log p and -log(1 - p): each carries the slope on one side of 0, and they sum to the logit."""
    from scipy.special import log_expit

    return log_expit(x_N), -log_expit(-x_N)


class IdentityCalibrator(Calibrator):
    """Scores as they are: `transform` returns the logits. Always fitted; `fit` only records diagnostics."""

    method = "identity"
    takes_classes = True
    fitted = True

    @property
    def calibration_id(self) -> str:
        """ "identity": what a reward carries where nothing was fitted."""
        return self.method

    def to_vllm_pooler_config(self, fields: PoolerFields = "logit_mean, logit_sigma") -> dict[str, float | bool]:
        """Raw logits from vLLM, which by default applies its own activation."""
        return {"use_activation": False}

    def to_openrlhf(self) -> dict[str, float]:
        """OpenRLHF's defaults: no shift, no scaling."""
        return {"mean": 0.0, "std": 1.0}

    def _solve(self, data: Labelled) -> Outcome:
        return Outcome()

    def _solve_pairs(self, data: Labelled) -> Outcome:
        return Outcome()

    def _set(self) -> None: ...

    def _apply(self, x: Floats) -> Floats:
        return x.copy()

    def probabilities(self, logits: Numbers) -> Floats:
        """Sigmoid of [N] logits, softmax of [N, K]."""
        return plain_probabilities(as_rows(logits, "logits"))
