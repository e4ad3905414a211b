"""Labelled scores from a file, and how good a calibration method is on rows that it was not fitted on.

N rows, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlalign.calibration.arrays import as_rows, numbers, whole
from rlalign.calibration.calibrators import CalibrationWarning, Calibrator
from rlalign.calibration.calibrators.calibrator import judged_rows
from rlalign.calibration.metrics import (
    Interval,
    auroc,
    bootstrap_ci,
    brier_score,
    ece_noise_floor,
    expected_calibration_error,
    negative_log_likelihood,
    smooth_ece,
)
from rlalign.tasks.rows import jsonl_rows

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats

__all__ = ["Quality", "ScoreRows", "cross_fitted", "fit_and_hear", "fit_on", "predicted", "quality", "read_score_rows"]

RESAMPLES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Metrics of one set of probabilities. ece_null_p95: what perfect calibration reaches by chance. auroc: None
    without two outcomes. brier: with its 95 % range (rows of one group are resampled together). nll: nats, inf where
    something that happened had probability 0."""

    nll: float
    brier: Interval
    ece: float
    ece_null_p95: float
    smooth_ece: float
    auroc: float | None


def fit_on(calibrator: Calibrator, rows: ScoreRows) -> Calibrator:
    """`fit` or `fit_pairs`, whichever the rows are for."""
    if rows.shape == "pairs":
        return calibrator.fit_pairs(rows.logits[:, 0], rows.logits[:, 1], sample_weight=rows.weight_N)
    return calibrator.fit(rows.logits, rows.labels, sample_weight=rows.weight_N, soft_labels=rows.soft)


