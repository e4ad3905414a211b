"""What to do about the mismatch: importance weights and rejections, each a `Correction(weights, keep)`.

log_ratio d = old - rollout; rho = exp(d). Every function reads raw log-probabilities under `loss_mask_BL`, so
corrections computed from the same mask do not depend on each other's order, and `compose` joins them. To judge a
second one only on what the first kept, pass `first.keep` as its loss mask and compose the two: that is the only way
order enters. A token whose logprob is NaN or infinite on either side, or was sampled with one above 0,
is never kept and enters no sequence ratio.

Log-ratios are taken in float64; a weight is at most float32's largest number (d = 88.7), whatever d is.

B sequences, L padded length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from rlalign.mismatch.aligned import constant, require_aligned, require_usable
from rlalign.mismatch.stats import bounded_exp, bounded_expm1
from rlalign.types import Correction

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

__all__ = [
    "bound_for_ess",
    "compose",
    "correct",
    "describe",
    "identity",
    "normalized",
    "on_policy_as_one",
    "reject",
    "restrict",
]

Level = Literal["token", "sequence", "geometric", "segment"]
Mode = Literal["truncate", "clip", "mask"]
Estimator = Literal["k1", "k2", "k3", "ratio", "abs_prob", "binary_kl"]
Aggregate = Literal["token", "sum", "mean", "max"]

LEVELS: tuple[Level, ...] = ("token", "sequence", "geometric", "segment")
MODES: tuple[Mode, ...] = ("truncate", "clip", "mask")
ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3", "ratio", "abs_prob", "binary_kl")
AGGREGATES: tuple[Aggregate, ...] = ("token", "sum", "mean", "max")


def identity(old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor) -> Correction:
    """No correction: weight 1 on every masked token whose two logprobs are finite."""
    keep_BL = require_usable("correction", old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    return Correction(weights=keep_BL.float(), keep=keep_BL)


def correct(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    *,
    level: Level,
    mode: Mode,
    low: float | None = None,
    high: float | None = None,
    veto: float | None = None,
    normalize: bool = False,
) -> Correction:
    """Importance weights from the ratio old / rollout, bounded.

    level: what the ratio is. token rho_t; sequence exp(sum d), the product; geometric exp(mean d) over the sequence;
    segment exp(mean d) over each unbroken run of masked tokens (one assistant turn). All but token are broadcast.
    mode: truncate min(w, high); clip to [low, high]; mask keeps w where low <= w <= high and rejects the rest.
    low, high: bounds on w; None is no bound. `truncate` takes high alone; math.inf is plain importance sampling.
    veto: any token with rho < veto rejects its whole sequence (raw ratios, before everything else).
    normalize: divide by the mean kept weight of this batch, last (see `normalized` for a mean over ranks).
    Raises ValueError on an unknown level or mode, on bounds that do nothing or cross.
    References: TIS fengyao.notion.site/off-policy-rl; IcePop ringtech.notion.site/icepop; sequence and geometric
    levels richardli.xyz/rl-collapse; segment ROLL arXiv 2506.06122; veto slime's mismatch helper.
    """
    _check_choice("level", level, LEVELS)
    _check_choice("mode", mode, MODES)
    low, high = _weight_bounds(mode, low, high)
    keep_BL = require_usable("correction", old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    d_BL = _log_ratio(old_logprobs_BL, rollout_logprobs_BL, keep_BL)
    log_weight_BL = _at_level(d_BL, keep_BL, loss_mask_BL, level)
    log_low, log_high = _log(low), _log(high)
    if veto is not None:
        if not 0.0 < veto < 1.0:
            raise ValueError(f"veto must be a ratio between 0 and 1, got {veto}; 1e-4 is usual")
        keep_BL = keep_BL & ~(keep_BL & (d_BL < math.log(veto))).any(-1, keepdim=True)
    if mode == "mask":
        keep_BL = keep_BL & (log_weight_BL >= log_low) & (log_weight_BL <= log_high)
    else:
        log_weight_BL = log_weight_BL.clamp(log_low, log_high)
    correction = _of_log_weights(log_weight_BL, keep_BL)
    return normalized(correction) if normalize else correction


def reject(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    *,
    estimator: Estimator,
    aggregate: Aggregate,
    low: float | None = None,
    high: float | None = None,
) -> Correction:
    """Keep what lies in low <= x <= high, with weight 1; x is an estimator, per token or gathered over the sequence.

    estimator, per token: k1 = -d (signed: rollout - old), k2 = d^2 / 2, k3 = expm1(d) - d, ratio = rho,
    abs_prob = |exp(old) - exp(rollout)|, binary_kl = the larger of KL(p || q) and KL(q || p) of two-event distributions, this token
    or any other, with p = exp(old), q = exp(rollout), both in [1e-6, 1 - 1e-6].
    aggregate: token judges each token; sum, mean, max judge the sequence by that of its finite masked tokens.
    `ratio` is gathered as it stands: its mean is arithmetic. The geometric ratio is k1's mean: rho_geo in [a, b] is
    k1 mean in [-log b, -log a].
    Raises ValueError on unknown names, no bound at all, or low > high.
    """
    _check_choice("estimator", estimator, ESTIMATORS)
    _check_choice("aggregate", aggregate, AGGREGATES)
    if low is None and high is None:
        raise ValueError(
            f"reject({estimator}, {aggregate}): give low, high or both; without a bound nothing is rejected"
        )
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not low <= high:
        raise ValueError(f"reject({estimator}, {aggregate}): low must not exceed high, got low={low}, high={high}")
    keep_BL = require_usable("correction", old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    x_BL = _estimate(old_logprobs_BL, rollout_logprobs_BL, keep_BL, estimator)
    if aggregate == "sum":
        x_BL = x_BL.sum(-1, keepdim=True)
    elif aggregate == "mean":
        x_BL = x_BL.sum(-1, keepdim=True) / keep_BL.sum(-1, keepdim=True).clamp(min=1)
    elif aggregate == "max":
        none_B1 = x_BL.new_full((len(x_BL), 1), -math.inf)
        x_BL = torch.cat([x_BL.masked_fill(~keep_BL, -math.inf), none_B1], dim=-1).amax(-1, keepdim=True)
    keep_BL = keep_BL & (x_BL >= low) & (x_BL <= high)
    return Correction(weights=keep_BL.float(), keep=keep_BL)


def compose(*corrections: Correction) -> Correction:
    """Keep what all keep, with the weights of the one that has weights. The order of the arguments does not matter.

    Raises ValueError with no argument, on shapes that differ, or when two carry weights other than 1: their product
    would count the ratio twice.
    """
    if not corrections:
        raise ValueError("compose: give at least one correction")
    for c in corrections:
        require_aligned("compose", mask=c.keep, weights=c.weights, first=corrections[0].keep)
    keep_BL = torch.stack([c.keep for c in corrections]).all(0)
    weighted = [c for c in corrections if bool((c.weights[c.keep] != 1.0).any())]
    if len(weighted) > 1:
        raise ValueError(
            f"compose: {len(weighted)} corrections carry importance weights, and their product would count the ratio "
            "twice. Keep one from `correct` and turn the others into rejections with `reject`."
        )
    weights_BL = weighted[0].weights if weighted else keep_BL.float()
    return Correction(weights=weights_BL.masked_fill(~keep_BL, 0.0), keep=keep_BL)


def restrict(correction: Correction, where_BL: Tensor, otherwise: Correction) -> Correction:
    """`correction` where `where_BL` [B, L] bool is True, `otherwise` elsewhere, e.g. by the advantage's sign."""
    require_aligned(
        "restrict", mask=where_BL, keep=correction.keep, weights=correction.weights, otherwise=otherwise.keep
    )
    return Correction(
        weights=torch.where(where_BL, correction.weights, otherwise.weights),
        keep=torch.where(where_BL, correction.keep, otherwise.keep),
    )


