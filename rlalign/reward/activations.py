"""From a head's logits to the scores that a request asked for; the same arithmetic behind every backend.

T tokens or steps, K labels, D embedding dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlalign.reward.model_info import ModelInfo
    from rlalign.reward.params import ScoringParams

    Floats = NDArray[np.float32]


def classification_scores(logits: Floats, params: ScoringParams, info: ModelInfo) -> Floats:
    """activation((logits - mean) / sigma) of [K] or [T, K] logits; the logits themselves unless something was asked for."""
    x = logits.astype(np.float64)
    if params.logit_mean is not None:
        x = x - params.logit_mean
    if params.logit_sigma is not None:
        x = x / params.logit_sigma
    if params.use_activation:
        # a step-pooling model's returned columns compete with each other, whatever the whole head does
        activation = "softmax" if params.returned_token_ids and len(params.returned_token_ids) > 1 else info.activation
        x = activate(x, activation)
    return x.astype(np.float32)


def activate(x: NDArray[np.float64], activation: str) -> NDArray[np.float64]:
    """sigmoid, softmax over the last axis, or identity, in float64 and without overflow."""
    from scipy.special import expit, softmax

    if activation == "sigmoid":
        return expit(x)
    return softmax(x, axis=-1) if activation == "softmax" else x


def label_scores(logprobs_K: Floats, params: ScoringParams) -> tuple[Floats, float]:
    """A judge's scores [K] and label mass from the labels' log-probabilities (nats, over the whole vocabulary).

    Renormalised among the labels after division by the temperature, or as they are with full_vocabulary.
    """
    x_K = logprobs_K.astype(np.float64)
    mass = float(np.exp(x_K).sum())
    scores_K = np.exp(x_K) if params.full_vocabulary else activate(x_K / params.temperature, "softmax")
    return scores_K.astype(np.float32), mass


def embedding(state_D: Floats, params: ScoringParams) -> Floats:
    """The first `dimensions` of [D] or [T, D] states, to unit length if asked for (the cut comes first, as in training)."""
    cut = state_D[..., : params.dimensions]
    if not params.use_activation:
        return cut
    return cut / np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), 1e-12)
