"""Attention modules whose queries and keys are turned in float32 and rounded once: vLLM's rope in transformers' models."""

from __future__ import annotations

from types import MethodType

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlalign.trainer.rounding import variants

KNOWN = (
    "LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Qwen3MoeAttention", "GraniteAttention",
    "Gemma2Attention", "Gemma3Attention",
)  # fmt: skip
WITHOUT_WINDOW = ("LlamaAttention", "GraniteAttention")  # whatever their config says


def mirror_rotation(attention: nn.Module, *, toward_zero: bool = False) -> bool:
    """Replace the forward of an attention module of a KNOWN class; False for any other, which is left as it is."""
    if type(attention).__name__ not in KNOWN:
        return False
    attention.forward = MethodType(_toward_zero if toward_zero else _forward, attention)
    return True


def window_of(attention: nn.Module) -> int | None:
    """Tokens that a token of this module sees, itself included; None for all before it."""
    if type(attention).__name__ in WITHOUT_WINDOW:
        return None
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


def _forward(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: object = None,
    *,
    toward_zero: bool = False,
    **given: object,
) -> tuple[Tensor, Tensor | None]:
    """Projections, norms of queries and keys where there are any, rope, attention, projection."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (p(hidden_states).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    query, key = (
        variants.rotated(x.transpose(1, 2), *position_embeddings, toward_zero=toward_zero) for x in (query, key)
    )
    value = value.transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    given["sliding_window"] = window_of(self)
    if hasattr(self, "attn_logit_softcapping"):
        given["softcap"] = self.attn_logit_softcapping
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    dropout = self.attention_dropout if self.training else 0.0
    found, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **given)
    return self.o_proj(found.reshape(*hidden_states.shape[:-1], -1)), weights


def _toward_zero(self: nn.Module, *args: object, **given: object) -> tuple[Tensor, Tensor | None]:
    return _forward(self, *args, toward_zero=True, **given)
