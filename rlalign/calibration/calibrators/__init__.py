"""Calibrators: raw reward logits in, probabilities out, in the manner of scikit-learn.

    calibrator = PlattCalibrator().fit(logits, labels)      # labels: what a verifier or a person said
    p = calibrator.transform(new_logits)
    calibrator.save("rm.calib.json", model=ModelIdentity(id="my/reward-model", head_dtype="float32"))

Platt, temperature and beta increase strictly and keep the order of responses; isotonic has plateaus (see
`diagnostics_.tied_fraction`). A positive affine change of the reward is a no-op under group-normalised GRPO: only what
follows the affine part (the sigmoid, a mixture with other rewards, a threshold) can change training.
Inputs are checked in `labelled_data`, optimisation is in `solvers`, files are in `calibration_file`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlalign.calibration.arrays import as_rows
from rlalign.calibration.calibrators.affine import (
    AffineCalibrator,
    BetaCalibrator,
    IsotonicCalibrator,
    PlattCalibrator,
    TemperatureCalibrator,
)
from rlalign.calibration.calibrators.calibration_file import (
    CalibrationMismatchError,
    CalibrationWarning,
    ModelIdentity,
    NotFittedError,
)
from rlalign.calibration.calibrators.calibrator import (
    Calibrator,
    FitReport,
    Outcome,
    PoolerFields,
    Support,
    plain_probabilities,
)

if TYPE_CHECKING:
    from rlalign.calibration.arrays import Floats, Numbers
    from rlalign.calibration.calibrators.calibration_file import Json
    from rlalign.calibration.calibrators.solvers import Labelled

__all__ = [
    "AffineCalibrator", "BetaCalibrator", "CalibrationMismatchError", "CalibrationWarning", "Calibrator", "FitReport",
    "IdentityCalibrator", "IsotonicCalibrator", "ModelIdentity", "NotFittedError", "PlattCalibrator", "Support",
    "TemperatureCalibrator",
]  # fmt: skip


class IdentityCalibrator(Calibrator):
    """Scores as they are: `transform` returns the logits. Always fitted; `fit` only records diagnostics."""

    method = "identity"
    takes_classes = True
    fitted = True

    @property
    def calibration_id(self) -> str:
        """ "identity": what a reward carries where nothing was fitted."""
        return self.method

    def to_vllm_pooler_config(self, fields: PoolerFields = "logit_mean, logit_sigma") -> dict[str, float | bool]:
        """Raw logits from vLLM, which by default applies its own activation."""
        return {"use_activation": False}

    def to_openrlhf(self) -> dict[str, float]:
        """OpenRLHF's defaults: no shift, no scaling."""
        return {"mean": 0.0, "std": 1.0}

    def _solve(self, data: Labelled) -> Outcome:
        return Outcome()

    def _solve_pairs(self, data: Labelled) -> Outcome:
        return Outcome()

    def _apply(self, x: Floats) -> Floats:
        return x.copy()

    def probabilities(self, logits: Numbers) -> Floats:
        """Sigmoid of [N] logits, softmax of [N, K]."""
        return plain_probabilities(as_rows(logits, "logits"))

    def parameters(self) -> Json:
        return {}

    def _restore(self, params: Json) -> None: ...
