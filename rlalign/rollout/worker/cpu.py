"""vLLM on the CPU: its kernels on plain tensors, for the other side of a run to call; steady engines, whose bf16 layers add in one
order, whatever the number of rows in a step.

vLLM (0.32) multiplies small weights by a packed kernel with AMX tiles and large ones by oneDNN. The first has another order for up
to 4 rows, the second for 64 to about 1,000; so the same token has other bits prefilled than decoded, and in a batch of another
size. In an engine that is built steady every layer takes the packed kernel, up to 4 rows padded to 5: one chain per output, the
order of `rlalign.head.steady`. Where products are widened (no instructions for bf16) they keep to one order already.
M rows, K inputs, N outputs, T tokens in all, H heads, G key/value heads, E head size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from rlalign.head import steady, widened
from rlalign.rollout.exact import asked_by

BLOCK = 128  # slots of a block of keys, vLLM's own choice on CPU
STEADY = "RLALIGN_STEADY"
MARK = "rlalign_steady"  # of a layer, so that a reload packs it again in the same way
FEWEST = 5  # rows from which the packed kernel uses tiles


def attend(
    query_THE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    """[T, H, E]: causal attention of sequences that lie one behind the other, by vLLM's kernel of this host.

    lengths: of the sequences, T in all. window: tokens that a token sees, itself included. Raises ValueError where the lengths do
    not add up.
    """
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends import cpu_attn

    if sum(lengths) != len(query_THE):
        raise ValueError(f"attention over {len(query_THE)} tokens was given sequences of {sum(lengths)} in all")
    heads, groups, size = query_THE.shape[1], key_TGE.shape[1], query_THE.shape[2]
    isa = cpu_attn._get_attn_isa(query_THE.dtype, BLOCK, size)
    blocks = [-(-length // BLOCK) for length in lengths]
    first = [0, *accumulate(blocks)]
    keys = query_THE.new_zeros(first[-1], groups, 2 * BLOCK, size)
    key_cache, value_cache = keys.chunk(2, dim=2)
    slots = torch.cat([torch.arange(n) + at * BLOCK for n, at in zip(lengths, first, strict=False)])
    ops.cpu_attn_reshape_and_cache(key_TGE.contiguous(), value_TGE.contiguous(), key_cache, value_cache, slots, isa)
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for i, (count, at) in enumerate(zip(blocks, first, strict=False)):
        table[i, :count] = torch.arange(at, at + count)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    ends = torch.tensor(lengths, dtype=torch.int32)
    sees = -1 if window is None else window
    plan = ops.cpu_attn_get_scheduler_metadata(
        len(lengths), heads, groups, size, ends, query_THE.dtype, starts, True, sees, isa, True
    )
    out_THE = torch.empty_like(query_THE, memory_format=torch.contiguous_format)
    ops.cpu_attention_with_kv_cache(
        query_THE.contiguous(),
        key_cache,
        value_cache,
        out_THE,
        starts,
        ends,
        scale,
        True,
        None,
        sees,
        table,
        soft_cap,
        plan,
        None,
    )
    return out_THE


def multiply(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """[M, N] bf16: x @ weight.T + bias by vLLM's packed product, the one of a steady engine.

    The weight is packed at every call: a copy kept would not see an optimizer's step. Needs AMX, K a multiple of 32, N of 16, and
    5 rows or more, below which the kernel adds in another order (`rlalign.head.steady` proves it before it is used).
    """
    from vllm import _custom_ops as ops

    packed = torch.ops._C.convert_weight_packed(weight_NK.detach())
    return ops.weight_packed_linear_cpu(x_MK, packed, len(weight_NK), None if bias_N is None else bias_N.float())


def steady_wanted() -> bool:
    """True while engines are to be built steady."""
    return os.environ.get(STEADY) == "1"


@contextmanager
def building_steady(wanted: bool) -> Iterator[None]:
    """Engines built inside are steady, or vLLM's own, whatever the environment says; afterwards it says what it said.

    Raises RuntimeError on another platform than the CPU, and where this host has no products in one order.
    """
    with asked_by(STEADY, wanted):
        if wanted:
            install_steady()
        yield


def install_steady() -> None:
    """Let vLLM ask us how it packs a layer, in this process. Idempotent. Raises RuntimeError off the CPU."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise RuntimeError("trainer.body=mirrored is for rollouts on the CPU so far; use trainer.body=model")
    own_dispatch, own_check = utils.dispatch_cpu_unquantized_gemm, utils.check_cpu_sgl_kernel
    if own_dispatch.__module__ == __name__:
        return
    packed = [False]  # inside a steady layer's dispatch: every size goes to the packed kernel

    def check(n: int, k: int, dtype: torch.dtype) -> bool:
        return _fits(n, k, dtype) if packed[0] else own_check(n, k, dtype)

    def dispatch(layer: nn.Module, remove_weight: bool) -> None:
        if not isinstance(layer, LinearBase) or not getattr(layer, MARK, steady_wanted()):
            return own_dispatch(layer, remove_weight)
        widened.decide(layer.weight.dtype)
        fits = not layer.weight.is_meta and layer.weight.ndim == 2 and _fits(*layer.weight.shape, layer.weight.dtype)
        packed[0] = fits
        try:
            own_dispatch(layer, remove_weight and (fits or widened.is_widened(layer.weight.dtype)))
        finally:
            packed[0] = False
        _keep_order(layer, fits)
        setattr(layer, MARK, True)

    utils.dispatch_cpu_unquantized_gemm, utils.check_cpu_sgl_kernel = dispatch, check


