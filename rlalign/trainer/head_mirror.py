"""The trainer's lm_head, mirrored: the same projection as the rollout engine's, in place, on the same weight.

Only the `forward` of the existing lm_head module changes. The module call stays, so that ZeRO hooks still gather its weight; the
weight stays, so that tied embeddings keep their dtype and their tie.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import Tensor, nn

from rlalign import head, logprobs, routes
from rlalign.trainer.exact import ExactHead


@dataclass(slots=True)
class HeadStatus:
    """What the trainer's head is and did: the trainer's side of the handshake."""

    name: str
    mode: str  # "off", "mirrored", or "exact"
    dtype: str  # "float32", "master", or the body's when off
    tied: bool
    calls: int = 0
    route: str | None = None  # how logits are made, as `prove` found it; None for a head that is not mirrored
    kernel: str | None = None  # the compiled path behind that route
    bits: str | None = None  # digest of the bits of a fixed probe; None where not on CPU
    master_VD: Tensor | None = field(default=None, repr=False)  # dtype "master": the optimizer's unrounded lm_head

    def prove(self, lm_head: nn.Linear, device: torch.device) -> None:
        """Note route, kernel and bits of this process now, for operands of the dtypes that this head multiplies."""
        if self.mode != "mirrored":
            return
        body, size = lm_head.weight.dtype, lm_head.in_features  # under ZeRO-3 the weight itself may be elsewhere
        wide = torch.float32 if self.dtype == "master" else body
        hidden = torch.empty(1, size, dtype=body, device=device)
        weight = torch.empty(1, size, dtype=wide, device=device)
        route = head.route(hidden, weight)
        self.route, self.kernel = route.value, routes.kernel_name(route, hidden, weight)
        self.bits = routes.bits(head.project, size, body, wide) if device.type == "cpu" else None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the head is asked about: ids_BL int64; mask_BL bool, the tokens to score; temperature divides the logits."""

    ids_BL: Tensor
    mask_BL: Tensor
    temperature: float


class _Unrounded(torch.autograd.Function):
    """The master in place of the weight it rounds to; its gradient is the weight's, as in mixed-precision training."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight_VD: Tensor, master_VD: Tensor) -> Tensor:
        ctx.dtype = weight_VD.dtype
        return master_VD.view_as(master_VD)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_VD: Tensor) -> tuple[Tensor, None]:
        return grad_VD.to(ctx.dtype), None


def mirror(model: nn.Module, *, head_dtype: str, chunk: int, keep_mib: int = 0) -> HeadStatus:
    """Replace the forward of `model`'s lm_head; returns its live status.

    Given `Tokens` too, the head returns their float32 logprobs and entropies, both [B, L] (nats; entry t is about token t; 0.0
    where not asked) without building [tokens, vocabulary]; without, it returns logits as any lm_head does.
    head_dtype "model" keeps the projection in the body's dtype, as transformers would; "master" projects with
    `status.master_VD` wherever it is set (gradients still reach the weight itself). An exact head keeps its own products.
    chunk, keep_mib: as in `token_logprobs`, 0 for none.
    Raises ValueError without an lm_head, and for an exact one with head_dtype "master".
    """
    lm_head = model.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear output embedding (found {type(lm_head).__name__}); "
            "the head mirror covers causal language models with a plain lm_head"
        )
    exact_head = isinstance(lm_head, ExactHead)
    if exact_head and head_dtype == "master":
        raise ValueError(
            "exact mode projects with the weight that is published, not with its master; use head_dtype=float32"
        )
    own = exact_head or head_dtype == "model"  # the module's products, logits and all
    lm_head.__dict__.pop("forward", None)  # an earlier mirror: start again from the class's own forward
    transform = head.HeadTransform.of(model.config.get_text_config().to_dict())
    status = HeadStatus(
        name=next(name for name, module in model.named_modules() if module is lm_head),
        mode="off" if head_dtype == "model" else "exact" if exact_head else "mirrored",
        dtype=head_dtype if head_dtype != "model" else str(lm_head.weight.dtype).removeprefix("torch."),
        tied=lm_head.weight is model.get_input_embeddings().weight,
    )
    plain_forward = lm_head.forward

    def plain(hidden: Tensor) -> Tensor:
        logits = plain_forward(hidden)
        return logits.to(hidden.dtype) if head_dtype == "model" else logits

    def weight_of(lm_head: nn.Linear) -> Tensor:
        return lm_head.weight if status.master_VD is None else _Unrounded.apply(lm_head.weight, status.master_VD)

    def forward(
        self: nn.Linear, hidden: Tensor, tokens: Tokens | None = None, *, exact: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        status.calls += 1
        if tokens is None:
            return plain(hidden) if own else head.project(hidden, weight_of(self), self.bias)
        if own:
            return logprobs.from_logits(
                transform.apply(plain(hidden)),
                tokens.ids_BL,
                temperature=tokens.temperature,
                mask=tokens.mask_BL,
            )
        return logprobs.token_logprobs(
            hidden,
            weight_of(self),
            tokens.ids_BL,
            bias=self.bias,
            temperature=tokens.temperature,
            soft_cap=transform.soft_cap,
            logit_scale=transform.logit_scale,
            chunk=chunk or None,
            keep_mib=keep_mib,
            entropy=True,
            mode="exact_mirror" if exact else "fast",
            mask=tokens.mask_BL,
        )

    lm_head.forward = MethodType(forward, lm_head)
    return status
