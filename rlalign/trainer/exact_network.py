"""Exact mode of the trainer's model: transformers computing with `rlalign.head.exact`.

Suffixes: B sequences, H heads, G key/value heads, L padded length, D head size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rlalign.head import exact

NAME = "rlalign_exact"  # of our function in transformers' registries of attention and masks


class ExactLinear(nn.Linear):
    """Blocked products."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == torch.float64:
            return super().forward(input)  # the wide reference of attribution
        return exact.linear(input, self.weight, self.bias)


class ExactHead(nn.Linear):
    """Logits in float32 from a body of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == torch.float64:
            return super().forward(input)
        return exact.linear(input, self.weight, self.bias, dtype=torch.float32)


class ExactSilu(SiLUActivation):
    """Without torch's silu."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.dtype == torch.float64 else exact.silu(input)


def make_exact(network: PreTrainedModel) -> PreTrainedModel:
    """Let this model compute exactly from now on: its linear layers, head, activations, attention. Returns it.

    Norms, rope and embeddings already are what `rlalign.head.exact` copies. Raises ValueError for fused experts, for activations
    other than silu, and on another device than the CPU.
    """
    if network.device.type != "cpu":
        raise ValueError(
            f"exact mode is for the CPU so far; the trainer's model is on {network.device}: run with exact=false"
        )
    exact.require_reproducible()
    head = network.get_output_embeddings()
    for name, module in network.named_modules():
        if type(module) is nn.Linear:
            module.__class__ = ExactHead if module is head else ExactLinear
        elif type(module) is SiLUActivation:
            module.__class__ = ExactSilu
        elif type(module).__module__ == SiLUActivation.__module__ and not isinstance(module, SiLUActivation):
            raise ValueError(f"exact mode knows silu only: {name} is {type(module).__name__}")
        elif any(p.ndim == 3 for p in module.parameters(recurse=False)):
            raise ValueError(f"exact mode knows no fused experts: {name} is a {type(module).__name__}")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.set_attn_implementation(NAME)
    return network


def attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    mask: Tensor | None,
    scaling: float,
    **options: object,
) -> tuple[Tensor, None]:
    """Plain causal attention of right-padded sequences. Raises ValueError for any other mask, for soft caps and sinks."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError(f"exact mode knows plain attention only: {type(module).__name__} asks for a soft cap or sinks")
    if mask is not None:
        allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        if bool(allowed.triu(1).any()) or not bool(allowed[:, :, 0].all()) or options.get("sliding_window"):
            raise ValueError("exact mode knows causal masks over right-padded sequences only")
    parts = [
        _attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scaling)
        for q, k, v in zip(query_BHLD, key_BGLD, value_BGLD, strict=True)
    ]
    return torch.stack(parts), None


def _attend(query_LHD: Tensor, key_LGD: Tensor, value_LGD: Tensor, scaling: float) -> Tensor:
    """One sequence. Its products of L x L x H x D numbers are made again for the gradient, not kept."""
    attend = partial(exact.attend, first=0, scale=scaling)
    if not torch.is_grad_enabled():
        return attend(query_LHD, key_LGD, value_LGD)
    return checkpoint(attend, query_LHD, key_LGD, value_LGD, use_reentrant=False, preserve_rng_state=False)
