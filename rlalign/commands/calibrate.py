"""rlalign calibrate: fit a calibration on labelled scores, judge it on rows it did not see, write the file and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from rlalign.calibration.arrays import one_of
from rlalign.calibration.calibrators import (
    AffineCalibrator,
    BetaCalibrator,
    Calibrator,
    IdentityCalibrator,
    IsotonicCalibrator,
    ModelIdentity,
    PlattCalibrator,
    TemperatureCalibrator,
)
from rlalign.calibration.calibrators.calibrator import judged_rows
from rlalign.calibration.calibrators.cross_fit import (
    Quality,
    ScoreRows,
    cross_fitted,
    fit_and_hear,
    predicted,
    quality,
    read_score_rows,
)
from rlalign.calibration.metrics.reliability import reliability_diagram, write_reliability

METHODS: dict[str, Callable[[], Calibrator]] = {
    "platt": PlattCalibrator,
    "temperature": TemperatureCalibrator,
    "isotonic": IsotonicCalibrator,
    "beta": BetaCalibrator,
    "identity": IdentityCalibrator,
}


def calibrate(
    scores_file: Path,
    *,
    method: str,
    out: Path,
    plot: Path | None = None,
    json_path: Path | None = None,
    model: ModelIdentity | None = None,
    folds: int = 5,
    seed: int = 0,
    soft_labels: bool = False,
    allow_negative_scale: bool = False,
) -> int:
    """Fit, print before / after / cross-fitted, write `out`. Returns 1, and writes no calibration, when it does harm.

    scores_file: see `score_rows`. model: what produced the scores; without one the file is bound to nothing and a
    scorer that checks will refuse it. soft_labels: labels are rates in [0, 1]. allow_negative_scale: Platt may find that high
    scores mean failure. Harm: the cross-fitted Brier score is above that of the raw scores.
    Raises ValueError on rows that cannot be read or fitted.
    """
    one_of(method, tuple(METHODS), "method")
    rows = read_score_rows(scores_file, soft=soft_labels)
    if allow_negative_scale and method != "platt":
        raise ValueError(f"--allow-negative-scale is an option of platt, which alone has a signed scale, got {method}")
    make = partial(PlattCalibrator, allow_negative_scale=True) if allow_negative_scale else METHODS[method]
    calibrator = make()
    said = fit_and_hear(calibrator, rows)
    held = cross_fitted(make, rows, folds=folds, seed=seed)
    before = predicted(IdentityCalibrator(), rows)
    columns = {
        "before": quality(before, rows),
        "after": quality(predicted(calibrator, rows), rows),
        "cross-fitted": quality(held, rows),
    }
    print(f"{calibrator.calibration_id}: {method} on {len(rows)} {rows.shape} rows of {scores_file}")
    for line in [*_parameters(calibrator), *(f"warning: {line}" for line in said)]:
        print(line)
    print(_table(columns))
    if plot:
        _plot(plot, {"before": before, f"{method}, cross-fitted": held}, rows, title=calibrator.calibration_id)
        print(f"plot: {plot}")
    if json_path:
        _write_json(json_path, calibrator, columns)
    worse = columns["cross-fitted"].brier.value > columns["before"].brier.value
    if worse:
        print(
            "The cross-fitted Brier score is above that of the raw scores: on rows it has not seen this calibration "
            f"does harm. {out} was not written; use more rows, or a method with fewer parameters."
        )
        return 1
    if model is None or model == ModelIdentity():
        print("warning: the file is bound to no model: a scorer that checks its model will refuse it")
    calibrator.save(out, model=model)
    print(f"calibration: {out}")
    return 0


def report(
    calibration_file: Path,
    *,
    scores_file: Path | None = None,
    plot: Path | None = None,
    json_path: Path | None = None,
    model: ModelIdentity | None = None,
) -> int:
    """Print what a calibration file holds; with scores_file, judge it on those rows.

    Returns 1 when the ECE on those rows is above what perfect calibration reaches by chance (95 %), else 0.
    model: fail (CalibrationMismatchError) unless the file is for it. Raises ValueError on unreadable files, and when
    a plot or JSON is asked for without rows.
    """
    calibrator = Calibrator.load(calibration_file, expect_model=model)
    fit = calibrator.diagnostics_
    print(f"{calibrator.calibration_id}: {calibration_file}")
    for line in _parameters(calibrator):
        print(line)
    print(
        "model: "
        + (", ".join(f"{k}={v}" for k, v in asdict(calibrator.model_).items() if v is not None) or "not bound")
    )
    if fit is not None:
        print(
            f"fitted {fit.created} on {fit.n} {'pairs' if fit.pairs else 'rows'}; support [{fit.support.min:.4g}, "
            f"{fit.support.max:.4g}]; nll {fit.nll_before:.4f} to {fit.nll_after:.4f} nats on the fitted rows; "
            f"tied {fit.tied_fraction:.1%}; at bound: {'yes' if fit.at_bound else 'no'}"
        )
    if scores_file is None:
        if plot or json_path:
            raise ValueError("calibrate report: a plot or JSON needs --scores, the rows to judge the calibration on")
        return 0
    rows = read_score_rows(scores_file)
    before, after = predicted(IdentityCalibrator(), rows), predicted(calibrator, rows)
    columns = {"raw": quality(before, rows), "calibrated": quality(after, rows)}
    print(_table(columns))
    outside = calibrator.out_of_support(rows.logits) if fit is not None else 0
    print(f"outside the fitted support: {outside} of {rows.logits.size} logits")
    if plot:
        _plot(plot, {"raw": before, "calibrated": after}, rows, title=calibrator.calibration_id)
        print(f"plot: {plot}")
    if json_path:
        _write_json(json_path, calibrator, columns)
    now = columns["calibrated"]
    if now.ece > now.ece_null_p95:
        print(
            f"ECE {now.ece:.4f} is above {now.ece_null_p95:.4f}, the 95 % level of chance: not calibrated on these rows"
        )
        return 1
    print(f"ECE {now.ece:.4f} is within chance (95 % level {now.ece_null_p95:.4f})")
    return 0


def _parameters(calibrator: Calibrator) -> list[str]:
    """One line per parameter, with its range where there is one."""
    params = calibrator.parameters()
    if isinstance(calibrator, AffineCalibrator):
        params |= {"bias": calibrator.bias_}
    intervals = {} if calibrator.diagnostics_ is None else calibrator.diagnostics_.intervals
    lines = []
    for name, value in params.items():
        if isinstance(value, list):
            lines.append(f"{name}: {len(value)} knots from {value[0]:.6g} to {value[-1]:.6g}")
        else:
            low_high = f" [{intervals[name][0]:.4g}, {intervals[name][1]:.4g}]" if name in intervals else ""
            lines.append(f"{name}: {value:.6g}{low_high}")
    return lines


def _table(columns: dict[str, Quality]) -> str:
    def row(name: str, shown: Callable[[Quality], str]) -> str:
        return f"{name:<22}" + "".join(f"{shown(each):>26}" for each in columns.values())

    return "\n".join(
        [
            f"{'':<22}" + "".join(f"{name:>26}" for name in columns),
            row("nll (nats)", lambda q: f"{q.nll:.4f}"),
            row("brier [95 %]", lambda q: f"{q.brier.value:.4f} [{q.brier.low:.4f}, {q.brier.high:.4f}]"),
            row("ece, 15 bins", lambda q: f"{q.ece:.4f}"),
            row("  by chance (95 %)", lambda q: f"{q.ece_null_p95:.4f}"),
            row("smooth ece", lambda q: f"{q.smooth_ece:.4f}"),
            row("auroc", lambda q: "-" if q.auroc is None else f"{q.auroc:.4f}"),
        ]
    )


def _plot(path: Path, probabilities: dict[str, np.ndarray], rows: ScoreRows, *, title: str) -> None:
    diagrams = {}
    labels_N = np.ones(len(rows)) if rows.labels_N is None else rows.labels_N
    for label, p in probabilities.items():
        shown_N, outcome_N = judged_rows(p, labels_N, top_label=rows.shape != "binary")
        diagrams[label] = reliability_diagram(shown_N, outcome_N, sample_weight=rows.weight_N, soft_labels=rows.soft)
    write_reliability(path, diagrams, title=title)


def _write_json(path: Path, calibrator: Calibrator, columns: dict[str, Quality]) -> None:
    """Every number; null where a number is infinite."""
    finite = {
        name: {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(each).items()}
        for name, each in columns.items()
    }
    content = {"calibration_id": calibrator.calibration_id, "params": calibrator.parameters(), "quality": finite}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
