"""vLLM's layers and attention in exact mode: each turns into vLLM's own at once unless its engine is built exact.

Suffixes: N tokens, H heads, G key/value heads, D head size, S keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from rlalign.head import exact
from rlalign.rollout.exact.switch import enabled

LINEARS = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear)


class ExactLinearMethod(UnquantizedLinearMethod):
    """The weight stays as it was loaded, and products are blocked."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is packed."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return exact.linear(x, layer.weight, bias)


class ExactHeadMethod(UnquantizedEmbeddingMethod):
    """Logits in float32 from a body of any dtype."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is packed."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return exact.linear(x, layer.weight, bias, dtype=torch.float32)


class ExactRMSNorm(RMSNorm):
    """The residual is added and rounded first; then transformers' formula."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if not enabled():
            self.__class__ = RMSNorm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return exact.rms_norm(x, self.weight, self.variance_epsilon)
        total = residual + x
        return exact.rms_norm(total, self.weight, self.variance_epsilon), total


class ExactRotaryEmbedding(RotaryEmbedding):
    """Rope in transformers' order of roundings."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if not enabled():
            self.__class__ = RotaryEmbedding
        elif not (self.is_neox_style and self.rotary_dim == self.head_size):
            raise RuntimeError("exact mode knows rope over whole heads in NeoX order only")

    def forward(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        cos, sin = self._match_cos_sin_cache_dtype(query).index_select(0, positions.flatten()).chunk(2, dim=-1)
        cos_ND, sin_ND = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        turned = [
            None if x is None else exact.rotate(x.view(len(x), -1, self.head_size), cos_ND, sin_ND).reshape(x.shape)
            for x in (query, key)
        ]
        return turned[0], turned[1]


class ExactSiluAndMul(SiluAndMul):
    """silu(gate) * up without torch's silu."""

    def __init__(self, *, compile_native: bool = True) -> None:
        super().__init__(compile_native=compile_native)
        if not enabled():
            self.__class__ = SiluAndMul

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return exact.silu(gate) * up


def _with_method(parent: type[PluggableLayer], method: type, plain: type) -> type[PluggableLayer]:
    """A subclass whose unquantized products are exact in engines built so."""

    def init(self: PluggableLayer, *args: object, **kwargs: object) -> None:
        parent.__init__(self, *args, **kwargs)
        if not enabled():
            self.__class__ = parent
        elif type(self.quant_method) is not plain:
            raise RuntimeError(
                f"exact mode computes plain weights only; {parent.__name__} has {type(self.quant_method).__name__}"
            )
        else:
            self.quant_method = method()

    return type(f"Exact{parent.__name__}", (parent,), {"__init__": init, "__doc__": method.__doc__})


CLASSES: dict[type, type] = {
    RMSNorm: ExactRMSNorm,
    RotaryEmbedding: ExactRotaryEmbedding,
    SiluAndMul: ExactSiluAndMul,
    ParallelLMHead: _with_method(ParallelLMHead, ExactHeadMethod, UnquantizedEmbeddingMethod),
    **{parent: _with_method(parent, ExactLinearMethod, UnquantizedLinearMethod) for parent in LINEARS},
}


def register_layers() -> None:
    """Put every class into its slot. Idempotent. Raises RuntimeError for a slot that somebody else holds."""
    for parent, ours in CLASSES.items():
        holder = op_registry_oot.get(parent.__name__)
        if holder is None:
            parent.register_oot(ours)
        elif holder is not ours:
            raise RuntimeError(
                f"exact mode: vLLM's slot for {parent.__name__} is held by {holder.__module__}.{holder.__qualname__}"
            )


@contextmanager
def rope_cache_of_its_own() -> Iterator[None]:
    """vLLM gives every engine of a process the same rope modules; inside, new ones are made, and forgotten afterwards."""
    cached = dict(rotary_embedding._ROPE_DICT)
    rotary_embedding._ROPE_DICT.clear()
    try:
        yield
    finally:
        rotary_embedding._ROPE_DICT.clear()
        rotary_embedding._ROPE_DICT.update(cached)


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


def register_attention() -> None:
    """Override the CPU backend. Raises RuntimeError on another platform."""
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector

    if not current_platform.is_cpu():
        raise RuntimeError(
            f"exact mode is for the CPU so far; this is {current_platform.device_name or torch.device('cuda')}"
        )
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.ExactAttentionBackend")
    selector._cached_get_attn_backend.cache_clear()  # an earlier engine of this process has filled it with vLLM's own
