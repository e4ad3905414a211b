"""Low-rank adapters: which weights get one, and how large; arXiv 2106.09685."""

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
