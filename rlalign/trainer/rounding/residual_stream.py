"""Decoder layers and norms that carry the residual stream in two forms: rounded, and as the float32 sum before it was rounded.

An engine's fused add-and-norm normalises the sum and then rounds both; transformers rounds the sum first. So a layer here returns
(rounded, sum), hands both to its norms, and the next layer's first norm, or the model's last, finds what it needs.
B sequences, L padded length, D hidden.
"""

from __future__ import annotations

from types import MethodType

from torch import Tensor, nn

from rlalign.trainer.rounding import variants

Stream = Tensor | tuple[Tensor, Tensor]  # of embeddings: one tensor; between layers: (rounded, the float32 sum)
PRE_NORM = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PARALLEL = {"self_attn", "mlp", "input_layernorm"}
AFTER = {"self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm"}  # norms of branches alone
SANDWICH = PRE_NORM | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}


def mirror_norm(norm: nn.Module, *, late: bool, weight_wide: bool) -> None:
    """Replace the forward of an RMS norm. late: it normalises the unrounded sum where it is given one."""
    offset, epsilon = has_offset(norm), epsilon_of(norm)

    def forward(self: nn.Module, hidden: Stream, unrounded: Tensor | None = None) -> Tensor:
        if isinstance(hidden, tuple):
            hidden, unrounded = hidden
        wide = hidden.float() if unrounded is None or not late else unrounded
        return variants.norm(wide, self.weight, epsilon, offset=offset, weight_wide=weight_wide)

    norm.forward = MethodType(forward, norm)


def is_rms(norm: nn.Module) -> bool:
    """Whether a norm is one of root mean squares, with a weight."""
    return "RMSNorm" in type(norm).__name__ and hasattr(norm, "weight")


def has_offset(norm: nn.Module) -> bool:
    """Whether a norm multiplies by 1 + weight, in float32."""
    return "Gemma" in type(norm).__name__


def epsilon_of(norm: nn.Module) -> float:
    """Of an RMS norm, by either of transformers' names."""
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def mirror_layer(layer: nn.Module) -> None:
    """Replace the forward of a decoder layer that adds before it normalises. Raises ValueError for one of an unknown shape."""
    children = _children(layer)
    if children in (PARALLEL, AFTER):
        return  # no norm of a sum that its engine could make from the unrounded one
    if children == PRE_NORM:
        layer.forward = MethodType(_pre_norm, layer)
    elif children == SANDWICH:
        layer.forward = MethodType(_sandwich, layer)
    else:
        raise ValueError(f"{type(layer).__name__} consists of {sorted(children)}, not of {sorted(PRE_NORM)}")


def is_parallel(layer: nn.Module) -> bool:
    """Whether attention and MLP of a layer are given the same norm."""
    return _children(layer) == PARALLEL


def mirror_parallel(layer: nn.Module) -> None:
    """Let a parallel layer add its branches before the residual stream."""
    layer.forward = MethodType(_branches_first, layer)


def _children(layer: nn.Module) -> set[str]:
    return {name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)}


def _split(layer: nn.Module, stream: Stream) -> tuple[Tensor, Tensor | None]:
    """Both forms of the residual stream. Raises ValueError under reentrant checkpointing, which loses a gradient."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        how = getattr(layer._gradient_checkpointing_func, "keywords", {})
        if how.get("use_reentrant", True):
            raise ValueError(
                f"{type(layer).__name__}: a mirrored body hands two tensors from layer to layer, and reentrant checkpointing loses "
                'the gradient of one; call gradient_checkpointing_enable({"use_reentrant": False})'
            )
    return stream if isinstance(stream, tuple) else (stream, None)


def _pre_norm(self: nn.Module, hidden_states: Stream, **given: object) -> tuple[Tensor, Tensor]:
    """Llama, Mistral, Qwen2, Qwen3, Phi-3, Granite: norm, attention, add; norm, MLP, add."""
    residual, unrounded = _split(self, hidden_states)
    times = getattr(self, "residual_multiplier", 1.0)
    normed = self.input_layernorm(residual, unrounded)
    attended, _ = self.self_attn(hidden_states=normed, **given)
    residual, unrounded = variants.added(residual, attended if times == 1.0 else attended * times)
    fed = self.mlp(self.post_attention_layernorm(residual, unrounded))
    return variants.added(residual, fed if times == 1.0 else fed * times)


def _sandwich(self: nn.Module, hidden_states: Stream, **given: object) -> tuple[Tensor, Tensor]:
    """Gemma 2 and 3: attention and MLP each between two norms."""
    residual, unrounded = _split(self, hidden_states)
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(residual, unrounded), **given)
    residual, unrounded = variants.added(residual, self.post_attention_layernorm(attended))
    fed = self.mlp(self.pre_feedforward_layernorm(residual, unrounded))
    return variants.added(residual, self.post_feedforward_layernorm(fed))


def _branches_first(self: nn.Module, hidden_states: Tensor, **given: object) -> Tensor:
    """Cohere: attention and MLP of one norm."""
    normed = self.input_layernorm(hidden_states)
    attended, _ = self.self_attn(hidden_states=normed, **given)
    return hidden_states + (attended + self.mlp(normed))
