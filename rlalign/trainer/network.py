"""The trained network: loaded for its ZeRO stage, and put behind one forward that scores tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from rlalign.head import widened
from rlalign.trainer import attention_choice, packing
from rlalign.trainer.attention import install as install_sdpa
from rlalign.trainer.deepspeed_setup import round_biased_layers_once
from rlalign.trainer.exact_network import make_exact
from rlalign.trainer.head_mirror import Tokens
from rlalign.trainer.rounding.mirroring import BodyPlan, mirror_body
from rlalign.types import RolloutBatch


class ScoringNetwork(nn.Module):
    """Body and mirrored head behind one forward: DeepSpeed's ZeRO-3 hooks need to see a pass from its start to its end."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, inputs: Mapping[str, object], tokens: Tokens | None, *, exact: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logprobs and entropies [B, L] of `tokens`; with None the hidden states [B, L, D] that the head is given.

        inputs: of the body, from `padded_inputs` or `packing.inputs`.
        """
        body = self.network.base_model(**inputs, use_cache=False)
        if tokens is None:
            return body.last_hidden_state
        return self.network.get_output_embeddings()(body.last_hidden_state, tokens, exact=exact)


def padded_inputs(batch: RolloutBatch, device: torch.device) -> dict[str, object]:
    """The body's arguments for padded rows."""
    return {"input_ids": batch.token_ids_BL.to(device), "attention_mask": batch.attention_mask_BL.to(device)}


def load(
    model: Path,
    dtype: str,
    deepspeed_config: dict[str, object],
    *,
    checkpointing: bool,
    exact: bool = False,
    attention: str = "auto",
    packed: bool = False,
    head: bool = True,
    mirrored: BodyPlan | None = None,
) -> nn.Module:
    """A Hugging Face causal language model; under ZeRO-3 already partitioned over the ranks as it is read.

    head: with its lm_head; without, the body alone. exact: see `make_exact`. attention: a name of transformers, or auto, which
    passes over those that would leave out what this model asks for (`rlalign.trainer.attention_choice`).
    checkpointing: recompute each block's activations in the backward pass instead of keeping them.
    mirrored: where the body rounds (`mirror_body`); raises ValueError for a model that can be mirrored in parts only.
    packed: prepare it for packed rows; raises ValueError where that cannot be.
    """
    zero_3 = deepspeed_config["zero_optimization"]["stage"] == 3
    partitioned = HfDeepSpeedConfig(deepspeed_config) if zero_3 else None  # transformers looks for a living one
    kind = AutoModelForCausalLM if head else AutoModel
    chosen = attention_choice.of_folder(model, attention, setting="trainer.attention").name
    network = kind.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation=chosen)
    del partitioned
    if not (exact or torch.cuda.is_available()):
        widened.decide_together(network.dtype)
    network.config.use_cache = False
    if zero_3:
        _restore_buffers(network)
        round_biased_layers_once()
    if exact:
        make_exact(network)
    elif mirrored is not None:
        _mirror(network, mirrored)
    else:
        install_sdpa(network)
    if packed:
        packing.require(network)
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network


def _mirror(network: nn.Module, plan: BodyPlan) -> None:
    """All or nothing: one op that rounds elsewhere leaves the whole body as far from the engine as before."""
    done = mirror_body(network, plan.choices, kernels=plan.kernels, probed=plan.probed)
    if done.left:
        why = "; ".join(f"{op}: {reason}" for op, reason in done.left.items())
        kind = type(network).__name__
        raise ValueError(
            f"trainer.body=mirrored: {kind} would be mirrored in parts only ({why}); use trainer.body=model"
        )


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
