"""The trainer: DeepSpeed and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlalign.config.checks import positive, require


@dataclass(kw_only=True)
class LoraConfig:
    rank: int = 0  # of each adapter; 0: the whole model is trained
    alpha: float = 32.0  # an adapter's product is scaled by alpha / rank
    dropout: float = 0.0  # of an adapter's input, in forward_backward alone: scoring has none, so ratios start off 1
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # endings of module names; all but the lm_head

    def __post_init__(self) -> None:
        positive(self, "trainer.lora", "alpha")
        require(self.rank >= 0, f"trainer.lora.rank={self.rank}: cannot be negative (0 trains the whole model)")
        require(0.0 <= self.dropout < 1.0, f"trainer.lora.dropout={self.dropout}: must be at least 0 and below 1")
        require(
            bool(self.targets) and ("all-linear" not in self.targets or len(self.targets) == 1),
            f"trainer.lora.targets={self.targets}: give endings of module names such as q_proj, or all-linear alone",
        )


BODIES = ("model", "mirrored", "exact")
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(kw_only=True)
class TrainerConfig:
    zero_stage: int = 1  # DeepSpeed ZeRO 1, 2 or 3; 0 with a float32 body only
    micro_batch_size: int = 16  # sequences in one forward, where rows are padded
    pack_tokens: int = 0  # tokens in one forward, in a row without padding; 0: padded rows
    # auto: transformers' choice (sdpa), eager where that would drop a soft cap; or one of ATTENTION by name
    attention: str = "auto"
    # model: as transformers rounds; mirrored: where the rollout engine rounds (CPU, bf16); exact: the same as exact=true
    body: str = "model"
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
        require(self.body in BODIES, f"trainer.body={self.body!r}: choose one of {', '.join(BODIES)}")
        require(
            self.attention in ATTENTION, f"trainer.attention={self.attention!r}: choose one of {', '.join(ATTENTION)}"
        )
        require(
            min(self.threads, self.logprob_chunk, self.logprob_keep_mib, self.pack_tokens) >= 0,
            "trainer.threads, trainer.logprob_chunk, trainer.logprob_keep_mib and trainer.pack_tokens cannot be negative",
        )
