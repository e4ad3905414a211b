"""Which sequences go through the network together, and how they lie there: padded rows, or one row without padding.

A packed row holds sequences one behind the other; positions start again at each, and none sees another:

    row       a a a a b b b b c c
    position  0 1 2 3 0 1 2 3 0 1
    runs      (2 sequences of 4), (1 of 2)         neighbours of equal length are one batch to the attention

B sequences of a step, b of one micro-batch, L padded length, T tokens of a packed row.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from rlalign.types import KeptSets, RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows of the step's batch in one forward, longest first, cut to the longest of them. index_b int64."""

    index_b: Tensor
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A micro-batch as one row. ids, positions [1, T] int64; present_bL bool, where its tokens were; runs (count, length).

    kept: the kept sets of the row's tokens, where the batch has them.
    """

    token_ids_1T: Tensor
    position_ids_1T: Tensor
    loss_mask_1T: Tensor
    present_bL: Tensor
    runs: tuple[tuple[int, int], ...]
    kept: KeptSets | None = None

    def unpack(self, value_1T: Tensor) -> Tensor:
        """[b, L] with each value at its token and 0.0 elsewhere; differentiable."""
        return value_1T.new_zeros(self.present_bL.shape).masked_scatter(self.present_bL, value_1T)

    def unpack_sets(self, kept: KeptSets) -> KeptSets:
        """The sets of the row's tokens as those of [b, L]."""
        position_T = self.present_bL.cpu().flatten().nonzero().squeeze(1)
        return KeptSets.spread(kept.ids_E, kept.count_BL[0], position_T, self.present_bL.shape)


def pack(batch: RolloutBatch, device: torch.device) -> Row:
    """The rows of a micro-batch, in their order, as one row. They are padded on the right, as everywhere."""
    present_bL = batch.attention_mask_BL
    positions_bL = torch.arange(present_bL.shape[1]).expand(present_bL.shape)
    lengths = present_bL.sum(1).tolist()
    kept = None
    if batch.kept is not None:
        ids_E, count_T = batch.kept.at(present_bL.flatten().nonzero().squeeze(1))
        kept = KeptSets(ids_E=ids_E, count_BL=count_T[None])
    return Row(
        token_ids_1T=batch.token_ids_BL[present_bL][None].to(device),
        position_ids_1T=positions_bL[present_bL][None].to(device),
        loss_mask_1T=batch.loss_mask_BL[present_bL][None].to(device),
        present_bL=present_bL.to(device),
        runs=tuple((len(list(run)), length) for length, run in groupby(lengths)),
        kept=kept,
    )


def plan(lengths: Sequence[int], *, rank: int, ranks: int, rows: int, tokens: int) -> list[MicroBatch]:
    """This rank's micro-batches. Every rank has the same number of them, which ZeRO needs, and the longest come first.

    lengths: tokens of every sequence of the step. tokens: of one packed micro-batch; a sequence beyond it goes alone. 0: no
    packing, at most `rows` sequences of similar length. Raises ValueError when `ranks` does not divide the sequences: only
    then can every rank always be given as many micro-batches as any other.
    """
    if len(lengths) % ranks or not lengths:
        raise ValueError(
            f"{len(lengths)} sequences cannot be divided evenly among {ranks} trainer ranks; "
            "choose rollout.prompts_per_step x rollout.group_size / algo.minibatches as a multiple of the ranks"
        )
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups = _within(lengths, longest_first, ranks, tokens) if tokens else _chunks(longest_first, ranks, rows)
    return [MicroBatch(index_b=torch.tensor(group), length=lengths[group[0]]) for group in groups[rank::ranks]]


def _chunks(longest_first: list[int], ranks: int, rows: int) -> list[list[int]]:
    """Neighbours in length together, in as many chunks as `rows` demands and the ranks can share."""
    count = ranks * math.ceil(len(longest_first) / ranks / rows)
    bounds = [len(longest_first) * i // count for i in range(count + 1)]
    return [longest_first[start:end] for start, end in pairwise(bounds)]


def _within(lengths: Sequence[int], longest_first: list[int], ranks: int, tokens: int) -> list[list[int]]:
    """The fewest groups within the budget, a multiple of the ranks, nearly equal in tokens; sorted by their tokens.

    Each sequence, longest first, joins the group with the fewest tokens so far, which is at most 4/3 of the best maximum
    (Graham 1969).
    """
    count = ranks * math.ceil(sum(lengths) / tokens / ranks)
    while True:
        groups: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
        least = [(0, at) for at in range(len(groups))]
        for row in longest_first:
            used, at = least[0]
            groups[at].append(row)
            heapq.heapreplace(least, (used + lengths[row], at))
        if count >= len(lengths) or all(
            len(group) == 1 or sum(lengths[row] for row in group) <= tokens for group in groups
        ):
            return sorted(groups, key=lambda group: (-sum(lengths[row] for row in group), group))
        count += ranks
