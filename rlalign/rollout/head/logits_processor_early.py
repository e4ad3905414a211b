"""The same layer for vLLM before 0.26, where two methods call the lm_head's kernel themselves and there is no `_apply_head`.

Both are given a stand-in for the lm_head whose kernel is our projection; gathering, padding and the argmax over shards stay
vLLM's own. LoRA on such versions bypasses the layer and is refused.
"""

from __future__ import annotations

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from rlalign.rollout.head.head_settings import HeadMode
from rlalign.rollout.head.logits_processor import AlignedLogitsProcessor


class ProjectedHead:
    """What vLLM's methods see of the lm_head: its place in the vocabulary, and our product as its kernel."""

    def __init__(self, layer: EarlyLogitsProcessor, lm_head: VocabParallelEmbedding) -> None:
        self._layer = layer
        self._lm_head = lm_head
        self.quant_method = self
        self.shard_indices = lm_head.shard_indices

    def apply(self, stand_in: ProjectedHead, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The call of vLLM's quant_method.apply(lm_head, hidden_states, bias=...)."""
        return self._layer._apply_head(self._lm_head, x, bias)


class EarlyLogitsProcessor(AlignedLogitsProcessor):
    """AlignedLogitsProcessor on `_get_logits` and `get_top_tokens`."""

    def __init__(
        self,
        vocab_size: int,
        org_vocab_size: int | None = None,
        scale: float = 1.0,
        logits_as_input: bool = False,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(vocab_size, org_vocab_size, scale, logits_as_input, soft_cap)
        if self.mode is not HeadMode.OFF and get_current_vllm_config().lora_config is not None:
            raise ValueError(
                "before vLLM 0.26 LoRA bypasses LogitsProcessor, so a float32 head would miss it; "
                "install vllm>=0.26 or run without LoRA"
            )

    def _get_logits(
        self, hidden_states: torch.Tensor, lm_head: VocabParallelEmbedding, embedding_bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        return super()._get_logits(hidden_states, self._projected(lm_head), embedding_bias)

    def get_top_tokens(
        self,
        lm_head: VocabParallelEmbedding,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Argmax over the shards of the vocabulary, of our logits."""
        return super().get_top_tokens(self._projected(lm_head), hidden_states, embedding_bias)

    def product(self, lm_head: VocabParallelEmbedding, hidden_ND: torch.Tensor) -> torch.Tensor:
        """This rank's logits of hidden states, without a bias."""
        if self.mode in (HeadMode.OFF, HeadMode.EXACT):
            return lm_head.quant_method.apply(lm_head, hidden_ND)
        return self._apply_head(lm_head, hidden_ND, None)

    def _projected(self, lm_head: VocabParallelEmbedding) -> VocabParallelEmbedding | ProjectedHead:
        if self.mode not in (HeadMode.OFF, HeadMode.EXACT):
            return ProjectedHead(self, lm_head)
        self.calls += 1
        return lm_head
