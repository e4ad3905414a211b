"""What the policy losses share: masking, ratios, denominators, the clipped surrogate.

B sequences, L padded length. scale_BL: a token's share of the step's mean, 0 where not kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from rlalign.mismatch.aligned import constant, require_aligned, wide

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.types import Correction

LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8 still has a finite square in float32

Loss = tuple["Tensor", dict[str, "Tensor"]]
KlGradient = Literal["k3", "unbiased"]


def clipped_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    scale_BL: Tensor,
    clip_low: float,
    clip_high: float,
    ref_logprobs_BL: Tensor | None,
    kl_coef: float,
    kl_gradient: KlGradient,
) -> Loss:
    """Clipped surrogate plus kl_coef times k3 to the reference, tokens weighted by scale_BL."""
    check(logprobs_BL, old_logprobs_BL, advantages_BL, correction, clip_low, clip_high, ref_logprobs_BL)
    keep_BL = correction.keep
    log_ratio_BL = log_ratio(logprobs_BL, constant(old_logprobs_BL), keep_BL)
    advantages_BL = inside(constant(advantages_BL), keep_BL)
    loss, metrics = surrogate_loss(log_ratio_BL, advantages_BL, correction, scale_BL, clip_low, clip_high)
    return with_reference(loss, metrics, logprobs_BL, ref_logprobs_BL, keep_BL, scale_BL, kl_coef, kl_gradient)


def with_reference(
    loss: Tensor,
    metrics: dict[str, Tensor],
    logprobs_BL: Tensor,
    ref_logprobs_BL: Tensor | None,
    keep_BL: Tensor,
    scale_BL: Tensor,
    kl_coef: float,
    kl_gradient: KlGradient,
) -> Loss:
    """The loss plus kl_coef times k3 of KL(policy || reference). Raises ValueError for kl_coef without a reference.

    kl_gradient: "k3" differentiates k3 itself, as GRPO does; its mean over the policy's tokens is the gradient of KL(reference ||
    policy), not of the KL it estimates. "unbiased" has k3's value and the gradient d * grad logprob, whose mean is that of
    KL(policy || reference) (NeMo-RL #2506; arXiv 2506.09477).
    """
    if kl_gradient not in ("k3", "unbiased"):
        raise ValueError(f'kl_gradient must be "k3" or "unbiased", got {kl_gradient!r}')
    if ref_logprobs_BL is None:
        if kl_coef:
            raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs_BL, the reference policy's log-probabilities")
        return loss, metrics
    to_ref_BL = log_ratio(constant(ref_logprobs_BL), logprobs_BL, keep_BL)
    k3_BL = to_ref_BL.expm1() - to_ref_BL
    if kl_gradient == "unbiased":
        k2_BL = 0.5 * to_ref_BL.square()
        k3_BL = k3_BL.detach() + k2_BL - k2_BL.detach()
    ref_k3 = (k3_BL * scale_BL).sum()
    return loss + kl_coef * ref_k3, metrics | {"ref_k3": ref_k3.detach()}


def surrogate_loss(
    log_ratio_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    scale_BL: Tensor,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """Sum of scale * weight * the pessimistic of raw and clipped surrogate."""
    ratio_BL = log_ratio_BL.exp()
    clipped_BL = ratio_BL.clamp(1.0 - clip_low, 1.0 + clip_high)
    pessimistic_BL = torch.minimum(ratio_BL * advantages_BL, clipped_BL * advantages_BL)
    loss = -(pessimistic_BL * weights_of(correction) * scale_BL).sum()
    metrics = ratio_metrics(ratio_BL, log_ratio_BL, advantages_BL, scale_BL, clip_low, clip_high)
    return loss, metrics | {"policy_loss": loss.detach()}


def ratio_metrics(
    ratio_BL: Tensor, log_ratio_BL: Tensor, advantages_BL: Tensor, scale_BL: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """clipped_*: tokens whose gradient the clip removes. k1_old: k1 of KL(old || policy). ratio: its mean."""
    ratio_BL, log_ratio_BL = ratio_BL.detach(), log_ratio_BL.detach()
    return {
        "ratio": (ratio_BL * scale_BL).sum(),
        "k1_old": (-log_ratio_BL * scale_BL).sum(),
        "clipped_low": (((ratio_BL < 1.0 - clip_low) & (advantages_BL < 0)) * scale_BL).sum(),
        "clipped_high": (((ratio_BL > 1.0 + clip_high) & (advantages_BL > 0)) * scale_BL).sum(),
    }


def per_token(correction: Correction, denominator: int) -> Tensor:
    """1 / denominator on kept tokens, 0 elsewhere."""
    if denominator < 1:
        raise ValueError(
            f"the loss denominator must be a positive count of kept tokens or sequences, got {denominator}"
        )
    return correction.keep / denominator


def per_sequence_token(correction: Correction, num_sequences: int) -> Tensor:
    """1 / (kept tokens of the sequence * num_sequences) on kept tokens, 0 elsewhere."""
    return per_token(correction, num_sequences) / correction.keep.sum(-1, keepdim=True).clamp(min=1)


def inside(x_BL: Tensor, keep_BL: Tensor) -> Tensor:
    """x where kept, 0 elsewhere, with no gradient from elsewhere: NaN there is harmless. In float32 at least."""
    return torch.where(keep_BL, wide(x_BL), 0.0)


def weights_of(correction: Correction) -> Tensor:
    """The weights where kept, 0 elsewhere: an infinite one that was rejected is not multiplied."""
    return inside(constant(correction.weights), correction.keep)


def log_ratio(numerator_BL: Tensor, denominator_BL: Tensor, keep_BL: Tensor) -> Tensor:
    """numerator - denominator where kept, clamped to +-LOG_RATIO_LIMIT, 0 elsewhere."""
    moved_BL = inside(numerator_BL, keep_BL) - inside(denominator_BL, keep_BL)
    return moved_BL.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def check(
    logprobs_BL: Tensor,
    old_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    clip_low: float,
    clip_high: float,
    ref_BL: Tensor | None = None,
) -> None:
    """Raise ValueError on shapes that differ, a keep that is not bool, bounds out of range."""
    require_aligned(
        "loss", logprobs=logprobs_BL, old=old_BL, advantages=advantages_BL, ref=ref_BL, mask=correction.keep,
        weights=correction.weights,
    )  # fmt: skip
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(f"loss: clip_low must be in [0, 1] and clip_high >= 0, got {clip_low} and {clip_high}")
