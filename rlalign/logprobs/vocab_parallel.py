"""Token logprobs when every rank of a process group holds a slice of the vocabulary (tensor-parallel lm_head).

Each rank reduces its own columns; one all-gather of four numbers per token merges them, in rank order, so all ranks
hold identical results. In the backward pass hidden gradients are summed over the group; each rank keeps its weight's.

N tokens, D hidden, V rows of this rank's weight, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlalign.head.projection import route
from rlalign.logprobs.backward import Upstream, backward_tiles
from rlalign.logprobs.blocks import Stash, Tile, stash_size
from rlalign.logprobs.forward import Kept, Problem, Sums, Transform, forward_sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The slice of the vocabulary this rank's weight holds: ids start, start + 1, ...; `total` ids over all ranks.

    group: None is the default group.
    """

    start: int
    total: int
    group: ProcessGroup | None = None

    @classmethod
    def of(cls, weight_VD: DTensor) -> VocabShard:
        """Read off the slice of a tensor-parallel lm_head; its `weight.to_local()` is what this rank multiplies by.

        Not for FSDP's shards: its ranks have other tokens each, and gather the weight. Raises ValueError unless rows are split
        over a mesh of one dimension, in DTensor's own even slices.
        """
        from torch.distributed.tensor import Shard

        mesh, local = weight_VD.device_mesh, weight_VD.to_local()
        rows = -(-weight_VD.shape[0] // mesh.size())
        start = min(rows * mesh.get_local_rank(), weight_VD.shape[0]) if mesh.ndim == 1 else 0
        if weight_VD.placements != (Shard(0),) or local.shape[0] != min(rows, weight_VD.shape[0] - start):
            raise ValueError(
                f"VocabShard.of: expected rows split over a mesh of one dimension, (Shard(0),), got {weight_VD.placements} on a "
                f"mesh of {tuple(mesh.shape)}; redistribute the weight, or name its slice with VocabShard(start, total, group)"
            )
        return cls(start, weight_VD.shape[0], mesh.get_group())


def sharded_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    transform: Transform,
    kept: Kept | None,
    shard: VocabShard,
    vocab_size: int,
    chunk: int | None,
    entropy: bool,
    keep_mib: int,
) -> tuple[Tensor, Tensor]:
    """(logprobs [N], entropy [N] or [0]) float32, equal on all ranks; hidden states and targets must be too.

    vocab_size: real vocabulary over all ranks; rows beyond it are padding. keep_mib: budget of each rank. A collective:
    every rank must call it.
    """
    real_rows = min(max(vocab_size - shard.start, 0), weight_VD.shape[0])
    problem = Problem(
        hidden_ND=hidden_ND.detach(),
        weight_VD=weight_VD.detach()[:real_rows],
        bias_V=None if bias_V is None else bias_V.detach()[:real_rows],
        target_N=target_N - shard.start,
        transform=transform,
        tile=Tile.of(hidden_ND.device, chunk),
        route=route(hidden_ND, weight_VD),
        kept=None if kept is None else kept.shifted(shard.start),
    )
    return _Sharded.apply(hidden_ND, weight_VD, bias_V, problem, shard.group, entropy, keep_mib)


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        problem: Problem,
        group: ProcessGroup | None,
        entropy: bool,
        keep_mib: int,
    ) -> tuple[Tensor, Tensor]:
        layout = (len(hidden_ND), problem.weight_VD.shape[0], problem.tile.vocab)
        stash_E = torch.empty(stash_size(*layout, keep_mib), device=hidden_ND.device)
        merged = _merge(forward_sums(problem, mean=entropy, stash=Stash(stash_E, *layout)), group)
        entropy_N = merged.lse_N.new_empty(0) if merged.mean_N is None else merged.lse_N - merged.mean_N
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, merged.lse_N, entropy_N, stash_E)
        ctx.problem, ctx.group, ctx.entropy, ctx.layout = problem, group, entropy, layout
        return merged.target_N - merged.lse_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logprob_grad_N, entropy_grad_N = grad_outputs
        hidden_ND, weight_VD, bias_V, lse_N, entropy_N, stash_E = ctx.saved_tensors
        hidden, weight, bias = ctx.needs_input_grad[:3]
        upstream = Upstream(logprob_grad_N, entropy_grad_N if ctx.entropy else None, lse_N, entropy_N)
        wanted = {"hidden": hidden, "bias": bias, "stash": Stash(stash_E, *ctx.layout)}
        grads = backward_tiles(ctx.problem, upstream, weight_VD if weight else None, **wanted)
        hidden_grad_ND = None
        if grads.hidden_ND is not None:
            hidden_grad_ND = grads.hidden_ND.contiguous()
            dist.all_reduce(hidden_grad_ND, group=ctx.group)
            hidden_grad_ND = hidden_grad_ND.to(hidden_ND.dtype)
        bias_grad_V = None
        if bias_V is not None and grads.bias_V is not None:
            bias_grad_V = torch.zeros_like(bias_V)
            bias_grad_V[: len(grads.bias_V)] = grads.bias_V
        return hidden_grad_ND, grads.weight_VD, bias_grad_V, None, None, None, None


def _merge(local: Sums, group: ProcessGroup | None) -> Sums:
    """Sums over all ranks' columns from each rank's own: one all-gather of [4, N]."""
    mine = local.target_N.isfinite()
    mean_N = torch.zeros_like(local.lse_N) if local.mean_N is None else local.mean_N
    packed_4N = torch.stack((local.lse_N, mean_N, torch.where(mine, local.target_N, 0.0), mine.float()))
    gathered = [torch.empty_like(packed_4N) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed_4N, group=group)
    lse_RN, mean_RN, target_RN, mine_RN = torch.stack(gathered, dim=1)
    lse_N = lse_RN.logsumexp(0)
    # a rank whose rows are all padding has lse -inf and no mean
    share_RN = (lse_RN - lse_N).exp()
    mean_N = torch.where(share_RN > 0, share_RN * mean_RN, 0.0).sum(0)
    target_N = torch.where(mine_RN.sum(0) == 1, target_RN.sum(0), float("nan"))
    return Sums(lse_N, target_N, None if local.mean_N is None else mean_N)
