"""Matrix products with float32 results that never round: the routes. `routes` chooses between them.

M, K, J: rows, inner and columns of a bare product; N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.head import kernel as head_kernel
from rlalign.head import triton as gpu_head

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112  # cblas enums
_DECODE_ROWS, _DECODE_COLUMNS = 16, 32768


class Route(StrEnum):
    """How float32 logits are made.

    CUDA_OUT_DTYPE: 16-bit operands, `torch.mm(out_dtype=float32)` (CUDA and ROCm, torch >= 2.10).
    TRITON: 16-bit operands, the kernel of rlalign/head/triton; where RLALIGN_GPU_HEAD=triton asks for it.
    MKL_BF16: bf16 operands, float32 result, no copy (`cblas_gemm_bf16bf16f32` of torch's own library).
    ONEDNN_BF16: float32 copies of bf16 values multiplied by oneDNN's bf16 math; the products are exact.
    KERNEL_FMA: float32 or bf16 operands as they are, one fused multiply-add chain per logit (head_kernel, AVX2 or AVX-512).
    BLOCKED_FP32: the same operands in IEEE float32 products of one fixed shape, for hosts without that kernel; slow.
    STRICT_FP32: float32 copies and an IEEE float32 product. Bits may change with the number of rows.
    The two bf16 routes give the same bits. On every route but the first and the last, logits do not depend on the number of rows,
    on where a row lies, on the slice of the vocabulary.
    """

    CUDA_OUT_DTYPE = "cuda_out_dtype"
    TRITON = "triton"
    MKL_BF16 = "mkl_bf16"
    ONEDNN_BF16 = "onednn_bf16"
    KERNEL_FMA = "kernel_fma"
    BLOCKED_FP32 = "blocked_fp32"
    STRICT_FP32 = "strict_fp32"


# read a bf16 operand as it is
AS_STORED = (Route.MKL_BF16, Route.CUDA_OUT_DTYPE, Route.TRITON, Route.KERNEL_FMA, Route.BLOCKED_FP32)


def stored_for(x: Tensor, route: Route) -> Tensor:
    """`x` in the storage `matmul` wants for this route: as it is, or a float32 copy."""
    if route in (Route.KERNEL_FMA, Route.BLOCKED_FP32) and x.dtype == torch.float16:
        return x.float()
    return x if route in AS_STORED else x.float()


def matmul(a_MK: Tensor, b_KJ: Tensor, route: Route, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """a @ b in float32, plus `out` when accumulating. Operands as `stored_for` gives them, transposed or not."""
    if out is None:
        out = torch.empty(a_MK.shape[0], b_KJ.shape[1], dtype=torch.float32, device=a_MK.device)
    if route in (Route.KERNEL_FMA, Route.BLOCKED_FP32, Route.TRITON):
        product = {Route.KERNEL_FMA: _kernel_product, Route.BLOCKED_FP32: blocked_product}.get(route, _triton_product)
        return out.add_(product(a_MK, b_KJ.t(), torch.empty_like(out))) if accumulate else product(a_MK, b_KJ.t(), out)
    if route is Route.MKL_BF16:
        return _mkl_bf16(a_MK, b_KJ, out, accumulate)
    if route is Route.CUDA_OUT_DTYPE:
        with torch.autocast("cuda", enabled=False):
            if accumulate:
                return torch.addmm(out, a_MK, b_KJ, out_dtype=torch.float32, out=out)
            return torch.mm(a_MK, b_KJ, out_dtype=torch.float32, out=out)
    with fp32_matmul("bf16" if route is Route.ONEDNN_BF16 else "ieee", a_MK.device):
        return torch.addmm(out, a_MK, b_KJ, out=out) if accumulate else torch.mm(a_MK, b_KJ, out=out)


def _kernel_product(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor) -> Tensor:
    kernel = head_kernel.fma()
    if kernel is None:
        raise RuntimeError(
            "route kernel_fma without the head kernel: it has gone since the route was chosen; rlalign build-kernel"
        )
    return kernel(hidden_ND, weight_VD, out_NV)


def _triton_product(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor) -> Tensor:
    from rlalign.head.triton import launches  # here, since it imports Triton

    return launches.logits(hidden_ND, weight_VD, out_NV)


@contextmanager
def fp32_matmul(precision: str, device: torch.device) -> Iterator[None]:
    # The switch is process-wide: a float32 product in another thread meanwhile would see it too.
    switch = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        switch.fp32_precision = before


BLOCK_COLUMNS = (512, 32)
BLOCK_ROWS = (512, 64, 16)  # a call takes the lowest that holds its rows, of those that agree bit for bit


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Of one block: `columns` of the vocabulary, any of these numbers of rows (ascending)."""

    columns: int
    rows: tuple[int, ...]


def blocked_product(hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor) -> Tensor:
    """hidden @ weight.T into `out` (float32), made of torch's own products of one shape, padded with zeros.

    For a host without the compiled kernel. Operands float32 or bf16, on CPU.
    A library may order the additions of an element by the shape of the product and by the element's place in it; one shape leaves
    only the place, and `block_shape` looks at every place before it trusts a shape. Raises RuntimeError where none is sound.
    """
    (n, d), vocab = hidden_ND.shape, weight_VD.shape[0]
    shape = block_shape(d, torch.get_num_threads())
    if shape is None:
        raise RuntimeError(f"no shape of blocks gives the same bits at every place on this host (hidden size {d})")
    height = next((rows for rows in shape.rows if rows >= n), shape.rows[-1])
    rows = [(start, _filled(hidden_ND[start : start + height], height)) for start in range(0, n, height)]
    block = torch.empty(height, shape.columns)
    for start in range(0, vocab, shape.columns):
        weight = _filled(weight_VD[start : start + shape.columns], shape.columns)
        for first, hidden in rows:
            target = out_NV[first : first + height, start : start + shape.columns]
            with fp32_matmul("ieee", hidden.device):
                torch.mm(hidden, weight.t(), out=block)
            target.copy_(block[: target.shape[0], : target.shape[1]])
    return out_NV


@lru_cache(maxsize=64)
def block_shape(hidden_size: int, threads: int) -> BlockShape | None:
    """The largest blocks whose elements come out the same at every place, here and with so many threads; None: there are none."""
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, hidden_size, generator=generator).bfloat16().float() for _ in range(3)]
    for columns in BLOCK_COLUMNS:
        found = {rows: _the_same_everywhere(pairs, rows, columns) for rows in BLOCK_ROWS}
        values = [value for value in found.values() if value is not None]
        if values:
            return BlockShape(columns, tuple(sorted(rows for rows, value in found.items() if value == values[0])))
    return None


