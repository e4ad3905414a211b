"""A transformers model computing with a quantised body: linear layers, their inputs, cached keys and values; never its head.

O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.trainer.attention_heads import heads_changed
from rlalign.trainer.rounding.formats import FORMATS, KV_FORMATS

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)  # one matrix in vLLM: one scale where a tensor has one


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is quantised, by names of `formats`; "" leaves it plain. layers: their numbers, None for all.

    Raises ValueError for an unknown name.
    """

    weights: str = ""
    activations: str = ""
    kv: str = ""
    layers: frozenset[int] | None = None

    def __post_init__(self) -> None:
        for what, name, known in (
            ("weights", self.weights, FORMATS),
            ("activations", self.activations, FORMATS),
            ("kv", self.kv, KV_FORMATS),
        ):
            if name and name not in known:
                raise ValueError(f"quantised {what}: unknown format {name!r}; choose one of {', '.join(known)}")


@contextmanager
def fake_quantised(network: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """Run `network` with a quantised body meanwhile; its weights are the same bits again afterwards, unless they were trained.

    Weights are rounded in place, so a gradient reaches the parameter as if it were not (straight through); what an optimizer adds
    inside is lost. Activations are rounded as the layer gets them, and the gradient passes through unchanged. Embedding, norms and
    lm_head stay plain.
    Raises ValueError for layers whose matrices are not linear layers (stacked experts), RuntimeError when a layer's attention did
    not go through transformers' registry, so that its keys and values were not seen.
    """
    every = layers_of(network)
    chosen = [every[i] for i in sorted(recipe.layers)] if recipe.layers is not None else list(every)
    for layer in chosen:
        _require_linear(layer)
    with ExitStack() as stack:
        if recipe.weights:
            stack.enter_context(_weights(chosen, FORMATS[recipe.weights].weights))
        if recipe.activations:
            faked = _straight_through(FORMATS[recipe.activations].activations)
            for linear in (module for layer in chosen for module in _linears(layer)):
                hook = linear.register_forward_pre_hook(lambda _, args: (faked(args[0]), *args[1:]))
                stack.callback(hook.remove)
        if recipe.kv:
            stack.enter_context(_cached(network, chosen, _straight_through(KV_FORMATS[recipe.kv])))
        yield


def layers_of(network: PreTrainedModel) -> Sequence[nn.Module]:
    """The decoder's layers. Raises ValueError for a model without `layers`."""
    layers = getattr(network.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(network).__name__}: no decoder layers found under base_model.layers, "
            f"which has {sorted(name for name, _ in network.base_model.named_children())}"
        )
    return layers


def _linears(layer: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in layer.modules() if isinstance(module, nn.Linear))


def _require_linear(layer: nn.Module) -> None:
    if any(hasattr(weight, "placements") for weight in layer.parameters()):
        raise ValueError("fake quantisation needs whole weights, and these are DTensors: quantise before fully_shard")
    known = {id(linear.weight) for linear in _linears(layer)}
    other = [name for name, weight in layer.named_parameters() if weight.ndim > 1 and id(weight) not in known]
    if other:
        raise ValueError(
            f"{type(layer).__name__}: {', '.join(other[:4])} are no linear layers (stacked experts, convolutions); "
            "fake quantisation covers nn.Linear bodies, and leaving them out would measure too little"
        )


@contextmanager
def _weights(layers: Sequence[nn.Module], faked: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    before: dict[nn.Parameter, Tensor] = {}
    try:
        for layer in layers:
            for linears in _fused(layer):
                amax = torch.stack([linear.weight.detach().abs().amax() for linear in linears]).amax().double()
                for linear in linears:
                    before[linear.weight] = linear.weight.data
                    linear.weight.data = faked(linear.weight.data, amax)
        yield
    finally:
        for weight, data in before.items():
            weight.data = data


def _fused(layer: nn.Module) -> list[list[nn.Linear]]:
    """The layer's linear layers; those that vLLM multiplies as one matrix are together."""
    groups: dict[tuple[str, int], list[nn.Linear]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            parent, _, own = name.rpartition(".")
            at = next((i for i, names in enumerate(FUSED) if own in names), None)
            groups.setdefault((name, -1) if at is None else (parent, at), []).append(module)
    return list(groups.values())


def _straight_through(faked: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def through(x: Tensor) -> Tensor:
        return faked(x) if not (torch.is_grad_enabled() and x.requires_grad) else _Through.apply(x, faked)

    return through


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, faked: Callable[[Tensor], Tensor]) -> Tensor:
        return faked(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@contextmanager
def _cached(network: PreTrainedModel, layers: Sequence[nn.Module], faked: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Keys and values are rounded before every query reads them, a token's own too, as an engine reads them from its cache."""
    inside = {module: layer for layer in layers for module in layer.modules()}
    seen: set[nn.Module] = set()

    def change(module: nn.Module, heads: list[Tensor]) -> list[Tensor]:
        if module not in inside:
            return heads
        seen.add(inside[module])
        return [heads[0], faked(heads[1]), faked(heads[2])]

    def require_seen(layer: nn.Module, *_: object) -> None:
        if layer not in seen:
            raise RuntimeError(
                f"{type(layer).__name__}: its attention does not go through transformers' registry of attention functions, so its "
                "keys and values were not quantised; load the model with attn_implementation=sdpa or eager"
            )

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(require_seen).remove)
        stack.enter_context(heads_changed(network, change))
        yield
