"""The model: where it is, its dtype, and the dtype of its head."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class HeadDtype(enum.Enum):
    """Dtype of the logits on both sides. There is one for the run: a one-sided float32 head can be worse than none."""

    float32 = "float32"
    master = "master"  # float32 with the optimizer's unrounded fp32 lm_head on both sides; 16-bit bodies only
    model = "model"  # the body's dtype: rlalign's head is off


class Dtype(enum.Enum):
    """Dtype of the model's body, on both sides."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(kw_only=True)
class ModelConfig:
    path: str = "???"  # Hugging Face folder, or tiny:untied / tiny:tied (built and cached on first use)
    dtype: Dtype = Dtype.bfloat16
