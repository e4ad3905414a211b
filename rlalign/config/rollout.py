"""The rollout engine: what is sampled, and how vLLM is started."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.checks import positive, require
from rlalign.config.servers import ServersConfig


@dataclass(kw_only=True)
class RolloutConfig(ServersConfig):
    prompts_per_step: int = 16
    group_size: int = 8  # completions of one prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    max_tokens: int = 512  # sampled tokens of one completion
    max_model_len: int = 2048  # prompt + completion, tokens
    max_num_seqs: int = 128  # sequences the engine decodes at once
    max_num_batched_tokens: int = (
        0  # tokens of one engine step; 0: vLLM's choice. Below max_model_len prefills are chunked
    )
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.4  # the trainer shares the device
    cpu_kv_cache_gib: int = 1
    enforce_eager: bool = False
    prefix_caching: bool = True
    head_mode: str = "auto"  # auto | native | cached: how vLLM reaches float32 logits

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            self,
            "rollout",
            "prompts_per_step",
            "group_size",
            "max_tokens",
            "max_model_len",
            "max_num_seqs",
            "tensor_parallel_size",
        )
        require(
            self.temperature > 0,
            f"rollout.temperature={self.temperature}: must be positive; greedy rollouts carry no exploration and no usable ratio",
        )
        require(
            self.top_p == 1.0 and self.top_k == 0 and self.min_p == 0.0,
            f"rollout.top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p}: a truncated sampler renormalises over tokens "
            "that the trainer cannot see, so every ratio would be biased; use top_p=1, top_k=0, min_p=0",
        )
        require(
            self.max_tokens < self.max_model_len,
            f"rollout.max_tokens={self.max_tokens} leaves no room for a prompt in rollout.max_model_len={self.max_model_len}",
        )
        require(
            self.head_mode in ("auto", "native", "cached"),
            f"rollout.head_mode={self.head_mode!r}: choose auto, native or cached",
        )
