"""transformers' attention functions: SDPA with packed rows and a fast gradient on CPU; queries, keys and values seen from outside.

B sequences, L length of each, T tokens of a packed row, H heads, G key/value heads, E head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlalign.head import widened

NAME = "rlalign_sdpa"  # of our function in transformers' registries of attention and masks
SHORT = (
    128  # tokens. Up to here torch 2.13's 16-bit gradient on CPU is slower than one in float32: at 14 tokens 10 times
)
# Given an attention module and its [query, key, value], each [B, H, L, E], returns what it shall attend with.
Change = Callable[[nn.Module, list[Tensor]], list[Tensor]]


def install(network: PreTrainedModel) -> None:
    """Let a model that attends through transformers' SDPA do it through `sdpa`; leave any other alone."""
    if network._supports_attention_backend and network.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, sdpa)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        network.set_attn_implementation(NAME)


def sdpa(
    module: nn.Module,
    query_BHLE: Tensor,
    key_BGLE: Tensor,
    value_BGLE: Tensor,
    mask: Tensor | None,
    *,
    runs: tuple[tuple[int, int], ...] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: object,  # transformers hands every kind of attention the options of all of them
) -> tuple[Tensor, None]:
    """[B, L, H, E]. runs: (sequences, their length) in a packed row [1, ., T, E]; no sequence sees another.

    mask: None for plain causal attention. In a packed row what a sliding window leaves, cut out for each sequence.
    Raises ValueError for what transformers' sdpa would leave out of the sum without a word.
    """
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__} asks for a soft cap or sinks, which sdpa would leave out; use trainer.attention=eager"
        )
    given = {"dropout": dropout, "scaling": scaling, **options}
    if runs is None:
        return _attend(module, query_BHLE, key_BGLE, value_BGLE, mask, given), None
    found, start = [], 0
    sizes = [count * length for count, length in runs]
    split = (x.split(sizes, dim=2) for x in (query_BHLE, key_BGLE, value_BGLE))
    for (count, length), *parts in zip(runs, *split, strict=True):
        of_run = (x[0].unflatten(1, (count, length)).transpose(0, 1) for x in parts)
        own = None if mask is None else mask[..., start : start + length, start : start + length]
        found.append(_attend(module, *of_run, own, given).flatten(0, 1))
        start += count * length
    return torch.cat(found)[None], None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, object]
) -> Tensor:
    slow = query.device.type == "cpu" and query.dtype in widened.SIXTEEN_BITS and not widened.is_widened(query.dtype)
    if slow and query.shape[2] <= SHORT and torch.is_grad_enabled() and not options["dropout"]:
        return _Float32Gradient.apply(query, key, value, module, mask, options)
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


class _Float32Gradient(torch.autograd.Function):
    """The forward pass as it is, bit for bit; its gradient through float32 copies of what went in."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        module: nn.Module,
        mask: Tensor | None,
        options: dict[str, object],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rest = module, mask, options
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        module, mask, options = ctx.rest
        given = [x.detach().float().requires_grad_() for x in ctx.saved_tensors]
        wide = mask if mask is None or mask.dtype == torch.bool else mask.float()
        with torch.enable_grad():
            again, _ = sdpa_attention_forward(module, *given, wide, **options)
        found = torch.autograd.grad(again, given, grad.float())
        return *(x.to(grad.dtype) for x in found), None, None, None


@contextmanager
def heads_changed(network: PreTrainedModel, change: Change) -> Iterator[None]:
    """Call `change` before every attention of every forward inside.

    Raises ValueError where the model's attention cannot be seen: it then must be run with the sdpa or eager implementation.
    """
    name = network.config._attn_implementation
    if name not in ("sdpa", "eager") and name not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"the trainer's attention implementation {name!r} cannot be seen; load the model with sdpa or eager"
        )
    known = ALL_ATTENTION_FUNCTIONS.get(name)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: object
    ) -> tuple:
        own = known or sys.modules[type(module).__module__].eager_attention_forward
        return own(module, *change(module, [query, key, value]), mask, **options)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        if known is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = known
