"""KL(policy || reference) from sampled tokens, and the controller that holds it near a target.

d = old_logprobs - ref_logprobs, in nats, of tokens that the policy sampled. B sequences, L padded length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlalign import ranks
from rlalign.mismatch.aligned import require_aligned
from rlalign.objective.losses import log_ratio

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.config import KlPenaltyConfig

LARGEST_ERROR = 0.2  # of the controller, relative to its target
FILE = "kl_penalty.json"


def per_token(old_logprobs_BL: Tensor, ref_logprobs_BL: Tensor, loss_mask_BL: Tensor, estimator: str) -> Tensor:
    """[B, L] float32, 0 outside the mask: an estimate of KL(policy || reference) by each token.

    k1 = d, unbiased and of either sign; k2 = d^2 / 2, biased; k3 = expm1(-d) + d, unbiased and never negative. d is clamped to
    +-losses.LOG_RATIO_LIMIT. Raises ValueError for another estimator, shapes that differ, a mask that is
    not bool. Reference: joschu.net/blog/kl-approx.html.
    """
    require_aligned("reference_kl", old=old_logprobs_BL, ref=ref_logprobs_BL, mask=loss_mask_BL)
    d_BL = log_ratio(old_logprobs_BL.detach(), ref_logprobs_BL.detach(), loss_mask_BL)
    if estimator == "k1":
        return d_BL
    if estimator == "k2":
        return d_BL.square() / 2
    if estimator == "k3":
        return torch.expm1(-d_BL) + d_BL
    raise ValueError(f"KL estimator {estimator!r}: choose k1, k2 or k3")


class KlController:
    """The coefficient of the penalty: fixed without a target, otherwise steered so that a sequence's KL comes near it.

    coef *= 1 + clip(measured / target - 1, -0.2, 0.2) * sequences / horizon. Its only state is coef, which checkpoints keep.
    Reference: arXiv 1909.08593, section 2.2.
    """

    def __init__(self, config: KlPenaltyConfig) -> None:
        self.coef = config.coef
        self._target, self._horizon = config.target, config.horizon

    def update(self, measured: float, sequences: int) -> None:
        """measured: mean over sequences of the sum over their tokens, nats. RuntimeError unless it is finite."""
        if not self._target:
            return
        if not abs(measured) < float("inf"):
            raise RuntimeError(
                f"the KL to the initial policy was measured as {measured} nats: nothing can be steered by that"
            )
        error = max(-LARGEST_ERROR, min(LARGEST_ERROR, measured / self._target - 1.0))
        self.coef *= 1.0 + error * sequences / self._horizon

    def save_state(self, folder: Path) -> None:
        """Every trainer rank must call it."""
        ranks.on_first(lambda: _write(folder / FILE, self.coef))

    def load_state(self, folder: Path) -> None:
        """Every trainer rank must call it. A fixed coefficient stays the configuration's."""
        if self._target:
            self.coef = ranks.on_first(lambda: json.loads((folder / FILE).read_text())["coef"])


def _write(path: Path, coef: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"coef": coef}))
