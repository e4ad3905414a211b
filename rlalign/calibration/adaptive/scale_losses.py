"""What a calibration head is trained on: losses of one scale per token, from four numbers per token.

The scale s = 1 / T multiplies the logits z of a token. Every loss needs the log-sum-exp of s z, which moves with s, and
the logits of the target and of the top, and the mean logit, which do not. Masked tokens never get here.
The log-sum-exp comes in two parts, the top token and the rest: 1 - p of a nearly certain token is then exact.

N scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Loss = Literal["top_label", "selective", "cross_entropy", "label_smoothing", "uniform"]
AlphaForm = Literal["share", "balanced", "added"]
LOSSES = ("top_label", "selective", "cross_entropy", "label_smoothing", "uniform")
ALPHA_FORMS = ("share", "balanced", "added")


class Facts(NamedTuple):
    """What the uncalibrated logits say, per token.

    Logits of the target, of the top token (the first where several are largest) and of the runner-up; their mean over
    the vocabulary; the top token's id; whether it is the target.
    """

    target_N: Tensor
    top_N: Tensor
    runner_up_N: Tensor
    mean_N: Tensor
    top_id_N: Tensor
    right_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Which loss.

    top_label: log loss of "the most likely token is the right one" under its own probability; proper for confidence.
    cross_entropy: -log p(target). uniform: cross-entropy to the uniform distribution, whatever the target.
    label_smoothing: (1 - smoothing) cross_entropy + smoothing uniform (arXiv 1512.00567).
    selective: cross-entropy where the base model's argmax is right, uniform where it is wrong (arXiv 2409.19817).
    How its alpha weighs them, per token:
      share     (1 - alpha) if right, alpha if wrong. The default: no token's weight depends on another token.
      balanced  the official code: mean over the right tokens times (1 - alpha)(1 - a), mean over the wrong ones times
                alpha a, normalised, a the accuracy; here a is the fitted set's, not a batch's, so a batch without
                wrong tokens still has a gradient. The same as share at alpha' / (1 - alpha') =
                alpha / (1 - alpha) * (a / (1 - a))^2: at a = 0.9 wrong tokens weigh 81 times more than alpha says.
      added     cross-entropy everywhere, plus alpha times uniform where wrong.
    Raises ValueError on an unknown name, and on alpha or smoothing outside (0, 1).
    """

    loss: Loss = "top_label"
    alpha: float = 0.5
    alpha_form: AlphaForm = "share"
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.alpha_form not in ALPHA_FORMS:
            raise ValueError(f"alpha_form: expected one of {', '.join(ALPHA_FORMS)}, got {self.alpha_form!r}")
        for name, value in (("alpha", self.alpha), ("smoothing", self.smoothing)):
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name}: expected a number in (0, 1), got {value}")

    def per_token(self, rest_N: Tensor, scale_N: Tensor, facts: Facts, accuracy: float) -> Tensor:
        """The loss of each token [N], nats; its mean over tokens is what is minimised.

        rest_N: log-sum-exp of the scaled logits without the top token's. accuracy: of the whole fitted set; only
        `balanced` reads it. Raises ValueError where `balanced` has nothing to balance (accuracy 0 or 1).
        """
        top_N = scale_N * facts.top_N
        if self.loss == "top_label":
            log_odds_N = top_N - rest_N
            return functional.softplus(torch.where(facts.right_N, -log_odds_N, log_odds_N))
        lse_N = torch.logaddexp(top_N, rest_N)
        hard_N, smooth_N = self._weights(facts.right_N, accuracy)
        return hard_N * (lse_N - scale_N * facts.target_N) + smooth_N * (lse_N - scale_N * facts.mean_N)

    def _weights(self, right_N: Tensor, accuracy: float) -> tuple[Tensor, Tensor]:
        """Weights of the target's and of the uniform cross-entropy, per token."""
        right_N = right_N.to(torch.float32)
        wrong_N = 1.0 - right_N
        if self.loss == "selective" and self.alpha_form == "share":
            return (1.0 - self.alpha) * right_N, self.alpha * wrong_N
        if self.loss == "selective" and self.alpha_form == "added":
            return torch.ones_like(right_N), self.alpha * wrong_N
        if self.loss == "selective":
            if not 0.0 < accuracy < 1.0:
                raise ValueError(
                    f"alpha_form 'balanced': the fitted tokens are all {'right' if accuracy else 'wrong'}, so there is "
                    "nothing to balance; use alpha_form 'share'"
                )
            hard, smooth = (1.0 - self.alpha) * (1.0 - accuracy), self.alpha * accuracy
            total = hard + smooth
            return hard / total / accuracy * right_N, smooth / total / (1.0 - accuracy) * wrong_N
        smooth = {"cross_entropy": 0.0, "uniform": 1.0, "label_smoothing": self.smoothing}[self.loss]
        return torch.full_like(right_N, 1.0 - smooth), torch.full_like(right_N, smooth)
