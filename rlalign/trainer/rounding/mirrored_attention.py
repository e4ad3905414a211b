"""The engine's own attention kernel inside a transformers model: its bits forwards, torch's gradient backwards.

B sequences, L padded length, T tokens in all, H heads, G key/value heads, E head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from rlalign.trainer import sdpa

NAME = "rlalign_mirrored"  # of our function in transformers' registries of attention and masks


class EngineKernels(Protocol):
    """The engine's own kernels on plain tensors, without a gradient. A module with these functions is one."""

    def attend(
        self,
        query_THE: Tensor,
        key_TGE: Tensor,
        value_TGE: Tensor,
        lengths: Sequence[int],
        *,
        scale: float,
        window: int | None,
        soft_cap: float,
    ) -> Tensor:
        """Causal attention of sequences that lie one behind the other: [T, H, E]."""

    def multiply(self, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        """A linear product in bf16: [M, N]."""


_KERNELS: weakref.WeakKeyDictionary[nn.Module, EngineKernels | None] = weakref.WeakKeyDictionary()


def install(network: PreTrainedModel, attentions: Sequence[nn.Module], kernels: EngineKernels | None) -> None:
    """Let these modules attend through the engine's kernel; with None as torch's sdpa does, queries and keys rounded first."""
    for module in attentions:
        _KERNELS[module] = kernels
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query_BHLE: Tensor,
    key_BGLE: Tensor,
    value_BGLE: Tensor,
    mask: Tensor | None,
    *,
    runs: tuple[tuple[int, int], ...] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: object,  # transformers hands every kind of attention the options of all of them
) -> tuple[Tensor, None]:
    """[B, L, H, E] in the values' dtype, to which queries and keys that rope left in float32 are rounded here, once.

    runs: (sequences, their length) in a packed row. Raises ValueError for rows that are not padded on the right, dropout, sinks,
    RuntimeError for a model that only shares the config of a mirrored one.
    """
    if dropout or options.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__}: a mirrored body knows no dropout in attention and no sinks")
    query, key = query_BHLE.to(value_BGLE.dtype), key_BGLE.to(value_BGLE.dtype)
    if module not in _KERNELS:
        raise RuntimeError(
            f"{type(module).__name__} was not mirrored: its model shares the config of one that was; copy it first"
        )
    kernels = _KERNELS[module]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kernels is None:
        return sdpa.attention(
            module, query, key, value_BGLE, mask, runs=runs, scaling=scale, softcap=softcap, **options
        )
    _require_right_padding(module, mask)
    if runs is not None and len(query) != 1:
        raise ValueError(f"a packed row lies alone; got {len(query)}")
    lengths = [query.shape[2]] * len(query) if runs is None else [n for count, n in runs for _ in range(count)]
    arguments = {"scale": scale, "window": sliding_window, "soft_cap": softcap or 0.0}
    return _Mirrored.apply(query, key, value_BGLE, module, mask, runs, lengths, kernels, arguments), None


class _Mirrored(torch.autograd.Function):
    """The kernel's result; the gradient of torch's attention at the same inputs, which differs from it by rounding."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        module: nn.Module,
        mask: Tensor | None,
        runs: tuple[tuple[int, int], ...] | None,
        lengths: list[int],
        kernels: EngineKernels,
        arguments: dict[str, object],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rest = module, mask, runs, arguments
        flat = [x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (query, key, value)]
        found_THE = kernels.attend(*flat, lengths, **arguments)
        return found_THE.view(query.shape[0], query.shape[2], *found_THE.shape[1:])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        module, mask, runs, arguments = ctx.rest
        given = [x.detach() for x in ctx.saved_tensors]
        if given[0].device.type == "cpu" and given[0].shape[2] <= sdpa.SHORT:  # where 16-bit gradients are slow
            given = [x.float() for x in given]
        with torch.enable_grad():
            again = _differentiable(module, [x.requires_grad_() for x in given], mask, runs, arguments)
        found = torch.autograd.grad(again, given, grad.to(again.dtype))
        return *(x.to(grad.dtype) for x in found), None, None, None, None, None, None


def _differentiable(
    module: nn.Module,
    given: list[Tensor],
    mask: Tensor | None,
    runs: tuple[tuple[int, int], ...] | None,
    arguments: dict[str, object],
) -> Tensor:
    if arguments["soft_cap"]:
        return _capped(module, *given, mask, arguments)
    found, _ = sdpa.attention(module, *given, mask, runs=runs, scaling=arguments["scale"])
    return found


def _capped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, arguments: dict[str, object]
) -> Tensor:
    """Attention with a soft cap, written out: torch's sdpa has none."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.float() @ key.float().transpose(2, 3) * arguments["scale"]
    scores = arguments["soft_cap"] * torch.tanh(scores / arguments["soft_cap"])
    length = query.shape[2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (torch.softmax(scores, dim=-1) @ value.float()).to(value.dtype).transpose(1, 2)


def _require_right_padding(module: nn.Module, mask: Tensor | None) -> None:
    """A kernel that knows lengths and windows gives the rows behind a sequence's end other values, and no row before it."""
    if mask is None:
        return
    allowed = mask if mask.dtype == torch.bool else mask == 0
    diagonal = allowed.diagonal(dim1=-2, dim2=-1)
    if bool(allowed[:, 0].triu(1).any()) or not bool((diagonal[..., :-1].int() >= diagonal[..., 1:].int()).all()):
        raise ValueError(
            f"{type(module).__name__}: a mirrored body needs causal masks over rows that are padded on the right; pad there, or "
            "train with trainer.body=model"
        )
