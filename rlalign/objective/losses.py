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

Each named loss is one call of `policy_loss`: a surrogate, and an aggregation in the form of a weight for every token.
Each loss returns (loss, metrics). A metric is this shard's part of the step's mean, weighted exactly as the loss
weights its tokens: add over micro-batches and ranks, never average. Where peers differ: docs/losses.md.

B sequences, L padded length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from rlalign.mismatch.aligned import constant, require_aligned, wide

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.types import Correction

__all__ = [
    "cispo_loss",
    "dapo_loss",
    "dr_grpo_loss",
    "grpo_loss",
    "grpo_sequence_loss",
    "gspo_loss",
    "policy_loss",
    "ppo_loss",
    "value_loss",
]

LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8 still has a finite square in float32

Loss = tuple["Tensor", dict[str, "Tensor"]]
KlGradient = Literal["k3", "unbiased"]
Surrogate = Literal["clip", "dual_clip", "sequence", "weight"]


def policy_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    correction: Correction,
    scale_BL: Tensor,
    surrogate: Surrogate,
    clip_low: float,
    clip_high: float,
    *,
    dual_clip: float = math.inf,
    ref_logprobs_BL: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_gradient: KlGradient = "k3",
) -> Loss:
    """Minus the sum of scale * weight * surrogate over kept tokens, plus kl_coef times k3 of KL(policy || reference).

    surrogate: "clip" min(ratio A, clip(ratio) A); "dual_clip" the same, at least dual_clip * A where A < 0; "sequence" as "clip",
    of the sequence's geometric ratio; "weight" stop_gradient(clip(ratio)) A logprobs. scale_BL: the aggregation, `per_token` or
    `per_sequence_token`. kl_gradient: "k3" differentiates k3 itself, as GRPO does; its mean over the policy's tokens is the
    gradient of KL(reference || policy), not of the KL it estimates. "unbiased" has k3's value and the gradient d * grad logprob,
    whose mean is that of KL(policy || reference) (NeMo-RL #2506; arXiv 2506.09477).
    Metrics: ratio, its mean; k1_old, k1 of KL(old || policy); clipped_*, tokens whose gradient the clip removes ("weight": whose
    weight it bounds); dual_clipped; policy_loss; ref_k3. Raises ValueError on shapes that differ, a keep that is not bool, bounds
    out of range, and kl_coef without a reference.
    """
    require_aligned(
        "loss", logprobs=logprobs_BL, old=old_logprobs_BL, advantages=advantages_BL, ref=ref_logprobs_BL, mask=correction.keep,
        weights=correction.weights,
    )  # fmt: skip
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(f"loss: clip_low must be in [0, 1] and clip_high >= 0, got {clip_low} and {clip_high}")
    keep_BL, old_BL, metrics = correction.keep, constant(old_logprobs_BL), {}
    own_BL, advantages_BL = inside(logprobs_BL, keep_BL), inside(constant(advantages_BL), keep_BL)
    if surrogate == "sequence":
        mean_B1 = (own_BL - inside(old_BL, keep_BL)).sum(-1, keepdim=True) / keep_BL.sum(-1, keepdim=True).clamp(min=1)
        log_ratio_BL = own_BL - own_BL.detach() + mean_B1.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    else:
        log_ratio_BL = log_ratio(logprobs_BL, old_BL, keep_BL)
    ratio_BL = log_ratio_BL.exp()
    clipped_BL = ratio_BL.clamp(1.0 - clip_low, 1.0 + clip_high)
    if surrogate == "weight":
        objective_BL = clipped_BL.detach() * advantages_BL * own_BL
    else:
        objective_BL = torch.minimum(ratio_BL * advantages_BL, clipped_BL * advantages_BL)
    if surrogate == "dual_clip":
        floor_BL = torch.where(advantages_BL < 0, advantages_BL * dual_clip, -torch.inf)
        metrics["dual_clipped"] = ((objective_BL < floor_BL) * scale_BL).sum().detach()
        objective_BL = torch.maximum(objective_BL, floor_BL)
    # an infinite weight that was rejected is not multiplied
    loss = -(objective_BL * inside(constant(correction.weights), keep_BL) * scale_BL).sum()
    moved_BL, always = ratio_BL.detach(), surrogate == "weight"
    metrics |= {
        "ratio": (moved_BL * scale_BL).sum(),
        "k1_old": (-log_ratio_BL.detach() * scale_BL).sum(),
        "clipped_low": (((moved_BL < 1.0 - clip_low) & ((advantages_BL < 0) | always)) * scale_BL).sum(),
        "clipped_high": (((moved_BL > 1.0 + clip_high) & ((advantages_BL > 0) | always)) * scale_BL).sum(),
        "policy_loss": loss.detach(),
    }
    if kl_gradient not in ("k3", "unbiased"):
        raise ValueError(f'kl_gradient must be "k3" or "unbiased", got {kl_gradient!r}')
    if ref_logprobs_BL is None:
        if kl_coef:
            raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs_BL, the reference policy's log-probabilities")
        return loss, metrics
    ref_k3 = (_k3(log_ratio(constant(ref_logprobs_BL), logprobs_BL, keep_BL), kl_gradient) * scale_BL).sum()
    return loss + kl_coef * ref_k3, metrics | {"ref_k3": ref_k3.detach()}


