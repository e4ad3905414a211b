"""Which route this host takes for the head, tried before it is trusted, and the proof of it that another process can compare.

N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from rlalign.head import kernel as head_kernel
from rlalign.head import triton as gpu_head
from rlalign.head.products import Route, block_shape, has_mkl_bf16, logits_of, stored_for

logger = logging.getLogger(__name__)

PROBE_ROWS, PROBE_COLUMNS = (1, 5, 17), 97


def cpu_route(hidden_size: int, *, bf16: bool) -> Route:
    """The route of this CPU for logits. bf16: both operands hold bf16 values; else any of float32, bfloat16, float16."""
    return _chosen(hidden_size, bf16, torch.get_num_threads(), head_kernel.forced(), head_kernel.fma() is not None)


@lru_cache(maxsize=64)
def _chosen(hidden_size: int, bf16: bool, threads: int, asked: str, has_kernel: bool) -> Route:
    kernel = has_kernel and is_exact_and_invariant(Route.KERNEL_FMA, hidden_size)
    # Without tiles torch's bf16 products are no faster than the kernel, and one of them wants a float32 copy of the weight.
    library_first = not kernel or ("amx" in head_kernel.host_paths() and asked not in head_kernel.FMA_PATHS)
    if bf16 and library_first and (library := _library_route(hidden_size)) is not None:
        return library
    if kernel:
        return Route.KERNEL_FMA
    if block_shape(hidden_size, threads) is not None and is_exact_and_invariant(Route.BLOCKED_FP32, hidden_size):
        logger.warning(
            "head: without the compiled kernel (%s) float32 logits are made of torch products of one fixed shape: the same bits "
            "for every batch, but 3 to 8 times slower for few rows; run `rlalign build-kernel` on every host",
            head_kernel.why_none(),
        )
        return Route.BLOCKED_FP32
    logger.warning(
        "head: this host's products (hidden size %d, %d threads) are inexact or change with the number of rows; "
        "taking strict float32 products, whose last bits depend on the number of rows",
        hidden_size,
        threads,
    )
    return Route.STRICT_FP32


def _library_route(hidden_size: int) -> Route | None:
    """The first bf16 route of torch's libraries that this host carries out exactly and independently of the batch.

    MKL is taken only where its bits equal oneDNN's, so that a float32 copy of a weight and the weight itself agree.
    """
    if not is_exact_and_invariant(Route.ONEDNN_BF16, hidden_size):
        return None
    if not has_mkl_bf16() or not is_exact_and_invariant(Route.MKL_BF16, hidden_size):
        return Route.ONEDNN_BF16
    hidden_ND, weight_VD = _probe(hidden_size)
    onednn = logits_of(hidden_ND.float(), weight_VD.float(), Route.ONEDNN_BF16)
    same_bits = torch.equal(onednn, logits_of(hidden_ND, weight_VD, Route.MKL_BF16))
    return Route.MKL_BF16 if same_bits else Route.ONEDNN_BF16


def decode_kernel(route: Route, hidden_ND: Tensor, weight_VD: Tensor) -> head_kernel.Kernel | None:
    """The compiled kernel with the bits of this route for these operands; None: the library product is used.

    AMX is tried against the library product first, and used only if every bit agrees; a difference is logged.
    """
    if route is Route.KERNEL_FMA:
        kernel = head_kernel.fma()
    elif route is Route.MKL_BF16:
        kernel = head_kernel.amx()
    else:
        return None
    if kernel is None or not kernel.takes(hidden_ND, weight_VD):
        return None
    return kernel if route is Route.KERNEL_FMA or _has_library_bits(kernel, hidden_ND.shape[1]) else None


def kernel_name(route: Route, hidden_ND: Tensor, weight_VD: Tensor) -> str | None:
    """The path of the compiled kernel that makes logits of such operands in decoding; None for a library product."""
    if hidden_ND.device.type != "cpu":
        return None
    kernel = decode_kernel(route, stored_for(hidden_ND, route), stored_for(weight_VD, route))
    return None if kernel is None else kernel.path


@lru_cache(maxsize=16)
def _has_library_bits(kernel: head_kernel.Kernel, hidden_size: int) -> bool:
    hidden_ND, weight_VD = _probe(hidden_size, 70, 661)  # ends inside a tile
    for n in (1, 16, 17, 70):
        expected = logits_of(hidden_ND[:n], weight_VD, Route.MKL_BF16)
        if not torch.equal(kernel(hidden_ND[:n], weight_VD, torch.empty(n, len(weight_VD))), expected):
            logger.warning(
                "head kernel: its bits differ from the library product's for hidden size %d here; using that one",
                hidden_size,
            )
            return False
    return True


def _probe(hidden_size: int, rows: int = 130, columns: int = 2048) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(rows, hidden_size, generator=generator).bfloat16()
    return hidden_ND, torch.randn(columns, hidden_size, generator=generator).bfloat16()


def is_exact_and_invariant(route: Route, hidden_size: int) -> bool:
    """Self-test: within 2^-20 * sum |h||w| of float64 (bf16 rounding: 2^-9), same bits for any rows and slice."""
    with torch.inference_mode():
        hidden_ND, weight_VD = _probe(hidden_size)
        h, w = stored_for(hidden_ND, route), stored_for(weight_VD, route)
        whole_NV = logits_of(h, w, route)
        exact_NV = hidden_ND[:8].double() @ weight_VD.double().t()
        size_NV = hidden_ND[:8].double().abs() @ weight_VD.double().abs().t()
        if bool(((whole_NV[:8] - exact_NV).abs() > 2.0**-20 * size_NV).any()):
            return False
        rows = all(torch.equal(logits_of(h[:n], w, route), whole_NV[:n]) for n in (1, 2, 5, 16, 64, 129))
        slices = all(torch.equal(logits_of(h[:n], w[96:609], route), whole_NV[:n, 96:609]) for n in (1, 64, 130))
        return rows and slices


def bits(
    product: Callable[[Tensor, Tensor], Tensor],
    hidden_size: int,
    hidden: torch.dtype,
    weight: torch.dtype,
    device: torch.device | None = None,
) -> str | None:
    """A digest of the bits that `product(hidden [N, D], weight [V, D])` gives now for a fixed probe, 1, 5 and 17 rows at a time.

    Two processes of one `law` with the same digest make the same logits of the same operands. hidden, weight: dtypes of the
    operands; the probe itself holds bf16 values. device: by default the CPU. None on a device whose library gives a row other bits
    in another batch: any but a CPU, unless the product is TRITON's.
    """
    if device is not None and device.type != "cpu":
        of_a_kernel = hidden == weight != torch.float32 and gpu_head.multiplies_on(device)
        if not of_a_kernel:
            return None
    hidden_ND, weight_VD = _probe(hidden_size, max(PROBE_ROWS), PROBE_COLUMNS)
    hidden_ND, weight_VD = hidden_ND.to(device, hidden), weight_VD.to(device, weight)
    digest = hashlib.sha256()
    with torch.inference_mode():
        for n in PROBE_ROWS:
            digest.update(product(hidden_ND[:n], weight_VD).contiguous().view(torch.int32).cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def law(route: str) -> str:
    """The routes that share their bits by construction go by one name."""
    return "bf16" if route in (Route.MKL_BF16, Route.ONEDNN_BF16) else route
