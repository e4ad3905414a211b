"""Advantages from rewards: group-relative (GRPO) and generalised advantage estimation (PPO).

B sequences, L padded length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlalign.mismatch.aligned import require_aligned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["explained", "gae", "group_relative", "token_rewards", "whiten"]


EQUAL = 2.0**-21  # relative: four units in float32's last place


def group_relative(
    rewards_B: Tensor | Sequence[float | None],
    group_id_B: Tensor,
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """(reward - group mean) / (group std + eps), one advantage per sequence: [B] float32.

    rewards_B: [B]; None or NaN means no reward, is left out of its group's statistics and gets advantage 0.
    group_id_B: [B] int, equal for the samples of one prompt; any order. std is the unbiased one (n - 1), as in the
    reference implementations. normalize_std=False leaves the difference, as Dr. GRPO proposes.
    A group whose rewards are all equal, or with a single reward, gets exactly 0. Equal means equal as float32 numbers are:
    a spread of at most EQUAL of the largest reward is what adding in another order leaves, and dividing by it makes noise of it.
    Raises ValueError on lengths that differ or an infinite reward.
    References: GRPO arXiv 2402.03300, Dr. GRPO arXiv 2503.20783.
    """
    if not isinstance(rewards_B, torch.Tensor):
        rewards_B = torch.tensor([float("nan") if r is None else float(r) for r in rewards_B], dtype=torch.float64)
    if rewards_B.ndim != 1 or rewards_B.shape != group_id_B.shape:
        raise ValueError(
            f"rewards and group ids must be [B]; got {tuple(rewards_B.shape)} and {tuple(group_id_B.shape)}"
        )
    if rewards_B.isinf().any():
        raise ValueError("an infinite reward has no group-relative advantage; bound the reward or mark it NaN")
    rewards_B = rewards_B.detach().double()
    known_B = ~rewards_B.isnan()
    groups_G, index_B = group_id_B.to(rewards_B.device).unique(return_inverse=True)
    value_B = rewards_B.masked_fill(~known_B, 0.0)

    def per_group(x_B: Tensor) -> Tensor:
        return x_B.new_zeros(len(groups_G)).index_add_(0, index_B, x_B)

    count_G = per_group(known_B.double())
    mean_G = per_group(value_B) / count_G.clamp(min=1.0)
    centred_B = (value_B - mean_G[index_B]).masked_fill(~known_B, 0.0)
    range_G, size_G = _range_of_groups(rewards_B, known_B, index_B, len(groups_G))
    varies_B = (range_G > EQUAL * size_G)[index_B]
    if normalize_std:
        std_G = (per_group(centred_B.square()) / (count_G - 1.0).clamp(min=1.0)).sqrt()
        centred_B = centred_B / (std_G[index_B] + eps)
    return torch.where(varies_B, centred_B, 0.0).float()


def _range_of_groups(rewards_B: Tensor, known_B: Tensor, index_B: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of each group's known rewards: largest minus smallest, and the largest absolute one."""
    highest_G = rewards_B.new_full((groups,), -torch.inf)
    highest_G.scatter_reduce_(0, index_B[known_B], rewards_B[known_B], "amax")
    lowest_G = rewards_B.new_full((groups,), torch.inf).scatter_reduce_(0, index_B[known_B], rewards_B[known_B], "amin")
    return highest_G - lowest_G, torch.maximum(highest_G.abs(), lowest_G.abs())


