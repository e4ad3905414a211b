"""Where an op of a bf16 block may round: the few ways in which engines do it, as differentiable functions.

MODEL is always what transformers does. Names say what is rounded, and when. Shapes: [..., D] with D features; E head size.
Read from vLLM 0.32: `ir/ops/layernorm.py` (a fused add-and-norm normalises the sum before it is rounded),
`csrc/cpu/pos_encoding.cpp` (rope in float32 from cosines of the model's dtype, rounded once), `csrc/layernorm_kernels.cu` and
`csrc/type_convert.cuh` (CUDA: packed 16-bit adds, so that the sum is rounded first), `csrc/activation_kernels.cu`,
`model_executor/layers/activation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

MODEL = "model"
ELEMENTS = 2**17  # of a norm's temporaries on CPU: 512 KiB
ADD_AND_NORM, ROPE, ACTIVATION, PRODUCTS, ATTENTION = "add_and_norm", "rope", "activation", "products", "attention"
RESIDUAL = "residual"  # of layers whose attention and MLP run side by side
OPS = (ADD_AND_NORM, ROPE, ACTIVATION, PRODUCTS, ATTENTION, RESIDUAL)
SUM_ROUNDED_LATE, SUM_ROUNDED_LATE_WEIGHT_WIDE = "sum_rounded_after_norm", "sum_rounded_after_norm_weight_in_float32"
WEIGHT_WIDE = "weight_in_float32"
ROUNDED_ONCE, ROUNDED_ONCE_WIDE_COS = "rounded_once", "rounded_once_cos_in_float32"
TRUNCATED_ONCE = "truncated_once"
ONE_ORDER, ENGINE_KERNEL = "one_order", "engine_kernel"
BRANCHES_FIRST = "branches_first"
SUMS = (PRODUCTS, ATTENTION)  # whose last variant adds up as the engine does, whatever the rows


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to round an op. cost: its place among the op's variants, cheapest first; `Probed.choices` settles ties."""

    op: str
    name: str
    cost: int
    rounds: str


def norm(wide: Tensor, weight_D: Tensor, epsilon: float, *, offset: bool = False, weight_wide: bool = False) -> Tensor:
    """RMS norm of a float32 input, in the weight's dtype.

    offset: Gemma's, which multiplies by 1 + weight in float32 and rounds once. weight_wide: rounds once after the weight, else
    before it and after it.
    """
    return _Norm.apply(wide, weight_D, epsilon, offset, weight_wide)


def norms(
    rounded: Tensor, wide: Tensor, weight_D: Tensor, epsilon: float, *, offset: bool = False
) -> dict[str, Callable[[], Tensor]]:
    """Variant -> the add-and-norm that rounds so, of the rounded sum and the float32 one; without MODEL, the layer's own."""
    forms = {
        WEIGHT_WIDE: (rounded.float(), True),
        SUM_ROUNDED_LATE: (wide, False),
        SUM_ROUNDED_LATE_WEIGHT_WIDE: (wide, True),
    }
    return {
        name: lambda of=of, w=weight_wide: norm(of, weight_D, epsilon, offset=offset, weight_wide=w)
        for name, (of, weight_wide) in forms.items()
    }


class _Norm(torch.autograd.Function):
    """Written out and a few rows at a time: autograd's own chain of a norm passes over the states three times as often, and its
    float32 temporaries leave the cache."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, wide: Tensor, weight_D: Tensor, epsilon: float, offset: bool, weight_wide: bool
    ) -> Tensor:
        ctx.offset = offset
        rows_ND, times_D = wide.reshape(-1, wide.shape[-1]), _wide_weight(weight_D, offset)
        out_ND = torch.empty(rows_ND.shape, dtype=weight_D.dtype, device=wide.device)
        scale_N1 = rows_ND.new_empty(len(rows_ND), 1)
        for part in _parts(rows_ND):
            scale_N1[part] = torch.rsqrt(rows_ND[part].pow(2).mean(-1, keepdim=True) + epsilon)
            scaled = rows_ND[part] * scale_N1[part]
            if offset or weight_wide:
                out_ND[part] = scaled.mul_(times_D)
            else:
                out_ND[part] = weight_D * scaled.to(weight_D.dtype)
        ctx.save_for_backward(wide, weight_D, scale_N1)
        return out_ND.view(wide.shape)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, weight_D, scale_N1 = ctx.saved_tensors
        rows_ND, grad_ND = (x.reshape(-1, x.shape[-1]) for x in (wide, grad))
        times_D = _wide_weight(weight_D, ctx.offset)
        to_wide_ND, to_weight_D = torch.empty_like(rows_ND), torch.zeros_like(times_D)
        for part in _parts(rows_ND):
            along, scale = grad_ND[part].float(), scale_N1[part]
            to_weight_D += (along * rows_ND[part]).mul_(scale).sum(0)
            along *= times_D
            slope = (along * rows_ND[part]).mean(-1, keepdim=True).mul_(scale.pow(3))
            to_wide_ND[part] = along.mul_(scale).addcmul_(rows_ND[part], slope, value=-1)
        return to_wide_ND.view(wide.shape), to_weight_D.to(weight_D.dtype), None, None, None


def _wide_weight(weight_D: Tensor, offset: bool) -> Tensor:
    return weight_D.float() + 1.0 if offset else weight_D.float()


def _parts(rows_ND: Tensor) -> Iterator[slice]:
    step = max(1, ELEMENTS // rows_ND.shape[1]) if rows_ND.device.type == "cpu" else max(1, len(rows_ND))
    yield from (slice(start, start + step) for start in range(0, len(rows_ND), step))


def added(residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """(the sum rounded to the residual's dtype, the sum in float32)."""
    return _Added.apply(residual, branch)


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        wide = residual.to(torch.float32, copy=True).add_(branch)  # a float32 residual must stay as it is
        return wide.to(residual.dtype), wide

    @staticmethod
    def backward(ctx: FunctionCtx, to_rounded: Tensor, to_wide: Tensor) -> tuple[Tensor, Tensor]:
        grad = (to_wide + to_rounded).to(to_rounded.dtype)
        return grad, grad


def rotated(states_HLE: Tensor, cos_LE: Tensor, sin_LE: Tensor, *, toward_zero: bool = False) -> Tensor:
    """Rope in float32: both products and the sum, rounded once. States [..., H, L, E], cosines [..., L, E]."""
    return _Rotated.apply(states_HLE, cos_LE, sin_LE, toward_zero)


def truncated(wide: Tensor) -> Tensor:
    """float32 to bfloat16 by its upper half: toward zero."""
    return (wide.contiguous().view(torch.int32) & -65536).view(torch.float32).bfloat16()


class _Rotated(torch.autograd.Function):
    """Head by head, so that the float32 of one is all there is of it. The result lies as [..., L, H, E], which attention wants."""

    @staticmethod
    def forward(ctx: FunctionCtx, states_HLE: Tensor, cos_LE: Tensor, sin_LE: Tensor, toward_zero: bool) -> Tensor:
        ctx.save_for_backward(cos_LE, sin_LE)
        (cos_1, cos_2), (sin_1, sin_2) = (x.float().chunk(2, dim=-1) for x in (cos_LE, sin_LE))

        def turn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            wide = x * cos_1 - y * sin_1, y * cos_2 + x * sin_2
            return (truncated(wide[0]), truncated(wide[1])) if toward_zero else wide

        return _by_head(states_HLE, turn)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cos_1, cos_2), (sin_1, sin_2) = (x.float().chunk(2, dim=-1) for x in ctx.saved_tensors)
        return _by_head(grad, lambda x, y: (x * cos_1 + y * sin_2, y * cos_2 - x * sin_1)), None, None, None


