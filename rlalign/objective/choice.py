"""From the algorithm's configuration to its advantages, correction and losses: which function, with which arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from rlalign.config import AlgoConfig
from rlalign.objective import advantages, corrections, losses, presets, reference_kl
from rlalign.types import Correction, RolloutBatch, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Which token earned what. advantages, values, returns: [B, L] float32; the last two with a critic only.

    kl: KL(policy || reference) of a sequence, nats, mean over those with a reward; None without a penalty.
    """

    advantages_BL: Tensor
    values_BL: Tensor | None = None
    returns_BL: Tensor | None = None
    kl: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def credit(
    rewards_B: Tensor,
    batch: RolloutBatch,
    algo: AlgoConfig,
    *,
    old_BL: Tensor,
    ref_BL: Tensor | None = None,
    values_BL: Tensor | None = None,
    kl_coef: float = 0.0,
    earned_BL: Tensor | None = None,
) -> Credit:
    """The configured advantages of a step's samples. A sample without a reward (NaN) is in no statistic and gets 0.

    values_BL: the critic's, which gae needs. earned_BL: where turns earned their part of the reward, for gae.
    kl_coef: of the penalty on every token's reward, in units of the reward per nat.
    """
    if algo.advantage == "group":
        advantage_B = advantages.group_relative(rewards_B, batch.group_id_B, normalize_std=algo.normalize_std)
        return Credit(advantages_BL=advantage_B[:, None].expand_as(old_BL))
    if values_BL is None:
        raise ValueError("algo.advantage=gae needs values_BL, the critic's value of every token")
    mask_BL = batch.loss_mask_BL & ~rewards_B.isnan()[:, None]
    penalty_BL, kl, metrics = None, None, {}
    if algo.kl_penalty.coef:
        if ref_BL is None:
            raise ValueError("algo.kl_penalty needs ref_BL, the reference policy's log-probabilities")
        kl_BL = reference_kl.per_token(old_BL, ref_BL, mask_BL, algo.kl_penalty.estimator)
        penalty_BL, kl = kl_coef * kl_BL, float(kl_BL.sum(1)[mask_BL.any(1)].mean())
        metrics = {"token": float(kl_BL[mask_BL].mean()), "sequence": kl, "coef": kl_coef, "penalty": kl_coef * kl}
    reward_BL = advantages.token_rewards(rewards_B, mask_BL, penalty_BL, earned_BL)
    raw_BL, returns_BL = advantages.gae(reward_BL, values_BL, mask_BL, gamma=algo.gae.gamma, lam=algo.gae.lam)
    whole_BL = advantages.gae(reward_BL, torch.zeros_like(values_BL), mask_BL, gamma=algo.gae.gamma, lam=1.0)[1]
    measured = advantages.explained(values_BL, whole_BL, mask_BL) | {
        "value_mean": float(values_BL[mask_BL].mean()),
        "return_mean": float(whole_BL[mask_BL].mean()),
        "return_std": float(whole_BL[mask_BL].std(correction=0)),
        "advantage_mean": float(raw_BL[mask_BL].mean()),
        "advantage_std": float(raw_BL[mask_BL].std(correction=0)),
    }
    whitened = (
        algo.gae.whiten and int(mask_BL.sum()) > 1
    )  # one token has no variance: its advantage stays as it is, and is logged
    if algo.gae.whiten:
        measured["whitened"] = float(whitened)
    return Credit(
        advantages_BL=advantages.whiten(raw_BL, mask_BL) if whitened else raw_BL,
        values_BL=values_BL,
        returns_BL=returns_BL,
        kl=kl,
        metrics={f"ref_kl/{name}": value for name, value in metrics.items()}
        | {f"critic/{name}": value for name, value in measured.items()},
    )


def correct(
    old_BL: Tensor, batch: RolloutBatch, advantages_BL: Tensor, algo: AlgoConfig, *, version: int | None = None
) -> Correction:
    """The configured correction; without one, weights of one on every token whose logprobs are finite.

    version: the trainer's when it made old_BL; needed by algo.correction.on_policy_one, else ValueError.
    """
    given = (old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL)
    chosen = algo.correction
    if chosen.off:
        return corrections.identity(*given)
    numbers = {n: x for n in ("low", "high", "threshold") if (x := getattr(chosen, n)) is not None}
    if chosen.preset:
        preset = getattr(presets, chosen.preset)
        extra = (advantages_BL,) if "advantages_BL" in signature(preset).parameters else ()
        found = preset(*given, *extra, **numbers)
    else:
        shape = {"level": chosen.level, "mode": chosen.mode, "veto": chosen.veto, "normalize": chosen.normalize}
        found = corrections.correct(*given, **shape, **numbers)
    if not chosen.on_policy_one:
        return found
    if version is None:
        raise ValueError(
            "algo.correction.on_policy_one: the trainer's version is needed to tell which tokens it sampled itself"
        )
    return corrections.on_policy_as_one(found, batch.policy_version_BL == version, corrections.identity(*given).keep)


def policy_loss(
    logprobs_BL: Tensor, batch: TrainBatch, *, algo: AlgoConfig, max_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The configured loss on one micro-batch, divided by the counts of the whole step.

    max_tokens: the longest completion allowed, Dr. GRPO's constant. Metrics add up over micro-batches.
    """
    device = logprobs_BL.device
    given = (logprobs_BL, batch.old_logprobs_BL.to(device), batch.advantages_BL.to(device), batch.correction.to(device))
    loss = getattr(losses, f"{algo.loss}_loss")
    possible: dict[str, Any] = {
        "clip_low": algo.clip_low,
        "clip_high": algo.clip_high,
        "num_tokens": batch.num_tokens,
        "num_sequences": batch.num_sequences,
        "max_tokens": max_tokens,
    }
    if batch.ref_logprobs_BL is not None:
        possible |= {"kl_coef": algo.kl_coef, "kl_gradient": algo.kl_gradient}
        possible["ref_logprobs_BL"] = batch.ref_logprobs_BL.to(device)
    takes = signature(loss).parameters
    return loss(*given, **{name: x for name, x in possible.items() if name in takes and x is not None})


def value_loss(values_BL: Tensor, batch: TrainBatch, *, algo: AlgoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss on one micro-batch, over the tokens that the policy trains on, divided by their count in the step."""
    if batch.values_BL is None or batch.returns_BL is None:
        raise ValueError("the critic's loss needs values_BL and returns_BL, and this batch was made without a critic")
    old_BL, returns_BL, keep_BL = (
        x.to(values_BL.device) for x in (batch.values_BL, batch.returns_BL, batch.correction.keep)
    )
    return losses.value_loss(values_BL, old_BL, returns_BL, keep_BL, num_tokens=batch.num_tokens, clip=algo.critic.clip)
