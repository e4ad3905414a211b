"""Which tokens of a point count: those that were context for a scored token, and on the decode route those that were decoded.

Suffixes: B sequences, L padded length, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlalign.diagnose.attribution.difference import TokenDifferences, common_rows, differences, scalar_differences
from rlalign.diagnose.attribution.mapping import LOGITS
from rlalign.rollout.engine.teacher_forcing import Route
from rlalign.rollout.worker.recording import Recording
from rlalign.types import RolloutBatch


def compared(
    one: Recording, other: Recording, point: str, batch: RolloutBatch, width: int, route: Route = Route.prefill
) -> TokenDifferences:
    """The differences at the tokens that count."""
    return differences(one, other, point, counted(one, other, point, batch, route), width=width)


def counted(
    one: Recording, other: Recording, point: str, batch: RolloutBatch, route: Route = Route.prefill
) -> tuple[Tensor, Tensor]:
    """Row numbers in both recordings of the tokens that precede a scored token; for logits, that directly precede one.

    On the decode route only tokens that `one` decoded count; the logits behind the prompt are sampled from too.
    """
    rows_N, other_rows_N = common_rows(one.table(point), other.table(point))
    sequence_N, position_N, decoded_N = one.table(point)[rows_N].unbind(1)
    if point == LOGITS:
        predicts_BL = torch.nn.functional.pad(batch.loss_mask_BL[:, 1:], (0, 1))
        keep_N = predicts_BL[sequence_N, position_N]
    else:
        last_B = torch.where(batch.loss_mask_BL, torch.arange(batch.token_ids_BL.shape[1]), 0).amax(1)
        keep_N = (position_N < last_B[sequence_N]) & ((decoded_N == 1) | (route is Route.prefill))
    return rows_N[keep_N], other_rows_N[keep_N]


def scored(one_BL: Tensor, other_BL: Tensor, batch: RolloutBatch) -> TokenDifferences:
    """Logprobs of the scored tokens, at the position that predicts them."""
    sequence_N, position_N = batch.loss_mask_BL.nonzero(as_tuple=True)
    rows_N3 = torch.stack([sequence_N, position_N - 1, torch.zeros_like(position_N)], dim=1)
    return scalar_differences(one_BL[batch.loss_mask_BL], other_BL[batch.loss_mask_BL], rows_N3)


def distinct(one: Recording, point: str, rows: tuple[Tensor, Tensor], batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """The first row of every context: samples of one prompt share its tokens, and so their activations."""
    seen: set[tuple[int, ...]] = set()
    keep = []
    for i, (sequence, position, _) in enumerate(one.table(point)[rows[0]].tolist()):
        context = tuple(batch.token_ids_BL[sequence, : position + 1].tolist())
        if context not in seen:
            seen.add(context)
            keep.append(i)
    return rows[0][keep], rows[1][keep]
