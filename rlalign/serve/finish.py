"""What a request still needs after scorer.run: probabilities in place of logits, and no number that JSON has no word for.

K labels, T tokens or steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rlalign.scoring.answers import activate
from rlalign.scoring.calibrated import calibrated

if TYPE_CHECKING:
    from rlalign.calibration.calibrators import Calibrator
    from rlalign.scoring.result import ScoreResult

NUMBERS = ("logits", "scores", "pooled_hidden_states", "token_logprobs", "label_mass")


def only_finite(result: ScoreResult) -> ScoreResult:
    """The result with a reason in place of every item that has a NaN or an infinity anywhere."""
    bad = {
        i: name
        for name in NUMBERS
        for i, entry in enumerate(getattr(result, name) or ())
        if entry is not None and not np.isfinite(np.asarray(entry)).all()
    }
    if not bad:
        return result

    def kept(name: str) -> list | None:
        column = getattr(result, name)
        return None if column is None else [None if i in bad else entry for i, entry in enumerate(column)]

    errors = [error or (f"not_finite: {bad[i]}" if i in bad else None) for i, error in enumerate(result.errors)]
    return replace(result, **{name: kept(name) for name in NUMBERS}, errors=errors)


def with_probabilities(result: ScoreResult, calibrator: Calibrator, *, generative: bool) -> ScoreResult:
    """Calibrated scores. Raises ValueError on a judge with other than two labels, whose log-odds nobody defined."""
    sizes = {len(row) for row in result.logits if row is not None}
    if generative and sizes - {2}:
        raise ValueError(f"a judge is calibrated by the log-odds of exactly two labels, got {max(sizes)}")
    return calibrated(result, calibrator, generative=generative)


def with_softmax(result: ScoreResult, temperature: float) -> ScoreResult:
    """softmax(logits / temperature) over the labels, in float64."""
    with np.errstate(over="ignore", invalid="ignore"):  # a tiny temperature; only_finite finds it
        rows = [
            None if row is None else activate(row.astype(np.float64) / temperature, "softmax") for row in result.logits
        ]
    return replace(result, scores=rows)


def single_logits(result: ScoreResult, *, generative: bool) -> list[float | None]:
    """The one logit of each item (a judge's log-odds); None where an item failed or has several."""
    rows = [row if error is None else None for row, error in zip(result.logits, result.errors, strict=True)]
    if generative:
        rows = [row[:1] - row[1:] if row is not None and len(row) == 2 else None for row in rows]
    return [float(row[0]) if row is not None and row.shape == (1,) else None for row in rows]
