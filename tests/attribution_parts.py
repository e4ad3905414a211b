"""A small transformers model, a batch for it, and its own modules as both sides of a mapping: attribution without an engine."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlalign.diagnose.attribution.mapping import BUILT_IN, ModelMap, match
from rlalign.diagnose.attribution.trainer_side import module_names
from rlalign.types import LogprobSpec, Rollout, RolloutBatch, collate

LAYERS = 3


def model(seed: int = 0, **changes: object) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    return Qwen3ForCausalLM(config).eval()


def batch(sequences: int = 6, *, seed: int = 0) -> RolloutBatch:
    """Prompts of different lengths, eight sampled tokens each."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for i in range(sequences):
        prompt = 4 + 3 * i
        tokens = torch.randint(0, 97, (prompt + 8,), generator=generator).tolist()
        rollouts.append(
            Rollout(
                token_ids=tokens, loss_mask=[False] * prompt + [True] * 8, rollout_logprobs=[0.0] * (prompt + 8), prompt_id=i,
                group_id=i, finish_reason="length", version_spans=[(prompt, prompt + 8, 0)],
            )
        )  # fmt: skip
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec())


def rollout_names() -> dict[str, str]:
    """The module tree of vLLM's Qwen3 with so many layers."""
    names = {
        "": "Qwen3ForCausalLM",
        "model": "Qwen3Model",
        "model.embed_tokens": "VocabParallelEmbedding",
        "lm_head": "ParallelLMHead",
    }
    children = {
        "input_layernorm": [], "post_attention_layernorm": [], "mlp": ["gate_up_proj", "act_fn", "down_proj"],
        "self_attn": ["qkv_proj", "o_proj", "rotary_emb", "attn", "q_norm", "k_norm"],
    }  # fmt: skip
    for i in range(LAYERS):
        for child, parts in children.items():
            names |= {f"model.layers.{i}.{child}": child}
            names |= {f"model.layers.{i}.{child}.{part}": part for part in parts}
    return names | {"model.layers": "ModuleList", "model.norm": "RMSNorm"}


def mapping(network: nn.Module) -> ModelMap:
    return match(rollout_names(), module_names(network), BUILT_IN)
