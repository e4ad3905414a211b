"""What a calibration fit saw and achieved: written into the file, so that drift can be measured against it.

N rows, K classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from rlalign.calibration.calibrators.solvers import Z95
from rlalign.calibration.metrics import (
    auroc,
    brier_score,
    ece_noise_floor,
    expected_calibration_error,
    negative_log_likelihood,
)

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats


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

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> FitReport:
        """The inverse of `as_json` after a trip through JSON. Raises TypeError on unknown or missing fields."""
        support = dict(content["support"])
        support |= {name: tuple(support[name]) for name in ("deciles", "below")}
        intervals = {name: (low, high) for name, (low, high) in content["intervals"].items()}
        plain: dict[str, Any] = {**content, "support": Support(**support), "intervals": intervals}
        return cls(**plain)


def fit_report(
    logits: Floats,
    labels_N: np.ndarray,
    weight_N: Floats,
    *,
    before: Floats,
    after: Floats,
    at_bound: bool,
    separable: bool,
    intervals: dict[str, tuple[float, float]],
    pairs: bool,
    seen: Floats,
) -> FitReport:
    """logits, before and after: [N] or [N, K]; labels: 0/1, soft, or classes. For pairs, logits are the margins.

    seen: the logits that make up the support.
    """
    binary = logits.ndim == 1
    digest = hashlib.sha256()
    for array in (logits, labels_N.astype(np.float64), weight_N):
        digest.update(np.ascontiguousarray(array).tobytes())
    errors = [_errors(p, labels_N, weight_N, top_label=pairs or not binary) for p in (before, after)]
    shown_N, _ = judged_rows(after, labels_N, top_label=pairs or not binary)
    return FitReport(
        n=len(labels_N),
        n_positive=float(weight_N @ labels_N) if binary else 0.0,
        effective_n=float(weight_N.sum() ** 2 / (weight_N**2).sum()),
        weighted=bool((weight_N != weight_N[0]).any()),
        pairs=pairs,
        nll_before=errors[0]["nll"],
        nll_after=errors[1]["nll"],
        brier_before=errors[0]["brier"],
        brier_after=errors[1]["brier"],
        ece_before=errors[0]["ece"],
        ece_after=errors[1]["ece"],
        ece_null_p95=ece_noise_floor(shown_N, sample_weight=weight_N).p95,
        auroc=auroc(logits, labels_N, sample_weight=weight_N)
        if binary and set(np.unique(labels_N)) == {0, 1}
        else None,
        at_bound=at_bound,
        separable=separable,
        tied_fraction=_tied_fraction(logits, after) if binary else 0.0,
        intervals={**intervals, "brier_after": _brier_interval(after, labels_N, weight_N)},
        support=Support.of(seen, weight_N),
        data_sha256=digest.hexdigest(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _errors(p: Floats, labels_N: np.ndarray, weight_N: Floats, *, top_label: bool) -> dict[str, float]:
    soft = p.ndim == 1
    shown_N, outcome_N = judged_rows(p, labels_N, top_label=top_label)
    return {
        "nll": negative_log_likelihood(p, labels_N, sample_weight=weight_N, soft_labels=soft),
        "brier": brier_score(p, labels_N, sample_weight=weight_N, soft_labels=soft),
        "ece": expected_calibration_error(shown_N, outcome_N, sample_weight=weight_N, soft_labels=True),
    }


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
