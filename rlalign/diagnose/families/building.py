"""Tiny random models whose logits are as spread as a trained model's, written as ordinary folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.diagnose.families.family_table import CONTEXT, VOCABULARY, Recipe
from rlalign.tiny_policy.tokenizer import byte_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SPREAD = 3.0  # standard deviation of a position's logits: the largest of 288 then lies near 10
PROBES = (3, 48)  # sequences, tokens


def build(recipe: Recipe, folder: Path, *, seed: int = 0) -> Path:
    """A model of the recipe with its tokenizer, in bfloat16. Raises ValueError where transformers does not know the model type."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer(CONTEXT)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = AutoConfig.for_model(recipe.model_type, **recipe.arguments() | special)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _enliven(model, seed)
    _spread(model)
    return saved(model.bfloat16(), folder)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The model and its tokenizer, as an ordinary folder."""
    model.save_pretrained(folder)
    byte_tokenizer(CONTEXT).save_pretrained(folder)
    return folder


def probes(seed: int = 0) -> list[list[int]]:
    """Random token ids of the whole vocabulary, padding included."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, PROBES, generator=generator).tolist()


def perturbed(folder: Path, *, seed: int, dtype: str, size: float = 0.02) -> PreTrainedModel:
    """The folder's model after a made-up optimizer step that moves every weight."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlalign.trainer import attention_choice

    attention = attention_choice.of_folder(folder).name  # transformers' default drops Gemma 2's caps
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * size)
    return model.eval()


def reference(model: PreTrainedModel, sequences: list[list[int]]) -> Tensor:
    """[B, L] logprobs of the tokens by transformers' own forward, log-softmax in float64; entry 0 is 0."""
    import torch

    ids_BL = torch.tensor(sequences)
    with torch.no_grad():
        logits_BLV = model(ids_BL, use_cache=False).logits.double()
    found_BL = logits_BLV.log_softmax(-1)[:, :-1].gather(-1, ids_BL[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros(len(ids_BL), 1, dtype=torch.float64), found_BL], dim=1)


def _enliven(model: PreTrainedModel, seed: int) -> None:
    """Biases, sinks and norms that transformers starts at 0 or 1 get values, so that one that is left out shows."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _spread(model: PreTrainedModel) -> None:
    """Scale the head, where it is not tied, or the last norm, until logits have SPREAD.

    Behind a tied head the norm also gets random signs: a random model would else answer every token with itself, and nothing
    that it samples would vary.
    """
    import torch

    ids_BL = torch.tensor(probes())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    last = [m for m in model.modules() if "norm" in type(m).__name__.lower()][::-1]
    generator = torch.Generator().manual_seed(2)

    def spread() -> float:
        return float(model(ids_BL, use_cache=False).logits.std(-1).mean())

    with torch.no_grad():
        for module in last if tied else [head]:
            kept = module.weight.detach().clone()
            signs = torch.randint(0, 2, kept.shape, generator=generator) * 2 - 1 if tied else 1
            for shift in (0, 1):  # Gemma's norms multiply by 1 + weight
                turned = (kept + shift) * signs
                module.weight.copy_(turned - shift)
                module.weight.copy_(turned * (SPREAD / spread()) - shift)
                if abs(spread() - SPREAD) < 0.1 * SPREAD:
                    return
            module.weight.copy_(kept)
    raise RuntimeError(f"{type(model).__name__}: no norm scales its logits; give the recipe an untied head")
