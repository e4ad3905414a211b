"""A random Qwen3 of 68 M parameters with realistic logits: large enough for rounding to add up over layers, small enough for a CPU.

python -m benchmarks.random_policy FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

LOGIT_SCALE = 4.5  # of the lm_head: the largest logit of a token is then 18 to 28, as those of trained models are


def build(folder: Path) -> Path:
    """Write it as a Hugging Face folder with a byte tokenizer, the same bits every time. Nothing is written where it is there."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlalign.tiny_policy.tokenizer import byte_tokenizer

    if (folder / "model.safetensors").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(2048)
    config = Qwen3Config(
        vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.lm_head.weight.data.mul_(LOGIT_SCALE)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
