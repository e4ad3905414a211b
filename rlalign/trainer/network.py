"""The trained network: loaded for its ZeRO stage, and put behind one forward that scores tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from rlalign.trainer.head_mirror import Tokens


class ScoringNetwork(nn.Module):
    """Body and mirrored head behind one forward: DeepSpeed's ZeRO-3 hooks need to see a pass from its start to its end."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, token_ids_BL: Tensor, attention_mask_BL: Tensor, tokens: Tokens | None, *, exact: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logprobs and entropies [B, L] of `tokens`; with None the hidden states [B, L, D] that the head is given."""
        body = self.network.base_model(input_ids=token_ids_BL, attention_mask=attention_mask_BL, use_cache=False)
        if tokens is None:
            return body.last_hidden_state
        return self.network.get_output_embeddings()(body.last_hidden_state, tokens, exact=exact)


def load(model: Path, dtype: str, deepspeed_config: dict[str, object], *, checkpointing: bool) -> nn.Module:
    """A Hugging Face causal language model; under ZeRO-3 already partitioned over the ranks as it is read.

    checkpointing: recompute each block's activations in the backward pass instead of keeping them.
    """
    zero_3 = deepspeed_config["zero_optimization"]["stage"] == 3
    partitioned = HfDeepSpeedConfig(deepspeed_config) if zero_3 else None  # transformers looks for a living one
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    del partitioned
    network.config.use_cache = False
    if zero_3:
        _restore_buffers(network)
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network


def _restore_buffers(network: nn.Module) -> None:
    """Give rotary embeddings their float32 frequencies back.

    DeepSpeed 0.19.8's zero.Init rounds every tensor made inside it to bf16, those of rotary embeddings too, and the positions
    are then wrong by up to 0.3 %. Raises RuntimeError for a rounded buffer that is none of theirs.
    """
    for module in network.modules():
        own = {name: buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")}
        if any(buffer.dtype != torch.float32 for buffer in own.values()):
            fresh = dict(type(module)(module.config).named_buffers())
            for name, buffer in own.items():
                setattr(module, name, fresh[name].to(buffer.device))
    rounded = [n for n, b in network.named_buffers() if b.is_floating_point() and b.dtype != torch.float32]
    if rounded:
        raise RuntimeError(
            f"ZeRO-3 loaded the buffers {', '.join(rounded)} in 16 bits; their float32 values are not known here. "
            "Train this architecture with trainer.zero_stage=2"
        )


def full_weights(network: nn.Module, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors, a tied weight once; under ZeRO-3 each is gathered in turn, so that every rank must iterate.

    keep: this rank reads them, so that a gathered one is copied to CPU before it is let go.
    """
    for name, parameter in network.named_parameters():
        if not hasattr(parameter, "ds_id"):  # DeepSpeed's own mark of a partitioned parameter
            yield name, parameter
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().to("cpu", copy=True) if keep else parameter.detach()
        yield name, whole
