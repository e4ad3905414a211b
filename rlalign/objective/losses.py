"""Policy and value losses: pure functions of log-probabilities, advantages and a `Correction`.

ratio = exp(logprobs - old), the policy's own movement since old; correction.weights carry old / rollout. Rejected
tokens leave every sum *and* are not counted by the denominators: num_tokens and num_sequences are counts over what
`correction.keep` keeps, of the whole optimizer step over all ranks and micro-batches, so that shards add up to the
loss of the whole. Log-ratios are clamped to +-LOG_RATIO_LIMIT before exp: beyond it a token has no gradient in the losses of
token ratios, while in gspo and cispo, where the ratio is a weight, the gradient goes on with the weight of the limit.

Old, reference, advantages, weights, values of before and returns are data: they get no gradient, also where the same tensor is
passed as logprobs. Everything is computed in float32 at least.

What lies outside `keep` is never multiplied, so NaN there reaches neither loss nor gradient. NaN inside is the
caller's bug and makes the loss NaN.

Each loss returns (loss, metrics). A metric is this shard's part of the step's mean, weighted exactly as the loss
weights its tokens: add over micro-batches and ranks, never average. Where peers differ: docs/losses.md.

B sequences, L padded length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlalign.mismatch.aligned import constant, require_aligned
from rlalign.objective.surrogate import (
    LOG_RATIO_LIMIT,
    check,
    clipped_loss,
    inside,
    log_ratio,
    per_sequence_token,
    per_token,
    ratio_metrics,
    surrogate_loss,
    weights_of,
    with_reference,
)

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.objective.surrogate import KlGradient, Loss
    from rlalign.types import Correction

__all__ = [
    "cispo_loss",
    "dapo_loss",
    "dr_grpo_loss",
    "grpo_loss",
    "grpo_sequence_loss",
    "gspo_loss",
    "ppo_loss",
    "value_loss",
]


def grpo_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    *,
    num_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprobs_BL: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_gradient: KlGradient = "k3",
) -> Loss:
    """Clipped surrogate, mean over the step's kept tokens: -w min(ratio A, clip(ratio, 1 - low, 1 + high) A).

    advantages_BL: [B, L]; a sequence's advantage repeated on its tokens. num_tokens: kept tokens of the step.
    ref_logprobs_BL: adds kl_coef times k3 of KL(policy || reference) on kept tokens, without importance weights; kl_gradient:
    "k3" for GRPO's own gradient, which is biased, "unbiased" for that of the KL (`surrogate.with_reference`).
    Every token of the step counts alike. The paper's mean over sequences of their means: `grpo_sequence_loss`.
    Raises ValueError on shapes that differ, num_tokens < 1, bounds out of range, or kl_coef without a reference.
    References: GRPO arXiv 2402.03300; token mean DAPO arXiv 2503.14476.
    """
    scale_BL = per_token(correction, num_tokens)
    return clipped_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, clip_low, clip_high, ref_logprobs_BL, kl_coef,
        kl_gradient,
    )  # fmt: skip


def grpo_sequence_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    *,
    num_sequences: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprobs_BL: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_gradient: KlGradient = "k3",
) -> Loss:
    """GRPO as published: each sequence's mean over its kept tokens, then the mean over the step's sequences.

    num_sequences: sequences of the step with a kept token. Short answers weigh more per token than long ones.
    Otherwise as `grpo_loss`. Reference: arXiv 2402.03300.
    """
    scale_BL = per_sequence_token(correction, num_sequences)
    return clipped_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, clip_low, clip_high, ref_logprobs_BL, kl_coef,
        kl_gradient,
    )  # fmt: skip


def dr_grpo_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    *,
    num_sequences: int,
    max_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprobs_BL: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_gradient: KlGradient = "k3",
) -> Loss:
    """Dr. GRPO: the sum over kept tokens divided by num_sequences * max_tokens, a constant that no length can bias.

    max_tokens: the generation limit of the run, not this batch's longest answer. Use with
    `advantages.group_relative(normalize_std=False)`. Otherwise as `grpo_loss`. Reference: arXiv 2503.20783.
    """
    if max_tokens < 1:
        raise ValueError(f"dr_grpo_loss: max_tokens must be positive, got {max_tokens}")
    scale_BL = per_token(correction, num_sequences * max_tokens)
    return clipped_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, clip_low, clip_high, ref_logprobs_BL, kl_coef,
        kl_gradient,
    )  # fmt: skip


def dapo_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    *,
    num_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Loss:
    """DAPO's objective: `grpo_loss` with a higher upper bound and no reference. Reference: arXiv 2503.14476.

    Its dynamic sampling, overlong filtering and reward shaping belong to rollout and reward.
    """
    scale_BL = per_token(correction, num_tokens)
    return clipped_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, clip_low, clip_high, None, 0.0, "k3"
    )


def ppo_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    *,
    num_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    ref_logprobs_BL: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_gradient: KlGradient = "k3",
) -> Loss:
    """PPO with dual clip: where A < 0 the loss is at most -dual_clip * A, however large the ratio.

    dual_clip > 1; math.inf is plain PPO. The reference term is that of `grpo_loss`.
    References: PPO arXiv 1707.06347, dual clip arXiv 1912.09729.
    """
    if not dual_clip > 1.0:
        raise ValueError(f"ppo_loss: dual_clip must exceed 1, got {dual_clip}")
    check(logprobs_BL, old_logprobs_BL, advantages_BL, correction, clip_low, clip_high, ref_logprobs_BL)
    keep_BL = correction.keep
    log_ratio_BL = log_ratio(logprobs_BL, constant(old_logprobs_BL), keep_BL)
    advantages_BL = inside(constant(advantages_BL), keep_BL)
    ratio_BL = log_ratio_BL.exp()
    clipped_BL = ratio_BL.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate_BL = torch.maximum(-advantages_BL * ratio_BL, -advantages_BL * clipped_BL)
    bound_BL = torch.where(advantages_BL < 0, -advantages_BL * dual_clip, torch.inf)
    scale_BL = per_token(correction, num_tokens)
    loss = (torch.minimum(surrogate_BL, bound_BL) * weights_of(correction) * scale_BL).sum()
    metrics = ratio_metrics(ratio_BL, log_ratio_BL, advantages_BL, scale_BL, clip_low, clip_high)
    metrics["dual_clipped"] = ((surrogate_BL > bound_BL) * scale_BL).sum().detach()
    metrics["policy_loss"] = loss.detach()
    return with_reference(loss, metrics, logprobs_BL, ref_logprobs_BL, keep_BL, scale_BL, kl_coef, kl_gradient)


def gspo_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    *,
    num_sequences: int,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Loss:
    """GSPO: one geometric ratio per sequence, exp(mean over kept tokens of logprobs - old), clipped as a whole.

    The gradient of token t is the sequence ratio's value times that of its own log-probability (GSPO-token form, equal
    to GSPO when a sequence's tokens share the advantage). Mean over the step's num_sequences of token means.
    Reference: arXiv 2507.18071.
    """
    check(logprobs_BL, old_logprobs_BL, advantages_BL, correction, clip_low, clip_high)
    keep_BL = correction.keep
    advantages_BL = inside(constant(advantages_BL), keep_BL)
    own_BL = inside(logprobs_BL, keep_BL)
    moved_BL = own_BL - inside(constant(old_logprobs_BL), keep_BL)
    mean_B1 = moved_BL.sum(-1, keepdim=True) / keep_BL.sum(-1, keepdim=True).clamp(min=1)
    log_ratio_BL = own_BL - own_BL.detach() + mean_B1.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    scale_BL = per_sequence_token(correction, num_sequences)
    return surrogate_loss(log_ratio_BL, advantages_BL, correction, scale_BL, clip_low, clip_high)


def cispo_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    *,
    num_tokens: int,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> Loss:
    """CISPO: -w stop_gradient(clip(ratio, 1 - low, 1 + high)) A logprobs, mean over the step's kept tokens.

    Every kept token has a gradient; only its weight is bounded. clip_low = 1 means no lower bound, as published.
    Reference: MiniMax-M1 arXiv 2506.13585.
    """
    check(logprobs_BL, old_logprobs_BL, advantages_BL, correction, clip_low, clip_high)
    keep_BL = correction.keep
    log_ratio_BL = log_ratio(logprobs_BL, constant(old_logprobs_BL), keep_BL)
    advantages_BL = inside(constant(advantages_BL), keep_BL)
    ratio_BL = log_ratio_BL.detach().exp()
    bounded_BL = ratio_BL.clamp(1.0 - clip_low, 1.0 + clip_high)
    scale_BL = per_token(correction, num_tokens)
    loss = (-bounded_BL * advantages_BL * inside(logprobs_BL, keep_BL) * weights_of(correction) * scale_BL).sum()
    metrics = {
        "ratio": (ratio_BL * scale_BL).sum(),
        "k1_old": (-log_ratio_BL.detach() * scale_BL).sum(),
        "clipped_low": ((ratio_BL < 1.0 - clip_low) * scale_BL).sum(),
        "clipped_high": ((ratio_BL > 1.0 + clip_high) * scale_BL).sum(),
    }
    return loss, metrics | {"policy_loss": loss.detach()}


def value_loss(
    values_BL: Tensor,
    old_values_BL: Tensor,
    returns_BL: Tensor,
    keep_BL: Tensor,
    *,
    num_tokens: int,
    clip: float = 0.2,
) -> Loss:
    """Half the squared error of the critic, the worse of raw and clipped to old_values +- clip, mean over tokens.

    A value that has moved further than the clip towards the return has no gradient; away from it, it has. math.inf turns
    clipping off. value_clipped: tokens whose clipped error was the worse.
    Reference: PPO arXiv 1707.06347, value clipping as in its reference implementation.
    """
    require_aligned("value_loss", values=values_BL, old_values=old_values_BL, returns=returns_BL, mask=keep_BL)
    if num_tokens < 1 or not clip > 0.0:
        raise ValueError(f"value_loss: num_tokens and clip must be positive, got {num_tokens} and {clip}")
    values_BL = inside(values_BL, keep_BL)
    old_BL, returns_BL = (inside(constant(x), keep_BL) for x in (old_values_BL, returns_BL))
    raw_BL = (values_BL - returns_BL).square()
    clipped_BL = (old_BL + (values_BL - old_BL).clamp(-clip, clip) - returns_BL).square()
    loss = 0.5 * torch.maximum(raw_BL, clipped_BL).sum() / num_tokens
    clipped = ((clipped_BL > raw_BL) & keep_BL).sum() / num_tokens
    return loss, {"value_loss": loss.detach(), "value_clipped": clipped.detach()}
