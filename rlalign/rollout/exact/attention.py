"""Attention backend of exact mode: vLLM's CPU backend with its own key/value layout and `rlalign.head.exact.attend`.

Suffixes: N tokens, H heads, G key/value heads, D head size, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from rlalign.head import exact
from rlalign.rollout.exact import enabled


class ExactAttentionBackend(CPUAttentionBackend):
    """CPU_ATTN with another implementation."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return ExactAttentionImpl if enabled() else CPUAttentionBackendImpl


class ExactAttentionImpl(CPUAttentionBackendImpl):
    """Keys and values lie in vLLM's blocks as [G, slot, 2 D], unpacked. Decoder attention without windows, caps, sinks or alibi."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        plain = (
            self.sliding_window == -1 and not self.logits_soft_cap and self.alibi_slopes is None and self.sinks is None
        )
        if not plain or self.is_fp8_kv_cache or self.attn_type != AttentionType.DECODER:
            raise RuntimeError(
                "exact mode knows plain causal attention only: no window, soft cap, alibi, sinks, or fp8 cache"
            )

    def do_kv_cache_update(
        self, layer: nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write this step's keys and values to their slots."""
        size, count = kv_cache.shape[2], len(slot_mapping)
        held = slot_mapping >= 0
        slots = slot_mapping[held]
        kv_cache[slots // size, :, slots % size, : self.head_size] = key[:count][held]
        kv_cache[slots // size, :, slots % size, self.head_size :] = value[:count][held]

    def forward(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Every request by itself: its queries against all its keys so far."""
        if attn_metadata is None:
            return output
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for i, length in enumerate(lengths):
            rows = slice(starts[i], starts[i + 1])
            blocks = attn_metadata.block_table[i, : -(-length // kv_cache.shape[2])]
            held_SG = kv_cache[blocks].transpose(1, 2).flatten(0, 1)[:length]
            key_SGD, value_SGD = held_SG.split(self.head_size, dim=-1)
            count = rows.stop - rows.start
            output[rows] = exact.attend(
                query[rows], key_SGD, value_SGD, first=length - count, scale=self.scale
            ).view_as(output[rows])
        return output


def register() -> None:
    """Override the CPU backend. Raises RuntimeError on another platform."""
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector

    if not current_platform.is_cpu():
        raise RuntimeError(
            f"exact mode is for the CPU so far; this is {current_platform.device_name or torch.device('cuda')}"
        )
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.ExactAttentionBackend")
    selector._cached_get_attn_backend.cache_clear()  # an earlier engine of this process has filled it with vLLM's own
