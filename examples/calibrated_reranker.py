"""A reranker whose scores are probabilities: two numbers fitted on a validation set, served by vLLM itself.

python examples/calibrated_reranker.py

The raw score orders candidates; it does not say how likely one is right. Platt scaling fits sigmoid(scale * (logit - bias)), and
vLLM applies it through PoolerConfig (logit_mean, logit_sigma), so that every client of the engine gets probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import addition
import numpy as np

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.calibration.metrics import ece_noise_floor, expected_calibration_error
from rlalign.scoring import HFScorer, VLLMScorer, with_calibration


@dataclass(frozen=True)
class Outcome:
    """ece_plain, ece_served: of sigmoid(logit), and of the engine's scores. difference: engine against client, largest.

    reordered: questions whose candidates stand in another order. refusal: what a second calibration is answered.
    """

    ece_plain: float
    ece_served: float
    difference: float
    reordered: int
    refusal: str


def main() -> Outcome:
    model = addition.reward_model()
    plain = HFScorer(str(model))
    validation = addition.answers(800, 10, 99, seed=1)
    calibrator = PlattCalibrator().fit(addition.logits(plain, validation), addition.labels(validation))
    print(f"fitted on {len(validation)} answers: scale {calibrator.scale_:.3f}, bias {calibrator.bias_:.3f}")

    engine = VLLMScorer.start(model, dtype="float32", pooler_config=calibrator.to_vllm_pooler_config())
    asked = addition.questions(200, 10, 99, seed=2)
    rows = [answer for candidates in asked for answer in candidates]
    raw = addition.logits(plain, rows)[:, 0]
    found = addition.served(engine, rows)[:, 0]
    order = [np.argsort(x.reshape(len(asked), -1), axis=1, kind="stable") for x in (raw, found)]
    try:
        with_calibration(engine, calibrator)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    outcome = Outcome(
        ece_plain=expected_calibration_error(1 / (1 + np.exp(-raw.astype(np.float64))), addition.labels(rows)),
        ece_served=expected_calibration_error(found, addition.labels(rows)),
        difference=float(np.abs(calibrator.transform(raw) - found).max()),
        reordered=int((order[0] != order[1]).any(axis=1).sum()),
        refusal=refusal,
    )
    best = asked[0][order[1][0][-1]]
    print(f"{best.question} {best.text}   right with probability {found[:4].max():.2f}")
    print(
        f"calibration error: sigmoid of the raw score {outcome.ece_plain:.3f}, served by vLLM {outcome.ece_served:.3f}, "
        f"by chance up to {ece_noise_floor(found).p95:.3f}"
    )
    print(
        f"questions whose order changed: {outcome.reordered} of {len(asked)}; engine against client {outcome.difference:.1e}"
    )
    print(f"a second calibration: {outcome.refusal or 'was accepted'}")
    return outcome


if __name__ == "__main__":
    main()
