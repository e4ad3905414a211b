"""An adaptive temperature on disk: JSON sealed by a digest, the head's weights in safetensors beside it.

The JSON names the weights' file and its sha256, and is replaced last: whoever reads sees the old pair or the new one.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.reward.adaptive.heads import HeadShape, TemperatureHead
from rlalign.reward.adaptive.losses import Objective
from rlalign.reward.adaptive.training import AdaptiveFit, Training
from rlalign.reward.calibration import file as calibration_file
from rlalign.reward.calibration.file import CalibrationMismatchError, Json, ModelIdentity

if TYPE_CHECKING:
    from rlalign.reward.adaptive import AdaptiveTemperature

METHOD = "adaptive_temperature"


def calibration_id(calibrator: AdaptiveTemperature) -> str:
    """From the head's bytes, its shape and how its output is read."""
    return calibration_file.function_id(METHOD, _function(calibrator, _weights(calibrator)))


def save(calibrator: AdaptiveTemperature, path: Path, model: ModelIdentity) -> None:
    """Write weights, then JSON, then remove the weights that the JSON named before. Raises NotFittedError."""
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: name the JSON file; the weights go beside it")
    weights = _weights(calibrator)
    function = _function(calibrator, weights)
    beside = path.with_name(f"{path.stem}-{function['sha256'][:12]}.safetensors")
    content: Json = {
        "method": METHOD,
        "options": {
            "objective": asdict(calibrator.objective),
            "training": asdict(calibrator.training),
        },
        "params": function | {"weights": beside.name},
        "fit": None if calibrator.diagnostics_ is None else calibrator.diagnostics_.as_json(),
    }
    before = _weights_named_in(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside.with_name(f".{beside.name}.{os.getpid()}.partial")
    partial.write_bytes(weights)
    os.replace(partial, beside)
    calibration_file.write(path, content, model)
    if before is not None and before != beside:
        before.unlink(missing_ok=True)


def load(
    kind: type[AdaptiveTemperature], path: Path, *, expect_model: ModelIdentity | None, strict: bool
) -> AdaptiveTemperature:
    """Both files after every check; weights whose digest does not fit are refused even with strict=False."""
    from safetensors.torch import load as read_tensors

    content, model = calibration_file.read(path, expect_model=expect_model, strict=strict)
    if content.get("method") != METHOD:
        raise ValueError(
            f"{path}: method {content.get('method')!r}, expected {METHOD!r}; see rlalign.reward.calibration"
        )
    try:
        params, options = content["params"], content["options"]
        shape = HeadShape(**params["shape"])
        calibrator = kind(
            head=shape.kind,
            intermediate_size=shape.intermediate_size,
            num_heads=shape.num_heads,
            objective=Objective(**options["objective"]),
            training=Training(**options["training"]),
            bounds=tuple(params["bounds"]),
            level=params["level"],
            output=params["output"],
        )
        calibrator.diagnostics_ = None if content["fit"] is None else AdaptiveFit.from_json(content["fit"])
        beside, digest = path.with_name(params["weights"]), params["sha256"]
    except (KeyError, TypeError) as error:
        raise CalibrationMismatchError(f"{path}: fields that this rlalign does not know ({error!r})") from error
    if not beside.is_file():
        raise CalibrationMismatchError(f"{path}: its weights {beside.name} are not beside it; copy both files")
    weights = beside.read_bytes()
    if hashlib.sha256(weights).hexdigest() != digest:
        raise CalibrationMismatchError(f"{beside}: not the weights that {path.name} was saved with; save both again")
    head = TemperatureHead(shape)
    head.load_state_dict(read_tensors(weights))
    calibrator.head_, calibrator.model_ = head.requires_grad_(False), model
    return calibrator


def _weights(calibrator: AdaptiveTemperature) -> bytes:
    from safetensors.torch import save as write_tensors

    head = calibrator.require_fitted()
    return write_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()})


def _function(calibrator: AdaptiveTemperature, weights: bytes) -> Json:
    return {
        "shape": asdict(calibrator.require_fitted().shape),
        "bounds": list(calibrator.bounds),
        "level": calibrator.level,
        "output": calibrator.output,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def _weights_named_in(path: Path) -> Path | None:
    """The weights of the file that is about to be replaced; None when it is not a whole file of this kind."""
    try:
        content, _ = calibration_file.read(path, expect_model=None, strict=True)
    except (ValueError, CalibrationMismatchError):
        return None
    named = content["params"].get("weights") if content.get("method") == METHOD else None
    return None if named is None else path.with_name(Path(named).name)
