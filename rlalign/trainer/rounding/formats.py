"""Number formats of quantised rollouts, faked: values rounded as the format stores them, scaled back, in the dtype they came in.

Scales are those of vLLM's kernels (`fp8_utils`, `mxfp8_utils`, `nvfp4_emulation_utils`). A float32 product of faked operands is the
quantised product but for the order of its sum. O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
BLOCK = 128  # of DeepSeek's FP8: weights 128 x 128, activations 1 x 128
MX, NV = 32, 16  # values that share one scale


def e4m3(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Round x / scale to float8_e4m3fn, larger values to its largest, and multiply by `scale` again."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale


def e4m3_towards_zero(x: Tensor) -> Tensor:
    """The float8_e4m3fn next to x on the side of zero."""
    size = x.abs().clamp(max=E4M3_MAX)
    codes = size.to(torch.float8_e4m3fn)
    over = codes.to(x.dtype) > size  # codes of positive numbers are in their order
    return (codes.view(torch.uint8) - over.to(torch.uint8)).view(torch.float8_e4m3fn).to(x.dtype) * x.sign()


def e2m1(x: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4 or 6 and a sign: to nearest, ties to the even code; larger values to 6."""
    size = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return (size / step).round() * step * x.sign()


def of_tensor(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """E4M3, one scale. amax: the largest value the scale is for, where other tensors share it."""
    return e4m3(x, _scale(x.abs().amax() if amax is None else amax))


def of_rows(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """E4M3, a scale for each row: an output channel of a weight, a token of activations."""
    return e4m3(x, _scale(x.abs().amax(-1, keepdim=True)))


def of_groups(x: Tensor, size: int = BLOCK) -> Tensor:
    """E4M3, a scale for so many neighbouring inputs of one row."""
    return _grouped(x, size, lambda grouped: e4m3(grouped, _scale(grouped.abs().amax(-1, keepdim=True))))


def of_blocks(weight_OI: Tensor, amax: Tensor | None = None) -> Tensor:
    """E4M3, a scale for each 128 x 128 of a weight."""
    outputs, inputs = weight_OI.shape
    padded = torch.nn.functional.pad(weight_OI, (0, -inputs % BLOCK, 0, -outputs % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    faked = e4m3(blocks, _scale(blocks.abs().amax((1, 3), keepdim=True)))
    return faked.flatten(2).flatten(0, 1)[:outputs, :inputs]


def mxfp8(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """E4M3, 32 values share a power of two: the smallest that keeps the largest of them in range."""

    def faked(grouped: Tensor) -> Tensor:
        largest = grouped.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return e4m3(grouped, (largest / E4M3_MAX).log2().ceil().clamp(-127, 127).exp2())

    return _grouped(x, MX, faked)


def nvfp4(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """E2M1, 16 values share an E4M3 scale, all of them one float32 scale, for `amax` where other tensors share it."""
    whole = (x.abs().amax() if amax is None else amax) / (E4M3_MAX * E2M1_MAX)
    whole = torch.where(whole > 0, whole, 1.0)

    def faked(grouped: Tensor) -> Tensor:
        scale = e4m3(grouped.abs().amax(-1, keepdim=True) / E2M1_MAX / whole) * whole
        return e2m1(grouped / torch.where(scale > 0, scale, 1.0)) * scale

    return _grouped(x, NV, faked)


def _scale(amax: Tensor) -> Tensor:
    return torch.where(amax > 0, amax / E4M3_MAX, 1.0)


def _grouped(x: Tensor, size: int, faked: Callable[[Tensor], Tensor]) -> Tensor:
    """`faked` on [..., groups, size]; a last group that is not full is filled up with zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return faked(padded.unflatten(-1, (-1, size))).flatten(-2)[..., : x.shape[-1]]


def _widened(function: Callable[..., Tensor], x: Tensor, *rest: Tensor | None) -> Tensor:
    """16-bit values are faked in float32 and rounded once."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return function(wide, *rest).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Format:
    """weights: of [O, I] and the largest value of all layers fused with it. activations: of [..., I]. about: for people."""

    weights: Callable[[Tensor, Tensor | None], Tensor]
    activations: Callable[[Tensor], Tensor]
    about: str


def _format(weights: Callable, activations: Callable, about: str) -> Format:
    return Format(partial(_widened, weights), partial(_widened, activations), about)


FORMATS = {  # of linear layers
    "fp8_tensor": _format(of_tensor, of_tensor, "E4M3, one scale a tensor"),
    "fp8_channel": _format(of_rows, of_rows, "E4M3, a scale an output channel and a token"),
    "fp8_block": _format(of_blocks, of_groups, "E4M3, a scale for 128 x 128 weights and 1 x 128 activations"),
    "mxfp8": _format(mxfp8, mxfp8, "E4M3, a power of two for 32 values"),
    "nvfp4": _format(nvfp4, nvfp4, "E2M1, an E4M3 scale for 16 values"),
}
KV_FORMATS = {  # of keys and values [..., E], as the engine caches them
    "fp8": partial(_widened, e4m3),  # scale 1.0, vLLM's where no checkpoint brings one
    "fp8_towards_zero": partial(
        _widened, e4m3_towards_zero
    ),  # what vLLM's CPU kernels store for "fp8" (docs/upstream.md)
    "fp8_per_token_head": partial(_widened, of_rows),
}
