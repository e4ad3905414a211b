"""What a step logs of its rollouts, mismatch, staleness, correction and publish. Pure functions; docs/metrics.md has the keys."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign import mismatch
from rlalign.mismatch.breakdown import token_lags
from rlalign.mismatch.stats import Stats, bounded_expm1, merge
from rlalign.objective import corrections
from rlalign.types import UNKNOWN_VERSION, Correction, Rollout, RolloutBatch

if TYPE_CHECKING:
    from rlalign.logprobs.truncation import Found
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


def lags_of(batch: RolloutBatch, version: int, *, allowed: int | None = None) -> Tensor:
    """Versions between the trainer's and the one that sampled a token, [B, L] int64; 0 outside the loss mask.

    allowed: None for a synchronous step, which has one lag, normally 0. Otherwise the largest lag of the schedule, in versions;
    a token of a new version that attended to keys of an older one then counts as the older one's.
    Raises RuntimeError for lags that cannot be: the engine was not stamped with what was published.
    """
    version_BL, mask_BL = batch.policy_version_BL, batch.loss_mask_BL
    if allowed is not None:
        known_BL = batch.kv_version_BL != UNKNOWN_VERSION
        version_BL = torch.where(known_BL, torch.minimum(version_BL, batch.kv_version_BL), version_BL)
    lag_BL = (version - version_BL).masked_fill(~mask_BL, 0)
    lags = lag_BL[mask_BL].unique().tolist()
    if allowed is None:
        fits, expected = len(lags) == 1 and lags[0] >= 0, "one lag, not negative, as the step is synchronous"
    else:
        fits, expected = bool(lags) and lags[0] >= 0 and lags[-1] <= allowed, f"0 to {allowed}, as the schedule allows"
    if not fits:
        raise RuntimeError(
            f"a step got rollouts {lags} versions behind trainer version {version}; expected {expected}: "
            "the engine was not stamped with what was published"
        )
    return lag_BL


def by_lag(measured: Stats, probe: Stats | None) -> dict[int, Stats]:
    """Statistics for each lag. probe: of samples at lag 0 that are no part of the batch.

    A batch of one lag keeps its tables by position and group.
    """
    found = dict(measured.lags)
    if len(found) == 1:
        found = {lag: replace(stats, tables=measured.tables) for lag, stats in found.items()}
    if probe is not None:
        alone = replace(probe, lags={})
        found[0] = merge(found[0], alone) if 0 in found else alone
    return dict(sorted(found.items()))


def mismatch_metrics(at_lag: Mapping[int, Stats], floor: Mapping[str, float] | None) -> dict[str, float]:
    """Each under its lag: only lag 0 is engine mismatch, and only that has a noise floor to exceed."""
    found = {f"lag{lag}/{name}": x for lag, stats in at_lag.items() for name, x in mismatch.summarize(stats).items()}
    if floor is not None and 0 in at_lag:
        found |= mismatch.excess(found, floor)
    nonfinite = sum(stats.sums["nonfinite"] for stats in at_lag.values())
    kept = {name: value for name, value in found.items() if not name.endswith("/nonfinite")}
    return {f"mismatch/{name}": value for name, value in kept.items()} | {"mismatch/nonfinite": nonfinite}


def staleness_metrics(batch: RolloutBatch, version: int, at_lag: Mapping[int, Stats]) -> dict[str, float]:
    """Versions between the trainer's and the one that sampled a token, and the oldest keys and values it was sampled with.

    The second is left out where the engine does not tell. k3: old against rollout on all tokens of older versions, in nats per
    token, engine mismatch included; left out where there are none, NaN where none of them is finite.
    """
    found = {}
    for name, version_BL in (("policy", batch.policy_version_BL), ("kv", batch.kv_version_BL)):
        if name == "kv" and bool((version_BL[batch.loss_mask_BL] == UNKNOWN_VERSION).any()):
            continue
        lag_N = token_lags(version_BL, batch.loss_mask_BL, version=version)[batch.loss_mask_BL].double()
        found |= {f"staleness/{name}/mean": float(lag_N.mean()), f"staleness/{name}/max": float(lag_N.max())}
    older = [stats.sums for lag, stats in at_lag.items() if lag > 0]
    if older:
        tokens = sum(sums["tokens"] for sums in older)
        found["staleness/k3"] = sum(sums["k3"] for sums in older) / tokens if tokens else math.nan
    return found


def support_metrics(found: Found, batch: RolloutBatch) -> dict[str, float]:
    """Of tokens sampled over top-p, top-k or min-p: their sets, and how far trainer and engine agree on them.

    size: ids of a set. log_mass: mean log of a set's probability, nats: the bias of a trainer that does not renormalise. outside:
    share of tokens that the trainer's own set lacks; each was put into it. captured: share whose set the engine reported. differ,
    differ_mass: of these, share whose set is not the trainer's own, and the mean probability of the ids in only one of them.
    too_large: share of tokens that leave the loss. Left out where nothing was captured.
    """
    mask_BL = batch.loss_mask_BL
    compared_BL = found.compared_BL & mask_BL

    def share(flag_BL: Tensor, of_BL: Tensor) -> float:
        return float(flag_BL[of_BL].double().mean())

    size_N = found.kept.count_BL[mask_BL & ~found.too_large_BL].double()
    metrics = {
        "size_mean": float(size_N.mean()) if len(size_N) else math.nan,
        "size_max": float(size_N.max()) if len(size_N) else math.nan,
        "log_mass": share(found.log_mass_BL, mask_BL),
        "outside": share(found.outside_BL, mask_BL),
        "captured": share(found.compared_BL, mask_BL),
        "too_large": share(found.too_large_BL, mask_BL),
    }
    if bool(compared_BL.any()):
        metrics |= {
            "differ": share(found.differ_BL, compared_BL),
            "differ_mass": share(found.differ_mass_BL, compared_BL),
        }
    return {f"support/{name}": value for name, value in metrics.items()}


def outcome_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of conversations: turns of one, and the share that ended in each way; empty where there are none."""
    talks = [r for r in rollouts if r.outcome]
    if not talks:
        return {}
    turns = [sum(now and not before for before, now in pairwise([False, *r.loss_mask])) for r in talks]
    ended = Counter(r.outcome for r in talks)
    return {"turns/mean": sum(turns) / len(talks), "turns/max": float(max(turns))} | {
        f"turns/ended/{outcome}": count / len(talks) for outcome, count in sorted(ended.items())
    }


