"""Where a mismatch sits: by any label, the worst tokens, the broken ones, and which version sampled each token.

B sequences, L padded length, N finite masked tokens. d = old - rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlalign.mismatch.aligned import require_aligned, require_usable
from rlalign.mismatch.stats import DECILES, label_table
from rlalign.mismatch.summary import label_means

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TokenMismatch", "by_label", "deciles", "nonfinite_tokens", "token_classes", "token_lags", "worst_tokens"]

TOKEN_CLASSES = ("other", "eos", "special", "digits", "space")  # values of `token_classes`


@dataclass(frozen=True, slots=True)
class TokenMismatch:
    """One token: its place in the batch, its id (-1 if not given), and both log-probabilities in nats."""

    sequence: int
    position: int
    token_id: int
    old_logprob: float
    rollout_logprob: float

    @property
    def log_ratio(self) -> float:
        """old - rollout; NaN or infinite for a broken token."""
        return self.old_logprob - self.rollout_logprob


def by_label(
    old_logprobs_BL: Tensor, rollout_logprobs_BL: Tensor, loss_mask_BL: Tensor, label_BL: Tensor
) -> dict[int, dict[str, float]]:
    """tokens, k1, k2, k3, abs_mean of every label: prompt group, token class, entropy decile, data source, engine rank.

    label_BL: [B, L] int, [B, 1] for a label of the whole sequence, [1, L] for one of the position. Non-finite tokens are left out.
    Raises ValueError for labels of another shape.
    """
    B, L = loss_mask_BL.shape
    if label_BL.shape not in ((B, L), (B, 1), (1, L)):
        raise ValueError(f"by_label: labels must be {(B, L)}, {(B, 1)} or {(1, L)}, got {tuple(label_BL.shape)}")
    keep_BL = require_usable("mismatch", old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    old_N, rollout_N = (x_BL.detach()[keep_BL].double() for x_BL in (old_logprobs_BL, rollout_logprobs_BL))
    table = label_table(old_N, rollout_N, label_BL.to(keep_BL.device).expand_as(keep_BL)[keep_BL])
    return {label: label_means(row) for label, row in table.items()}


def deciles(values_BL: Tensor, loss_mask_BL: Tensor) -> Tensor:
    """Labels 0..9 by this batch's own deciles of `values_BL` (entropy, say) over masked tokens; [B, L] int64.

    Equal values share a decile. NaN values raise ValueError: they have no place in an order.
    """
    require_aligned("deciles", values=values_BL, mask=loss_mask_BL)
    inside_N = values_BL[loss_mask_BL].double()
    if inside_N.isnan().any():
        raise ValueError(f"deciles: {int(inside_N.isnan().sum())} masked values are NaN")
    rank_N = torch.searchsorted(inside_N.sort().values, inside_N)
    label_BL = torch.zeros_like(loss_mask_BL, dtype=torch.int64)
    label_BL[loss_mask_BL] = rank_N * DECILES // max(1, len(inside_N))
    return label_BL


def token_classes(
    token_ids_BL: Tensor, *, tokens: Sequence[str], eos_ids: Sequence[int], special_ids: Sequence[int]
) -> Tensor:
    """Labels into TOKEN_CLASSES; [B, L] int64. tokens: the vocabulary's decoded strings, by id.

    digits: at least one digit and nothing but digits and blanks; space: blanks only. EOS wins over special.
    """
    table_V = torch.zeros(len(tokens), dtype=torch.int64)
    for token_id, text in enumerate(tokens):
        if text and not text.strip():
            table_V[token_id] = TOKEN_CLASSES.index("space")
        elif text.strip().isdigit():
            table_V[token_id] = TOKEN_CLASSES.index("digits")
    table_V[list(special_ids)] = TOKEN_CLASSES.index("special")
    table_V[list(eos_ids)] = TOKEN_CLASSES.index("eos")
    return table_V.to(token_ids_BL.device)[token_ids_BL]


def worst_tokens(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    *,
    count: int = 10,
    token_ids_BL: Tensor | None = None,
) -> list[TokenMismatch]:
    """The finite masked tokens of largest |d|, worst first; equal ones in batch order."""
    keep_BL = require_usable("mismatch", old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    size_BL = (old_logprobs_BL.detach().double() - rollout_logprobs_BL.detach().double()).abs()
    flat = size_BL.masked_fill(~keep_BL, -1.0).flatten()
    largest = flat.topk(min(count, int(keep_BL.sum()))).indices.tolist()
    largest.sort(key=lambda i: (-float(flat[i]), i))
    return _rows(old_logprobs_BL, rollout_logprobs_BL, largest, token_ids_BL)


def nonfinite_tokens(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    *,
    count: int = 10,
    token_ids_BL: Tensor | None = None,
) -> list[TokenMismatch]:
    """The first `count` masked tokens whose logprob is NaN or infinite on either side, or above 0 in the rollout."""
    broken_BL = loss_mask_BL & ~require_usable("mismatch", old_logprobs_BL, rollout_logprobs_BL, loss_mask_BL)
    found = broken_BL.flatten().nonzero().flatten()[:count].tolist()
    return _rows(old_logprobs_BL, rollout_logprobs_BL, found, token_ids_BL)


def token_lags(version_BL: Tensor, loss_mask_BL: Tensor, *, version: int) -> Tensor:
    """Lag of every masked token, [B, L] int64: `version` minus the version in `version_BL`; 0 outside the mask.

    version_BL: `RolloutBatch.policy_version_BL`, or `kv_version_BL` for the age of the oldest keys attended to; there an
    unknown version (-1) raises ValueError, as does one newer than `version`: the engine was not stamped with what it held.
    """
    require_aligned("token_lags", versions=version_BL, mask=loss_mask_BL)
    lag_BL = (version - version_BL).masked_fill(~loss_mask_BL, 0)
    wrong_BL = loss_mask_BL & ((version_BL < 0) | (version_BL > version))
    if wrong_BL.any():
        row, position = wrong_BL.nonzero()[0].tolist()
        raise ValueError(
            f"token_lags: {int(wrong_BL.sum())} tokens have no usable version, the first at sequence {row}, position {position}: "
            f"{int(version_BL[row, position])}, with the trainer at {version} (-1 is unknown)"
        )
    return lag_BL


def _rows(
    old_BL: Tensor, rollout_BL: Tensor, flat_indices: list[int], token_ids_BL: Tensor | None
) -> list[TokenMismatch]:
    length = old_BL.shape[1]
    places = [divmod(i, length) for i in flat_indices]
    return [
        TokenMismatch(
            sequence=b,
            position=t,
            token_id=-1 if token_ids_BL is None else int(token_ids_BL[b, t]),
            old_logprob=float(old_BL[b, t]),
            rollout_logprob=float(rollout_BL[b, t]),
        )
        for b, t in places
    ]
