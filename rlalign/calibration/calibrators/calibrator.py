"""What every calibrator can do, and what a fit saw and achieved: written into the file, so that drift can be measured against it.

N rows, K classes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
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
from rlalign.calibration.calibrators.solvers import Z95, Labelled, labelled, margins, warn
from rlalign.calibration.metrics import (
    auroc,
    brier_score,
    ece_noise_floor,
    expected_calibration_error,
    negative_log_likelihood,
)

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Range of the logits that were fitted, and their 11 deciles (minimum and maximum included).

    below: the share of the weight at or below each decile; with ties more than its tenths.
    """

    min: float
    max: float
    deciles: tuple[float, ...]
    below: tuple[float, ...]

    @classmethod
    def of(cls, seen: Floats, weight_N: Floats) -> Support:
        """seen: [N] logits, [N, K], or several [N] one after the other (both sides of pairs)."""
        flat = seen.ravel()
        weight = np.repeat(weight_N, seen.shape[1]) if seen.ndim == 2 else np.tile(weight_N, len(seen) // len(weight_N))
        deciles = np.quantile(flat, np.linspace(0, 1, 11))
        order = np.argsort(flat)
        reached = np.concatenate([[0.0], np.cumsum(weight[order])]) / weight.sum()
        return cls(
            min=float(flat.min()),
            max=float(flat.max()),
            deciles=tuple(deciles.tolist()),
            below=tuple(reached[np.searchsorted(flat[order], deciles, side="right")].tolist()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """Everything is measured on the fitted rows, so `after` is optimistic; `rlalign calibrate` cross-fits.

    n: rows with weight; n_positive: weight of label 1 (0 for K classes). effective_n: (sum w)^2 / sum w^2.
    pairs: fitted on chosen against rejected. nll in nats, Brier and ECE (15 bins; top-label for K classes and pairs)
    before (sigmoid or softmax of the raw logits) and after; ece_null_p95: what perfect calibration reaches by chance.
    at_bound: a parameter stopped at its bound. separable: a threshold splits the labels.
    tied_fraction: rows whose calibrated score equals that of another row with a different logit: inside a GRPO group
    such ties give no advantage. intervals: approximate 95 % of brier_after and, where defined, of each parameter.
    auroc: of the logits; None for soft labels, classes, pairs and one label only.
    """

    n: int
    n_positive: float
    effective_n: float
    weighted: bool
    pairs: bool
    nll_before: float
    nll_after: float
    brier_before: float
    brier_after: float
    ece_before: float
    ece_after: float
    ece_null_p95: float
    auroc: float | None
    at_bound: bool
    separable: bool
    tied_fraction: float
    intervals: dict[str, tuple[float, float]]
    support: Support
    data_sha256: str
    created: str

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> FitReport:
        """The inverse of `asdict` after a trip through JSON. Raises TypeError on unknown or missing fields."""
        support = dict(content["support"])
        support |= {name: tuple(support[name]) for name in ("deciles", "below")}
        intervals = {name: (low, high) for name, (low, high) in content["intervals"].items()}
        plain: dict[str, Any] = {**content, "support": Support(**support), "intervals": intervals}
        return cls(**plain)


def fit_report(data: Labelled, after: Floats, outcome: Outcome, *, pairs: bool) -> FitReport:
    """Of a fit that gives `after`, [N] or [N, K], for the fitted rows; for pairs these are the margins, of label 1."""
    labels_N, weight_N, top_label = data.labels_N, data.weight_N, pairs or not data.binary
    digest = hashlib.sha256()
    for array in (data.logits, labels_N.astype(np.float64), weight_N):
        digest.update(np.ascontiguousarray(array).tobytes())
    nll, brier, ece = zip(
        *(_errors(p, labels_N, weight_N, top_label=top_label) for p in (plain_probabilities(data.logits), after)),
        strict=True,
    )
    ranks = data.binary and set(np.unique(labels_N)) == {0, 1}
    return FitReport(
        n=len(labels_N),
        n_positive=float(weight_N @ labels_N) if data.binary else 0.0,
        effective_n=float(weight_N.sum() ** 2 / (weight_N**2).sum()),
        weighted=bool((weight_N != weight_N[0]).any()),
        pairs=pairs,
        nll_before=nll[0],
        nll_after=nll[1],
        brier_before=brier[0],
        brier_after=brier[1],
        ece_before=ece[0],
        ece_after=ece[1],
        ece_null_p95=ece_noise_floor(judged_rows(after, labels_N, top_label=top_label)[0], sample_weight=weight_N).p95,
        auroc=auroc(data.logits, labels_N, sample_weight=weight_N) if ranks else None,
        at_bound=outcome.at_bound,
        separable=outcome.separable,
        tied_fraction=_tied_fraction(data.logits, after) if data.binary else 0.0,
        intervals={**outcome.intervals, "brier_after": _brier_interval(after, labels_N, weight_N)},
        support=Support.of(data.seen, weight_N),
        data_sha256=digest.hexdigest(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _errors(p: Floats, labels_N: np.ndarray, weight_N: Floats, *, top_label: bool) -> tuple[float, float, float]:
    soft = p.ndim == 1
    return (
        negative_log_likelihood(p, labels_N, sample_weight=weight_N, soft_labels=soft),
        brier_score(p, labels_N, sample_weight=weight_N, soft_labels=soft),
        expected_calibration_error(
            *judged_rows(p, labels_N, top_label=top_label), sample_weight=weight_N, soft_labels=True
        ),
    )


def judged_rows(p: Floats, labels_N: np.ndarray, *, top_label: bool) -> tuple[Floats, Floats]:
    """The probability that ECE looks at, and its outcome: of label 1, or of the more probable side."""
    if not top_label:
        return p, labels_N.astype(np.float64)
    if p.ndim == 1:
        return np.maximum(p, 1 - p), (p > 0.5).astype(np.float64)
    return p.max(1), (p.argmax(1) == labels_N).astype(np.float64)


def _brier_interval(p: Floats, labels_N: np.ndarray, weight_N: Floats) -> tuple[float, float]:
    """95 % of the weighted mean, normal approximation with the sandwich variance."""
    error_N = (p - labels_N) ** 2 if p.ndim == 1 else ((p - np.eye(p.shape[1])[labels_N]) ** 2).sum(1)
    share_N = weight_N / weight_N.sum()
    mean = float(share_N @ error_N)
    half = Z95 * float(np.sqrt((share_N**2) @ (error_N - mean) ** 2))
    return mean - half, mean + half


def _tied_fraction(logits_N: Floats, after_N: Floats) -> float:
    logit_M, rows_M = np.unique(logits_N, return_counts=True)
    first_N = np.searchsorted(logit_M, logits_N)
    after_M = np.empty(len(logit_M))
    after_M[first_N] = after_N
    _, index_M, shared = np.unique(after_M, return_inverse=True, return_counts=True)
    return float(rows_M[shared[index_M] > 1].sum() / len(logits_N))


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
    parameter_names: ClassVar[
        tuple[str, ...]
    ] = ()  # the fitted numbers; each is an attribute NAME_, set by `_set` in this order
    option_names: ClassVar[tuple[str, ...]] = ()  # the constructor's arguments
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
        return self._described(data, self._solve(data), pairs=False)

    def fit_pairs(self, chosen: Numbers, rejected: Numbers, *, sample_weight: Numbers | None = None) -> Self:
        """Fit P(chosen beats rejected) = sigmoid(scale * (chosen - rejected)), the Bradley-Terry model.

        Pairs identify the scale only: any bias cancels and stays 0, so `transform` then orders responses and its
        differences mean what they say, but its level is arbitrary. Raises ValueError on bad input and where rejected
        responses score higher; TypeError where the method has more than a scale.
        """
        data = margins(chosen, rejected, sample_weight, who=type(self).__name__)
        return self._described(data, self._solve_pairs(data), pairs=True)

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
            "fit": None if self.diagnostics_ is None else asdict(self.diagnostics_),
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

    @property
    def activation(self) -> str:
        """What follows the fitted part: "sigmoid" or "softmax"; "none" where the method gives scores itself."""
        return "none"

    def unfitted(self) -> Self:
        """A new calibrator of the same kind with the same options."""
        return type(self)(**self._options())

    def _described(self, data: Labelled, outcome: Outcome, *, pairs: bool) -> Self:
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
        self.diagnostics_ = fit_report(data, self.probabilities(data.logits), outcome, pairs=pairs)
        if self.diagnostics_.tied_fraction > 0.0 and self.method == "isotonic":
            warn(
                f"{type(self).__name__}: {self.diagnostics_.tied_fraction:.0%} of the rows share their calibrated score "
                "with a different logit; ties inside a group give no advantage. Prefer Platt for rewards"
            )
        return self

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

    def parameters(self) -> Json:
        """The fitted numbers, as they stand in the file."""
        return {name: getattr(self, f"{name}_") for name in self.parameter_names}

    def _restore(self, params: Json) -> None:
        self._set(*(number(params, name) for name in self.parameter_names))

    @abstractmethod
    def _set(self, *args: Any, **kwargs: Any) -> None: ...

    def _options(self) -> Json:
        return {name: getattr(self, name) for name in self.option_names}


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
