"""Gradients of token logprobs and entropies, tile by tile: the logits are formed again, never kept.

Vocabulary outer, tokens inner: the weight gradient of one vocabulary block is summed over all tokens in float32 and
written once, the hidden gradient grows in a float32 accumulator. Four products instead of three buy the memory.

N tokens, D hidden, V vocabulary (or this rank's shard of it), T rows and S columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.logprobs.forward import Problem, padded, token_tiles
from rlalign.products import Route, backward_route, matmul, stored_for

# MKL's bf16 product is a fifth faster on inner lengths of 1024 than on longer ones (AMX).
_INNER = 1024


@dataclass(frozen=True, slots=True)
class Upstream:
    """Gradients of the loss for logprob and entropy of each token, with the normaliser they were computed with."""

    logprob_N: Tensor
    entropy_grad_N: Tensor | None
    lse_N: Tensor
    entropy_N: Tensor | None


@dataclass(slots=True)
class Gradients:
    """hidden_ND float32; weight_VD in the weight's dtype; bias_V float32; None where not wanted."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def backward_tiles(
    problem: Problem, upstream: Upstream, weight: Tensor | None, *, hidden: bool, bias: bool
) -> Gradients:
    """Gradients for hidden states, weight and bias from per-token upstream gradients, each if wanted.

    weight: the whole parameter (the problem's weight may leave out padded rows: gradient 0), or None if frozen.

    With 16-bit operands the gradient of the logits is rounded once to bfloat16 before the two products (float32
    operands and float16: not at all); `p - 1` of the target is formed in float32 before that.
    """
    hidden_ND, tile = problem.hidden_ND, problem.tile
    route = backward_route(problem.route, hidden_ND.dtype)
    (n, d), vocab, device = hidden_ND.shape, problem.weight_VD.shape[0], hidden_ND.device
    shape = (min(tile.tokens, n), min(tile.vocab, vocab))
    x_buffer = padded(*shape, torch.float32, device)
    logits_needed = problem.transform.soft_cap is not None or upstream.entropy_grad_N is not None
    p_buffer = padded(*shape, torch.float32, device) if logits_needed else x_buffer
    low_dtype = hidden_ND.dtype if route in (Route.MKL_BF16, Route.CUDA_OUT_DTYPE) else torch.float32
    low_buffer = p_buffer if low_dtype == torch.float32 else padded(*shape, low_dtype, device)
    grads = Gradients(
        padded(n, d, torch.float32, device).zero_() if hidden else None,
        None if weight is None else weight.new_empty(weight.shape),
        torch.zeros(vocab, device=device) if bias else None,
    )
    if grads.weight_VD is not None:
        grads.weight_VD[vocab:] = 0
    block_buffer = None if weight is None else padded(shape[1], d, torch.float32, device)
    for columns, weight_SD in problem.blocks():
        width = columns.stop - columns.start
        if block_buffer is not None:
            block_buffer.zero_()
        for rows in token_tiles(n, tile.tokens):
            height = rows.stop - rows.start
            x_TS = problem.logits(rows, columns, weight_SD, x_buffer[:height, :width])
            grad_TS = _logit_gradient(problem, upstream, x_TS, p_buffer[:height, :width], rows, columns)
            if grads.bias_V is not None:
                grads.bias_V[columns] += grad_TS.sum(0)
            low_TS = grad_TS if low_dtype == torch.float32 else low_buffer[:height, :width].copy_(grad_TS)
            if grads.hidden_ND is not None:
                _add_product(grads.hidden_ND[rows], low_TS, stored_for(weight_SD, route), route)
            if block_buffer is not None:
                _add_product(block_buffer[:width], low_TS.t(), stored_for(hidden_ND[rows], route), route)
        if grads.weight_VD is not None and block_buffer is not None:
            grads.weight_VD[columns] = block_buffer[:width]
    return grads


def _logit_gradient(
    problem: Problem, upstream: Upstream, x_TS: Tensor, p_TS: Tensor, rows: slice, columns: slice
) -> Tensor:
    """Gradient for the projection's output on one tile, in `p_TS`; overwrites the logits `x_TS`.

    g (onehot - p) for the logprob; -h p (log p + H) for the entropy; times the slope of the transform.
    """
    lse_T1, grad_T1 = upstream.lse_N[rows].unsqueeze(1), upstream.logprob_N[rows].unsqueeze(1)
    if upstream.entropy_grad_N is None or upstream.entropy_N is None:
        torch.exp(torch.sub(x_TS, lse_T1, out=p_TS), out=p_TS).mul_(-grad_T1)
    else:
        entropy_grad_T1 = upstream.entropy_grad_N[rows].unsqueeze(1)
        constant_T1 = grad_T1 + entropy_grad_T1 * (upstream.entropy_N[rows].unsqueeze(1) - lse_T1)
        torch.exp(torch.sub(x_TS, lse_T1, out=p_TS), out=p_TS)
        p_TS.mul_(torch.addcmul(constant_T1, entropy_grad_T1, x_TS).neg_())
    column_T1, inside_T = problem.target_columns(rows, columns)
    p_TS.scatter_add_(1, column_T1, (grad_T1.squeeze(1) * inside_T).unsqueeze(1))
    slope = problem.transform.slope_(x_TS, rows)
    return p_TS if slope is None else p_TS.mul_(slope)


def _add_product(out: Tensor, a_MK: Tensor, b_KJ: Tensor, route: Route) -> None:
    inner = a_MK.shape[1]
    step = _INNER if route is Route.MKL_BF16 else inner
    for k in range(0, inner, step):
        matmul(a_MK[:, k : k + step], b_KJ[k : k + step], route, out=out, accumulate=True)