def _k3(to_ref_BL: Tensor, kl_gradient: KlGradient) -> Tensor:
    k3_BL = to_ref_BL.expm1() - to_ref_BL
    if kl_gradient == "k3":
        return k3_BL
    k2_BL = 0.5 * to_ref_BL.square()
    return k3_BL.detach() + k2_BL - k2_BL.detach()


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


def log_ratio(numerator_BL: Tensor, denominator_BL: Tensor, keep_BL: Tensor) -> Tensor:
    """numerator - denominator where kept, clamped to +-LOG_RATIO_LIMIT, 0 elsewhere."""
    moved_BL = inside(numerator_BL, keep_BL) - inside(denominator_BL, keep_BL)
    return moved_BL.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


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
    "k3" for GRPO's own gradient, which is biased, "unbiased" for that of the KL (`policy_loss`).
    Every token of the step counts alike. The paper's mean over sequences of their means: `grpo_sequence_loss`.
    Raises ValueError on shapes that differ, num_tokens < 1, bounds out of range, or kl_coef without a reference.
    References: GRPO arXiv 2402.03300; token mean DAPO arXiv 2503.14476.
    """
    scale_BL = per_token(correction, num_tokens)
    return policy_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, "clip", clip_low, clip_high,
        ref_logprobs_BL=ref_logprobs_BL, kl_coef=kl_coef, kl_gradient=kl_gradient,
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
    return policy_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, "clip", clip_low, clip_high,
        ref_logprobs_BL=ref_logprobs_BL, kl_coef=kl_coef, kl_gradient=kl_gradient,
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
    return policy_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, "clip", clip_low, clip_high,
        ref_logprobs_BL=ref_logprobs_BL, kl_coef=kl_coef, kl_gradient=kl_gradient,
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
    return policy_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, "clip", clip_low, clip_high,
    )  # fmt: skip


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
    scale_BL = per_token(correction, num_tokens)
    return policy_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, "dual_clip", clip_low, clip_high, dual_clip=dual_clip,
        ref_logprobs_BL=ref_logprobs_BL, kl_coef=kl_coef, kl_gradient=kl_gradient,
    )  # fmt: skip


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
    scale_BL = per_sequence_token(correction, num_sequences)
    return policy_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, "sequence", clip_low, clip_high,
    )  # fmt: skip


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
    scale_BL = per_token(correction, num_tokens)
    return policy_loss(
        logprobs_BL, old_logprobs_BL, advantages_BL, correction, scale_BL, "weight", clip_low, clip_high,
    )  # fmt: skip


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
