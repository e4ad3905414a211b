"""Which models can train on packed rows, where no sequence sees another, and how each kind of attention is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlalign.trainer import attention_choice as attention
from rlalign.trainer import sdpa
from rlalign.trainer.packing import Row
from rlalign.trainer.rounding import mirrored_attention

KINDS = (sdpa.NAME, mirrored_attention.NAME, "flash_attention_2", "flash_attention_3", "flex_attention")
STATIC_ROPE = {"default", "linear", "yarn", "llama3", "proportional"}  # no dependence on the length of the row
LIMIT = {torch.float32: 1e-3}  # of the distance that seeing another sequence makes; 16 bits take 0.1
PROBE = ((5, 11), (3, 17), (3, 29), (8, 5))  # length and first id of the sequences that confirm a model
Body = Callable[[Mapping[str, object]], Tensor]  # hidden states [B, L, D] from the arguments of the model's body


def require(network: PreTrainedModel) -> None:
    """Raises ValueError with the reason if this model's attention cannot keep the sequences of a packed row apart."""
    if reason := refusal(network):
        raise ValueError(_refused(network, reason))


def refusal(network: PreTrainedModel) -> str:
    """Why sequences cannot share a row, as far as the configuration tells; `confirm` measures the rest."""
    config = network.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [part for part in rope.values() if isinstance(part, dict)] or ([rope] if rope else [])
    types = {str(part.get("rope_type", "default")) for part in ropes}
    if states := layers - {"full_attention", "sliding_attention", "attention"}:
        return f"layers of type {', '.join(sorted(states))} do not keep sequences apart"
    if not types <= STATIC_ROPE:
        return f"rotary positions of type {', '.join(sorted(types - STATIC_ROPE))} depend on the length of the row"
    if not network._supports_attention_backend:
        return "it computes attention in its own way and cannot be told where sequences begin"
    if config._attn_implementation not in KINDS:
        kinds = (
            "flex_attention or a flash attention"
            if attention.caps_scores(config.to_dict())
            else "sdpa or a flash attention"
        )
        return f"attention {config._attn_implementation!r} cannot be told where sequences begin; use {kinds}"
    return ""


def inputs(row: Row, attention: str) -> dict[str, object]:
    """What the body is given for a packed row. attention: the implementation it was loaded with."""
    given: dict[str, object] = {"input_ids": row.token_ids_1T, "position_ids": row.position_ids_1T}
    if attention in (sdpa.NAME, mirrored_attention.NAME):
        # all ones: without any mask transformers would build a dense one from the positions
        return given | {"attention_mask": torch.ones_like(row.token_ids_1T), "runs": row.runs}
    if attention == "flex_attention":
        return given | {"attention_mask": None}
    lengths = [length for count, length in row.runs for _ in range(count)]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=row.token_ids_1T.device)
    longest = max(lengths)
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return given | {"attention_mask": None} | bounds


@torch.no_grad()
def confirm(network: PreTrainedModel, body: Body, device: torch.device) -> None:
    """Measure on four short sequences that packed hidden states are those of each alone. Raises ValueError otherwise.

    The measure is how far states are off when the four are one sequence, so that no outlying activation hides a difference.
    """
    vocabulary = network.config.get_text_config().vocab_size
    alone = [torch.arange(first, first + 7 * n, 7, device=device)[None] % vocabulary for n, first in PROBE]
    row = Row(
        token_ids_1T=torch.cat(alone, dim=1),
        position_ids_1T=torch.cat([torch.arange(n, device=device) for n, _ in PROBE])[None],
        loss_mask_1T=torch.empty(0),
        present_bL=torch.empty(0),
        runs=((1, 5), (2, 3), (1, 8)),
    )
    packed = body(inputs(row, network.config._attn_implementation))[0].double()
    wanted = torch.cat([body({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0] for ids in alone]).double()
    as_one = body({"input_ids": row.token_ids_1T, "attention_mask": torch.ones_like(row.token_ids_1T)})[0].double()
    error = float((packed - wanted).abs().mean() / (as_one - wanted).abs().mean())
    if not error < LIMIT.get(network.dtype, 0.1):
        reason = f"measured: packed states are off by {error:.2g} of what it makes to see the sequences before"
        raise ValueError(_refused(network, reason))


def _refused(network: PreTrainedModel, reason: str) -> str:
    return f"trainer.pack_tokens: {type(network).__name__} cannot train on packed rows: {reason}; set trainer.pack_tokens=0"