def turn_metrics(old_BL: Tensor, batch: RolloutBatch, sampled_BL: Tensor) -> dict[str, float]:
    """Old against rollout of each turn: mismatch/turnN/k3 and abs_mean in nats, tokens; N from 1.

    sampled_BL: the mask before any token was taken out of the loss; its unbroken runs are the turns.
    """
    turn_BL = corrections.segments(sampled_BL) * batch.loss_mask_BL
    ratio_BL = old_BL - batch.rollout_logprobs_BL
    found = {}
    for turn in range(1, int(turn_BL.max()) + 1):
        ratio_N = ratio_BL[turn_BL == turn].double()
        if not len(ratio_N):
            continue
        found |= {
            f"mismatch/turn{turn}/k3": float((bounded_expm1(ratio_N) - ratio_N).mean()),
            f"mismatch/turn{turn}/abs_mean": float(ratio_N.abs().mean()),
            f"mismatch/turn{turn}/tokens": float(len(ratio_N)),
        }
    return found


def route_metrics(taken: Mapping[str, float], batch: RolloutBatch) -> dict[str, float]:
    """Of positions that the trainer sent to the rollout engine's experts.

    differ: share of the engine's choices that the trainer's gates would not have made; tokens_differ: share of positions with such
    a choice in any layer. own: share of the positions that sampled tokens depend on without a route, where the trainer chose.
    bytes_per_token: what a position's route takes.
    """
    missing_B, known_B = batch.routes.missing(batch.loss_mask_BL), batch.routes.count_B
    return {
        "routes/differ": taken["differ"] / taken["choices"] if taken["choices"] else math.nan,
        "routes/tokens_differ": taken["tokens_differ"] / taken["tokens"] if taken["tokens"] else math.nan,
        "routes/own": float(missing_B.sum() / (missing_B + known_B).sum()),
        "routes/bytes_per_token": float(batch.routes.experts_ELK[:1].nbytes),
    }


def correction_metrics(correction: Correction, old_BL: Tensor, batch: RolloutBatch) -> dict[str, float]:
    """What the correction did, apart from the raw metrics: share kept, weights, effective sample size."""
    found = corrections.describe(correction, old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL)
    return {f"correction/{name}": value for name, value in found.items()} | {
        "correction/kept_frac": 1.0 - found["masked_share"]
    }


def publish_metrics(report: PublishReport) -> dict[str, float]:
    """What was moved, what had to be repaired on the way, and how many tensors were proved in which way."""
    proofs = {f"publish/proofs/{kind}": float(count) for kind, count in report.proofs.items()}
    fields = {name: value for name, value in asdict(report).items() if name not in ("ranks", "proof_of")}
    return {f"publish/{name}": float(value) for name, value in fields.items()} | proofs
