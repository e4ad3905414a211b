"""vLLM's CPU kernels on plain tensors: what the engine computes with, for the other side of a run to call.

M rows, K inputs, N outputs, T tokens in all, H heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

BLOCK = 128  # slots of a block of keys, vLLM's own choice on CPU


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
