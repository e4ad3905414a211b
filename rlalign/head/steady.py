"""Linear products in bf16 whose bits depend on the row alone, at the library's speed wherever it keeps to one order of additions.

torch's CPU products change the order with the number of rows: oneDNN with AMX adds 64 to about 1,000 rows differently from all
others (torch 2.13; 1 element in 20,000 then rounds apart), and one such element is enough for a whole body to round apart from
there on. Here the rows are cut into pieces of sizes at which the library was proved, on this host and for this weight's shape, to
give the bits of one chain; what is left over is made by MKL's product with a float32 result, rounded once, which always does.
M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from rlalign.head import kernel as head_kernel
from rlalign.head import widened
from rlalign.head.products import Route, has_mkl_bf16, logits_of
from rlalign.head.routes import is_exact_and_invariant

SIZES, FEW = (4096, 2048, 1024), 32  # rows of a piece; FEW takes what is smaller, padded with zeros
NEARLY = 0.75  # of a size, from which rows are padded up to it
BUFFER = 2**18  # float32 results at once
PROVED_ON = 2**20  # elements that must agree: where orders differ, more than 1 in 50,000 do not
PROBE_SIZES = (96, 576)  # inputs, for `missing`


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x [M, K], weight [N, K], bias [N] or None -> [M, N] bf16


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, rest: Product | None = None) -> Tensor:
    """x @ weight.T + bias in one order of additions, in float32, rounded once. Differentiable; leading dimensions are kept.

    rest: a product for rows that the library would add up in another order, used where it is proved to keep to this one; without,
    or elsewhere, MKL's. Gradients are those of `torch.nn.functional.linear`, in torch's own orders. What is not bf16 on a CPU goes
    to torch.
    """
    if x.dtype != torch.bfloat16 or weight_NK.dtype != torch.bfloat16 or x.device.type != "cpu":
        return torch.nn.functional.linear(x, weight_NK, bias_N)
    return _Linear.apply(x, weight_NK, bias_N, rest)


def missing(dtype: torch.dtype) -> str:
    """Why this process has no such product of this dtype; empty where it has one."""
    if dtype != torch.bfloat16:
        return f"products in one order of additions are for bfloat16 on a CPU, not for {dtype}"
    if widened.is_widened(dtype):
        if head_kernel.fma() is not None:
            return ""
        return f"bf16 products are widened here without the head's kernel ({head_kernel.why_none()}); run rlalign build-kernel"
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return (
            f"bf16 products are torch's own here, on a host without instructions for them ({widened.VARIABLE}=native?), and change "
            f"their bits with the number of rows; unset {widened.VARIABLE}"
        )  # nor is MKL's asked for: imitating one, it has been seen to write beyond its operands
    if not has_mkl_bf16():
        return "torch's CPU library has no MKL product of bf16 with a float32 result"
    if not all(is_exact_and_invariant(Route.MKL_BF16, size) for size in PROBE_SIZES):
        return "MKL's bf16 product changes its bits with the number of rows on this host"
    return ""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, rest: Product | None) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        ctx.has_bias = bias_N is not None
        rows_MK = x.reshape(-1, x.shape[-1])
        return product(rows_MK, weight_NK, bias_N, rest).view(*x.shape[:-1], len(weight_NK))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_NK = ctx.saved_tensors
        grad_MN = grad.reshape(-1, grad.shape[-1])
        to_x = (grad_MN @ weight_NK).view_as(x) if ctx.needs_input_grad[0] else None
        to_weight = grad_MN.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        to_bias = grad_MN.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias, None


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, rest: Product | None = None) -> Tensor:
    """[M, N] bf16, without a gradient."""
    if widened.is_widened(torch.bfloat16):
        return torch.nn.functional.linear(
            x_MK, weight_NK, bias_N
        )  # the head's kernel: one chain for any number of rows
    out_MN = torch.empty(len(x_MK), len(weight_NK), dtype=torch.bfloat16)
    start = 0
    for rows, size in pieces(len(x_MK), *weight_NK.shape, bias_N is not None):
        part_MK = x_MK[start : start + rows]
        if not size and rest is not None and rows > FEW and _agrees(rest, *weight_NK.shape, bias_N is not None):
            out_MN[start : start + rows] = rest(part_MK, weight_NK, bias_N)
        elif not size:
            _one_chain_into(out_MN[start : start + rows], part_MK, weight_NK, bias_N)
        elif size == rows:
            _library(part_MK, weight_NK, bias_N, out_MN[start : start + rows])
        else:
            padded_MK = torch.nn.functional.pad(part_MK, (0, 0, 0, size - rows))
            out_MN[start : start + rows] = _library(padded_MK, weight_NK, bias_N)[:rows]
        start += rows
    return out_MN


def pieces(rows: int, outputs: int, inputs: int, bias: bool) -> list[tuple[int, int]]:
    """(rows, of the library's product at which size they are made; 0 for MKL's), in order."""
    found: list[tuple[int, int]] = []
    kind = (outputs, inputs, bias, torch.get_num_threads())
    for size in (s for s in SIZES if s * NEARLY <= rows and _keeps_order(s, *kind)):
        found += [(size, size)] * (rows // size)
        rows %= size
        if rows >= NEARLY * size:
            return [*found, (rows, size)]
    if 0 < rows <= FEW and _keeps_order(FEW, *kind):
        return [*found, (rows, FEW)]
    return [*found, (rows, 0)] if rows else found


@lru_cache(maxsize=1024)
def _keeps_order(rows: int, outputs: int, inputs: int, bias: bool, threads: int) -> bool:
    """Whether the library's product of this size has the bits of the one chain, on PROVED_ON elements."""
    return _has_the_bits(_library, rows, outputs, inputs, bias)


@lru_cache(maxsize=1024)
def _agrees(rest: Product, outputs: int, inputs: int, bias: bool) -> bool:
    """Whether another product has the bits of the one chain, for numbers of rows at which kernels change."""
    whole_tiles = inputs % 32 == 0 and outputs % 16 == 0  # all that such kernels take
    return whole_tiles and all(_has_the_bits(rest, rows, outputs, inputs, bias) for rows in (FEW + 1, 64, 200, 1000))


def _has_the_bits(product: Product, rows: int, outputs: int, inputs: int, bias: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(-(-PROVED_ON // (rows * outputs))):
            x_MK = torch.randn(rows, inputs, generator=generator).bfloat16()
            weight_NK = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).bfloat16()
            bias_N = torch.randn(outputs, generator=generator).bfloat16() if bias else None
            if not torch.equal(product(x_MK, weight_NK, bias_N), _one_chain(x_MK, weight_NK, bias_N)):
                return False
    return True


def _library(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_MN: Tensor | None = None) -> Tensor:
    if bias_N is None:
        return torch.mm(x_MK, weight_NK.t(), out=out_MN)
    return torch.addmm(bias_N, x_MK, weight_NK.t(), out=out_MN)


def _one_chain_into(out_MN: Tensor, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> None:
    """MKL's product, so many rows at once that its float32 result stays in the cache until it is rounded."""
    step = max(FEW, BUFFER // len(weight_NK))
    for start in range(0, len(x_MK), step):
        out_MN[start : start + step] = _one_chain(x_MK[start : start + step], weight_NK, bias_N)


def _one_chain(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    result_MN = logits_of(x_MK.contiguous(), weight_NK.contiguous(), Route.MKL_BF16)
    return (result_MN if bias_N is None else result_MN.add_(bias_N.float())).to(torch.bfloat16)
