"""Adaptive temperature scaling (arXiv 2409.19817): a small head reads a temperature for every token off its hidden state.

    calibrator = AdaptiveTemperature().fit(batches, validation=held_out)
    temperature_BL = calibrator.temperatures(hidden_BLD)              # entry t is about token t
    logprobs_BL = token_logprobs(hidden_BLD, weight_VD, token_ids_BL, temperature=temperature_BL)

The model is frozen and its ranking of tokens stays: a positive number divides all logits of a token. Serves the token
confidence of a policy or of a generative judge (TokenBatch), a judge's labels and multi-class reward heads with a
pooled hidden state (ClassBatch). docs/adaptive.md says when a single temperature is better, which it often is.
"""

from __future__ import annotations

from rlalign.calibration.adaptive.batches import Batch, ClassBatch, TokenBatch, token_batches
from rlalign.calibration.adaptive.fitting import AdaptiveFit, Training
from rlalign.calibration.adaptive.heads import HeadShape
from rlalign.calibration.adaptive.sums import Objective, Projection
from rlalign.calibration.adaptive.temperature import AdaptiveTemperature, Confidence, confidence_at

__all__ = [
    "AdaptiveFit", "AdaptiveTemperature", "Batch", "ClassBatch", "Confidence", "HeadShape", "Objective", "Projection",
    "TokenBatch", "Training", "confidence_at", "token_batches",
]  # fmt: skip
