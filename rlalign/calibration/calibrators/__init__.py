"""Calibrators: raw reward logits in, probabilities out, in the manner of scikit-learn.

    calibrator = PlattCalibrator().fit(logits, labels)      # labels: what a verifier or a person said
    p = calibrator.transform(new_logits)
    calibrator.save("rm.calib.json", model=ModelIdentity(id="my/reward-model", head_dtype="float32"))

Platt, temperature and beta increase strictly and keep the order of responses; isotonic has plateaus (see
`diagnostics_.tied_fraction`). A positive affine change of the reward is a no-op under group-normalised GRPO: only what
follows the affine part (the sigmoid, a mixture with other rewards, a threshold) can change training.
The methods are in `methods`, what they share in `calibrator`, optimisation in `solvers`, files in `calibration_file`.
"""

from __future__ import annotations

from rlalign.calibration.calibrators.calibration_file import (
    CalibrationMismatchError,
    CalibrationWarning,
    ModelIdentity,
    NotFittedError,
)
from rlalign.calibration.calibrators.calibrator import Calibrator, FitReport, Support
from rlalign.calibration.calibrators.methods import (
    AffineCalibrator,
    BetaCalibrator,
    IdentityCalibrator,
    IsotonicCalibrator,
    PlattCalibrator,
    TemperatureCalibrator,
)

__all__ = [
    "AffineCalibrator", "BetaCalibrator", "CalibrationMismatchError", "CalibrationWarning", "Calibrator", "FitReport",
    "IdentityCalibrator", "IsotonicCalibrator", "ModelIdentity", "NotFittedError", "PlattCalibrator", "Support",
    "TemperatureCalibrator",
]  # fmt: skip
