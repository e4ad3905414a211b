"""Put a choice of roundings into a transformers model, in place: forwards of its modules change, weights and names do not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.head import steady
from rlalign.trainer.fake_quantised import layers_of
from rlalign.trainer.rounding import mirrored_modules, variants
from rlalign.trainer.rounding.mirrored_modules import EngineKernels
from rlalign.trainer.rounding.variants import ACTIVATION, ADD_AND_NORM, ATTENTION, MODEL, PRODUCTS, RESIDUAL, ROPE

KNOWN = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM", "GraniteForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Qwen3MoeForCausalLM", "Olmo2ForCausalLM", "CohereForCausalLM",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choices:
    """One variant per op, by name (`variants.TABLE`). Raises ValueError for a variant that does not exist."""

    add_and_norm: str = MODEL
    rope: str = MODEL
    activation: str = MODEL
    products: str = MODEL
    attention: str = MODEL
    residual: str = MODEL

    def __post_init__(self) -> None:
        for op in variants.OPS:
            variants.require_known(op, getattr(self, op))


class Probe(Protocol):
    """What a probe of an engine's ops has found (`rlalign.trainer.rounding.probing`)."""

    def table(self) -> list[str]:
        """Markdown lines."""

    def shares(self) -> list[dict[str, object]]:
        """Each part of each op: the variant chosen, and the shares of differing elements before and after."""


VLLM_CPU = Choices(
    add_and_norm=variants.SUM_ROUNDED_LATE,
    rope=variants.ROUNDED_ONCE,
    products=variants.ONE_ORDER,
    attention=variants.ENGINE_KERNEL,
)  # what the probe finds on vLLM 0.32's CPU backend


@dataclass(frozen=True, slots=True)
class BodyPlan:
    """How a body is to round, the engine's own kernels for what only they can compute, and the probe that found it."""

    kernels: EngineKernels
    choices: Choices = VLLM_CPU
    probed: Probe | None = None


@dataclass(frozen=True, slots=True)
class MirroredBody:
    """What was put in place. applied: {op: variant}; left: {op or module: why it computes as the model does}.

    probed: the measurement behind it, where there was one."""

    applied: Mapping[str, str]
    left: Mapping[str, str]
    probed: Probe | None = None

    def as_dict(self) -> dict[str, object]:
        """For a run's summary."""
        ops = [] if self.probed is None else self.probed.shares()
        return {"mirrored": dict(self.applied), "left": dict(self.left), "ops": ops}

    def describe(self) -> list[str]:
        """Lines for people: what is mirrored, what is not, and the table of the probe."""
        done = ", ".join(f"{op} {name}" for op, name in self.applied.items()) or "nothing"
        return [
            f"body: mirrored are {done}",
            *(f"body: {op} as the model has it: {why}" for op, why in self.left.items()),
            *([] if self.probed is None else self.probed.table()),
        ]


_BODIES: weakref.WeakKeyDictionary[nn.Module, MirroredBody] = weakref.WeakKeyDictionary()
_ATTENTION: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # the implementation before


def body_of(model: nn.Module) -> MirroredBody | None:
    """What `mirror_body` did to this model; None for a body as transformers has it."""
    return _BODIES.get(model)


def mirror_body(
    model: PreTrainedModel, choices: Choices, *, kernels: EngineKernels | None = None, probed: Probe | None = None
) -> MirroredBody:
    """Let this model's body round as `choices` say, from now on; returns what was done and what was left.

    kernels: the engine's own, for the variant `engine_kernel`, and for products where they are faster. A class that is not KNOWN
    gets what holds for any model (products, attention, rope) and keeps its layers and norms. The head is not touched. Raises
    ValueError for a body that is not bf16, for a variant that this host cannot compute, and for `engine_kernel` without kernels.
    """
    require_bf16_on_cpu(model)
    if choices.attention == variants.ENGINE_KERNEL and kernels is None:
        raise ValueError("attention=engine_kernel needs the engine's kernels; pass kernels=, or choose attention=model")
    if choices.products == variants.ONE_ORDER and (why := steady.missing(model.dtype)):
        raise ValueError(f"products=one_order: {why}; choose products=model")
    left: dict[str, str] = {}
    applied: dict[str, str] = {}
    steps: tuple[tuple[str, Callable[[], str]], ...] = (
        (ADD_AND_NORM, lambda: _mirror_stream(model, choices.add_and_norm)),
        (ROPE, lambda: _mirror_rope(model, choices)),
        (ACTIVATION, lambda: _mirror_activation(model, choices.activation)),
        (PRODUCTS, lambda: _mirror_products(model, kernels)),
        (ATTENTION, lambda: _mirror_attention(model, choices, kernels)),
        (RESIDUAL, lambda: _mirror_parallel(model)),
    )
    for op, step in steps:
        if (name := getattr(choices, op)) == MODEL and not (op == ATTENTION and choices.rope != MODEL):
            continue
        if why := step():
            left[op] = why
        elif name != MODEL:
            applied[op] = name
    done = _BODIES[model] = MirroredBody(applied, left, probed)
    return done


