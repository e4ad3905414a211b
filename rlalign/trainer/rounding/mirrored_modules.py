"""transformers' modules computing as the engine's do: layers and norms, rope in attention, the engine's attention kernel.

B sequences, L padded length, T tokens in all, H heads, G key/value heads, E head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import MethodType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlalign.trainer.attention import SHORT, sdpa
from rlalign.trainer.rounding import variants

Stream = Tensor | tuple[Tensor, Tensor]  # of embeddings: one tensor; between layers: (rounded, the float32 sum)
PRE_NORM = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PARALLEL = {"self_attn", "mlp", "input_layernorm"}
AFTER = {"self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm"}  # norms of branches alone
SANDWICH = PRE_NORM | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
KNOWN_ATTENTION = (
    "LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Qwen3MoeAttention", "GraniteAttention",
    "Gemma2Attention", "Gemma3Attention",
)  # fmt: skip
WITHOUT_WINDOW = ("LlamaAttention", "GraniteAttention")  # whatever their config says
NAME = "rlalign_mirrored"  # of our function in transformers' registries of attention and masks


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


def mirror_rotation(attention: nn.Module, *, toward_zero: bool = False) -> bool:
    """Replace the forward of an attention module of a KNOWN_ATTENTION class; False for any other, which is left as it is."""
    if type(attention).__name__ not in KNOWN_ATTENTION:
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


class EngineKernels(Protocol):
    """The engine's own kernels on plain tensors, without a gradient. A module with these functions is one."""

    def attend(
        self,
        query_THE: Tensor,
        key_TGE: Tensor,
        value_TGE: Tensor,
        lengths: Sequence[int],
        *,
        scale: float,
        window: int | None,
        soft_cap: float,
    ) -> Tensor:
        """Causal attention of sequences that lie one behind the other: [T, H, E]."""

    def multiply(self, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        """A linear product in bf16: [M, N]."""


_KERNELS: weakref.WeakKeyDictionary[nn.Module, EngineKernels | None] = weakref.WeakKeyDictionary()


def install_attention(network: PreTrainedModel, attentions: Sequence[nn.Module], kernels: EngineKernels | None) -> None:
    """Let these modules attend through the engine's kernel; with None as torch's sdpa does, queries and keys rounded first."""
    for module in attentions:
        _KERNELS[module] = kernels
    AttentionInterface.register(NAME, engine_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.set_attn_implementation(NAME)


def engine_attention(
    module: nn.Module,
    query_BHLE: Tensor,
    key_BGLE: Tensor,
    value_BGLE: Tensor,
    mask: Tensor | None,
    *,
    runs: tuple[tuple[int, int], ...] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: object,  # transformers hands every kind of attention the options of all of them
) -> tuple[Tensor, None]:
    """[B, L, H, E] in the values' dtype, to which queries and keys that rope left in float32 are rounded here, once.

    runs: (sequences, their length) in a packed row. Raises ValueError for rows that are not padded on the right, dropout, sinks,
    RuntimeError for a model that only shares the config of a mirrored one.
    """
    if dropout or options.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__}: a mirrored body knows no dropout in attention and no sinks")
    query, key = query_BHLE.to(value_BGLE.dtype), key_BGLE.to(value_BGLE.dtype)
    if module not in _KERNELS:
        raise RuntimeError(
            f"{type(module).__name__} was not mirrored: its model shares the config of one that was; copy it first"
        )
    kernels = _KERNELS[module]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kernels is None:
        return sdpa(module, query, key, value_BGLE, mask, runs=runs, scaling=scale, softcap=softcap, **options)
    _require_right_padding(module, mask)
    if runs is not None and len(query) != 1:
        raise ValueError(f"a packed row lies alone; got {len(query)}")
    lengths = [query.shape[2]] * len(query) if runs is None else [n for count, n in runs for _ in range(count)]
    arguments = {"scale": scale, "window": sliding_window, "soft_cap": softcap or 0.0}
    return _Mirrored.apply(query, key, value_BGLE, module, mask, runs, lengths, kernels, arguments), None


class _Mirrored(torch.autograd.Function):
    """The kernel's result; the gradient of torch's attention at the same inputs, which differs from it by rounding."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        module: nn.Module,
        mask: Tensor | None,
        runs: tuple[tuple[int, int], ...] | None,
        lengths: list[int],
        kernels: EngineKernels,
        arguments: dict[str, object],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rest = module, mask, runs, arguments
        flat = [x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (query, key, value)]
        found_THE = kernels.attend(*flat, lengths, **arguments)
        return found_THE.view(query.shape[0], query.shape[2], *found_THE.shape[1:])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        module, mask, runs, arguments = ctx.rest
        given = [x.detach() for x in ctx.saved_tensors]
        if given[0].device.type == "cpu" and given[0].shape[2] <= SHORT:  # where 16-bit gradients are slow
            given = [x.float() for x in given]
        with torch.enable_grad():
            again = _differentiable(module, [x.requires_grad_() for x in given], mask, runs, arguments)
        found = torch.autograd.grad(again, given, grad.to(again.dtype))
        return *(x.to(grad.dtype) for x in found), None, None, None, None, None, None


def _differentiable(
    module: nn.Module,
    given: list[Tensor],
    mask: Tensor | None,
    runs: tuple[tuple[int, int], ...] | None,
    arguments: dict[str, object],
) -> Tensor:
    if arguments["soft_cap"]:
        return _capped(module, *given, mask, arguments)
    found, _ = sdpa(module, *given, mask, runs=runs, scaling=arguments["scale"])
    return found


def _capped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, arguments: dict[str, object]
) -> Tensor:
    """Attention with a soft cap, written out: torch's sdpa has none."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.float() @ key.float().transpose(2, 3) * arguments["scale"]
    scores = arguments["soft_cap"] * torch.tanh(scores / arguments["soft_cap"])
    length = query.shape[2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (torch.softmax(scores, dim=-1) @ value.float()).to(value.dtype).transpose(1, 2)


def _require_right_padding(module: nn.Module, mask: Tensor | None) -> None:
    """A kernel that knows lengths and windows gives the rows behind a sequence's end other values, and no row before it."""
    if mask is None:
        return
    allowed = mask if mask.dtype == torch.bool else mask == 0
    diagonal = allowed.diagonal(dim1=-2, dim2=-1)
    if bool(allowed[:, 0].triu(1).any()) or not bool((diagonal[..., :-1].int() >= diagonal[..., 1:].int()).all()):
        raise ValueError(
            f"{type(module).__name__}: a mirrored body needs causal masks over rows that are padded on the right; pad there, or "
            "train with trainer.body=model"
        )
