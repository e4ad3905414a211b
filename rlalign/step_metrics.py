"""What a step logs of its rollouts, mismatch, staleness, correction and publish. Pure functions; docs/metrics.md has the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from torch import Tensor

from rlalign import corrections, mismatch
from rlalign.mismatch.breakdown import token_lags
from rlalign.types import UNKNOWN_VERSION, Correction, Rollout, RolloutBatch

if TYPE_CHECKING:
    from rlalign.weights import PublishReport


def rollout_metrics(rollouts: Sequence[Rollout], seconds: float) -> dict[str, float]:
    """Sampled tokens, speed, lengths; a completion cut off by max_tokens counts as truncated."""
    lengths = [sum(r.loss_mask) for r in rollouts]
    return {
        "rollout/tokens": float(sum(lengths)),
        "rollout/tokens_per_s": sum(lengths) / seconds,
        "rollout/length_mean": sum(lengths) / len(lengths),
        "rollout/truncated_frac": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "rollout/policy_version": float(max(r.policy_version for r in rollouts)),
    }


def lag_of(batch: RolloutBatch, version: int) -> int:
    """Versions between the one that sampled this batch and the trainer's. A synchronous step has one lag, normally 0."""
    lags = (version - batch.policy_version_BL[batch.loss_mask_BL]).unique().tolist()
    if len(lags) != 1 or lags[0] < 0:
        raise RuntimeError(
            f"a synchronous step got rollouts {lags} versions behind trainer version {version}; expected one lag, not negative: "
            "the engine was not stamped with what was published"
        )
    return lags[0]


def staleness_metrics(batch: RolloutBatch, version: int) -> dict[str, float]:
    """Versions between the trainer's and the one that sampled a token, and the oldest keys and values it was sampled with.

    The second is left out where the engine does not tell.
    """
    found = {}
    for name, version_BL in (("policy", batch.policy_version_BL), ("kv", batch.kv_version_BL)):
        if name == "kv" and bool((version_BL[batch.loss_mask_BL] == UNKNOWN_VERSION).any()):
            continue
        lag_N = token_lags(version_BL, batch.loss_mask_BL, version=version)[batch.loss_mask_BL].double()
        found |= {f"staleness/{name}/mean": float(lag_N.mean()), f"staleness/{name}/max": float(lag_N.max())}
    return found


def mismatch_metrics(measured: dict[str, float], lag: int, floor: Mapping[str, float] | None) -> dict[str, float]:
    """Under the lag they were measured at: only lag 0 is engine mismatch, and only that has a noise floor to exceed."""
    found = {f"lag{lag}/{name}": value for name, value in measured.items() if name != "nonfinite"}
    if floor is not None and lag == 0:
        found |= mismatch.excess(found, floor)
    return {f"mismatch/{name}": value for name, value in found.items()} | {"mismatch/nonfinite": measured["nonfinite"]}


def correction_metrics(correction: Correction, old_BL: Tensor, batch: RolloutBatch) -> dict[str, float]:
    """What the correction did, apart from the raw metrics: share kept, weights, effective sample size."""
    found = corrections.describe(correction, old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL)
    return {f"correction/{name}": value for name, value in found.items()} | {
        "correction/kept_frac": 1.0 - found["masked_share"]
    }


def publish_metrics(report: PublishReport) -> dict[str, float]:
    """What was moved, and what had to be repaired on the way."""
    return {f"publish/{name}": float(value) for name, value in asdict(report).items() if name != "ranks"}
