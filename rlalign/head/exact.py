"""Products and attention whose bits depend on the row alone: not on the batch, the chunk, or the library around them.

For diagnosis. Two engines that compute with these functions agree bit for bit, whatever else they do differently. Every product
is cut into blocks of one fixed shape, padded with zeros, so that a kernel has no reason to choose another order of additions; and
sums over keys go block by block from the first, so that later keys cannot change the order of earlier ones.
Suffixes: N rows, K inputs, M outputs, S keys, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # rows and columns of one product
KEYS = 64  # keys summed at once
ELEMENTS = 2**22  # of an intermediate result


def linear(
    input_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """input @ weight.T + bias in float32, rounded once to `dtype` (the input's by default). Leading dimensions are kept."""
    flat_NK, outputs = input_NK.reshape(-1, input_NK.shape[-1]).float(), weight_MK.shape[0]
    blocks = _padded(weight_MK.float(), BLOCK).view(-1, BLOCK, weight_MK.shape[1]).transpose(1, 2)
    rows = []
    for part_NK in flat_NK.split(BLOCK):
        product = torch.matmul(_padded(part_NK, BLOCK), blocks)  # [blocks, BLOCK, BLOCK]
        rows.append(product.transpose(0, 1).reshape(BLOCK, -1)[: len(part_NK), :outputs])
    result = torch.cat(rows) if rows else flat_NK.new_zeros(0, outputs)
    result = result if bias_M is None else result + bias_M.float()
    return result.to(dtype or input_NK.dtype).view(*input_NK.shape[:-1], outputs)


def attend(query_NHD: Tensor, key_SGD: Tensor, value_SGD: Tensor, *, first: int, scale: float) -> Tensor:
    """Causal attention of rows at positions first, first + 1, ...; keys from position 0. [N, H, D] in the query's dtype.

    Computed in float32 without a matrix product: element by element, summed over features and over blocks of keys.
    """
    heads, groups = query_NHD.shape[1], key_SGD.shape[1]
    key_HSD = _padded(key_SGD.float(), KEYS).transpose(0, 1).repeat_interleave(heads // groups, dim=0)
    value_HDS = _padded(value_SGD.float(), KEYS).permute(1, 2, 0).repeat_interleave(heads // groups, dim=0)
    step = max(1, ELEMENTS // key_HSD.numel())
    at_N = torch.arange(first, first + len(query_NHD), device=query_NHD.device)
    parts = [
        _attend(part.float(), key_HSD, value_HDS.contiguous(), at, scale)
        for part, at in zip(query_NHD.split(step), at_N.split(step), strict=True)
    ]
    return torch.cat(parts).to(query_NHD.dtype)


def _attend(query_NHD: Tensor, key_HSD: Tensor, value_HDS: Tensor, at_N: Tensor, scale: float) -> Tensor:
    scores_NHS = (query_NHD[:, :, None, :] * key_HSD).sum(-1) * scale
    later_NS = torch.arange(key_HSD.shape[1], device=at_N.device) > at_N[:, None]
    scores_NHS = scores_NHS.masked_fill(later_NS[:, None, :], -torch.inf)
    weights_NHS = (scores_NHS - scores_NHS.amax(-1, keepdim=True)).exp()
    total_NH = torch.zeros_like(query_NHD[..., 0])
    result_NHD = torch.zeros_like(query_NHD)
    for start in range(0, key_HSD.shape[1], KEYS):
        block = slice(start, start + KEYS)
        total_NH = total_NH + weights_NHS[..., block].contiguous().sum(-1)
        result_NHD = result_NHD + (weights_NHS[:, :, None, block] * value_HDS[..., block]).sum(-1)
    return result_NHD / total_NH[..., None]


def rotate(states_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rope as transformers writes it: x cos + rotate_half(x) sin, every product and the sum rounded to the dtype of x."""
    half = states_NHD.shape[-1] // 2
    turned_NHD = torch.cat((-states_NHD[..., half:], states_NHD[..., :half]), dim=-1)
    return states_NHD * cos_ND[:, None, :] + turned_NHD * sin_ND[:, None, :]


def rms_norm(hidden_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """As transformers writes it: in float32, rounded to the dtype of the input before the weight is multiplied."""
    wide_ND = hidden_ND.float()
    wide_ND = wide_ND * torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight_D * wide_ND.to(hidden_ND.dtype)


def silu(gate: Tensor) -> Tensor:
    """x / (1 + exp(-x)) in float32. torch's own gives the last few elements of a tensor other bits than the rest."""
    wide = gate.float()
    return (wide / (1 + (-wide).exp())).to(gate.dtype)


def require_reproducible() -> None:
    """Raise RuntimeError where this machine's kernels give a row other bits at another place of a block."""
    generator = torch.Generator().manual_seed(0)
    for inputs in (96, 1408):
        rows = torch.randn(BLOCK, inputs, generator=generator)
        weight = torch.randn(BLOCK + 5, inputs, generator=generator)
        whole = linear(rows, weight)
        turned = linear(rows.roll(7, 0), weight.roll(3, 0)).roll(-7, 0).roll(-3, 1)
        alone = torch.cat([linear(row[None], weight) for row in rows])
        if not (torch.equal(whole, turned) and torch.equal(whole, alone)):
            raise RuntimeError(
                "exact mode: matrix products of this machine depend on where a row lies; no bitwise agreement to be had"
            )


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """Zeros appended along the first dimension."""
    missing = -len(rows) % multiple
    return rows if not missing else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
