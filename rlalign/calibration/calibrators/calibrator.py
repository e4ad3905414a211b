"""What every calibrator can do; the five of them are in `calibration`.

N rows, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from rlalign.calibration.arrays import as_rows
from rlalign.calibration.calibrators import calibration_file
from rlalign.calibration.calibrators.calibration_file import (
    CalibrationMismatchError,
    Json,
    ModelIdentity,
    NotFittedError,
)
from rlalign.calibration.calibrators.fit_report import FitReport, fit_report
from rlalign.calibration.calibrators.solvers import Labelled, labelled, margins, warn

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers

PoolerFields = Literal["logit_mean, logit_sigma", "logit_bias, logit_scale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a solver ended. intervals: 95 % per parameter."""

    at_bound: bool = False
    separable: bool = False
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


class Calibrator(ABC):
    """fit, transform, save, load. `method` names the kind in files; `diagnostics_` is the FitReport of the last fit.

    A subclass holds its options in the constructor and sets its fitted attributes at the end of a solve, so that a fit
    that raises leaves the calibrator as it was.
    """

    method: ClassVar[str]
    takes_classes: ClassVar[bool] = False
    fitted: bool = False

    def __init__(self) -> None:
        self.diagnostics_: FitReport | None = None
        self.model_ = ModelIdentity()

    def fit(
        self, logits: Numbers, labels: Numbers, *, sample_weight: Numbers | None = None, soft_labels: bool = False
    ) -> Self:
        """Fit on logits [N] or [N, 1] (TemperatureCalibrator: also [N, K]) and labels [N]: 0 or 1 (classes for K).

        sample_weight: importance weights; weight 2 is the row twice, weight 0 its absence. soft_labels: labels are
        probabilities. Lists, NumPy arrays and torch tensors of any float dtype; the arithmetic is float64.
        Raises ValueError on empty, mismatched, non-finite or constant input, on labels that are not 0 or 1, on one
        class only, and where higher scores come with fewer successes. Warns (CalibrationWarning) when the logits look
        like probabilities, below 50 rows, and when the labels are separable or a parameter stops at its bound.
        """
        data = labelled(
            logits, labels, sample_weight, soft_labels=soft_labels, classes=self.takes_classes, who=type(self).__name__
        )
        outcome = self._solve(data)
        self._describe(
            data, outcome, before=plain_probabilities(data.logits), after=self.probabilities(data.logits), pairs=False
        )
        return self

    def fit_pairs(self, chosen: Numbers, rejected: Numbers, *, sample_weight: Numbers | None = None) -> Self:
        """Fit P(chosen beats rejected) = sigmoid(scale * (chosen - rejected)), the Bradley-Terry model.

        Pairs identify the scale only: any bias cancels and stays 0, so `transform` then orders responses and its
        differences mean what they say, but its level is arbitrary. Raises ValueError on bad input and where rejected
        responses score higher; TypeError where the method has more than a scale.
        """
        data = margins(chosen, rejected, sample_weight, who=type(self).__name__)
        outcome = self._solve_pairs(data)
        self._describe(
            data, outcome, before=plain_probabilities(data.logits), after=self.probabilities(data.logits), pairs=True
        )
        return self

    def transform(self, logits: Numbers) -> Floats:
        """Probabilities, float64: [N] for [N] or [N, 1], [N, K] for [N, K]. An empty batch stays empty.

        Extrapolates outside the fitted support (isotonic clips); count with `out_of_support`. Raises NotFittedError
        before a fit, ValueError on non-finite logits or another number of classes.
        """
        self._require_fitted()
        return self._apply(as_rows(logits, "logits"))

    def probabilities(self, logits: Numbers) -> Floats:
        """What metrics judge: `transform`; for identity, whose scores are logits, their sigmoid or softmax."""
        return self.transform(logits)

    def out_of_support(self, logits: Numbers) -> int:
        """How many of the logits lie outside the range that was fitted, where the calibration is a guess."""
        report = self._require_report()
        x = as_rows(logits, "logits")
        return int(((x < report.support.min) | (x > report.support.max)).sum())

    @property
    def calibration_id(self) -> str:
        """Names the fitted function: equal ids give equal scores. Logged with every reward."""
        self._require_fitted()
        return calibration_file.function_id(self.method, self.parameters())

    def save(self, path: str | Path, *, model: ModelIdentity | None = None) -> None:
        """Write a calibration file (JSON) bound to `model`, by default the model it was loaded for.

        Replaces the file atomically. Raises NotFittedError before a fit.
        """
        calibration_file.write(Path(path), self._content(), model or self.model_)

    def document(self, *, model: ModelIdentity | None = None) -> Json:
        """What `save` would write."""
        return calibration_file.sealed(self._content(), model or self.model_)

    def _content(self) -> Json:
        self._require_fitted()
        return {
            "method": self.method,
            "options": self._options(),
            "params": self.parameters(),
            "input": "logit",
            "activation": self.activation,
            "fit": None if self.diagnostics_ is None else self.diagnostics_.as_json(),
        }

    @classmethod
    def load(cls, path: str | Path, *, expect_model: ModelIdentity | None = None, strict: bool = True) -> Self:
        """Read a calibration file; `Calibrator.load` gives whichever kind it holds. `transform` is bit-equal.

        expect_model: what produces the scores now; every field it names must match the file. Raises
        CalibrationMismatchError on another model, unknown version or broken digest (strict=False: CalibrationWarning),
        ValueError on what is not a calibration file or one of another kind than `cls`.
        """
        return cls.of_document(calibration_file.parsed(Path(path)), str(path), expect_model=expect_model, strict=strict)

    @classmethod
    def of_document(
        cls, document: Any, where: str, *, expect_model: ModelIdentity | None = None, strict: bool = True
    ) -> Self:
        """`load` of a file's content; `where` names it in errors."""
        content, model = calibration_file.opened(document, where, expect_model=expect_model, strict=strict)
        kinds = {kind.method: kind for kind in _kinds(Calibrator)}
        kind = kinds.get(str(content.get("method")))
        if kind is None or not issubclass(kind, cls):
            raise ValueError(
                f"{where}: method {content.get('method')!r}, expected "
                f"{' or '.join(sorted(name for name, known in kinds.items() if issubclass(known, cls)))}"
            )
        try:
            calibrator = kind(**content["options"])
            calibrator._restore(content["params"])
            calibrator.diagnostics_ = None if content["fit"] is None else FitReport.from_json(content["fit"])
        except (KeyError, TypeError) as error:
            raise CalibrationMismatchError(f"{where}: fields that this rlalign does not know ({error!r})") from error
        calibrator.model_ = model
        return calibrator

    def to_vllm_pooler_config(self, fields: PoolerFields = "logit_mean, logit_sigma") -> dict[str, float | bool]:
        """Keys for vLLM's `--pooler-config` that give the same scores: activation((logit - mean) / sigma).

        fields: "logit_bias, logit_scale" for builds that spell it activation(scale * (logit - bias)); vLLM refuses
        fields it does not know (vllm-project/vllm#39434, #39530). vLLM applies mean and sigma even to requests with
        use_activation=false, so never calibrate such an engine's scores again.
        Raises TypeError for a calibrator that is not affine, ValueError where the scale is 0.
        """
        raise TypeError(f"{type(self).__name__} is not affine: vLLM's pooler cannot apply it; calibrate on the client")

    def to_openrlhf(self) -> dict[str, float]:
        """`mean` and `std` for the reward model's config.json; OpenRLHF gives (reward - mean) / std, no sigmoid.

        It needs OpenRLHF's own normalisation switch on, and it clips to (-10, 10). Without the sigmoid this is a
        positive affine change: under group-normalised GRPO it changes nothing.
        Raises TypeError for a calibrator that is not affine, ValueError where the scale is 0.
        """
        raise TypeError(f"{type(self).__name__} is not affine: it has no mean and std; calibrate on the client")

    def unfitted(self) -> Self:
        """A new calibrator of the same kind with the same options."""
        return type(self)(**self._options())

    @property
    def activation(self) -> str:
        """What follows the fitted part: "sigmoid" or "softmax"; "none" where the method gives scores itself."""
        return "none"

    def _describe(self, data: Labelled, outcome: Outcome, *, before: Floats, after: Floats, pairs: bool) -> None:
        if outcome.separable:
            warn(
                f"{type(self).__name__}: a threshold separates the labels perfectly, so the data do not determine how "
                "steep the curve is: get harder rows"
            )
        elif outcome.at_bound:
            warn(
                f"{type(self).__name__}: a parameter stopped at its bound; the data ask for a steeper or flatter curve"
            )
        self.model_ = ModelIdentity()
        self.diagnostics_ = fit_report(
            data.logits, data.labels_N, data.weight_N, before=before, after=after, at_bound=outcome.at_bound,
            separable=outcome.separable, intervals=outcome.intervals, pairs=pairs, seen=data.seen,
        )  # fmt: skip
        if self.diagnostics_.tied_fraction > 0.0 and self.method == "isotonic":
            warn(
                f"{type(self).__name__}: {self.diagnostics_.tied_fraction:.0%} of the rows share their calibrated score "
                "with a different logit; ties inside a group give no advantage. Prefer Platt for rewards"
            )

    def _solve_pairs(self, data: Labelled) -> Outcome:
        raise TypeError(
            f"{type(self).__name__}.fit_pairs: pairs identify only a scale; use TemperatureCalibrator or PlattCalibrator"
        )

    def _require_report(self) -> FitReport:
        self._require_fitted()
        if self.diagnostics_ is None:
            raise NotFittedError(f"{type(self).__name__}: was never fitted on data, so it has no support; call fit")
        return self.diagnostics_

    @abstractmethod
    def _solve(self, data: Labelled) -> Outcome: ...

    @abstractmethod
    def _apply(self, x: Floats) -> Floats: ...

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise NotFittedError(f"{type(self).__name__}: not fitted yet; call fit, fit_pairs or load first")

    def _require_one_logit(self, x: Floats) -> None:
        if x.ndim != 1:
            raise ValueError(f"{type(self).__name__}: fitted on one logit per row, got shape {x.shape}")

    @abstractmethod
    def parameters(self) -> Json:
        """The fitted numbers, as they stand in the file."""

    @abstractmethod
    def _restore(self, params: Json) -> None: ...

    def _options(self) -> Json:
        """The constructor's arguments."""
        return {}


def _kinds(parent: type[Calibrator]) -> list[type[Calibrator]]:
    return [kind for child in parent.__subclasses__() for kind in (child, *_kinds(child)) if "method" in vars(kind)]


def plain_probabilities(logits: Floats) -> Floats:
    """Probabilities without calibration."""
    from scipy.special import expit, softmax

    return expit(logits) if logits.ndim == 1 else softmax(logits, axis=1)


def number(params: Json, name: str) -> float:
    """A finite number of a file. Raises TypeError otherwise."""
    value = params[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise TypeError(f"{name} is {value!r}, not a finite number")
    return float(value)
