"""The layer that replaces vLLM's LogitsProcessor: same head, float32 logits, proof of what it did.

Only `_apply_head` is overridden (signature stable from vLLM 0.26 to 0.32): gathering, padding, soft cap, scale and LoRA stay
vLLM's own. `forward` must not be overridden, since the LoRA wrapper calls it unbound with itself as `self`.
"""

from __future__ import annotations

import enum
import weakref
from dataclasses import dataclass

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.platforms import current_platform

from rlalign import head
from rlalign.head_cache import HeadCache
from rlalign.rollout.head_plugin import SETTINGS_KEY
from rlalign.rollout.versions import require_supported


class HeadMode(enum.Enum):
    """How the rollout side reaches float32 logits."""

    OFF = "off"  # vLLM's own head in the model's dtype
    NATIVE = "native"  # vLLM's own float32 head: mm(out_dtype=float32) on CUDA, nothing to go stale
    CACHED = "cached"  # an fp32 copy of the weight, for platforms where the native head casts it on every call


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """What the driver asked of this engine, from vLLM's additional_config."""

    head_dtype: str
    mode: str

    @classmethod
    def read(cls) -> HeadSettings | None:
        """None when this engine was not started by rlalign."""
        given = get_current_vllm_config().additional_config.get(SETTINGS_KEY)
        return None if given is None else cls(head_dtype=given["head_dtype"], mode=given["mode"])

    def resolve(self) -> HeadMode:
        """The mode for this platform. Raises ValueError for names that do not exist."""
        if self.head_dtype == "model":
            return HeadMode.OFF
        if self.head_dtype != "float32":
            raise ValueError(f'head_dtype must be "float32" or "model", got {self.head_dtype!r}')
        if self.mode == "auto":
            return HeadMode.NATIVE if current_platform.is_cuda() or current_platform.is_rocm() else HeadMode.CACHED
        return HeadMode(self.mode)


CACHE = HeadCache()  # one per process: a worker has one target model
LIVE: weakref.WeakSet[AlignedLogitsProcessor] = weakref.WeakSet()


class AlignedLogitsProcessor(LogitsProcessor):
    """vLLM's LogitsProcessor with the projection that the trainer uses."""

    def __init__(
        self,
        vocab_size: int,
        org_vocab_size: int | None = None,
        scale: float = 1.0,
        logits_as_input: bool = False,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(vocab_size, org_vocab_size, scale, logits_as_input, soft_cap)
        settings = HeadSettings.read()  # only here: the current config is out of reach during forward
        if settings is not None:
            require_supported(vllm.__version__)
        self.model_dtype = self.head_dtype
        self.calls = 0
        self.set_mode(HeadMode.OFF if settings is None else settings.resolve())
        LIVE.add(self)

    def set_mode(self, mode: HeadMode) -> None:
        """Switch the head. Runs set it once; `rlalign parity` compares modes on one engine."""
        self.mode = mode
        self.head_dtype = torch.float32 if mode is HeadMode.NATIVE else self.model_dtype

    def _apply_head(
        self, lm_head: VocabParallelEmbedding, hidden_states: torch.Tensor, embedding_bias: torch.Tensor | None
    ) -> torch.Tensor:
        self.calls += 1
        if self.mode is not HeadMode.CACHED:
            return super()._apply_head(lm_head, hidden_states, embedding_bias)
        require_plain_weight(lm_head)
        weight = lm_head.weight
        return head.project(
            hidden_states, CACHE.get(weight), embedding_bias, weight_is_bf16_valued=weight.dtype == torch.bfloat16
        )


def require_plain_weight(lm_head: VocabParallelEmbedding) -> None:
    """Raise ValueError for a head whose weight is packed by a quantisation scheme: its fp32 copy would be noise."""
    if isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        return
    raise ValueError(
        f"the lm_head is quantised by {type(lm_head.quant_method).__name__}: a float32 head needs its plain weight. "
        "Exclude lm_head in the quantisation config (ignore=['lm_head']), or run with head_dtype=model on both sides."
    )
