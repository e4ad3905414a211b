"""kept_sets(): the ids that top-p, top-k and min-p leave, computed from the trainer's own logits as vLLM's sampler does.

The operations and their order are those of vllm/v1/sample (0.32): temperature, min-p against the largest probability, the
k-th largest logit (ties stay), top-p over the ascending cumulative sum. Whole rows of logits exist for one tile of tokens at
a time; what stays is the sets, 4 bytes an id.

B sequences, L padded length, N scored tokens, T tokens of a tile, D hidden, V vocabulary, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from rlalign.head.products import stored_for
from rlalign.head.projection import route
from rlalign.logprobs.blocks import Tile, token_tiles
from rlalign.logprobs.forward import Kept, Problem, Transform
from rlalign.types import KeptSets

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlalign.logprobs.vocab_parallel import VocabShard
    from rlalign.types import LogprobSpec

__all__ = ["LIMIT", "Found", "Truncation", "kept_mask", "kept_sets", "of_logits"]

LIMIT = 4096  # ids of one set


@dataclass(frozen=True, slots=True)
class Truncation:
    """top_k 0, top_p 1.0 and min_p 0.0 are off."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @staticmethod
    def of(spec: LogprobSpec) -> Truncation:
        """Of a convention."""
        return Truncation(spec.top_k, spec.top_p, spec.min_p)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The sets to renormalise over and how they came about; [B, L] on CPU, False or 0.0 where no token was scored.

    kept: the captured set where there is one, else the trainer's own with the sampled token in it; empty where it has more
    than the limit of ids. log_mass_BL: log of the set's probability over the whole vocabulary, nats: what a trainer that
    does not renormalise is off by. outside_BL: the sampled token is not in the trainer's own set. compared_BL: a captured
    set was given; differ_BL: it is not the trainer's own, and differ_mass_BL the probability of the ids in only one of them.
    too_large_BL: more ids than the limit.
    """

    kept: KeptSets
    log_mass_BL: Tensor
    outside_BL: Tensor
    compared_BL: Tensor
    differ_BL: Tensor
    differ_mass_BL: Tensor
    too_large_BL: Tensor


def kept_mask(x_TV: Tensor, truncation: Truncation) -> Tensor:
    """[T, V] bool of the ids that stay, from logits already divided by the temperature; at least one in each row."""
    x_TV = x_TV.clone()
    if truncation.min_p > 0.0:
        probs_TV = x_TV.softmax(-1)
        least_T1 = probs_TV.amax(-1, keepdim=True).mul_(torch.tensor(truncation.min_p, device=x_TV.device))
        x_TV.masked_fill_(probs_TV < least_T1, -torch.inf)
    top_k = truncation.top_k if 0 < truncation.top_k < x_TV.shape[1] else 0
    if top_k and truncation.top_p >= 1.0:
        x_TV.masked_fill_(x_TV < x_TV.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if truncation.top_p < 1.0:
        sorted_TV, order_TV = x_TV.sort(dim=-1)
        if top_k:
            sorted_TV.masked_fill_(sorted_TV < sorted_TV[:, -top_k, None], -torch.inf)
        below_TV = sorted_TV.softmax(-1).cumsum(-1) <= 1 - torch.tensor(truncation.top_p, device=x_TV.device)
        below_TV[:, -1] = False
        sorted_TV.masked_fill_(below_TV, -torch.inf)
        x_TV.scatter_(-1, order_TV, sorted_TV)
    return x_TV > -torch.inf


@torch.no_grad()
def kept_sets(
    hidden_BLD: Tensor,
    weight_VD: Tensor,
    token_ids_BL: Tensor,
    *,
    mask: Tensor,
    truncation: Truncation,
    captured: KeptSets | None = None,
    limit: int = LIMIT,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
    shard: VocabShard | None = None,
) -> Found:
    """The kept set of every masked token, under these operands; see `token_logprobs` for theirs, which are the same.

    captured: what the engine said it sampled from; it has the last word where it has a set. A sampled token always belongs:
    where rounding puts it just outside, its logprob over the set with it is finite, and the token is counted.
    shard: every rank calls, and gets the same sets; one tile of whole rows is gathered at a time.
    Raises ValueError for a limit below 1, and for captured sets of another shape or of other tokens.
    """
    position_N = mask.flatten().nonzero().squeeze(1)
    n, device = len(position_N), hidden_BLD.device
    real = vocab_size or (weight_VD.shape[0] if shard is None else shard.total)
    rows = real if shard is None else min(max(real - shard.start, 0), weight_VD.shape[0])
    scale_N = None if temperature == 1.0 else torch.full((n,), temperature, device=device)
    problem = Problem(
        hidden_ND=hidden_BLD.flatten(0, 1).index_select(0, position_N - 1),
        weight_VD=weight_VD[:rows],
        bias_V=None if bias is None else bias[:rows],
        target_N=token_ids_BL.flatten()[position_N],
        transform=Transform(soft_cap, logit_scale, scale_N),
        tile=Tile.of(device, chunk),
        route=route(hidden_BLD, weight_VD),
    )
    stored_VD, columns = stored_for(problem.weight_VD, problem.route), slice(0, rows)

    def logits(tile: slice) -> Tensor:
        x_TS = problem.logits(tile, columns, stored_VD, torch.empty(tile.stop - tile.start, rows, device=device))
        return x_TS if shard is None else _gathered(x_TS, shard)

    height = chunk or max(1, problem.tile.tokens * problem.tile.vocab // real)
    return _found(logits, token_ids_BL, mask, truncation, captured, limit, height)


@torch.no_grad()
def of_logits(
    logits_BLV: Tensor,
    token_ids_BL: Tensor,
    *,
    mask: Tensor,
    truncation: Truncation,
    captured: KeptSets | None = None,
    limit: int = LIMIT,
    temperature: float = 1.0,
) -> Found:
    """`kept_sets` from logits that exist: what a trainer without the float32 head has. Alignment as in `from_logits`."""
    position_N = mask.flatten().nonzero().squeeze(1)
    flat_NV = logits_BLV.flatten(0, 1)

    def logits(tile: slice) -> Tensor:
        return flat_NV[position_N[tile] - 1].float() / temperature

    return _found(logits, token_ids_BL, mask, truncation, captured, limit, height=1024)


_NUMBERS = ("log_mass", "outside", "compared", "differ", "differ_mass", "too_large")


def _found(
    logits: Callable[[slice], Tensor],
    token_ids_BL: Tensor,
    mask_BL: Tensor,
    truncation: Truncation,
    captured: KeptSets | None,
    limit: int,
    height: int,
) -> Found:
    """logits: whole rows [T, V] of some of the masked tokens, in their order."""
    if limit < 1:
        raise ValueError(f"kept_sets: limit must be at least one id, got {limit}")
    if captured is not None and captured.count_BL.shape != token_ids_BL.shape:
        raise ValueError(
            f"kept_sets: captured sets of {tuple(captured.count_BL.shape)} tokens for token_ids {tuple(token_ids_BL.shape)}"
        )
    if captured is not None:
        captured.require_of(token_ids_BL, mask_BL, what="kept_sets")
    position_N, target_N = mask_BL.flatten().nonzero().squeeze(1), token_ids_BL[mask_BL]
    given = None if captured is None else Kept.of(*captured.at(position_N.cpu()), token_ids_BL.device)
    parts = [_tile(logits(t), target_N[t], given, t, truncation, limit) for t in token_tiles(len(target_N), height)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("ids", "count", *_NUMBERS)}
    shape, position_N = token_ids_BL.shape, position_N.cpu()
    spread = {
        f"{name}_BL": whole[name].new_zeros(shape.numel()).index_put((position_N,), whole[name]).view(shape)
        for name in _NUMBERS
    }
    return Found(kept=KeptSets.spread(whole["ids"], whole["count"], position_N, shape), **spread)


def _tile(
    x_TV: Tensor, target_T: Tensor, given: Kept | None, rows: slice, truncation: Truncation, limit: int
) -> dict[str, Tensor]:
    """Of some tokens: ids int32, count, and each of _NUMBERS, on CPU."""
    target_T1 = target_T.unsqueeze(1)
    own_TV = kept_mask(x_TV, truncation)
    outside_T = ~own_TV.gather(1, target_T1).squeeze(1)
    logprob_TV = x_TV.log_softmax(-1)
    chosen_TV = own_TV.scatter(1, target_T1, True)
    compared_T, differ_T = torch.zeros_like(outside_T), torch.zeros_like(outside_T)
    differ_mass_T = torch.zeros(len(x_TV), device=x_TV.device)
    if given is not None:
        compared_T = given.start_M.diff()[rows].to(x_TV.device) > 0
        theirs_TV = given.mask(rows, slice(0, x_TV.shape[1]))
        only_TV = (own_TV ^ theirs_TV) & compared_T.unsqueeze(1)
        differ_T, differ_mass_T = only_TV.any(1), (logprob_TV.exp() * only_TV).sum(1)
        chosen_TV = torch.where(compared_T.unsqueeze(1), theirs_TV, chosen_TV)
    log_mass_T = logprob_TV.masked_fill_(~chosen_TV, -torch.inf).logsumexp(1).clamp_(max=0.0)
    count_T = chosen_TV.sum(1)
    too_large_T = count_T > limit
    ids_E = (chosen_TV & ~too_large_T.unsqueeze(1)).nonzero()[:, 1].to(torch.int32)
    values = (log_mass_T, outside_T, compared_T, differ_T, differ_mass_T, too_large_T)
    found = {"ids": ids_E, "count": count_T.masked_fill(too_large_T, 0)} | dict(zip(_NUMBERS, values, strict=True))
    return {name: value.cpu() for name, value in found.items()}


def _gathered(x_TS: Tensor, shard: VocabShard) -> Tensor:
    """Whole rows from every rank's columns, in the order of the ranks."""
    widths = [torch.zeros(1, dtype=torch.int64, device=x_TS.device) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(widths, torch.tensor([x_TS.shape[1]], device=x_TS.device), group=shard.group)
    columns = [int(width) for width in widths]
    padded_TS = torch.nn.functional.pad(x_TS, (0, max(columns) - x_TS.shape[1])).contiguous()
    gathered = [torch.empty_like(padded_TS) for _ in columns]
    dist.all_gather(gathered, padded_TS, group=shard.group)
    return torch.cat([part_TS[:, :width] for part_TS, width in zip(gathered, columns, strict=True)], dim=1)
