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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlalign.trainer import attention, attention_choice
from rlalign.trainer.rounding import mirrored_modules
from rlalign.types import KeptSets, RolloutBatch

KINDS = (attention.NAME, mirrored_modules.NAME, "flash_attention_2", "flash_attention_3", "flex_attention")
STATIC_ROPE = {"default", "linear", "yarn", "llama3", "proportional"}  # no dependence on the length of the row
LIMIT = {torch.float32: 1e-3}  # of the distance that seeing another sequence makes; 16 bits take 0.1
PROBE = ((5, 11), (3, 17), (3, 29), (8, 5))  # length and first id of the sequences that confirm a model
Body = Callable[[Mapping[str, object]], Tensor]  # hidden states [B, L, D] from the arguments of the model's body


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


def require(network: PreTrainedModel) -> None:
    """Raises ValueError with the reason if this model's attention cannot keep the sequences of a packed row apart."""
    if reason := refusal(network):
        raise ValueError(_refused(network, reason))


def refusal(network: PreTrainedModel) -> str:
    """Why sequences cannot share a row, as far as the configuration tells; `confirm` measures the rest."""
    config = network.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [part for part in rope.values() if isinstance(part, dict)] or ([rope] if rope else [])
    types = {str(part.get("rope_type", "default")) for part in ropes}
    if states := layers - {"full_attention", "sliding_attention", "attention"}:
        return f"layers of type {', '.join(sorted(states))} do not keep sequences apart"
    if not types <= STATIC_ROPE:
        return f"rotary positions of type {', '.join(sorted(types - STATIC_ROPE))} depend on the length of the row"
    if not network._supports_attention_backend:
        return "it computes attention in its own way and cannot be told where sequences begin"
    if config._attn_implementation not in KINDS:
        kinds = (
            "flex_attention or a flash attention"
            if attention_choice.caps_scores(config.to_dict())
            else "sdpa or a flash attention"
        )
        return f"attention {config._attn_implementation!r} cannot be told where sequences begin; use {kinds}"
    return ""


def inputs(row: Row, kind: str) -> dict[str, object]:
    """What the body is given for a packed row. kind: the attention implementation it was loaded with."""
    given: dict[str, object] = {"input_ids": row.token_ids_1T, "position_ids": row.position_ids_1T}
    if kind in (attention.NAME, mirrored_modules.NAME):
        # all ones: without any mask transformers would build a dense one from the positions
        return given | {"attention_mask": torch.ones_like(row.token_ids_1T), "runs": row.runs}
    if kind == "flex_attention":
        return given | {"attention_mask": None}
    lengths = [length for count, length in row.runs for _ in range(count)]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=row.token_ids_1T.device)
    longest = max(lengths)
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return given | {"attention_mask": None} | bounds


@torch.no_grad()
def confirm(network: PreTrainedModel, body: Body, device: torch.device) -> None:
    """Measure on four short sequences that packed hidden states are those of each alone. Raises ValueError otherwise.

    The measure is how far states are off when the four are one sequence, so that no outlying activation hides a difference.
    """
    vocabulary = network.config.get_text_config().vocab_size
    alone = [torch.arange(first, first + 7 * n, 7, device=device)[None] % vocabulary for n, first in PROBE]
    row = Row(
        token_ids_1T=torch.cat(alone, dim=1),
        position_ids_1T=torch.cat([torch.arange(n, device=device) for n, _ in PROBE])[None],
        loss_mask_1T=torch.empty(0),
        present_bL=torch.empty(0),
        runs=((1, 5), (2, 3), (1, 8)),
    )
    packed = body(inputs(row, network.config._attn_implementation))[0].double()
    wanted = torch.cat([body({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0] for ids in alone]).double()
    as_one = body({"input_ids": row.token_ids_1T, "attention_mask": torch.ones_like(row.token_ids_1T)})[0].double()
    error = float((packed - wanted).abs().mean() / (as_one - wanted).abs().mean())
    if not error < LIMIT.get(network.dtype, 0.1):
        reason = f"measured: packed states are off by {error:.2g} of what it makes to see the sequences before"
        raise ValueError(_refused(network, reason))


def _refused(network: PreTrainedModel, reason: str) -> str:
    return f"trainer.pack_tokens: {type(network).__name__} cannot train on packed rows: {reason}; set trainer.pack_tokens=0"
