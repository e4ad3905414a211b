"""What a scorer answers: one entry an item, in the order of the items; an item that failed has a reason and no number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


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