def _the_same_everywhere(pairs: list[Tensor], rows: int, columns: int) -> tuple[float, ...] | None:
    """h.w of every pair from a block filled with h and w; None when two places differ."""
    values = []
    for hidden_D, weight_D in pairs:
        with fp32_matmul("ieee", hidden_D.device):
            block = torch.mm(hidden_D.repeat(rows, 1), weight_D.repeat(columns, 1).t())
        if not bool((block == block[0, 0]).all()):
            return None
        values.append(block[0, 0].item())
    return tuple(values)


def _filled(part: Tensor, height: int) -> Tensor:
    """A new float32 tensor of `height` rows that begins with `part`."""
    whole = torch.zeros(height, part.shape[1])
    whole[: len(part)] = part
    return whole


@lru_cache(maxsize=1)
def _mkl_symbol() -> ctypes._CFuncPtr | None:
    """`cblas_gemm_bf16bf16f32` of torch's CPU library, or None for a build without it (ARM, macOS, Windows)."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists() or not hasattr(ctypes.CDLL(str(library)), "cblas_gemm_bf16bf16f32"):
        return None
    function = ctypes.CDLL(str(library)).cblas_gemm_bf16bf16f32
    integer, pointer = ctypes.c_int, ctypes.c_void_p
    size = [integer] * 6
    function.argtypes = [*size, ctypes.c_float, pointer, integer, pointer, integer, ctypes.c_float, pointer, integer]
    function.restype = None
    return function


def has_mkl_bf16() -> bool:
    """Whether torch's CPU library has MKL's bf16 product at all."""
    return _mkl_symbol() is not None


def _mkl_bf16(a_MK: Tensor, b_KJ: Tensor, out_MJ: Tensor, accumulate: bool) -> Tensor:
    (a, a_trans, lda), (b, b_trans, ldb) = _blas_layout(a_MK), _blas_layout(b_KJ)
    m, k, j = *a_MK.shape, b_KJ.shape[1]
    beta = 1.0 if accumulate else 0.0
    _mkl_symbol()(
        _ROW_MAJOR, a_trans, b_trans, m, j, k, 1.0, a.data_ptr(), lda, b.data_ptr(), ldb,
        beta, out_MJ.data_ptr(), out_MJ.stride(0),
    )  # fmt: skip
    return out_MJ


def _blas_layout(x: Tensor) -> tuple[Tensor, int, int]:
    """(tensor to keep alive, transposition, leading dimension) of a row- or column-major matrix, else of its copy."""
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x, _NO_TRANS, x.stride(0)
    if x.stride(0) == 1 and x.stride(1) >= x.shape[0]:
        return x, _TRANS, x.stride(1)
    x = x.contiguous()
    return x, _NO_TRANS, x.shape[1]


def logits_of(hidden_ND: Tensor, weight_VD: Tensor, route: Route, *, out: Tensor | None = None) -> Tensor:
    """hidden @ weight.T with the bits every other number of rows would give. Operands as `stored_for` gives them.

    One row, or a tiny product, makes both bf16 libraries change kernels (and bits): zero rows are added to those.
    """
    n, v = hidden_ND.shape[0], weight_VD.shape[0]
    if route not in (Route.MKL_BF16, Route.ONEDNN_BF16):
        return matmul(hidden_ND, weight_VD.t(), route, out=out)
    rows, columns = max(n, 2, 257 // max(v, 2) + 1), max(v, 2)
    hidden = torch.nn.functional.pad(hidden_ND, (0, 0, 0, rows - n)) if rows > n else hidden_ND
    weight = torch.nn.functional.pad(weight_VD, (0, 0, 0, columns - v)) if columns > v else weight_VD
    if route is Route.MKL_BF16 and rows <= _DECODE_ROWS:
        out = torch.empty(n, v) if out is None else out
        return _decode_logits(hidden, weight, out)
    if (rows, columns) == (n, v):
        return matmul(hidden, weight.t(), route, out=out)
    logits_NV = matmul(hidden, weight.t(), route)[:n, :v]
    return logits_NV.contiguous() if out is None else out.copy_(logits_NV)


def _decode_logits(hidden_ND: Tensor, weight_VD: Tensor, out: Tensor) -> Tensor:
    """logits_of for few rows: with the weight as the left operand MKL reads it once, without packing it.

    Same bits, 0.7 times the time (AMX); from about 32 rows on turning the result over costs more than that saves.
    """
    rows, columns = hidden_ND.shape[0], weight_VD.shape[0]
    count = -(-columns // _DECODE_COLUMNS)
    bounds = [columns * i // count for i in range(count + 1)]
    buffer = torch.empty(-(-columns // count), rows)
    for start, stop in pairwise(bounds):
        block_VN = matmul(weight_VD[start:stop], hidden_ND.t(), Route.MKL_BF16, out=buffer[: stop - start])
        width = min(stop, out.shape[1]) - start
        out[:, start : start + width] = block_VN[:width, : out.shape[0]].t()
    return out


def backward_route(forward: Route, dtype: torch.dtype) -> Route:
    """The route of the gradient products: the forward's where that is made for any layout, else plain float32 (so for float16:
    p * g underflows it). No law binds their bits."""
    if forward is Route.TRITON:  # its kernel is made for logits; cuBLAS is for gradients, and the interpreter has none
        forward = Route.STRICT_FP32 if gpu_head.interpreted() else Route.CUDA_OUT_DTYPE
    made_for_any = forward in (Route.CUDA_OUT_DTYPE, Route.MKL_BF16, Route.ONEDNN_BF16)
    return forward if made_for_any and dtype != torch.float16 else Route.STRICT_FP32
