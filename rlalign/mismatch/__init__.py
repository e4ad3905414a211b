"""How far the trainer's log-probabilities are from the ones that sampled the tokens.

log_ratio d = old - rollout, ratio = exp(d). Samples come from the rollout policy, so k1, k2 and k3 estimate
KL(rollout || old). All metrics are taken on raw ratios, before any clip or mask, in float64.

Three quantities are kept apart. *Engine mismatch*: same weights, other numbers (the `lag0/` keys). *Staleness*: the
policy moved after sampling (`lag1/` and up). *Noise floor*: the engine against itself (`excess` subtracts it).

Peers' names for each key, and where their definitions differ: docs/metrics.md.

B sequences, L padded length, N finite masked tokens, S sequences with at least one of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rlalign.mismatch.stats import EXP_LIMIT, Stats, collect, merge, reduce
from rlalign.mismatch.summary import summarize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["EXP_LIMIT", "Stats", "collect", "compare", "excess", "merge", "reduce", "summarize"]


def compare(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    *,
    lag_B: Tensor | None = None,
    group_B: Tensor | None = None,
    positions: bool = True,
) -> dict[str, float]:
    """Every mismatch metric of one process's batch.

    old_logprobs_BL: the trainer's recompute before the update; rollout_logprobs_BL: as sampled. [B, L], nats, same
    LogprobSpec. loss_mask_BL: [B, L] bool. What lies outside the mask is never read, NaN included.
    lag_B: [B] int, trainer version minus the version that sampled the sequence, or [B, L] where versions change inside
    a sequence (see `mismatch.breakdown.token_lags`). Adds `lag{v}/...`: `lag0/k3` is engine mismatch alone.
    group_B: [B] int, prompt group; adds `group/...`. positions: adds `position{0..9}/...` by response decile.

    Means over tokens have the N finite masked tokens as denominator; means over sequences the S sequences that have
    one. A token whose logprob is NaN or infinite on either side is counted in `nonfinite` and used nowhere else.
    Exponentials are taken of log-ratios clamped to +-EXP_LIMIT (300 nats, so a square stays a float64); what was
    clamped is counted in `clamped_tokens` and `clamped_sequences`, and k1, k2 and quantiles never clamp.
    With no finite masked token every mean is NaN: gate with `not k3 <= limit`, which NaN fails.
    Raises ValueError on shapes that differ or a mask that is not bool.
    """
    stats = collect(
        old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL, lag_B=lag_B, group_B=group_B, positions=positions
    )
    return summarize(stats)


def excess(metrics: Mapping[str, float], floor: Mapping[str, float]) -> dict[str, float]:
    """Engine mismatch beyond the noise floor: `excess/{name}` = `lag0/{name}` - floor, for every name the floor has.

    metrics: what `compare` returned with `lag_B`. floor: the engine against itself, as `rlalign parity --noise-floor`
    measures it, e.g. {"k3": 2e-5, "abs_mean": 3e-3, "p99": 0.04}. A difference at or below 0 is within the floor.
    Raises ValueError when lag-0 keys are missing, since staleness would then be counted as engine mismatch.
    """
    if not floor:
        raise ValueError("excess: the floor is empty; measure one with `rlalign parity --noise-floor`")
    missing = [name for name in floor if f"lag0/{name}" not in metrics]
    if missing:
        raise ValueError(
            f"excess: no lag0/ value for {missing}. Pass lag_B to compare, so that engine mismatch is measured on "
            "tokens sampled by the version being trained; without it staleness is inside the number."
        )
    broken = [name for name, value in floor.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"excess: the floor of {broken} is not finite; measure it again")
    return {f"excess/{name}": metrics[f"lag0/{name}"] - value for name, value in floor.items()}
