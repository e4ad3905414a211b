"""An overconfident classifier, cooled down with one number: vLLM divides its logits by a temperature.

python examples/temperature_scaling.py

A classifier with three classes is trained far too long on too few answers, so that it is surer than it is right. Temperature
scaling cannot change which class wins. A mean shared by all classes would cancel in the softmax, so this is all that a scalar
in PoolerConfig can do for several labels; a temperature for each label is for the client.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import addition
import numpy as np

from rlalign.calibration.calibrators import TemperatureCalibrator
from rlalign.calibration.metrics import expected_calibration_error
from rlalign.scoring import HFScorer, VLLMScorer


@dataclass(frozen=True)
class Outcome:
    """Of the winning class: ece_plain and ece_served, sure_plain and sure_served (mean probability), accuracy.

    difference: engine against client, largest. moved: rows whose winning class changed.
    """

    temperature: float
    ece_plain: float
    ece_served: float
    sure_plain: float
    sure_served: float
    accuracy: float
    difference: float
    moved: int


def main() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder))


def run(folder: Path) -> Outcome:
    model = addition.trained(addition.answers(240, 10, 99, seed=1), folder, kinds=True, steps=150)
    plain = HFScorer(str(model))
    validation, held_out = addition.answers(600, 10, 99, seed=2), addition.answers(1200, 10, 99, seed=3)
    calibrator = TemperatureCalibrator().fit(addition.logits(plain, validation), [row.kind for row in validation])

    engine = VLLMScorer.start(model, dtype="float32", pooler_config=calibrator.to_vllm_pooler_config())
    raw, kinds = addition.logits(plain, held_out).astype(np.float64), np.array([row.kind for row in held_out])
    before = np.exp(raw - raw.max(1, keepdims=True))
    before /= before.sum(1, keepdims=True)
    after = addition.served(engine, held_out)
    right = before.argmax(1) == kinds
    outcome = Outcome(
        temperature=calibrator.temperature_,
        ece_plain=expected_calibration_error(before.max(1), right),
        ece_served=expected_calibration_error(after.max(1), right),
        sure_plain=float(before.max(1).mean()),
        sure_served=float(after.max(1).mean()),
        accuracy=float(right.mean()),
        difference=float(np.abs(calibrator.transform(raw) - after).max()),
        moved=int((before.argmax(1) != after.argmax(1)).sum()),
    )
    print(f"temperature {outcome.temperature:.2f}; accuracy {outcome.accuracy:.2f}")
    print(f"sure of itself: {outcome.sure_plain:.2f} before, {outcome.sure_served:.2f} served by vLLM")
    print(f"calibration error: {outcome.ece_plain:.3f} before, {outcome.ece_served:.3f} served by vLLM")
    print(f"answers whose class changed: {outcome.moved}; engine against client {outcome.difference:.1e}")
    return outcome


if __name__ == "__main__":
    main()
