"""Is a calibration for the model that scores now? The scorer's ModelInfo against the identity in the calibration file."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from rlalign.calibration.calibrators.calibration_file import CalibrationMismatchError, ModelIdentity

if TYPE_CHECKING:
    from rlalign.calibration.calibrators import Calibrator
    from rlalign.scoring.model_info import ModelInfo


def identity_of(info: ModelInfo) -> ModelIdentity:
    """What a calibration of this model's scores is bound to."""
    return ModelIdentity(
        id=info.id,
        revision=info.revision,
        template_sha256=info.template_sha256,
        dtype=info.dtype,
        head_dtype=info.head_dtype,
        num_labels=info.num_labels or None,
    )


def require_same_model(calibrator: Calibrator, info: ModelInfo, *, what: str, same_folder: bool = False) -> None:
    """Raise CalibrationMismatchError unless the calibrator was fitted on scores of this model.

    The id must be in the file; the other fields are compared where both sides know them. same_folder: the file lies in the
    model's own folder, which may have moved since: the id, its path, is not compared.
    """
    fitted, now = calibrator.model_, identity_of(info)
    if fitted.id is None:
        raise CalibrationMismatchError(
            f"{what}: the calibration is bound to no model; fit it with rlalign calibrate --model {info.id}"
        )
    known = {name for name, value in asdict(fitted).items() if value is not None}
    expected = replace(
        now, **{name: None for name in asdict(now) if name not in known or (same_folder and name == "id")}
    )
    if different := fitted.differences(expected):
        raise CalibrationMismatchError(
            f"{what}: the calibration was fitted on another model ({'; '.join(different)}); fit one on this model's scores"
        )
