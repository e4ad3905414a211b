"""The two objectives of a reward model, on rewards that it has already given.

N rows or pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


def bradley_terry_loss(
    chosen_N: Tensor, rejected_N: Tensor, *, centring: float = 0.0, weights_N: Tensor | None = None
) -> Tensor:
    """Mean of weight * (-log sigmoid(chosen - rejected) + centring * (chosen + rejected)^2), in nats.

    Pairs say nothing about the level of the rewards; the second term keeps it near 0 (arXiv 2312.09244, Eq. 2; 0.01 there).
    weights_N: with mean 1 over the data set, so that batches add up. Raises ValueError on shapes that differ, no pairs, a
    negative centring or weight.
    """
    _require(chosen_N, rejected_N, weights_N, "bradley_terry_loss: chosen and rejected")
    if centring < 0:
        raise ValueError(f"bradley_terry_loss: centring cannot be negative, got {centring}")
    loss_N = -functional.logsigmoid(chosen_N - rejected_N) + centring * (chosen_N + rejected_N).square()
    return (loss_N if weights_N is None else weights_N * loss_N).mean()


def pointwise_loss(rewards_N: Tensor, labels_N: Tensor, *, weights_N: Tensor | None = None) -> Tensor:
    """Mean of weight * binary cross entropy of sigmoid(reward), in nats. labels_N: in [0, 1].

    weights_N: with mean 1 over the data set. Raises ValueError on shapes that differ, no rows, labels outside [0, 1], or a
    negative weight.
    """
    _require(rewards_N, labels_N, weights_N, "pointwise_loss: rewards and labels")
    if ((labels_N < 0) | (labels_N > 1)).any():
        raise ValueError(f"pointwise_loss: labels must lie in [0, 1], got {labels_N.min():g} to {labels_N.max():g}")
    return functional.binary_cross_entropy_with_logits(rewards_N, labels_N, weight=weights_N)


def _require(left_N: Tensor, right_N: Tensor, weights_N: Tensor | None, what: str) -> None:
    if left_N.shape != right_N.shape or left_N.ndim != 1 or len(left_N) == 0:
        raise ValueError(f"{what} must be [N] with N >= 1, got {tuple(left_N.shape)} and {tuple(right_N.shape)}")
    if weights_N is not None and (weights_N.shape != left_N.shape or (weights_N < 0).any()):
        raise ValueError(f"{what}: weights must be [N] and not negative, got shape {tuple(weights_N.shape)}")
