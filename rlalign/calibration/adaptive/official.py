"""Checkpoints of the official ATS code (arXiv 2409.19817), read into an AdaptiveTemperature.

There the head's output is log 1/T: `logits * exp(output).clip(max=10)`, so T >= 0.1 without an upper end, and the hidden
states are not standardised. The folder holds config.json and calibration_head.safetensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlalign.calibration.adaptive.heads import HeadShape, TemperatureHead
from rlalign.calibration.calibrators.calibration_file import ModelIdentity

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "calibration_head.safetensors"
KINDS = {"temperature": "constant", "linear": "linear", "mlp": "mlp", "transformer": "transformer"}
BOUNDS = (0.1, 1e30)  # the official clip, and a number that no head reaches in place of "no upper end"


def read_official(folder: Path) -> tuple[TemperatureHead, ModelIdentity]:
    """The head and the model it was made for.

    Raises ValueError where files are missing, and for what this package does not compute: other features than the last
    hidden state, logits normalised first, Platt heads, weights that are not those of the head.
    """
    from safetensors.torch import load_file

    config_file, weights_file = folder / "config.json", folder / WEIGHTS
    if not config_file.is_file() or not weights_file.is_file():
        raise ValueError(
            f"{folder}: expected config.json and {WEIGHTS}; a pickled calibration_head.bin is not read, save it as "
            "safetensors first"
        )
    config = json.loads(config_file.read_text())
    kind = KINDS.get(config.get("calibration_type"))
    if kind is None:
        raise ValueError(f"{folder}: calibration_type {config.get('calibration_type')!r}, expected {', '.join(KINDS)}")
    if config.get("feature_key", "hidden_states") != "hidden_states" or config.get("normalize_logits"):
        raise ValueError(f"{folder}: feature_key and normalize_logits must be 'hidden_states' and false, got {config}")
    shape = HeadShape(
        kind=kind,
        hidden_size=config["in_features"],
        intermediate_size=config.get("intermediate_size"),
        num_heads=config.get("num_attention_heads"),
        num_key_value_heads=config.get("num_key_value_heads"),
    )
    head = TemperatureHead(shape)
    tensors = _renamed(load_file(weights_file), shape)
    missing, unexpected = head.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if name not in ("centre_D", "unit_D")]  # ours: 0 and 1 leave states as they are
    if missing or unexpected:
        raise ValueError(f"{weights_file}: not the weights of this head; missing {missing}, unknown {unexpected}")
    return head, ModelIdentity(id=config.get("base_model_name_or_path"))


def _renamed(tensors: dict[str, Tensor], shape: HeadShape) -> dict[str, Tensor]:
    """Their names to ours; the scalar temperature, which divides, to the bias of a constant head."""
    if shape.kind != "constant":
        return {name.replace("linear_head.", "linear."): tensor.float() for name, tensor in tensors.items()}
    temperature = float(tensors["temperature"])
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{WEIGHTS}: temperature {temperature} is not positive: logits would be turned round")
    return {"linear.weight": torch.zeros(1, shape.hidden_size), "linear.bias": torch.tensor([-math.log(temperature)])}