def on_policy_as_one(correction: Correction, on_policy_BL: Tensor, usable_BL: Tensor) -> Correction:
    """Weight exactly 1, and never rejected, for the tokens that the policy being trained sampled itself; the others as they are.

    on_policy_BL: [B, L] bool, by version span (lag 0). usable_BL: of `identity`, tokens whose logprobs are finite. Their ratio
    differs from 1 by engine mismatch alone: leaving that out removes its variance, and biases the mean of f over such tokens by
    E_rollout[(1 - rho) f], whose size is at most sqrt(chi2) times the spread of f.
    """
    require_aligned("on_policy_as_one", mask=on_policy_BL, keep=correction.keep, usable=usable_BL)
    return restrict(Correction(weights=usable_BL.float(), keep=usable_BL), on_policy_BL, correction)


def bound_for_ess(
    old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor, *, target: float
) -> float:
    """The largest bound c at which the weights min(rho_t, c) still have an effective sample size of `target`, in (0, 1].

    ESS is (sum w)^2 / (n sum w^2) over usable tokens. It only falls as c grows, so the bound is the least bias that buys this
    variance; math.inf where the raw ratios have it already. Exact: between two sorted ratios the ESS is a quotient of
    quadratics in c, solved in float64. NaN where no token is usable. Raises ValueError for a target outside (0, 1].
    """
    if not 0.0 < target <= 1.0:
        raise ValueError(f"bound_for_ess: target must lie in (0, 1], got {target}; 0.95 keeps 95 of 100 samples' worth")
    usable_BL = require_usable("correction", old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    d_N = _log_ratio(old_logprobs_BL, rollout_logprobs_BL, usable_BL)[usable_BL].sort().values
    if not len(d_N):
        return math.nan
    scale = float(d_N[-1])  # largest ratio 1: neither sums nor squares overflow
    w_N = (d_N - scale).exp()
    n = len(w_N)
    above_N = torch.arange(
        n - 1, -1, -1, dtype=torch.float64, device=w_N.device
    )  # ratios beyond the k-th, which c replaces
    sum_N, square_N = w_N.cumsum(0), w_N.square().cumsum(0)
    at_N = (sum_N + above_N * w_N).square() / (n * (square_N + above_N * w_N.square()))
    below = int((at_N >= target).sum())  # ratios that may be the bound
    if below == n:
        return math.inf
    if below == 0:  # equal ratios would have ESS 1: rounding alone
        return float(w_N[0]) * math.exp(scale)
    s, q, m = float(sum_N[below - 1]), float(square_N[below - 1]), n - below
    # (s + m c)^2 = target n (q + m c^2)
    a, b, e = m * m - target * n * m, 2.0 * s * m, s * s - target * n * q
    root = math.sqrt(max(0.0, b * b - 4.0 * a * e))
    low, high = float(w_N[below - 1]), float(w_N[below])
    candidates = [(-b + root) / (2 * a), (-b - root) / (2 * a)] if a else [-e / b]
    inside = [x for x in candidates if low * (1 - 1e-9) <= x <= high * (1 + 1e-9)]
    return min(max(inside, default=low), high) * math.exp(scale)


def normalized(correction: Correction, group: ProcessGroup | None = None, *, over_ranks: bool = False) -> Correction:
    """Weights divided by their mean over kept tokens (self-normalised importance sampling), so that the mean is 1.

    over_ranks: take the mean over every rank of `group`, which all must then call. Without it the mean is this
    process's alone, and ranks (or micro-batches) are scaled differently: normalise the whole step's batch.
    A batch that keeps nothing comes back as it is. The new mean is exact to float32 rounding.
    """
    require_aligned("normalized", mask=correction.keep, weights=correction.weights)
    kept_BL = torch.where(correction.keep, constant(correction.weights).double(), 0.0)
    totals = torch.stack([kept_BL.sum(), correction.keep.double().sum()])
    if over_ranks:
        torch.distributed.all_reduce(totals, group=group)
    total, count = totals.tolist()
    if not count or not total:
        return correction
    weights_BL = (kept_BL * (count / total)).clamp(max=_WEIGHT_MAX).float()
    return Correction(weights=weights_BL, keep=correction.keep)


def describe(
    correction: Correction, old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor
) -> dict[str, float]:
    """What a correction did: shares and weights after it, as keys apart from the raw metrics of `mismatch.compare`.

    masked_share: masked tokens not kept, non-finite ones among them. seq_masked_share: sequences with masked tokens of
    which none is kept. weight_*: over kept tokens. changed_share: kept tokens whose weight is not their raw ratio
    (bounded, vetoed to a sequence ratio, or left at 1). ess: (sum w)^2 / (n sum w^2) with n all masked tokens, so
    rejection lowers it; ess_kept with n the kept ones. k3_kept, k3_rejected: raw k3 on either side of the mask. outside_raw,
    outside_kept: share of usable tokens, and of kept ones, with a raw ratio outside [1/2, 2]: the same pair for every preset.
    NaN where nothing is left to average.
    """
    require_aligned("describe", mask=correction.keep, weights=correction.weights, old=old_logprobs_BL)
    keep_BL, usable_BL = (
        correction.keep,
        require_usable("correction", old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL),
    )
    d_BL = _log_ratio(old_logprobs_BL, rollout_logprobs_BL, usable_BL)
    k3_BL = _estimate(old_logprobs_BL, rollout_logprobs_BL, usable_BL, "k3")
    w_N = correction.weights[keep_BL].double()
    raw_N = bounded_exp(d_BL[keep_BL])
    has_B, kept_B = loss_mask_BL.any(-1), keep_BL.any(-1)
    square = w_N.square().sum()
    return {
        "masked_share": _mean((loss_mask_BL & ~keep_BL)[loss_mask_BL]),
        "seq_masked_share": _mean((~kept_B)[has_B]),
        "weight_mean": _mean(w_N),
        "weight_std": float(w_N.std(correction=0)) if w_N.numel() else math.nan,
        "weight_min": float(w_N.min()) if w_N.numel() else math.nan,
        "weight_max": float(w_N.max()) if w_N.numel() else math.nan,
        "changed_share": _mean((w_N - raw_N).abs() > 1e-6 * raw_N),
        "ess": float(w_N.sum().square() / square / loss_mask_BL.sum()) if w_N.numel() else math.nan,
        "ess_kept": float(w_N.sum().square() / square / w_N.numel()) if w_N.numel() else math.nan,
        "outside_raw": _mean(d_BL[usable_BL].abs() > math.log(2.0)),
        "outside_kept": _mean(d_BL[keep_BL].abs() > math.log(2.0)),
        "k3_kept": _mean(k3_BL[keep_BL]),
        "k3_rejected": _mean(k3_BL[usable_BL & ~keep_BL]),
    }


_LEAST_PROB = 1e-6
_WEIGHT_MAX = torch.finfo(torch.float32).max


def _mean(x_N: Tensor) -> float:
    return float(x_N.double().mean()) if x_N.numel() else math.nan


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _weight_bounds(mode: Mode, low: float | None, high: float | None) -> tuple[float, float]:
    if mode == "truncate" and (high is None or low is not None):
        raise ValueError(
            f"mode truncate takes high and no low, got low={low}, high={high}. For a lower bound use clip; "
            "for plain importance sampling pass high=math.inf"
        )
    if low is None and high is None:
        raise ValueError(f"mode {mode} needs low, high or both; without a bound it is plain importance sampling")
    low, high = 0.0 if low is None else low, math.inf if high is None else high
    if not 0.0 <= low <= high or high == 0.0:
        raise ValueError(f"bounds on a weight must satisfy 0 <= low <= high and high > 0, got low={low}, high={high}")
    return low, high


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0.0 else -math.inf


def _log_ratio(old_BL: Tensor, rollout_BL: Tensor, usable_BL: Tensor) -> Tensor:
    """d in float64, detached, 0 where not usable."""
    return (old_BL.detach().double() - rollout_BL.detach().double()).masked_fill(~usable_BL, 0.0)


def _at_level(d_BL: Tensor, usable_BL: Tensor, mask_BL: Tensor, level: Level) -> Tensor:
    if level == "token":
        return d_BL
    if level == "segment":
        return _segment_mean(d_BL, usable_BL, mask_BL)
    total_B1 = d_BL.sum(-1, keepdim=True)
    if level == "geometric":
        total_B1 = total_B1 / usable_BL.sum(-1, keepdim=True).clamp(min=1)
    return total_B1.expand_as(d_BL)


def segments(mask_BL: Tensor) -> Tensor:
    """[B, L] int64: 0 before the first masked token, then 1, 2, ... for each unbroken run and the gap behind it."""
    before_BL = torch.nn.functional.pad(mask_BL, (1, 0))[:, :-1]
    return (mask_BL & ~before_BL).cumsum(-1)


def _segment_mean(d_BL: Tensor, usable_BL: Tensor, mask_BL: Tensor) -> Tensor:
    segment_BL = segments(mask_BL)
    totals_BK = d_BL.new_zeros(d_BL.shape[0], d_BL.shape[1] + 1).scatter_add_(1, segment_BL, d_BL)
    counts_BK = torch.zeros_like(totals_BK).scatter_add_(1, segment_BL, usable_BL.double())
    return (totals_BK / counts_BK.clamp(min=1.0)).gather(1, segment_BL)


def _estimate(old_BL: Tensor, rollout_BL: Tensor, usable_BL: Tensor, estimator: Estimator) -> Tensor:
    """The estimator in float64, 0 where not usable."""
    d_BL = _log_ratio(old_BL, rollout_BL, usable_BL)
    if estimator == "k1":
        return -d_BL
    if estimator == "k2":
        return 0.5 * d_BL.square()
    if estimator == "k3":
        return bounded_expm1(d_BL) - d_BL
    if estimator == "ratio":
        return bounded_exp(d_BL).masked_fill(~usable_BL, 0.0)
    p_BL, q_BL = (x_BL.detach().double().masked_fill(~usable_BL, 0.0).exp() for x_BL in (old_BL, rollout_BL))
    if estimator == "abs_prob":
        return (p_BL - q_BL).abs()
    p_BL, q_BL = (x_BL.clamp(_LEAST_PROB, 1.0 - _LEAST_PROB) for x_BL in (p_BL, q_BL))
    token_BL, other_BL = (p_BL / q_BL).log(), ((1.0 - p_BL) / (1.0 - q_BL)).log()
    forward_BL = p_BL * token_BL + (1.0 - p_BL) * other_BL
    backward_BL = -q_BL * token_BL - (1.0 - q_BL) * other_BL
    return torch.maximum(forward_BL, backward_BL).masked_fill(~usable_BL, 0.0)


def _of_log_weights(log_weight_BL: Tensor, keep_BL: Tensor) -> Correction:
    weights_BL = bounded_exp(log_weight_BL).clamp(max=_WEIGHT_MAX).masked_fill(~keep_BL, 0.0).float()
    return Correction(weights=weights_BL, keep=keep_BL)