def require_bf16_on_cpu(model: nn.Module) -> None:
    """Raise ValueError for a body that is not mirrored: of another dtype, or on another device."""
    if model.dtype != torch.bfloat16:
        raise ValueError(
            f"a mirrored body rounds to bfloat16; this one is {model.dtype}, whose two sides differ by the order of float32 "
            "additions alone: use trainer.body=model, or exact=true"
        )
    if model.device.type not in ("cpu", "meta"):
        raise ValueError(f"a mirrored body is for CPUs so far; this one is on {model.device}: use trainer.body=model")


def unmirror_body(model: PreTrainedModel) -> None:
    """Let a model's body compute as its class does again; nothing for one that was not mirrored."""
    if _BODIES.pop(model, None) is None:
        return
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__module__", "").startswith("rlalign.trainer.rounding"):
            del module.forward
    if before := _ATTENTION.pop(model, None):
        model.set_attn_implementation(before)


def _mirror_stream(model: PreTrainedModel, name: str) -> str:
    if type(model).__name__ not in KNOWN:
        return f"the layers of {type(model).__name__} are not known; known are {', '.join(KNOWN)}"
    late = name in (variants.SUM_ROUNDED_LATE, variants.SUM_ROUNDED_LATE_WEIGHT_WIDE)
    wide = name in (variants.WEIGHT_WIDE, variants.SUM_ROUNDED_LATE_WEIGHT_WIDE)
    for layer in layers_of(model):
        mirrored_modules.mirror_layer(layer)
    norms = [module for layer in layers_of(model) for module in layer.modules()] + [model.base_model.norm]
    for norm in filter(mirrored_modules.is_rms, norms):
        mirrored_modules.mirror_norm(norm, late=late, weight_wide=wide)
    return ""


def _mirror_parallel(model: PreTrainedModel) -> str:
    if not all(mirrored_modules.is_parallel(layer) for layer in layers_of(model)):
        return f"the layers of {type(model).__name__} do not run attention and MLP side by side"
    for layer in layers_of(model):
        mirrored_modules.mirror_parallel(layer)
    return ""


def _mirror_rope(model: PreTrainedModel, choices: Choices) -> str:
    """Known attention modules turn by `variants.rotated`. Others are handed cosine and sine in float32, so that transformers' own
    formula computes in it and attention rounds what it is given: the same bits, slower."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return f"{type(model).__name__} has no rotary_emb"
    own, wide = rotary.forward, choices.rope == variants.ROUNDED_ONCE_WIDE_COS

    def forward(self: nn.Module, x: Tensor, *args: object, **given: object) -> tuple[Tensor, Tensor]:
        cos, sin = own(x.float() if wide else x, *args, **given)
        return (cos, sin) if turned else (cos.float(), sin.float())

    toward_zero = choices.rope == variants.TRUNCATED_ONCE
    known = [mirrored_modules.mirror_rotation(module, toward_zero=toward_zero) for module in _attentions(model)]
    turned = all(known)
    if toward_zero and not turned:
        return f"the attention of {type(model).__name__} is not known, and what it is given it rounds to nearest"
    rotary.forward = MethodType(forward, rotary)
    return ""


def _mirror_activation(model: PreTrainedModel, name: str) -> str:
    for layer in layers_of(model):
        if not all(hasattr(layer.mlp, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            return f"{type(layer.mlp).__name__} is not made of gate_proj, up_proj and down_proj"
        layer.mlp.forward = MethodType(_activated_once, layer.mlp)
    return ""


def _activated_once(self: nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(variants.activated_once(self.gate_proj(x), self.up_proj(x), self.act_fn))


def _mirror_products(model: PreTrainedModel, kernels: EngineKernels | None) -> str:
    others, rest = set(), None if kernels is None else kernels.multiply

    def steady_linear(self: nn.Linear, x: Tensor) -> Tensor:
        return steady.linear(x, self.weight, self.bias, rest=rest)

    for module in _in_layers(model):
        if type(module) is nn.Linear:
            module.forward = MethodType(steady_linear, module)
        elif module.__class__.__name__.endswith("Linear") or any(p.ndim == 3 for p in module.parameters(recurse=False)):
            others.add(type(module).__name__)
    return f"modules that are no plain nn.Linear: {', '.join(sorted(others))}" if others else ""


def _mirror_attention(model: PreTrainedModel, choices: Choices, kernels: EngineKernels | None) -> str:
    if not model._supports_attention_backend:
        return f"{type(model).__name__} computes attention in its own way"
    attentions = _attentions(model)
    if not attentions:
        return f"{type(model).__name__}: no attention modules found in its layers"
    chosen = kernels if choices.attention == variants.ENGINE_KERNEL else None
    _ATTENTION[model] = model.config._attn_implementation
    mirrored_modules.install_attention(model, attentions, chosen)
    return ""


def _attentions(model: PreTrainedModel) -> list[nn.Module]:
    return [m for m in _in_layers(model) if hasattr(m, "is_causal") and hasattr(m, "scaling")]


def _in_layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    for layer in layers_of(model):
        yield from layer.modules()