def fit_and_hear(calibrator: Calibrator, rows: ScoreRows) -> list[str]:
    """`fit_on`; returns what it warned of, instead of warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CalibrationWarning)
        fit_on(calibrator, rows)
    return [str(each.message) for each in caught if issubclass(each.category, CalibrationWarning)]


def predicted(calibrator: Calibrator, rows: ScoreRows) -> Floats:
    """Probabilities [N] or [N, K]; for pairs, that the chosen one wins."""
    if rows.shape != "pairs":
        return calibrator.probabilities(rows.logits)
    level = calibrator.probabilities(np.zeros(1))[0]
    if level != 0.5:
        raise ValueError("pairs need a calibrator without bias: one fitted on pairs, or a temperature")
    return calibrator.probabilities(rows.logits[:, 0] - rows.logits[:, 1])


def cross_fitted(make: Callable[[], Calibrator], rows: ScoreRows, *, folds: int = 5, seed: int = 0) -> Floats:
    """Probabilities of every row from a calibrator fitted on the other folds; groups stay in one fold.

    Raises ValueError naming the fold when the rest cannot be fitted, for instance because it has one class only.
    """
    fold_N = _folds(rows, whole(folds, "folds", at_least=2), seed)
    parts: list[tuple[np.ndarray, Floats]] = []
    for fold in np.unique(fold_N):
        held_N = np.flatnonzero(fold_N == fold)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationWarning)  # the fit on all rows gives the same ones
                calibrator = fit_on(make(), rows.rows(np.flatnonzero(fold_N != fold)))
        except ValueError as error:
            raise ValueError(f"without fold {fold} of {folds}: {error}; use fewer folds or more rows") from error
        parts.append((held_N, predicted(calibrator, rows.rows(held_N))))
    order_N = np.argsort(np.concatenate([held for held, _ in parts]))
    return np.concatenate([p for _, p in parts])[order_N]


def quality(p: Floats, rows: ScoreRows) -> Quality:
    """Every metric of probabilities for these rows."""
    labels_N = np.ones(len(rows)) if rows.labels_N is None else rows.labels_N
    weight_N = np.ones(len(rows)) if rows.weight_N is None else rows.weight_N
    if p.ndim == 2:
        labels_N = labels_N.astype(np.int64)
    shown_N, outcome_N = judged_rows(p, labels_N, top_label=rows.shape != "binary")
    ranks = rows.shape == "binary" and not rows.soft and len(np.unique(labels_N[weight_N > 0])) == 2

    def brier(index_N: Floats, _: Floats) -> float:
        picked_N = index_N.astype(np.int64)
        return brier_score(p[picked_N], labels_N[picked_N], sample_weight=weight_N[picked_N], soft_labels=rows.soft)

    return Quality(
        nll=negative_log_likelihood(p, labels_N, sample_weight=weight_N, soft_labels=rows.soft),
        brier=bootstrap_ci(brier, np.arange(len(rows)), labels_N, cluster=rows.group_N, n_resamples=RESAMPLES),
        ece=expected_calibration_error(shown_N, outcome_N, sample_weight=weight_N, soft_labels=rows.soft),
        ece_null_p95=ece_noise_floor(shown_N, sample_weight=weight_N).p95,
        smooth_ece=smooth_ece(shown_N, outcome_N, sample_weight=weight_N, soft_labels=rows.soft),
        auroc=auroc(p, labels_N, sample_weight=weight_N) if ranks else None,
    )


def _folds(rows: ScoreRows, folds: int, seed: int) -> np.ndarray:
    """Fold of every row: whole groups at random, else dealt out within each label so that folds look alike."""
    random = np.random.default_rng(seed)
    if rows.group_N is not None:
        groups = int(rows.group_N.max()) + 1
        return random.permutation(np.arange(groups) % folds)[rows.group_N]
    fold_N = np.empty(len(rows), dtype=np.int64)
    labels_N = np.ones(len(rows)) if rows.labels_N is None else rows.labels_N
    labels_N = labels_N >= 0.5 if rows.soft else labels_N
    for label in np.unique(labels_N):
        at_N = np.flatnonzero(labels_N == label)
        fold_N[at_N] = random.permutation(np.arange(len(at_N)) % folds)
    return fold_N


SHAPES = {"binary": {"logit", "label"}, "classes": {"logits", "label"}, "pairs": {"chosen", "rejected"}}
EXTRA = {"weight", "group"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRows:
    """logits: [N], [N, K], or for pairs [N, 2] with chosen first. labels_N: None for pairs. group_N: indices or None.

    soft: labels are rates in [0, 1] and not only 0 and 1.
    """

    shape: str
    logits: Floats
    labels_N: Floats | None
    weight_N: Floats | None
    group_N: np.ndarray | None
    soft: bool = False

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def labels(self) -> Floats:
        """labels_N of rows that have them. Raises ValueError for pairs."""
        if self.labels_N is None:
            raise ValueError("pairs have no labels: each says only which of two is better")
        return self.labels_N

    def rows(self, index_N: np.ndarray) -> ScoreRows:
        """The rows in `index_N`."""
        labels_N, weight_N, group_N = (
            None if column is None else column[index_N] for column in (self.labels_N, self.weight_N, self.group_N)
        )
        return replace(self, logits=self.logits[index_N], labels_N=labels_N, weight_N=weight_N, group_N=group_N)


def read_score_rows(path: Path, *, soft: bool = False) -> ScoreRows:
    """Read a file; soft: its labels may be rates. Raises ValueError, naming file and line, on anything but the shapes above."""
    records = list(jsonl_rows(path))
    if not records:
        raise ValueError(f"{path}: empty; expected one JSON object per line")
    first, wanted = records[0][0], set(records[0][1])
    shape = next((shape for shape, needed in SHAPES.items() if needed == wanted - EXTRA), None)
    if shape is None:
        choices = "; ".join(f"{sorted(needed)}" for needed in SHAPES.values())
        raise ValueError(f"{first}: fields {sorted(wanted)}; expected one of {choices}, and optionally {sorted(EXTRA)}")
    for where, record in records:
        if set(record) != wanted:
            raise ValueError(
                f"{where}: fields {sorted(record)}, but {first} has {sorted(wanted)}; every line needs the same"
            )
    columns = {name: [record[name] for _, record in records] for name in wanted}
    if shape == "pairs":
        logits = np.stack([as_rows(columns[name], f"{path}: {name}") for name in ("chosen", "rejected")], axis=1)
    else:
        logits = as_rows(columns["logit" if shape == "binary" else "logits"], f"{path}: logits")
    weights = columns.get("weight")
    return ScoreRows(
        shape=shape,
        logits=logits,
        labels_N=None if shape == "pairs" else numbers(columns["label"], f"{path}: label", booleans=True),
        weight_N=None if weights is None else numbers(weights, f"{path}: weight"),
        group_N=_indices(columns["group"]) if "group" in columns else None,
        soft=soft,
    )


def _indices(values: list[Any]) -> np.ndarray:
    known: dict[str, int] = {}
    return np.array([known.setdefault(repr(value), len(known)) for value in values])
