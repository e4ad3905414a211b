"""Calls of the kernels on tensors: nothing synchronises with the device, and nothing is looked at but shapes and strides.

N tokens, D hidden, V vocabulary, T tiles of the vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlalign.head.triton import Plan, head_kernels, interpreted, plan_for, softmax_plan

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

MERGED_ROWS, MERGED_TILES = 32, 32
# a product and a sum become one rounding where they touch: the same numbers from memory and from registers would differ
OPTIONS = {"enable_fp_fusion": False}


class Softmax(NamedTuple):
    """What stands between a product and the softmax: bias_V, temperature_N (each may be None), cap, scale; and the targets.

    target_N counts from the first row of the whole weight, first_id is the row at which the tile's columns begin. allowed_NV: bool,
    the ids that each token's softmax runs over; None means all.
    """

    bias_V: Tensor | None
    temperature_N: Tensor | None
    target_N: Tensor
    first_id: int
    soft_cap: float | None
    logit_scale: float
    allowed_NV: Tensor | None = None


def logits(
    hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor, bias_V: Tensor | None = None, *, plan: Plan | None = None
) -> Tensor:
    """hidden @ weight.T (+ bias) into `out`, float32, whose columns are contiguous. Operands of one 16-bit dtype, any strides.

    No memory is allocated, so a captured graph that calls it sees weights written in place afterwards.
    """
    plan = plan or plan_for(len(hidden_ND))
    operands, tiling = _operands(hidden_ND, weight_VD, plan)
    _columns_contiguous(out_NV)
    grid = _grid(len(hidden_ND), len(weight_VD), plan, tiling["DESCRIBED"], hidden_ND.device)
    if grid[0]:
        strides = (*hidden_ND.stride(), *weight_VD.stride(), out_NV.stride(0))
        with _on(hidden_ND):
            head_kernels.logits_kernel[grid](
                *operands, bias_V, out_NV, *_sizes(hidden_ND, weight_VD), *strides, **tiling, **_meta(plan)
            )
    return out_NV


def softmax_sums(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    made_NV: Tensor | None,
    softmax: Softmax,
    sums_3TN: Tensor,
    target_logit_N: Tensor,
    *,
    mean: bool,
    kept_NV: Tensor | None = None,
    plan: Plan | None = None,
) -> None:
    """Peaks, totals and weighted totals of each tile into sums [3, T, N], T = tiles_of(V); the target's logit where it is here.

    made_NV: products that exist (columns contiguous), or None to form them, and to leave them in kept_NV if that is given.
    sums and target_logit are written to. One plan whatever the rows: a thread's share of a row, and so the order of its sums, is
    part of it.
    """
    plan = plan or softmax_plan()
    operands, tiling = _operands(hidden_ND, weight_VD, plan)
    for x in (made_NV, kept_NV):
        if x is not None:
            _columns_contiguous(x)
    grid = _grid(len(hidden_ND), len(weight_VD), plan, tiling["DESCRIBED"], hidden_ND.device)
    if grid[0]:
        allowed_NV = _bytes(softmax.allowed_NV)
        lines = (0 if x is None else x.stride(0) for x in (made_NV, allowed_NV, kept_NV))
        strides = (*hidden_ND.stride(), *weight_VD.stride(), *lines)
        with _on(hidden_ND):
            head_kernels.sums_kernel[grid](
                *operands, made_NV, kept_NV, softmax.bias_V, softmax.temperature_N, allowed_NV, softmax.target_N, *sums_3TN,
                target_logit_N,
                *_sizes(hidden_ND, weight_VD), softmax.first_id, softmax.soft_cap or 1.0, softmax.logit_scale,
                *strides, sums_3TN.stride(1), CAPPED=softmax.soft_cap is not None, MEAN=mean, **tiling, **_meta(plan),
            )  # fmt: skip


def merged(sums_3TN: Tensor, *, mean: bool) -> tuple[Tensor, Tensor | None]:
    """(log-sum-exp [N], mean logit [N] or None) of the sums of all tiles."""
    (_, tiles, n), device = sums_3TN.shape, sums_3TN.device
    lse_N, mean_N = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(2))
    if n:
        with _on(sums_3TN):
            head_kernels.merge_kernel[(triton.cdiv(n, MERGED_ROWS),)](
                *sums_3TN, lse_N, mean_N, n, tiles, sums_3TN.stride(1),
                BLOCK_N=MERGED_ROWS, BLOCK_T=MERGED_TILES, MEAN=mean, **OPTIONS,
            )  # fmt: skip
    return lse_N, mean_N if mean else None


def logit_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    made_NV: Tensor | None,
    softmax: Softmax,
    lse_N: Tensor,
    logprob_grad_N: Tensor,
    entropy_N: Tensor | None,
    entropy_grad_N: Tensor | None,
    out_NV: Tensor,
    *,
    bias_grad_V: Tensor | None = None,
    plan: Plan | None = None,
) -> None:
    """Gradients of the loss for the products into `out`, rounded once to its dtype; their sums are added to bias_grad.

    made_NV: as in softmax_sums. entropy_N and entropy_grad_N: both or neither.
    """
    n, v = len(hidden_ND), len(weight_VD)
    plan = plan or softmax_plan()
    operands, tiling = _operands(hidden_ND, weight_VD, plan)
    _columns_contiguous(out_NV)
    grid = _grid(n, v, plan, tiling["DESCRIBED"], hidden_ND.device)
    if not grid[0]:
        return
    down_BV = None
    if bias_grad_V is not None:
        down_BV = torch.empty(triton.cdiv(n, plan.rows), v, dtype=torch.float32, device=hidden_ND.device)
    allowed_NV = _bytes(softmax.allowed_NV)
    lines = (0 if x is None else x.stride(0) for x in (made_NV, allowed_NV, out_NV))
    strides = (*hidden_ND.stride(), *weight_VD.stride(), *lines)
    with _on(hidden_ND):
        head_kernels.gradient_kernel[grid](
            *operands, made_NV, softmax.bias_V, softmax.temperature_N, allowed_NV, softmax.target_N,
            lse_N, logprob_grad_N, entropy_N, entropy_grad_N, out_NV, down_BV,
            *_sizes(hidden_ND, weight_VD), softmax.first_id, softmax.soft_cap or 1.0, softmax.logit_scale,
            *strides, v, CAPPED=softmax.soft_cap is not None, **tiling, **_meta(plan),
        )  # fmt: skip
    if bias_grad_V is not None and down_BV is not None:
        bias_grad_V.add_(down_BV.sum(0))


def tiles_of(columns: int) -> int:
    """Tiles of so many columns of the vocabulary."""
    return triton.cdiv(columns, softmax_plan().columns)


def _operands(hidden_ND: Tensor, weight_VD: Tensor, plan: Plan) -> tuple[tuple[object, object], dict[str, object]]:
    described = _describable(hidden_ND) and _describable(weight_VD)
    operands: tuple[object, object] = (hidden_ND, weight_VD)
    if described:
        operands = (
            TensorDescriptor.from_tensor(hidden_ND, [plan.rows, plan.inner]),
            TensorDescriptor.from_tensor(weight_VD, [plan.columns, plan.inner]),
        )
    widen = interpreted() or hidden_ND.dtype == torch.float32
    return operands, {"EVEN": hidden_ND.shape[1] % plan.inner == 0, "DESCRIBED": described, "WIDEN": widen}


def _describable(x: Tensor) -> bool:
    """Whether the device's tensor memory accelerator can read this matrix (compute capability 9 on)."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device)[0] < 9 or x.numel() == 0:
        return False
    pitch = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and pitch > 0 and pitch % 16 == 0 and x.data_ptr() % 16 == 0


def _grid(rows: int, columns: int, plan: Plan, described: bool, device: torch.device) -> tuple[int]:
    tiles = triton.cdiv(rows, plan.rows) * triton.cdiv(columns, plan.columns)
    if described:  # one program a multiprocessor, so that a tile's sums hide behind the next one's loads
        tiles = min(tiles, torch.cuda.get_device_properties(device).multi_processor_count)
    return (tiles,)


def _sizes(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[int, int, int]:
    return len(hidden_ND), len(weight_VD), hidden_ND.shape[1]


def _meta(plan: Plan) -> dict[str, object]:
    blocks = {"BLOCK_N": plan.rows, "BLOCK_V": plan.columns, "BLOCK_K": plan.inner, "GROUP": plan.group}
    return {**blocks, "num_warps": plan.warps, "num_stages": plan.stages, **OPTIONS}


def _bytes(allowed_NV: Tensor | None) -> Tensor | None:
    return None if allowed_NV is None else allowed_NV.view(torch.uint8)


def _columns_contiguous(x: Tensor) -> None:
    assert x.stride(1) == 1 or x.shape[1] <= 1, x.stride()


def _on(x: Tensor) -> AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
