"""Whole answers: the policy writes them greedily, the verifier judges them, and their confidence is one number.

The confidence of an answer comes from the calibrated probabilities of its tokens: their product, the probability of the
answer, or their mean, as the paper reports. B answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from adaptive_data import FAMILIES, Part, Policy
from adaptive_methods import BASELINES, Judged, adaptive, log_odds

from rlalign.calibration.adaptive import Objective
from rlalign.calibration.calibrators import PlattCalibrator

if TYPE_CHECKING:
    from adaptive import Data


def answer_rows(policy: Policy, data: Data) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Method -> (confidence_B, right_B) on greedy answers to mixed test problems."""
    families = list(FAMILIES)
    parts = {name: greedy_part(policy, data, name) for name in ("fit", "test")}
    (_, fit_right_B), (test, right_B) = parts["fit"], parts["test"]
    forced = data.part("fit", families), data.part("validation", families)
    rows = {}
    for name in ("uncalibrated", "temperature", "temperature, top-label loss"):
        judged = BASELINES[name](*forced)(test)
        rows[f"{name}, product"] = product(judged, test), right_B
        rows[f"{name}, mean"] = mean(judged, test), right_B
    for reduce in (product, mean):
        raw = BASELINES["uncalibrated"](*forced)
        calibrator = PlattCalibrator().fit(log_odds(reduce(raw(parts["fit"][0]), parts["fit"][0])), fit_right_B)
        rows[f"Platt on answers, {reduce.__name__}"] = calibrator.transform(log_odds(reduce(raw(test), test))), right_B
    for head in ("linear", "transformer"):
        for level in ("token", "sequence"):
            for loss, objective in (("", None), (", paper's loss", Objective(loss="selective"))):
                judged = adaptive(head, objective, level=level)(*forced)(test)
                rows[f"ATS {head}, a T per {level}{loss}, product"] = product(judged, test), right_B
                rows[f"ATS {head}, a T per {level}{loss}, mean"] = mean(judged, test), right_B
        print("answers", head, flush=True)
    return rows


def greedy_part(policy: Policy, data: Data, name: str) -> tuple[Part, np.ndarray]:
    """The policy's answers to one part of every family, and the verifier's verdicts."""
    asked = [(family, p) for family in FAMILIES for p in data.prompts[family][name]]
    part, texts = policy.greedy([p for _, p in asked])
    right = [data.tasks[family].reward(p, text) for (family, p), text in zip(asked, texts, strict=True)]
    return part, np.array(right) == 1.0


def product(judged: Judged, part: Part) -> np.ndarray:
    """The probability of every answer."""
    return np.exp(np.bincount(part.prompt_N, np.log(np.maximum(judged.top_N, 1e-300))))


def mean(judged: Judged, part: Part) -> np.ndarray:
    """The mean probability of every answer's tokens."""
    return np.bincount(part.prompt_N, judged.top_N) / np.bincount(part.prompt_N)
