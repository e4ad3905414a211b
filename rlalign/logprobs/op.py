"""The torch operator under token_logprobs: opaque to torch.compile, differentiable, indifferent to autocast.

N tokens, D hidden, V vocabulary, E ids of all kept sets and M = N + 1 places where they start (see kept.Kept).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlalign.head.projection import route
from rlalign.logprobs.backward import Upstream, backward_tiles
from rlalign.logprobs.blocks import Stash, Tile, stash_size
from rlalign.logprobs.forward import Kept, Problem, Transform, forward_sums, mirror


@torch.library.custom_op("rlalign::token_logprobs", mutates_args=())
def flat_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    temperature_N: Tensor | None,
    kept_E: Tensor | None,
    kept_start_M: Tensor | None,
    soft_cap: float | None,
    logit_scale: float,
    vocab_size: int,
    chunk: int | None,
    entropy: bool,
    exact_mirror: bool,
    keep_mib: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs [N], entropy [N] or [0], log-sum-exp [N], stash [E]) float32; NaN for targets outside the vocabulary."""
    problem = _problem(
        hidden_ND, weight_VD, bias_V, target_N, temperature_N, kept_E, kept_start_M, soft_cap, logit_scale,
        vocab_size, chunk,
    )  # fmt: skip
    size = stash_size(len(hidden_ND), vocab_size, problem.tile.vocab, keep_mib)
    stash_E = torch.empty(size, device=hidden_ND.device)
    stash = _stash(stash_E, problem)
    if exact_mirror:
        return *mirror(problem, rows=chunk, entropy=entropy, stash=stash), stash_E
    sums = forward_sums(problem, mean=entropy, stash=stash)
    entropy_N = sums.lse_N.new_empty(0) if sums.mean_N is None else sums.lse_N - sums.mean_N
    return sums.target_N - sums.lse_N, entropy_N, sums.lse_N, stash_E


@flat_logprobs.register_fake
def _(hidden_ND: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vocab_size, chunk, entropy, _, keep_mib = others[-5:]
    tokens, width = hidden_ND.shape[0], Tile.of(hidden_ND.device, chunk).vocab
    sizes = (tokens, tokens if entropy else 0, tokens, stash_size(tokens, vocab_size, width, keep_mib))
    first, second, third, fourth = (hidden_ND.new_empty(size, dtype=torch.float32) for size in sizes)
    return first, second, third, fourth


@torch.library.custom_op("rlalign::token_logprobs_backward", mutates_args=())
def _flat_backward(
    logprob_grad_N: Tensor,
    entropy_grad_N: Tensor | None,
    lse_N: Tensor,
    entropy_N: Tensor,
    stash_E: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    temperature_N: Tensor | None,
    kept_E: Tensor | None,
    kept_start_M: Tensor | None,
    soft_cap: float | None,
    logit_scale: float,
    vocab_size: int,
    chunk: int | None,
    wants: list[bool],
) -> list[Tensor]:
    problem = _problem(
        hidden_ND, weight_VD, bias_V, target_N, temperature_N, kept_E, kept_start_M, soft_cap, logit_scale,
        vocab_size, chunk,
    )  # fmt: skip
    upstream = Upstream(logprob_grad_N, entropy_grad_N, lse_N, entropy_N)
    wanted = {"hidden": wants[0], "bias": wants[2], "stash": _stash(stash_E, problem)}
    grads = backward_tiles(problem, upstream, weight_VD if wants[1] else None, **wanted)
    hidden = None if grads.hidden_ND is None else grads.hidden_ND.to(hidden_ND.dtype).contiguous()
    bias = None
    if bias_V is not None and grads.bias_V is not None:
        bias = torch.zeros_like(bias_V)
        bias[:vocab_size] = grads.bias_V
    return [lse_N.new_empty(0) if x is None else x for x in (hidden, grads.weight_VD, bias)]


@_flat_backward.register_fake
def _(logprob_grad_N: Tensor, entropy_grad_N: Tensor | None, lse_N: Tensor, *others: Any) -> list[Tensor]:
    _, _, hidden_ND, weight_VD, bias_V, *_, wants = others
    operands = (hidden_ND, weight_VD, bias_V)
    return [
        x.new_empty(x.shape) if x is not None and want else lse_N.new_empty(0)
        for x, want in zip(operands, wants, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden_ND, weight_VD, bias_V, target_N, temperature_N, kept_E, kept_start_M, *ctx.options, _ = inputs
    _, entropy_N, lse_N, stash_E = output
    ctx.mark_non_differentiable(lse_N, stash_E)
    ctx.set_materialize_grads(False)  # or autograd would fill a gradient of zeros as large as the stash
    ctx.save_for_backward(
        hidden_ND, weight_VD, bias_V, target_N, temperature_N, kept_E, kept_start_M, lse_N, entropy_N, stash_E
    )


def _backward(
    ctx: Any, logprob_grad_N: Tensor | None, entropy_grad_N: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *operands, lse_N, entropy_N, stash_E = ctx.saved_tensors
    soft_cap, logit_scale, vocab_size, chunk, entropy, exact_mirror = ctx.options
    wants = list(ctx.needs_input_grad[:3])
    grads = torch.ops.rlalign.token_logprobs_backward(
        torch.zeros_like(lse_N) if logprob_grad_N is None else logprob_grad_N, entropy_grad_N if entropy else None,
        lse_N, entropy_N, stash_E, *operands, soft_cap, logit_scale, vocab_size, None if exact_mirror else chunk, wants,
    )  # fmt: skip
    return *(grad if want else None for grad, want in zip(grads, wants, strict=True)), *[None] * 11


flat_logprobs.register_autograd(_backward, setup_context=_setup_context)


def _problem(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    temperature_N: Tensor | None,
    kept_E: Tensor | None,
    kept_start_M: Tensor | None,
    soft_cap: float | None,
    logit_scale: float,
    vocab_size: int,
    chunk: int | None,
) -> Problem:
    return Problem(
        hidden_ND=hidden_ND,
        weight_VD=weight_VD[:vocab_size],
        bias_V=None if bias_V is None else bias_V[:vocab_size],
        target_N=target_N,
        transform=Transform(soft_cap, logit_scale, temperature_N),
        tile=Tile.of(hidden_ND.device, chunk),
        route=route(hidden_ND, weight_VD),
        kept=None if kept_E is None or kept_start_M is None else Kept(kept_E, kept_start_M),
    )


def _stash(flat_E: Tensor, problem: Problem) -> Stash | None:
    if flat_E.numel() == 0:
        return None
    return Stash(flat_E, len(problem.hidden_ND), problem.weight_VD.shape[0], problem.tile.vocab)
