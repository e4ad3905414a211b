"""The trainer: DeepSpeed and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlalign.config.checks import positive, require
from rlalign.config.lora import LoraConfig

ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(kw_only=True)
class TrainerConfig:
    zero_stage: int = 1  # DeepSpeed ZeRO 1, 2 or 3; 0 with a float32 body only
    micro_batch_size: int = 16  # sequences in one forward, where rows are padded
    pack_tokens: int = 0  # tokens in one forward, in a row without padding; 0: padded rows
    # auto: transformers' choice (sdpa), eager where that would drop a soft cap; or one of ATTENTION by name
    attention: str = "auto"
    grad_clip: float = 1.0  # 2-norm
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_checkpointing: bool = False  # recompute activations in the backward pass instead of keeping them
    threads: int = 0  # torch threads; 0 leaves torch's choice. Two busy cores are faster with 1
    logprob_chunk: int = 0  # tokens projected at once; 0 chooses
    logprob_keep_mib: int = 0  # MiB of logits kept from the forward to the backward pass; 0 forms all of them again
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        positive(self, "trainer", "micro_batch_size", "grad_clip")
        require(self.zero_stage in (0, 1, 2, 3), f"trainer.zero_stage={self.zero_stage}: choose 0, 1, 2 or 3")
        require(
            self.attention in ATTENTION, f"trainer.attention={self.attention!r}: choose one of {', '.join(ATTENTION)}"
        )
        require(
            min(self.threads, self.logprob_chunk, self.logprob_keep_mib, self.pack_tokens) >= 0,
            "trainer.threads, trainer.logprob_chunk, trainer.logprob_keep_mib and trainer.pack_tokens cannot be negative",
        )
