"""From the algorithm's configuration to its correction and its loss: which function, with which arguments."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlalign import corrections, losses, presets
from rlalign.config import AlgoConfig
from rlalign.types import Correction, RolloutBatch, TrainBatch

NEEDS_ADVANTAGES = {"opsm": presets.opsm, "dppo_tv": presets.dppo_tv}
PRESETS: dict[str, Callable[..., Correction]] = {
    "tis": presets.tis,
    "icepop": presets.icepop,
    "mis": presets.mis,
    "seq_tis": presets.seq_tis,
    "geo_mask": presets.geo_mask,
    "veto": presets.veto,
    "opsm": presets.opsm,
    "dppo_tv": presets.dppo_tv,
    "m2po": presets.m2po,
}
BY_TOKEN = {"grpo": losses.grpo_loss, "dapo": losses.dapo_loss, "cispo": losses.cispo_loss, "ppo": losses.ppo_loss}
BY_SEQUENCE = {"grpo_sequence": losses.grpo_sequence_loss, "dr_grpo": losses.dr_grpo_loss, "gspo": losses.gspo_loss}
WITH_REFERENCE = ("grpo", "grpo_sequence", "dr_grpo")


def correct(old_BL: Tensor, batch: RolloutBatch, advantages_BL: Tensor, algo: AlgoConfig) -> Correction:
    """The configured correction; without one, weights of one on every token whose logprobs are finite."""
    given = (old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL)
    chosen = algo.correction
    if chosen.off:
        return corrections.identity(*given)
    bounds = {name: value for name, value in (("low", chosen.low), ("high", chosen.high)) if value is not None}
    if not chosen.preset:
        return corrections.correct(
            *given, level=chosen.level, mode=chosen.mode, veto=chosen.veto, normalize=chosen.normalize, **bounds
        )
    extra = (advantages_BL,) if chosen.preset in NEEDS_ADVANTAGES else ()
    return PRESETS[chosen.preset](*given, *extra, **bounds)


def policy_loss(
    logprobs_BL: Tensor, batch: TrainBatch, *, algo: AlgoConfig, max_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The configured loss on one micro-batch, divided by the counts of the whole step.

    max_tokens: the longest completion allowed, Dr. GRPO's constant. Metrics add up over micro-batches.
    """
    device = logprobs_BL.device
    given = (logprobs_BL, batch.old_logprobs_BL.to(device), batch.advantages_BL.to(device), batch.correction.to(device))
    options: dict[str, object] = {
        name: value for name, value in (("clip_low", algo.clip_low), ("clip_high", algo.clip_high)) if value is not None
    }
    if algo.loss in WITH_REFERENCE and batch.ref_logprobs_BL is not None:
        options |= {"ref_logprobs_BL": batch.ref_logprobs_BL.to(device), "kl_coef": algo.kl_coef}
    if algo.loss in BY_TOKEN:
        return BY_TOKEN[algo.loss](*given, num_tokens=batch.num_tokens, **options)
    if algo.loss == "dr_grpo":
        options["max_tokens"] = max_tokens
    return BY_SEQUENCE[algo.loss](*given, num_sequences=batch.num_sequences, **options)
