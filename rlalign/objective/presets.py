"""Published corrections under the names the field uses; each is a plain call of `corrections`.

All read raw ratios rho = exp(old - rollout) under the loss mask. Defaults are the ones their authors publish. Unlike
several implementations, a rejected token also leaves the loss denominator (through `keep`): to reproduce a peer that
keeps it there, count num_tokens over the loss mask instead of `keep`.

B sequences, L padded length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rlalign.mismatch.aligned import require_aligned
from rlalign.objective.corrections import bound_for_ess, compose, correct, identity, reject, restrict

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.types import Correction

__all__ = [
    "dppo_tv",
    "ess_tis",
    "geo_mask",
    "icepop",
    "kpop",
    "m2po",
    "m2po_all",
    "mis",
    "opsm",
    "seq_tis",
    "tis",
    "veto",
]


def tis(old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor, *, high: float = 2.0) -> Correction:
    """Truncated importance sampling: min(rho_t, high). Biased towards the rollout policy above `high`, rejects nothing.

    Reference: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    return correct(old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL, level="token", mode="truncate", high=high)


def icepop(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    *,
    low: float = 0.5,
    high: float = 5.0,
) -> Correction:
    """IcePop: rho_t where low <= rho_t <= high, other tokens rejected.

    Reference: Ring-1T, arXiv 2510.18855. verl, NeMo-RL and slime give rejected tokens weight 0 and keep them in the
    denominator; SkyRL and AReaL take them out, as here.
    """
    return correct(old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL, level="token", mode="mask", low=low, high=high)


