"""What a trained reward model is worth on prompts it never saw, scored as a run will score them, and its calibration."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign.calibration.calibrators import CalibrationWarning, Calibrator, PlattCalibrator, TemperatureCalibrator
from rlalign.calibration.calibrators.cross_fit import ScoreRows, fit_on, read_score_rows
from rlalign.calibration.metrics import auroc, negative_log_likelihood
from rlalign.reward.model_reward import logits_by
from rlalign.reward.training.examples import Pair, Row
from rlalign.scoring.calibrated import identity_of
from rlalign.scoring.hf import HFScorer

SCORES, CALIBRATION = "scores.jsonl", "calibration.json"


def judge(folder: Path, held_out: Sequence[Row], *, chat: bool = False, model_id: str = "") -> dict[str, Any]:
    """Score held-out rows, write scores.jsonl and calibration.json into the folder, and return what they say.

    A soft label counts as right from one half. Rows that cannot be scored are counted. A model whose scores fall with success
    gets no calibration, and the record says why.
    """
    scorer = HFScorer(str(folder.resolve()), device="cuda" if torch.cuda.is_available() else "cpu")
    sides = [(r.chosen, r.rejected) if isinstance(r, Pair) else (r.completion,) for r in held_out]
    answers = iter(
        logits_by(scorer, chat=chat)(
            [(r.prompt, text) for r, side in zip(held_out, sides, strict=True) for text in side]
        )
    )
    scored = [(row, [next(answers) for _ in side]) for row, side in zip(held_out, sides, strict=True)]
    numbers = [(row, [n for n in given if not isinstance(n, str)]) for row, given in scored]
    usable = [
        (row, found) for (row, found), (_, given) in zip(numbers, scored, strict=True) if len(found) == len(given)
    ]
    if not usable:
        raise RuntimeError(f"none of {len(held_out)} held-out rows could be scored; the first reason: {scored[0][1]}")
    with (folder / SCORES).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(_line(row, found)) + "\n" for row, found in usable)
    rows = read_score_rows(folder / SCORES)
    found = _quality(rows) | {"held_out_scored": len(usable), "held_out_unscored": len(held_out) - len(usable)}
    calibrator: Calibrator = TemperatureCalibrator() if rows.shape == "pairs" else PlattCalibrator()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", CalibrationWarning)
            fit_on(calibrator, rows)
    except ValueError as error:
        return found | {"calibration": None, "calibration_refused": str(error)}
    identity = identity_of(scorer.info)
    calibrator.save(folder / CALIBRATION, model=replace(identity, id=model_id or identity.id))
    return found | {"calibration": calibrator.calibration_id, "calibration_warnings": [str(w.message) for w in said]}


def _line(row: Row, numbers: Sequence[float]) -> dict[str, Any]:
    line = {"weight": row.weight, "group": row.prompt}
    if isinstance(row, Pair):
        return {"chosen": numbers[0], "rejected": numbers[1]} | line
    return {"logit": numbers[0], "label": float(row.label >= 0.5)} | line


def _quality(rows: ScoreRows) -> dict[str, Any]:
    """Held-out pairs: accuracy. Labelled rows: AUROC, accuracy within prompts, NLL (nats) of the uncalibrated sigmoid."""
    if rows.shape == "pairs":
        margin_N = rows.logits[:, 0] - rows.logits[:, 1]
        return {"pair_accuracy": float(np.average((margin_N > 0) + 0.5 * (margin_N == 0), weights=rows.weight_N))}
    p_N = 1 / (1 + np.exp(-rows.logits))
    both = len(np.unique(rows.labels)) == 2
    return {
        "nll": negative_log_likelihood(p_N, rows.labels, sample_weight=rows.weight_N),
        "right": float(rows.labels.mean()),
        "auroc": auroc(rows.logits, rows.labels, sample_weight=rows.weight_N) if both else None,
    }
