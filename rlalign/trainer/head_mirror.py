"""The trainer's lm_head, mirrored: the same projection as the rollout engine's, in place, on the same weight.

Only the `forward` of the existing lm_head module changes. The module call stays, so that ZeRO hooks still gather its weight; the
weight stays, so that tied embeddings keep their dtype and their tie.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlalign import logprobs
from rlalign.head import multiplied, projection, routes
from rlalign.head.multiplied import Multiplied
from rlalign.head.transform import HeadTransform
from rlalign.logprobs import truncation
from rlalign.trainer import logit_check
from rlalign.trainer.exact_network import ExactHead

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlalign.logprobs.truncation import Found, Truncation
    from rlalign.types import KeptSets

LOOKS = 4  # calls looked at, until one can tell


@dataclass(slots=True)
class HeadStatus:
    """What the trainer's head is and did: the trainer's side of the handshake."""

    name: str
    mode: str  # "off", "mirrored", or "exact"
    dtype: str  # "float32", "master", or the body's when off
    tied: bool
    calls: int = 0
    multiplied: Multiplied | None = None  # what the logprobs of a real call were found to be computed in
    route: str | None = None  # how logits are made, as `prove` found it; None for a head that is not mirrored
    kernel: str | None = None  # the compiled path behind that route
    bits: str | None = None  # digest of the bits of a fixed probe; None where `routes.bits` has none
    master_VD: Tensor | None = field(default=None, repr=False)  # dtype "master": the optimizer's unrounded lm_head
    asked: Asked | None = field(default=None, repr=False)  # set: the next call answers this, and its logits are zeros

    def prove(self, lm_head: nn.Linear, device: torch.device) -> None:
        """Note route, kernel and bits of this process now, for operands of the dtypes that this head multiplies."""
        if self.mode != "mirrored":
            return
        body, size = lm_head.weight.dtype, lm_head.in_features  # under ZeRO-3 the weight itself may be elsewhere
        wide = torch.float32 if self.dtype == "master" else body
        hidden = torch.empty(1, size, dtype=body, device=device)
        weight = torch.empty(1, size, dtype=wide, device=device)
        route = projection.route(hidden, weight)
        self.route, self.kernel = route.value, routes.kernel_name(route, hidden, weight)
        self.bits = routes.bits(projection.project, size, body, wide, device)


_STATUS: weakref.WeakKeyDictionary[nn.Module, HeadStatus] = weakref.WeakKeyDictionary()


def status_of(lm_head: nn.Module) -> HeadStatus:
    """The status that `mirror` returned for this head."""
    return _STATUS[lm_head]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the head is asked about: ids_BL int64; mask_BL bool, the tokens to score; temperature divides the logits ([B], [B, L]).

    kept: the sets to renormalise over, for tokens sampled from a truncated distribution. truncation: find those sets first;
    `kept` is then what the engine captured. vocab_size: ids from here on have no probability; 0: all rows have some.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    temperature: float | Tensor
    kept: KeptSets | None = None
    truncation: Truncation | None = None
    vocab_size: int = 0


@dataclass(slots=True)
class Asked:
    """A question that travels with a forward of the whole model, for who holds the model and not its head.

    tokens may hold one more per row than the model is given: the one after its last, as where a sequence is cut in shards.
    """

    tokens: Tokens
    exact: bool
    logprobs_BL: Tensor | None = None
    entropy_BL: Tensor | None = None


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
    where not asked) without building [tokens, vocabulary], and third the `truncation.Found` where these ask for one; without, it
    returns logits as any lm_head does.
    head_dtype "model" keeps the projection in the body's dtype, as transformers would; "master" projects with
    `status.master_VD` wherever it is set, else with the weight as it is (gradients still reach the weight itself). With "float32" a
    32-bit weight under 16-bit hidden states (autocast) is multiplied rounded to their dtype, as the engine holds it. An exact head
    keeps its own products.
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
    transform = logit_check.transform_of(model)
    status = _STATUS[lm_head] = HeadStatus(
        name=next(name for name, module in model.named_modules() if module is lm_head),
        mode="off" if head_dtype == "model" else "exact" if exact_head else "mirrored",
        dtype=head_dtype if head_dtype != "model" else str(next(model.parameters()).dtype).removeprefix("torch."),
        tied=_weight(lm_head) is not None and _weight(lm_head) is _weight(model.get_input_embeddings()),
    )
    form = _Form(status, transform, own, head_dtype, chunk or None, keep_mib)

    def forward(
        self: nn.Linear, hidden: Tensor, tokens: Tokens | None = None, *, exact: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        return form.answer(self, hidden, tokens, exact)

    lm_head.forward = MethodType(forward, lm_head)
    return status


@dataclass(frozen=True, slots=True)
class _Form:
    """What a mirrored head does in the place of its class's forward. own: by the module's own products, logits and all."""

    status: HeadStatus
    transform: HeadTransform
    own: bool
    head_dtype: str
    chunk: int | None
    keep_mib: int

    def answer(self, head: nn.Linear, hidden: Tensor, tokens: Tokens | None, exact: bool) -> Tensor | tuple:
        """Logits, or what `tokens` or the question that travels with this forward asks for."""
        status = self.status
        status.calls += 1
        asked, length = status.asked, hidden.shape[-2]
        if tokens is None and asked is None:
            return self.logits(head, hidden)
        if asked is None:
            hidden = self.transform.hidden(hidden)  # as the model's own forward does before it calls this module
        else:
            tokens, exact = asked.tokens, asked.exact
            if tokens.ids_BL.shape[1] == length + 1:
                hidden = nn.functional.pad(hidden, (0, 0, 0, 1))  # no token follows its last row
        given = self.scored(head, hidden, tokens, exact)
        if status.calls <= LOOKS and status.multiplied is None and (tokens.kept is None or len(given) == 3):
            real = slice(tokens.vocab_size or None)
            bias = None if head.bias is None else head.bias[real]
            weight = self.weight(head, hidden)[real]
            _look(status, weight, bias, self.transform, hidden, *_over_all_ids(tokens, given))
        if asked is None:
            return given
        asked.logprobs_BL, asked.entropy_BL = given[:2]
        return given[0][:, :length, None] * 0.0  # in the place of logits: whatever the model does to them

    def logits(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """As any lm_head gives them."""
        if not self.own:
            return projection.project(hidden, self.weight(head, hidden), head.bias)
        logits = type(head).forward(head, hidden)
        return logits.to(hidden.dtype) if self.head_dtype == "model" else logits

    def weight(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """What hidden states are multiplied by."""
        weight = head.weight
        if self.status.master_VD is not None:
            return _Unrounded.apply(weight, self.status.master_VD)
        narrower = weight.dtype == torch.float32 and hidden.dtype != torch.float32 and self.head_dtype == "float32"
        return weight.to(hidden.dtype) if narrower else weight

    def scored(self, head: nn.Linear, hidden: Tensor, tokens: Tokens, exact: bool) -> tuple[Tensor, ...]:
        """Logprobs, entropies, and the kept sets where these are asked for."""
        scale = {"temperature": tokens.temperature}
        if self.own:
            logits_BLV = self.transform.apply(self.logits(head, hidden))[..., : tokens.vocab_size or None]
            mask, kept, found = _sets(tokens, partial(truncation.of_logits, logits_BLV, **scale))
            return *logprobs.from_logits(logits_BLV, tokens.ids_BL, mask=mask, kept=kept, **scale), *found
        operands = (hidden, self.weight(head, hidden))
        scale |= {"bias": head.bias, "soft_cap": self.transform.soft_cap, "logit_scale": self.transform.logit_scale}
        scale["vocab_size"] = tokens.vocab_size or None
        mask, kept, found = _sets(tokens, partial(truncation.kept_sets, *operands, **scale))
        return *logprobs.token_logprobs(
            *operands, tokens.ids_BL, chunk=self.chunk, keep_mib=self.keep_mib, entropy=True,
            mode="exact_mirror" if exact else "fast", mask=mask, kept=kept, **scale,
        ), *found  # fmt: skip


def _over_all_ids(tokens: Tokens, given: tuple) -> tuple[Tokens, Tensor]:
    """The tokens that have one, and their logprobs before any truncation."""
    if len(given) == 2:
        return tokens, given[0]
    found, device = given[2], given[0].device
    left = replace(tokens, mask_BL=tokens.mask_BL & ~found.too_large_BL.to(device))
    return left, given[0] + found.log_mass_BL.to(device)


def _sets(tokens: Tokens, find: Callable[..., Found]) -> tuple[Tensor, KeptSets | None, tuple[Found, ...]]:
    """(tokens to score, their kept sets, what was found of these if it was asked for)."""
    if tokens.truncation is None:
        return tokens.mask_BL, tokens.kept, ()
    found = find(tokens.ids_BL, mask=tokens.mask_BL, truncation=tokens.truncation, captured=tokens.kept)
    return tokens.mask_BL & ~found.too_large_BL.to(tokens.mask_BL.device), found.kept, (found,)


def _at(temperature: float | Tensor, rows: Tensor, columns: Tensor) -> float | Tensor:
    """Of single tokens, [n, 1]: from one number, [B] or [B, L]."""
    if not isinstance(temperature, Tensor):
        return temperature
    return (temperature[rows] if temperature.dim() == 1 else temperature[rows, columns])[:, None]


def _weight(module: nn.Module | None) -> Tensor | None:
    """Its weight; None where FSDP has taken it away into a flat parameter."""
    return getattr(module, "weight", None)


def _look(
    status: HeadStatus,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    transform: HeadTransform,
    hidden_BLD: Tensor,
    tokens: Tokens,
    logprobs_BL: Tensor,
) -> None:
    """Compare a few logprobs of this call with float64. Raises RuntimeError for another dtype than the mode promises."""
    rows, columns = tokens.mask_BL.nonzero(as_tuple=True)
    rows, columns = rows[: multiplied.ROWS], columns[: multiplied.ROWS]
    if not len(rows):
        return
    found = multiplied.of_logprobs(
        logprobs_BL.detach()[rows, columns],
        hidden_BLD.detach()[rows, columns - 1],
        weight_VD,
        tokens.ids_BL[rows, columns],
        bias_V=bias_V,
        transform=transform.apply,
        temperature=_at(tokens.temperature, rows, columns),
    )
    if found.dtype is None:
        return
    status.multiplied = found
    wanted = status.dtype if status.mode == "off" else "float32"
    if found.dtype != wanted and (wanted == "float32" or found.dtype != multiplied.OTHER):
        raise RuntimeError(
            f"the trainer's {status.name} runs in mode {status.mode!r}, which promises {wanted} logits; measured on logprobs of "
            f"its own: {multiplied.said(found.as_dict())}. Another library may have replaced its products; remove it, or run "
            "with the head_dtype that it has"
        )