def gae(
    rewards_BL: Tensor, values_BL: Tensor, loss_mask_BL: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: advantages and returns, both [B, L] float32, 0 outside the mask.

    rewards_BL: per token (a sequence reward sits on its last masked token). values_BL: the critic before the action.
    Steps run from one masked token to the next one: tokens between (tool output, padding) are skipped, whatever
    their value. The end of a sequence has value 0. returns = advantages + values, before any whitening.
    Raises ValueError on shapes that differ, a mask that is not bool, gamma or lam outside [0, 1], and a reward outside the mask,
    which would be lost (`token_rewards` puts a sequence's reward on its last masked token).
    Reference: arXiv 1506.02438.
    """
    require_aligned("gae", rewards=rewards_BL, values=values_BL, mask=loss_mask_BL)
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"gae: gamma and lam must lie in [0, 1], got gamma={gamma}, lam={lam}")
    mask_BL = loss_mask_BL
    lost_BL = ~mask_BL & ~rewards_BL.isnan() & (rewards_BL != 0)
    if bool(lost_BL.any()):
        row, position = lost_BL.nonzero()[0].tolist()
        raise ValueError(
            f"gae: the reward {float(rewards_BL[row, position]):g} of sequence {row} lies at position {position}, outside the loss "
            "mask, and would be lost; put it on a masked token (advantages.token_rewards does)"
        )
    rewards_BL = rewards_BL.detach().double().masked_fill(~mask_BL, 0.0)
    values_BL = values_BL.detach().double().masked_fill(~mask_BL, 0.0)
    advantages_BL = torch.zeros_like(values_BL)
    next_value_B = values_BL.new_zeros(values_BL.shape[0])
    running_B = torch.zeros_like(next_value_B)
    for t in reversed(range(values_BL.shape[1])):
        here_B = mask_BL[:, t]
        delta_B = rewards_BL[:, t] + gamma * next_value_B - values_BL[:, t]
        running_B = torch.where(here_B, delta_B + gamma * lam * running_B, running_B)
        next_value_B = torch.where(here_B, values_BL[:, t], next_value_B)
        advantages_BL[:, t] = torch.where(here_B, running_B, 0.0)
    return advantages_BL.float(), (advantages_BL + values_BL).float()


def token_rewards(
    rewards_B: Tensor, loss_mask_BL: Tensor, penalty_BL: Tensor | None = None, earned_BL: Tensor | None = None
) -> Tensor:
    """[B, L] float32: minus the penalty on every masked token, and the sequence's reward on its last one; 0 outside.

    rewards_B: [B]; only read where a token is masked. earned_BL: [B, L], what of it was earned where, as at the ends of turns; the
    last token then has the rest, and the sum stays. penalty_BL: [B, L], such as kl_coef times `reference_kl.per_token`.
    Raises ValueError on shapes that differ, a mask that is not bool, or rewards that are not [B].
    Reference: the KL-penalised reward of arXiv 1909.08593 and 2203.02155.
    """
    require_aligned("token_rewards", mask=loss_mask_BL, penalty=penalty_BL, earned=earned_BL)
    if rewards_B.shape != loss_mask_BL.shape[:1]:
        raise ValueError(
            f"token_rewards: one reward for each sequence of the mask {tuple(loss_mask_BL.shape)}, got {tuple(rewards_B.shape)}"
        )
    positions_L = torch.arange(loss_mask_BL.shape[1], device=loss_mask_BL.device)
    last_B1 = torch.where(loss_mask_BL, positions_L, -1).amax(1, keepdim=True)
    earned_BL = (
        torch.zeros_like(loss_mask_BL, dtype=torch.float32) if earned_BL is None else earned_BL.float() * loss_mask_BL
    )
    rest_B1 = rewards_B[:, None].float() - earned_BL.sum(1, keepdim=True)
    token_BL = torch.where(positions_L == last_B1, rest_B1 + earned_BL, earned_BL)
    if penalty_BL is not None:
        token_BL = token_BL - penalty_BL
    return torch.where(loss_mask_BL, token_BL, 0.0)


def explained(values_BL: Tensor, returns_BL: Tensor, loss_mask_BL: Tensor) -> dict[str, float]:
    """How well values tell what sequences earned, over masked tokens.

    explained_variance: 1 - Var(returns - values) / Var(returns); at most 1, 0 for any constant. bias: mean of values -
    returns. slope: of returns over values; 1 where a difference in value is worth what it says, below 1 where values are too
    extreme. NaN where returns (for slope: values) do not vary. Give it what was really earned, `gae(rewards, 0, lam=1)`: returns
    that contain the critic's own values would flatter it. Reference for slope and bias: Mincer and Zarnowitz 1969.
    """
    require_aligned("explained", values=values_BL, returns=returns_BL, mask=loss_mask_BL)
    value_N, return_N = values_BL[loss_mask_BL].double(), returns_BL[loss_mask_BL].double()
    error_N, centred_N = return_N - value_N, value_N - value_N.mean()
    spread, of_values = float(return_N.var(correction=0)), float(centred_N.square().mean())
    return {
        "explained_variance": 1.0 - float(error_N.var(correction=0)) / spread if spread > 0 else float("nan"),
        "bias": -float(error_N.mean()),
        "slope": float((centred_N * return_N).mean()) / of_values if of_values > 0 else float("nan"),
    }


def whiten(advantages_BL: Tensor, loss_mask_BL: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Advantages with mean 0 and variance 1 over this batch's masked tokens; 0 outside. Unbiased variance.

    Fewer than two masked tokens raise ValueError: they have no variance.
    """
    require_aligned("whiten", advantages=advantages_BL, mask=loss_mask_BL)
    x_N = advantages_BL.detach()[loss_mask_BL].double()
    if x_N.numel() < 2:
        raise ValueError(f"whiten needs at least two masked tokens, got {x_N.numel()}")
    white_BL = (advantages_BL.detach().double() - x_N.mean()) * torch.rsqrt(x_N.var() + eps)
    return white_BL.masked_fill(~loss_mask_BL, 0.0).float()