def _by_head(states_HLE: Tensor, turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    half = states_HLE.shape[-1] // 2
    out_HLE = torch.empty_like(states_HLE.transpose(-3, -2), memory_format=torch.contiguous_format).transpose(-3, -2)
    for head in range(states_HLE.shape[-3]):
        x, y = states_HLE[..., head, :, :].float().split(half, dim=-1)
        out_HLE[..., head, :, :half], out_HLE[..., head, :, half:] = turn(x, y)
    return out_HLE


def rotated_model(states_HLE: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
    """Rope as transformers writes it: each product and the sum rounded."""
    half = states_HLE.shape[-1] // 2
    turned = torch.cat((-states_HLE[..., half:], states_HLE[..., :half]), dim=-1)
    return states_HLE * cos_LE + turned * sin_LE


def activated_model(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """The activation rounded, then the product."""
    return act(gate) * up


def activated_once(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Activation and product in float32, rounded once."""
    return (act(gate.float()) * up.float()).to(gate.dtype)


TABLE: tuple[Variant, ...] = (
    Variant(ADD_AND_NORM, MODEL, 0, "the sum, the normalised sum, its product with the weight"),
    Variant(ADD_AND_NORM, WEIGHT_WIDE, 1, "the sum, then once after the weight"),
    Variant(
        ADD_AND_NORM, SUM_ROUNDED_LATE, 2, "the normalised unrounded sum, its product with the weight; the sum apart"
    ),
    Variant(
        ADD_AND_NORM, SUM_ROUNDED_LATE_WEIGHT_WIDE, 3, "once after the weight, from the unrounded sum; the sum apart"
    ),
    Variant(ROPE, MODEL, 0, "cosine and sine, both products, their sum"),
    Variant(ROPE, ROUNDED_ONCE, 1, "cosine and sine, the result"),
    Variant(ROPE, ROUNDED_ONCE_WIDE_COS, 2, "the result"),
    Variant(
        ROPE,
        TRUNCATED_ONCE,
        3,
        "cosine and sine; the result toward zero, as vLLM's kernels do without bf16 instructions",
    ),
    Variant(ACTIVATION, MODEL, 0, "the activation, its product"),
    Variant(ACTIVATION, ROUNDED_ONCE, 1, "the product"),
    Variant(
        PRODUCTS, MODEL, 0, "the result; additions in the library's order, which may change with the number of rows"
    ),
    Variant(PRODUCTS, ONE_ORDER, 1, "the result; additions in one order for any number of rows (rlalign.head.steady)"),
    Variant(ATTENTION, MODEL, 0, "as torch's sdpa: weights before they are normalised, by a fast exponential"),
    Variant(ATTENTION, ENGINE_KERNEL, 1, "as the engine: its own kernel on the trainer's queries, keys and values"),
    Variant(RESIDUAL, MODEL, 0, "the stream with attention, that with the MLP"),
    Variant(RESIDUAL, BRANCHES_FIRST, 1, "attention with the MLP, the stream with both"),
)


def of(op: str) -> tuple[Variant, ...]:
    """The variants of one op, cheapest first. Raises ValueError for an unknown op."""
    found = tuple(v for v in TABLE if v.op == op)
    if not found:
        raise ValueError(f"no variants of an op {op!r}; there are {', '.join(OPS)}")
    return found


def require_known(op: str, name: str) -> None:
    """Raise ValueError naming the choices for a variant that does not exist."""
    names = [v.name for v in of(op)]
    if name not in names:
        raise ValueError(f"{op} has no variant {name!r}; choose one of {', '.join(names)}")