def unsteady(model: nn.Module) -> list[str]:
    """Names of linear layers whose order of additions may depend on the number of rows; empty in a steady engine."""
    from vllm.model_executor.layers.linear import LinearBase

    return [n for n, m in model.named_modules() if isinstance(m, LinearBase) and not getattr(m, MARK, False)]


def _fits(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Shapes that the packed kernel multiplies with tiles."""
    tiles = torch.cpu._is_amx_tile_supported() and not widened.is_widened(dtype)
    return tiles and dtype == torch.bfloat16 and inputs % 32 == 0 and outputs % 16 == 0


def _keep_order(layer: nn.Module, packed: bool) -> None:
    """Wrap what vLLM has just put in place."""
    own = layer.cpu_linear
    if packed:

        def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            if len(rows) >= FEWEST:
                return own(x, weight, bias)
            padded = torch.nn.functional.pad(rows, (0, 0, 0, FEWEST - len(rows)))
            return own(padded, weight, bias)[: len(rows)].view(*x.shape[:-1], -1)

        layer.cpu_linear = cpu_linear
        return
    if why := steady.missing(torch.bfloat16):
        raise RuntimeError(f"trainer.body=mirrored: {why}; use trainer.body=model")
    if not widened.is_widened(torch.bfloat16):
        layer.cpu_linear = lambda x, weight, bias: steady.linear(x, layer.weight, bias)


def install_widened() -> None:
    """Let vLLM multiply 16-bit weights through `rlalign.head.widened` where that is faster. Idempotent; nothing off the CPU.

    vLLM (0.32) packs a layer's weight for oneDNN. Where oneDNN has no 16-bit product (AVX2) it falls back to torch's, slow there;
    where oneDNN only imitates one (AVX-512 without bf16), its own is slow. In both cases vLLM is led into its fallback, whose
    products are then widened. Nothing is packed on that way, so no stale copy is left behind, and read-back passes through it too.
    """
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    pack = getattr(_custom_ops, "create_onednn_mm", None)
    if not current_platform.is_cpu() or pack is None or pack.__module__ == __name__:
        return

    def pack_unless_widened(weight: Tensor, *args: object, **kwargs: object) -> object:
        choice = widened.decide(weight.dtype)
        if choice is not None and choice.products == widened.WIDENED:
            raise RuntimeError(choice.describe())  # vLLM's own sign that oneDNN cannot: it takes torch's products
        return pack(weight, *args, **kwargs)

    _custom_ops.create_onednn_mm = pack_unless_widened