def kpop(
    old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor, *, threshold: float = 0.1
) -> Correction:
    """KPop: rho_t where the binary KL of this token against all others is at most `threshold` in both directions, others rejected.

    Wide in the ratio for rare tokens, tight for likely ones. Reference: ringtech.notion.site/kpop (phi = 0.1); probabilities are
    kept in [1e-6, 1 - 1e-6] as in prime-rl #3283.
    """
    if not threshold > 0.0:
        raise ValueError(f"kpop: threshold must be positive, got {threshold}")
    given = (old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    near = reject(*given, estimator="binary_kl", aggregate="token", high=threshold)
    return compose(near, correct(*given, level="token", mode="truncate", high=math.inf))


def ess_tis(
    old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor, *, threshold: float = 0.95
) -> Correction:
    """TIS whose bound is chosen for this batch: the largest at which the effective sample size is `threshold`, rejects nothing.

    The mean is over this batch: call it on the whole step's. See `corrections.bound_for_ess`; `weight_max` shows the bound.
    """
    bound = bound_for_ess(old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL, target=threshold)
    bound = math.inf if math.isnan(bound) else bound
    return correct(old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL, level="token", mode="truncate", high=bound)


def mis(old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor, *, high: float = 2.0) -> Correction:
    """Masked importance sampling: the sequence product where it is at most `high`, other sequences rejected.

    Reference: Liu et al. 2025, "When speed kills stability" (Seq-MIS).
    """
    return correct(old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL, level="sequence", mode="mask", high=high)


def seq_tis(
    old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor, *, high: float = 2.0
) -> Correction:
    """Sequence-truncated importance sampling: min(product of the sequence's rho_t, high) on all its tokens.

    Unbiased but for the truncation; the variance grows as (1 + chi2)^T. Reference: as `mis` (Seq-TIS).
    """
    return correct(old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL, level="sequence", mode="truncate", high=high)


def geo_mask(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    *,
    low: float = 0.999,
    high: float = 1.001,
) -> Correction:
    """Reject sequences whose geometric ratio exp(mean d) leaves [low, high]; weight 1 on the rest.

    Join it to `tis` with `corrections.compose` for weights as well. Length-invariant, unlike the product.
    Reference: as `mis` (Geo-RS); window as in verl's preset.
    """
    if not 0.0 < low <= high:
        raise ValueError(f"geo_mask: 0 < low <= high, got low={low}, high={high}")
    return reject(
        old_logprobs_BL,
        rollout_logprobs_BL,
        loss_mask_BL,
        estimator="k1",
        aggregate="mean",
        low=-math.log(high),
        high=-math.log(low),
    )


def veto(
    old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor, *, low: float = 1e-4
) -> Correction:
    """Reject every sequence with a token of rho_t < low; weight 1 on the rest.

    Reference: Liu et al. 2025 (token veto), on by default in slime's mismatch helper.
    """
    if not 0.0 < low < 1.0:
        raise ValueError(f"veto: low must be a ratio between 0 and 1, got {low}")
    return reject(
        old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL, estimator="k1", aggregate="max", high=-math.log(low)
    )


def opsm(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    advantages_BL: Tensor,
    *,
    delta: float = 1e-4,
) -> Correction:
    """Off-policy sequence masking: reject where the advantage is negative and mean(rollout - old) exceeds delta.

    Good answers always teach; bad ones only while they are nearly on-policy. To catch drift inside a step as well, pass
    the current log-probabilities as old. Reference: DeepSeek-V3.2, arXiv 2512.02556; delta as in slime.
    """
    given = (old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    require_aligned("opsm", mask=loss_mask_BL, advantages=advantages_BL)
    near = reject(*given, estimator="k1", aggregate="mean", high=delta)
    return restrict(near, advantages_BL < 0, identity(*given))


def dppo_tv(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    advantages_BL: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    truncate: float = math.inf,
) -> Correction:
    """DPPO with binary total variation: reject a token once its probability has moved too far the way A pushes it.

    p = exp(old), q = exp(rollout): rejected where A > 0 and p - q > high, or A <= 0 and p - q < -low. Weights are
    rho_t, cut at `truncate`. Meant for the current policy: pass its detached log-probabilities as old at every
    minibatch, and a loss without clipping of its own. Reference: arXiv 2602.04879; bounds as in prime-rl.
    """
    given = (old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    require_aligned("dppo_tv", mask=loss_mask_BL, advantages=advantages_BL)
    everything = identity(*given)
    up_BL = (advantages_BL > 0) & (old_logprobs_BL > rollout_logprobs_BL)
    down_BL = (advantages_BL <= 0) & (old_logprobs_BL < rollout_logprobs_BL)
    rose = restrict(reject(*given, estimator="abs_prob", aggregate="token", high=high), up_BL, everything)
    fell = restrict(reject(*given, estimator="abs_prob", aggregate="token", high=low), down_BL, everything)
    return compose(rose, fell, correct(*given, level="token", mode="truncate", high=truncate))


def m2po(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    advantages_BL: Tensor,
    *,
    threshold: float = 0.04,
) -> Correction:
    """Reject the tokens of largest d^2 among those that a clip could meet, until the mean of d^2 over these is at most `threshold`.

    A clip could meet tokens that moved the way their advantage pushes: A > 0 with rho > 1, A < 0 with rho < 1. All others are kept,
    and weights are 1. The mean is over this batch: call it on the whole step's. Ties at the cut are rejected together.
    Reference: M2PO arXiv 2510.01161, in its authors' final form (ms-swift #9954). Over all tokens: `m2po_all`.
    """
    given = (old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    require_aligned("m2po", mask=loss_mask_BL, advantages=advantages_BL)
    pushed_BL = (advantages_BL > 0) & (old_logprobs_BL > rollout_logprobs_BL)
    pushed_BL |= (advantages_BL < 0) & (old_logprobs_BL < rollout_logprobs_BL)
    within = m2po_all(old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL & pushed_BL, threshold=threshold)
    return restrict(within, pushed_BL, identity(*given))


def m2po_all(
    old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor, *, threshold: float = 0.04
) -> Correction:
    """M2PO without its signs: the mean of d^2 over all masked tokens is brought to `threshold`; weight 1. As AReaL has it.

    Otherwise as `m2po`.
    """
    if not threshold > 0.0:
        raise ValueError(f"m2po: threshold must be positive, got {threshold}")
    given = (old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    usable_BL = identity(*given).keep
    d_N = old_logprobs_BL[usable_BL].double() - rollout_logprobs_BL[usable_BL].double()
    square_N = d_N.square().sort().values
    mean_N = square_N.cumsum(0) / torch.arange(1, len(square_N) + 1, device=square_N.device)
    within = int((mean_N <= threshold).sum())  # a running mean of sorted values never falls
    if within == len(square_N):
        return identity(*given)
    # between the last kept square and the first rejected one, or below every square
    cut = float(torch.nextafter(square_N[within], square_N.new_tensor(-1.0)))
    return reject(*given, estimator="k2", aggregate="token", high=0.5 * cut)
