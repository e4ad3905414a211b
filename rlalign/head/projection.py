"""project(): THE lm_head projection both engines call, differentiable, with one choice of kernel.

Every product takes the stored values of hidden states and weight exactly and accumulates in float32; nothing is rounded
to the model's dtype on the way to the logits. Which kernel does that is a `Route`, chosen per device and dtype, tested
once per process and readable through `route()`.

N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlalign.head import triton as gpu_head
from rlalign.head.products import Route, backward_route, logits_of, matmul, stored_for
from rlalign.head.routes import cpu_route
from rlalign.head.transform import HeadTransform

__all__ = ["HeadTransform", "check_operands", "project", "route"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def route(hidden_ND: Tensor, weight_VD: Tensor, *, weight_is_bf16_valued: bool = False) -> Route:
    """The route `project` takes for these operands. `weight_is_bf16_valued`: as in `project`."""
    dtypes = (hidden_ND.dtype, weight_VD.dtype)
    if dtypes[0] == dtypes[1] != torch.float32 and gpu_head.multiplies_on(hidden_ND.device):
        return Route.TRITON
    if hidden_ND.is_cuda and dtypes[0] == dtypes[1] != torch.float32:
        return Route.CUDA_OUT_DTYPE
    if hidden_ND.device.type != "cpu":
        return Route.STRICT_FP32
    bf16_weight = dtypes[1] == torch.bfloat16 or (dtypes[1] == torch.float32 and weight_is_bf16_valued)
    best = cpu_route(hidden_ND.shape[-1], bf16=dtypes[0] == torch.bfloat16 and bf16_weight)
    if best is Route.MKL_BF16 and dtypes[1] == torch.float32:
        return Route.ONEDNN_BF16
    return best


def project(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None, *, weight_is_bf16_valued: bool = False
) -> Tensor:
    """float32 logits of hidden states: hidden @ weight.T + bias, accumulated in float32.

    hidden [..., D], weight [V, D], bias [V], each float32, bfloat16 or float16; result [..., V] float32, unbounded.
    weight_is_bf16_valued: a float32 weight that copies a bf16 one; the logits carry the bits of the bf16 weight's.
    Differentiable: gradients come back in each operand's dtype after float32 accumulation. For 16-bit operands the
    gradient of the logits enters the two products in the operands' dtype (float16: in float32), never the logits.
    No tokens give an empty result. Raises ValueError on wrong shapes, dtypes, devices, DTensors, or a weight without
    data (meta, or partitioned by ZeRO-3).
    """
    check_operands(hidden_ND, weight_VD, bias_V)
    flat_ND = hidden_ND.reshape(-1, hidden_ND.shape[-1])
    logits_NV = torch.ops.rlalign.project(flat_ND, weight_VD, bias_V, weight_is_bf16_valued)
    # as linear's output, no view: FSDP2 loses its hook, and the weights of the backward pass, where a view is changed in place
    return torch.ops.aten._unsafe_view(logits_NV, (*hidden_ND.shape[:-1], weight_VD.shape[0]))


def check_operands(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> None:
    """Raise ValueError unless hidden [..., D], weight [V, D] and bias [V] fit. Reads metadata only."""
    if weight_VD.is_meta:
        raise ValueError(
            "head: the weight is on the meta device and holds no data; load it (or end the weight update) first"
        )
    if weight_VD.numel() == 0:
        raise ValueError(
            f"head: the weight has shape {tuple(weight_VD.shape)} and no elements; under ZeRO-3 it is partitioned: "
            "call this inside the forward of the module that owns it, or inside deepspeed.zero.GatheredParameters"
        )
    if weight_VD.dim() != 2 or hidden_ND.dim() < 1 or hidden_ND.shape[-1] != weight_VD.shape[1]:
        raise ValueError(
            f"head: expected hidden [..., D] and weight [V, D], "
            f"got {tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"head: expected a bias of [{weight_VD.shape[0]}], got {tuple(bias_V.shape)}")
    for name, tensor in (("hidden", hidden_ND), ("weight", weight_VD), ("bias", bias_V)):
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"head: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if hasattr(tensor, "placements"):
            raise ValueError(
                f"head: {name} is a DTensor, spread over ranks {tensor.placements}; call this inside the forward of the module "
                "that FSDP gathers, or give a tensor-parallel head's to_local() with shard=VocabShard.of(weight)"
            )
        if tensor.device != hidden_ND.device:
            raise ValueError(f"head: {name} is on {tensor.device}, the hidden states are on {hidden_ND.device}")


@torch.library.custom_op("rlalign::project", mutates_args=())
def _project(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, weight_is_bf16_valued: bool) -> Tensor:
    if hidden_ND.shape[0] == 0:
        return hidden_ND.new_empty((0, weight_VD.shape[0]), dtype=torch.float32)
    chosen = route(hidden_ND, weight_VD, weight_is_bf16_valued=weight_is_bf16_valued)
    logits_NV = logits_of(stored_for(hidden_ND, chosen), stored_for(weight_VD, chosen), chosen)
    return logits_NV if bias_V is None else logits_NV.add_(bias_V.float())


@_project.register_fake
def _(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, weight_is_bf16_valued: bool) -> Tensor:
    return hidden_ND.new_empty((hidden_ND.shape[0], weight_VD.shape[0]), dtype=torch.float32)


@torch.library.custom_op("rlalign::project_backward", mutates_args=())
def _project_backward(
    grad_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor, weight_is_bf16_valued: bool, wants: list[bool]
) -> list[Tensor]:
    chosen = backward_route(route(hidden_ND, weight_VD, weight_is_bf16_valued=weight_is_bf16_valued), hidden_ND.dtype)
    grad = grad_NV.to(hidden_ND.dtype) if chosen is Route.CUDA_OUT_DTYPE or chosen is Route.MKL_BF16 else grad_NV
    hidden, weight = hidden_ND.new_empty(0), weight_VD.new_empty(0)
    if wants[0]:
        hidden = matmul(grad, stored_for(weight_VD, chosen), chosen).to(hidden_ND.dtype)
    if wants[1]:
        weight = matmul(grad.t(), stored_for(hidden_ND, chosen), chosen).to(weight_VD.dtype)
    return [hidden, weight]


@_project_backward.register_fake
def _(
    grad_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor, weight_is_bf16_valued: bool, wants: list[bool]
) -> list[Tensor]:
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if want else x.new_empty(0)
        for x, want in zip((hidden_ND, weight_VD), wants, strict=True)
    ]


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    hidden_ND, weight_VD, bias_V, ctx.weight_is_bf16_valued = inputs
    ctx.save_for_backward(hidden_ND, weight_VD)
    ctx.bias_dtype = None if bias_V is None else bias_V.dtype


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_NV: Tensor) -> tuple[Tensor | None, ...]:
    hidden_ND, weight_VD = ctx.saved_tensors
    hidden_wanted, weight_wanted, bias_wanted, _ = ctx.needs_input_grad
    hidden, weight = torch.ops.rlalign.project_backward(
        grad_NV, hidden_ND, weight_VD, ctx.weight_is_bf16_valued, [hidden_wanted, weight_wanted]
    )
    bias = grad_NV.sum(0).to(ctx.bias_dtype) if bias_wanted else None
    return hidden if hidden_wanted else None, weight if weight_wanted else None, bias, None


_project.register_autograd(_backward, setup_context=_setup_context)
