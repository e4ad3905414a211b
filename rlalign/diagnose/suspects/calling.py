"""How the trainer calls its model: what it says in its own batch against what the model says when asked plainly.

Suffixes: B sequences, L padded length, N sampled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlalign.diagnose.suspects.case import ROUNDING, Case
from rlalign.mismatch.causes import Cause

FAR = 4.0  # times the floor
NEAR = 0.25  # of the difference left: an explanation has to remove three quarters
TEMPERATURES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)


def causes(case: Case) -> list[Cause]:
    """Nothing when the trainer's scores are those of its model; else what explains them, or that nothing tried does."""
    away = _nearest(case, case.old_BL, case.temperature, case.head)
    if away <= ROUNDING:
        return []
    found = _temperature(case, away) or _head(case, away)
    if found or case.apart(case.old_BL, case.reference_BL) <= FAR * case.floor:
        return found
    return _padding_or_positions(case, case.apart(case.old_BL, case.reference_BL))


def fitting_temperature(case: Case, said_BL: Tensor) -> tuple[float, float]:
    """The temperature under which the plain model comes nearest to `said`, and the mean distance left (nats)."""
    tried = sorted({*TEMPERATURES, case.temperature, 1.0 / case.temperature, case.temperature**2})
    left = {t: _nearest(case, said_BL, t, case.head) for t in tried}
    best = min(left, key=left.__getitem__)
    return best, left[best]


def _nearest(case: Case, said_BL: Tensor, temperature: float, head: str) -> float:
    """Distance from the plain model, alone or in the padded batch: without a fault a trainer has the bits of one of them."""
    return min(case.apart(said_BL, case.plain(temperature, head, together=t)) for t in (False, True))


def _temperature(case: Case, away: float) -> list[Cause]:
    best, left = fitting_temperature(case, case.old_BL)
    if best == case.temperature or left > NEAR * away:
        return []
    ignored = "it ignores the temperature" if best == 1.0 else "another temperature"
    why = (
        f"the trainer's scores are its model's at temperature {best:g} (within {left:.1e} nats), the engine samples at "
        f"{case.temperature:g}: {ignored}"
    )
    return [Cause("temperature", why, "rlalign doctor", 1.0)]


def _head(case: Case, away: float) -> list[Cause]:
    for head in {"model", "float32"} - {case.head}:
        left = _nearest(case, case.old_BL, case.temperature, head)
        if left <= NEAR * away:
            why = f"the trainer's scores are those of a {head} head (within {left:.1e} nats), the engine's head is {case.head}"
            return [Cause("one-sided head", why, "rlalign parity", 1.0)]
    return []


def _padding_or_positions(case: Case, away: float) -> list[Cause]:
    """Padding is to blame when a sequence alone is scored right; positions, when the first sampled token still is."""
    alone_BL = torch.zeros_like(case.old_BL)
    for i, row in enumerate(case.alone):
        scores_1L = case.score(row).cpu()
        alone_BL[i, : scores_1L.shape[1]] = scores_1L[0]
    left = case.apart(alone_BL, case.reference_BL)
    wrong_BL = (case.old_BL - case.reference_BL).abs() > FAR * case.floor
    if left <= NEAR * away:
        length_B, wrong_B = case.batch.attention_mask_BL.sum(1), wrong_BL.logical_and(case.batch.loss_mask_BL).any(1)
        longest = int(length_B.max())
        why = (
            f"in its batch the trainer is {away:.2g} nats from its own model, with each sequence alone {left:.1e}: "
            f"{int(wrong_B.sum())} of {len(wrong_B)} sequences are wrong, of those of the full length {longest} "
            f"{int(wrong_B[length_B == longest].sum())}: padding is attended to"
        )
        command = "rlalign attribute (the trainer's attention mask and position ids)"
        return [Cause("attention mask", why, command, 1.0), Cause("position ids", why, command, 0.5)]
    first, later = _first_and_later(wrong_BL, case.batch.loss_mask_BL)
    why = (
        f"the trainer is {away:.2g} nats from its own model, also with each sequence alone: {first:.0%} of first sampled tokens "
        f"and {later:.0%} of later ones are wrong"
    )
    names = ("position ids", "attention mask") if first < 0.5 * later else ("attention mask", "position ids")
    command = "rlalign attribute (position ids and mask that the trainer passes)"
    return [Cause(names[0], why, command, 0.95), Cause(names[1], why, command, 0.6)]


def _first_and_later(wrong_BL: Tensor, mask_BL: Tensor) -> tuple[float, float]:
    first_BL = mask_BL & (mask_BL.cumsum(1) == 1)
    later_BL = mask_BL & ~first_BL
    return float(wrong_BL[first_BL].float().mean()), float(wrong_BL[later_BL].float().mean())
