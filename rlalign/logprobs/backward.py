"""Gradients of token logprobs and entropies, tile by tile: the logits are formed again, unless a stash holds them.

Vocabulary outer, tokens inner: the weight gradient of one vocabulary block is summed over all tokens in float32 and
written once, the hidden gradient grows in a float32 accumulator. Four products instead of three buy the memory.

N tokens, D hidden, V vocabulary (or this rank's shard of it), T rows and S columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlalign.head.products import Route, backward_route, matmul, stored_for
from rlalign.logprobs.blocks import Stash, padded, strip_height, strips, token_tiles
from rlalign.logprobs.forward import Problem

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
    problem: Problem, upstream: Upstream, weight: Tensor | None, *, hidden: bool, bias: bool, stash: Stash | None = None
) -> Gradients:
    """Gradients for hidden states, weight and bias from per-token upstream gradients, each if wanted.

    weight: the whole parameter (the problem's weight may leave out padded rows: gradient 0), or None if frozen.
    stash: where the forward pass left logits; read, not written.

    Where the two products read 16-bit operands, the gradient of the logits is rounded once to their dtype (with float32
    copies: not at all); `p - 1` of the target is formed in float32 before that.
    """
    route = backward_route(problem.route, problem.hidden_ND.dtype)
    low_dtype = problem.hidden_ND.dtype if route in (Route.MKL_BF16, Route.CUDA_OUT_DTYPE) else torch.float32
    # on the CPU every route of the logits takes float32 copies too, with the same bits; so one copy serves all products
    storage = problem.route if problem.route in (Route.CUDA_OUT_DTYPE, Route.TRITON) else route
    problem, tile = problem.widened(storage), problem.tile
    (n, d), vocab, device = problem.hidden_ND.shape, problem.weight_VD.shape[0], problem.hidden_ND.device
    shape = (min(tile.tokens, n), min(tile.vocab, vocab))
    in_registers = problem.one_pass and problem.route is Route.TRITON
    x_buffer = None if in_registers and low_dtype != torch.float32 else padded(*shape, torch.float32, device)
    low_buffer = x_buffer if x_buffer is not None and low_dtype == torch.float32 else padded(*shape, low_dtype, device)
    grads = Gradients(
        padded(n, d, torch.float32, device).zero_() if hidden else None,
        None if weight is None else weight.new_empty(weight.shape),
        torch.zeros(vocab, device=device) if bias else None,
    )
    if grads.weight_VD is not None:
        grads.weight_VD[vocab:] = 0
    scratch = torch.empty(0 if problem.one_pass else strip_height(device) * shape[1], device=device)
    tile_gradient = _one_pass_tile if problem.one_pass else partial(_tile_in_strips, scratch=scratch)
    block_buffer = None if weight is None else padded(shape[1], d, torch.float32, device)
    for columns, weight_SD in problem.blocks(storage):
        width = columns.stop - columns.start
        for rows in token_tiles(n, tile.tokens):
            low_TS = low_buffer[: rows.stop - rows.start, :width]
            made_TS = None if stash is None else stash.tile(rows, columns)
            room_TS = None if x_buffer is None else x_buffer[: rows.stop - rows.start, :width]
            tile_gradient(problem, upstream, rows, columns, weight_SD, made_TS, room_TS, low_TS, grads.bias_V)
            if grads.hidden_ND is not None:
                _add_product(grads.hidden_ND[rows], low_TS, stored_for(weight_SD, route), route)
            if block_buffer is not None:
                of_rows_TD = stored_for(problem.hidden_ND[rows], route)
                _add_product(block_buffer[:width], low_TS.t(), of_rows_TD, route, fresh=rows.start == 0)
        if grads.weight_VD is not None and block_buffer is not None:
            grads.weight_VD[columns] = block_buffer[:width] if n else 0
    return grads


def _one_pass_tile(
    problem: Problem,
    upstream: Upstream,
    rows: slice,
    columns: slice,
    weight_SD: Tensor,
    made_TS: Tensor | None,
    room_TS: Tensor | None,
    low_TS: Tensor,
    bias_grad_V: Tensor | None,
) -> None:
    """As `_tile_in_strips`, by one kernel. made_TS: products without bias, where the forward pass left them."""
    from rlalign.head.triton import launches  # here, since it imports Triton

    if made_TS is None and problem.route is not Route.TRITON:
        assert room_TS is not None, "only Triton's own products need no room"
        made_TS = problem.products(rows, weight_SD, room_TS)
    entropy_N, fall_N = upstream.entropy_N, upstream.entropy_grad_N
    falls = (None, None) if entropy_N is None or fall_N is None else (entropy_N[rows], fall_N[rows].contiguous())
    launches.logit_gradients(
        problem.hidden_ND[rows], weight_SD, made_TS, problem.softmax(rows, columns),
        upstream.lse_N[rows], upstream.logprob_N[rows].contiguous(),
        *falls, low_TS, bias_grad_V=None if bias_grad_V is None else bias_grad_V[columns],
    )  # fmt: skip


def _tile_in_strips(
    problem: Problem,
    upstream: Upstream,
    rows: slice,
    columns: slice,
    weight_SD: Tensor,
    made_TS: Tensor | None,
    room_TS: Tensor | None,
    low_TS: Tensor,
    bias_grad_V: Tensor | None,
    *,
    scratch: Tensor,
) -> None:
    """The gradient for the products of one tile into `low`, and its sum over tokens added to bias_grad[columns].

    made_TS: its logits, or None: they are formed in `room`, which may be `low`.
    """
    if made_TS is None:
        assert room_TS is not None, "only kernels of one pass form logits in registers"
        made_TS = problem.logits(rows, columns, weight_SD, room_TS)
    x_TS = made_TS
    for tokens, strip in strips(rows, x_TS.device):
        grad_TS = _logit_gradient(problem, upstream, x_TS[strip], tokens, columns, scratch)
        if bias_grad_V is not None:
            bias_grad_V[columns].add_(grad_TS.sum(0))
        low_TS[strip] = grad_TS


def _logit_gradient(
    problem: Problem, upstream: Upstream, x_TS: Tensor, tokens: slice, columns: slice, scratch: Tensor
) -> Tensor:
    """Gradient for the projection's output on one strip, in `scratch`, from its logits, which stay as they are.

    g (onehot - p) for the logprob; -h p (log p + H) for the entropy; times the slope of the transform.
    """
    lse_T1, grad_T1 = upstream.lse_N[tokens].unsqueeze(1), upstream.logprob_N[tokens].unsqueeze(1)
    p_TS = torch.sub(x_TS, lse_T1, out=scratch[: x_TS.numel()].view(x_TS.shape)).exp_()
    if upstream.entropy_grad_N is None or upstream.entropy_N is None:
        p_TS.mul_(-grad_T1)
    else:
        entropy_grad_T1 = upstream.entropy_grad_N[tokens].unsqueeze(1)
        constant_T1 = grad_T1 + entropy_grad_T1 * (upstream.entropy_N[tokens].unsqueeze(1) - lse_T1)
        p_TS.mul_(torch.addcmul(constant_T1, entropy_grad_T1, x_TS).neg_())
    column_T1, inside_T = problem.target_columns(tokens, columns)
    p_TS.scatter_add_(1, column_T1, (grad_T1.squeeze(1) * inside_T).unsqueeze(1))
    slope = problem.transform.slope(x_TS, tokens)
    return p_TS if slope is None else p_TS.mul_(slope)


def _add_product(out: Tensor, a_MK: Tensor, b_KJ: Tensor, route: Route, *, fresh: bool = False) -> None:
    """out += a @ b; `fresh`: out = a @ b."""
    inner = a_MK.shape[1]
    step = _INNER if route is Route.MKL_BF16 else inner
    for k in range(0, inner, step):
        accumulate = k > 0 or not fresh
        matmul(a_MK[:, k : k + step], b_KJ[k : k + step], route, out=out, accumulate=accumulate)
