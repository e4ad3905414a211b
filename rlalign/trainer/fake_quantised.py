"""A transformers model computing with a quantised body: the number formats, and where they are put; never into its head.

Values are rounded as the format stores them, scaled back, in the dtype they came in. Scales are those of vLLM's kernels
(`fp8_utils`, `mxfp8_utils`, `nvfp4_emulation_utils`). A float32 product of faked operands is the quantised product but for the
order of its sum. O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.trainer.attention import heads_changed

E4M3_MAX = 448.0
E2M1_MAX = 6.0
BLOCK = 128  # of DeepSeek's FP8: weights 128 x 128, activations 1 x 128
MX, NV = 32, 16  # values that share one scale
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}  # one matrix in vLLM, with one scale


def e4m3(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Round x / scale to float8_e4m3fn, larger values to its largest, and multiply by `scale` again."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale


def e4m3_towards_zero(x: Tensor) -> Tensor:
    """The float8_e4m3fn next to x on the side of zero."""
    size = x.abs().clamp(max=E4M3_MAX)
    codes = size.to(torch.float8_e4m3fn)
    over = codes.to(x.dtype) > size  # codes of positive numbers are in their order
    return (codes.view(torch.uint8) - over.to(torch.uint8)).view(torch.float8_e4m3fn).to(x.dtype) * x.sign()


def e2m1(x: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4 or 6 and a sign: to nearest, ties to the even code; larger values to 6."""
    size = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return (size / step).round() * step * x.sign()


def of_tensor(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """E4M3, one scale. amax: the largest value the scale is for, where other tensors share it."""
    return e4m3(x, _scale(x.abs().amax() if amax is None else amax))


def of_rows(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """E4M3, a scale for each row: an output channel of a weight, a token of activations."""
    return e4m3(x, _scale(x.abs().amax(-1, keepdim=True)))


def of_groups(x: Tensor, size: int = BLOCK) -> Tensor:
    """E4M3, a scale for so many neighbouring inputs of one row."""
    return _grouped(x, size, lambda grouped: e4m3(grouped, _scale(grouped.abs().amax(-1, keepdim=True))))


def of_blocks(weight_OI: Tensor, amax: Tensor | None = None) -> Tensor:
    """E4M3, a scale for each 128 x 128 of a weight."""
    outputs, inputs = weight_OI.shape
    padded = torch.nn.functional.pad(weight_OI, (0, -inputs % BLOCK, 0, -outputs % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    faked = e4m3(blocks, _scale(blocks.abs().amax((1, 3), keepdim=True)))
    return faked.flatten(2).flatten(0, 1)[:outputs, :inputs]


def mxfp8(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """E4M3, 32 values share a power of two: the smallest that keeps the largest of them in range."""

    def faked(grouped: Tensor) -> Tensor:
        largest = grouped.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return e4m3(grouped, (largest / E4M3_MAX).log2().ceil().clamp(-127, 127).exp2())

    return _grouped(x, MX, faked)


def nvfp4(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """E2M1, 16 values share an E4M3 scale, all of them one float32 scale, for `amax` where other tensors share it."""
    whole = (x.abs().amax() if amax is None else amax) / (E4M3_MAX * E2M1_MAX)
    whole = torch.where(whole > 0, whole, 1.0)

    def faked(grouped: Tensor) -> Tensor:
        scale = e4m3(grouped.abs().amax(-1, keepdim=True) / E2M1_MAX / whole) * whole
        return e2m1(grouped / torch.where(scale > 0, scale, 1.0)) * scale

    return _grouped(x, NV, faked)


def _scale(amax: Tensor) -> Tensor:
    return torch.where(amax > 0, amax / E4M3_MAX, 1.0)


def _grouped(x: Tensor, size: int, faked: Callable[[Tensor], Tensor]) -> Tensor:
    """`faked` on [..., groups, size]; a last group that is not full is filled up with zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return faked(padded.unflatten(-1, (-1, size))).flatten(-2)[..., : x.shape[-1]]


def _widened(function: Callable[..., Tensor], x: Tensor, *rest: Tensor | None) -> Tensor:
    """16-bit values are faked in float32 and rounded once."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return function(wide, *rest).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Format:
    """weights: of [O, I] and the largest value of all layers fused with it. activations: of [..., I]. about: for people."""

    weights: Callable[[Tensor, Tensor | None], Tensor]
    activations: Callable[[Tensor], Tensor]
    about: str


def _format(weights: Callable, activations: Callable, about: str) -> Format:
    return Format(partial(_widened, weights), partial(_widened, activations), about)


FORMATS = {  # of linear layers
    "fp8_tensor": _format(of_tensor, of_tensor, "E4M3, one scale a tensor"),
    "fp8_channel": _format(of_rows, of_rows, "E4M3, a scale an output channel and a token"),
    "fp8_block": _format(of_blocks, of_groups, "E4M3, a scale for 128 x 128 weights and 1 x 128 activations"),
    "mxfp8": _format(mxfp8, mxfp8, "E4M3, a power of two for 32 values"),
    "nvfp4": _format(nvfp4, nvfp4, "E2M1, an E4M3 scale for 16 values"),
}
KV_FORMATS = {  # of keys and values [..., E], as the engine caches them
    "fp8": partial(_widened, e4m3),  # scale 1.0, vLLM's where no checkpoint brings one
    "fp8_towards_zero": partial(
        _widened, e4m3_towards_zero
    ),  # what vLLM's CPU kernels store for "fp8" (docs/upstream.md)
    "fp8_per_token_head": partial(_widened, of_rows),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is quantised, by names in FORMATS and KV_FORMATS; "" leaves it plain. layers: their numbers, None for all.

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
            at = next((i for i, names in enumerate(FUSED.values()) if own in names), None)
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
