"""What a scorer answers: one entry an item, in the order of the items; an item that failed has a reason and no number.

Every backend ends in `score_result`. T tokens or steps, K labels, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from rlalign.scoring.params import ModelInfo, ScoringParams

    Floats = NDArray[np.floating]


LOW_LABEL_MASS = "low_label_mass"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """Scores of one request. Every list has one entry an item.

    logits: float32 head outputs before any mean, sigma or activation: [K] per item (classify), [T, K] (token tasks, or one row
        a step), [K] log-probabilities of the labels (generative), None for embeddings and for failed items.
    scores: what the request asked for (logits, probabilities, calibrated probabilities), same shapes; [1] for a calibrated judge,
        the probability of its first label; [D] for embeddings.
    pooled_hidden_states: [D] tensor per item, before the head; None as a whole unless it was asked for.
    token_logprobs: per item, the label tokens' log-probabilities (nats); None unless asked for.
    label_mass: per item, the probability the labels hold together (generative judges); None for other tasks.
    prompt_tokens: tokens of each item's sequence as the model read it.
    errors: None, or the reason why an item has no reward. A failed item is never 0.0. A score beside an error is one that must not
        be used as a reward: LOW_LABEL_MASS, a judge that put less than min_label_mass on its labels.
    calibration_id: of the one calibration that made every score here; "identity" for none.
    """

    logits: list[np.ndarray | None]
    scores: list[np.ndarray | None]
    prompt_tokens: list[int]
    errors: list[str | None]
    model: str
    calibration_id: str = "identity"
    pooled_hidden_states: list[Tensor | None] | None = None
    token_logprobs: list[np.ndarray | None] | None = None
    label_mass: list[float | None] | None = None
    truncated: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = len(self.scores)
        if not self.truncated:
            object.__setattr__(self, "truncated", [False] * n)
        lengths = {"logits": len(self.logits), "prompt_tokens": len(self.prompt_tokens), "errors": len(self.errors)}
        wrong = {name: length for name, length in lengths.items() if length != n}
        if wrong:
            raise RuntimeError(f"ScoreResult: {n} scores, but {wrong}: a scorer must answer every item")
        for i, (score, error) in enumerate(zip(self.scores, self.errors, strict=True)):
            if score is None and error is None:
                raise RuntimeError(
                    f"ScoreResult: item {i} has neither a score nor an error: a missing score needs a reason"
                )

    def __len__(self) -> int:
        return len(self.scores)

    def rewards(self, label_index: int | None = None) -> list[float | None]:
        """One number an item, None where it has an error. With several labels `label_index` says which; ValueError without it."""
        found: list[float | None] = []
        for score, error in zip(self.scores, self.errors, strict=True):
            if score is not None and score.shape != (1,) and label_index is None:
                raise ValueError(
                    f"{self.model}: a reward is one number, but the model gives scores of shape {score.shape}; "
                    "say which one with label_index"
                )
            found.append(
                None if score is None or error is not None else float(score[0 if label_index is None else label_index])
            )
        return found


def classification_scores(logits: Floats, params: ScoringParams, info: ModelInfo) -> Floats:
    """activation((logits - mean) / sigma) of [K] or [T, K] logits, in float64; the logits themselves unless something was asked.

    Not rounded to float32: 1 - 2e-9 and 1 - 2e-8, logits 20 and 18, would be one score, and a ranking a draw.
    """
    if params.logit_mean is None and params.logit_sigma is None and not params.use_activation:
        return logits
    x = logits.astype(np.float64)
    if params.logit_mean is not None:
        x = x - params.logit_mean
    if params.logit_sigma is not None:
        x = x / params.logit_sigma
    if params.use_activation:
        # a step-pooling model's returned columns compete with each other, whatever the whole head does
        activation = "softmax" if params.returned_token_ids and len(params.returned_token_ids) > 1 else info.activation
        x = activate(x, activation)
    return x


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
    assert params.temperature is not None, "resolved parameters have one"
    x_K = logprobs_K.astype(np.float64)
    mass = float(np.exp(x_K).sum())
    scores_K = np.exp(x_K) if params.full_vocabulary else activate(x_K / params.temperature, "softmax")
    return scores_K, mass


def embedding(state_D: Floats, params: ScoringParams) -> Floats:
    """The first `dimensions` of [D] or [T, D] states, to unit length if asked for (the cut comes first, as in training)."""
    cut = state_D[..., : params.dimensions]
    if not params.use_activation:
        return cut
    return cut / np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), 1e-12)


ROUNDING = 1e-6  # of a sum of probabilities that arrived as float32 logarithms


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One item's answer. values: float32 logits [K] or [T, K], labels' log-probabilities [K], states [D] or [T, D]; or an error.

    state: the pooled state [D] where it was asked for.
    """

    values: NDArray[np.float32] | None = None
    error: str | None = None
    state: Tensor | None = None
    prompt_tokens: int = 0
    truncated: bool = False


def score_result(
    answers: Sequence[Answer], params: ScoringParams, info: ModelInfo, calibration_id: str = "identity"
) -> ScoreResult:
    """Scores as the resolved `params` ask for them. An answer that is missing, empty or not finite becomes an error."""
    checked = [_checked(answer, params) for answer in answers]
    rows = [_row(answer, params, info) for answer in checked]
    generative = params.task == "generative"
    return ScoreResult(
        logits=[None if params.task in ("embed", "token_embed") else answer.values for answer in checked],
        scores=[score for score, _, _ in rows],
        errors=[error for _, _, error in rows],
        label_mass=[mass for _, mass, _ in rows] if generative else None,
        token_logprobs=[answer.values for answer in checked] if generative and params.return_token_logprobs else None,
        pooled_hidden_states=[answer.state for answer in checked] if params.return_pooled_hidden_states else None,
        prompt_tokens=[answer.prompt_tokens for answer in answers],
        truncated=[answer.truncated for answer in answers],
        model=info.id,
        calibration_id=calibration_id,
    )


def _checked(answer: Answer, params: ScoringParams) -> Answer:
    values = answer.values
    if answer.error is not None:
        reason = answer.error
    elif values is None:
        reason = "no score came back"
    elif not np.isfinite(values).all():
        reason = f"the score is not finite: {values.tolist()}"
    elif not values.size:
        steps = "" if params.step_tag_id is None else f": no token of the sequence is step_tag_id={params.step_tag_id}"
        reason = f"the score is an empty list{steps}"
    elif params.return_pooled_hidden_states and answer.state is None:
        reason = "a score came back without its pooled hidden state"
    else:
        return answer
    return Answer(error=reason, prompt_tokens=answer.prompt_tokens, truncated=answer.truncated)


def _row(answer: Answer, params: ScoringParams, info: ModelInfo) -> tuple[Floats | None, float | None, str | None]:
    """(score, label mass, error) of a checked answer."""
    if answer.values is None:
        return None, None, answer.error
    if params.task in ("embed", "token_embed"):
        return embedding(answer.values, params), None, None
    if params.task != "generative":
        return classification_scores(answer.values, params, info), None, None
    assert params.min_label_mass is not None, "resolved parameters have one"
    score_K, mass = label_scores(answer.values, params)
    if mass < params.min_label_mass - ROUNDING:
        return score_K, mass, LOW_LABEL_MASS
    return score_K, mass, None
