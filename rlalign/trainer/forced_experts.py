"""Send tokens to the experts that the rollout engine chose (R3), through each router's own arithmetic.

Inside a router's forward the answer of `torch.topk` over all experts is replaced: its indices by the engine's, its values by the
router's own scores at those. What the router does before and after stays the model's, so that every architecture's normalisation,
scaling and bias is kept, and the gradient reaches the gate through the scores of the forced set. Reference: arXiv 2510.11370.

Suffixes: B sequences, L padded length, T tokens as they go through the network, E known positions, K experts of a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rlalign.types import RolloutBatch, Routes

__all__ = ["ForcedExperts", "routers"]

ROUTER = re.compile(r"Top[kK]Router$")  # how transformers 5 calls the modules that choose experts
_CHOOSING = (torch.topk, Tensor.topk, torch.masked_fill, Tensor.masked_fill)
COUNTS = ("choices", "differ", "tokens", "tokens_differ")


def routers(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that choose experts, by name, in the order of the layers. Raises ValueError where there are none."""
    found = {name: module for name, module in network.named_modules() if ROUTER.search(type(module).__name__)}
    if not found:
        raise ValueError(
            f"rollout.replay_experts: {type(network).__name__} has no router that transformers calls TopKRouter; it is no mixture "
            "of experts, or one of another kind. Use rollout.replay_experts=off"
        )
    return found


@dataclass(slots=True)
class _Batch:
    """What is forced now. entry_T: rows of experts_ELK, -1 for the router's own choice."""

    experts_ELK: Tensor
    entry_T: Tensor


@dataclass(slots=True)
class ForcedExperts:
    """The routers of one network, forced while a batch is inside `of`. known: tokens without routes keep the trainer's choice.

    counts: of passes without a gradient, since `take` was called last.
    """

    network: nn.Module
    known: bool = False
    layers: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    _now: _Batch | None = None
    _apart_T: Tensor | None = None  # of the pass under way: tokens that a layer so far would have sent elsewhere

    def __post_init__(self) -> None:
        found = list(routers(self.network).values())
        self.layers = len(found)
        for layer, router in enumerate(found):
            router.forward = self._forced(router, router.forward, layer)
        self.take()

    @classmethod
    def asked(cls, network: nn.Module, replay_experts: str) -> ForcedExperts | None:
        """As rollout.replay_experts says: off, all or known."""
        return None if replay_experts == "off" else cls(network, known=replay_experts == "known")

    def require(self, batch: RolloutBatch) -> None:
        """Raise ValueError for routes of another model; RuntimeError for tokens without any, unless `known`."""
        routes, width = batch.routes, {router.top_k for router in routers(self.network).values()}
        if routes is not None and {tuple(routes.experts_ELK.shape[1:])} != {(self.layers, k) for k in width}:
            raise ValueError(
                f"the rollouts carry routes of {routes.experts_ELK.shape[1]} layers with {routes.experts_ELK.shape[2]} experts of "
                f"a token, the trainer has {self.layers} routers that choose {sorted(width)}: these are two models"
            )
        experts = min(router.num_experts for router in routers(self.network).values())
        if routes is not None and routes.experts_ELK.numel() and int(routes.experts_ELK.max()) >= experts:
            raise ValueError(
                f"the rollouts carry routes to expert {int(routes.experts_ELK.max())}, the trainer has {experts} in a layer: these "
                "are two models"
            )
        if self.known:
            return
        unknown = Routes(experts_ELK=torch.zeros(0, 1, 1), count_B=torch.zeros(len(batch), dtype=torch.int64))
        missing_B = (routes or unknown).missing(batch.loss_mask_BL)
        if bool(missing_B.any()):
            row = int((missing_B > 0).int().argmax())
            raise RuntimeError(
                f"{int((missing_B > 0).sum())} of {len(batch)} rollouts lack the experts of positions that their tokens depend on; "
                f"sequence {row} lacks {int(missing_B[row])} of them. Sample with rollout.replay_experts=all, or let the trainer "
                "choose there: rollout.replay_experts=known"
            )

    @contextmanager
    def of(self, batch: RolloutBatch, present_bL: Tensor | None) -> Iterator[None]:
        """Inside, forward passes and their gradients take the batch's routes. present_bL: of packed rows; None for padded ones."""
        if batch.routes is None:
            yield
            return
        entry_bL = batch.routes.entries(batch.token_ids_BL.shape[1])
        device = next(self.network.parameters()).device
        entry_T = entry_bL.flatten() if present_bL is None else entry_bL[present_bL.cpu()]
        self._now = _Batch(batch.routes.experts_ELK.to(device), entry_T.to(device))
        try:
            yield
        finally:
            self._now = None

    def take(self) -> dict[str, int]:
        """How often the router would have chosen otherwise, since the last call: see `COUNTS`."""
        found, self.counts = self.counts, dict.fromkeys(COUNTS, 0)
        return found

    def _forced(self, router: nn.Module, forward: Callable[..., object], layer: int) -> Callable[..., object]:
        def forced(*args: object, **kwargs: object) -> object:
            if self._now is None:
                return forward(*args, **kwargs)
            with _Picking(self, router, layer) as picking:
                given = forward(*args, **kwargs)
            if picking.picked != 1:
                raise RuntimeError(
                    f"{type(router).__name__} chose {picking.picked} times among {router.num_experts} experts where it was to be "
                    "forced once: its choice is made otherwise than by one topk over all experts"
                )
            return given

        return forced

    def known_T1(self) -> Tensor:
        """Which tokens of the pass under way have a route."""
        return (self._now.entry_T >= 0)[:, None]

    def choose(self, own_TK: Tensor, layer: int) -> Tensor:
        """The experts to take, where the router would take `own_TK`."""
        experts_ELK, entry_T = self._now.experts_ELK, self._now.entry_T
        if len(entry_T) != len(own_TK):
            raise RuntimeError(f"routes of {len(entry_T)} tokens for the {len(own_TK)} that a router was given")
        known_T1 = self.known_T1()
        chosen_TK = own_TK.clone()
        chosen_TK[known_T1[:, 0]] = experts_ELK[:, layer][entry_T[known_T1[:, 0]]].to(own_TK.dtype)
        if not torch.is_grad_enabled():
            self._count(chosen_TK, own_TK, known_T1, layer)
        return chosen_TK

    def _count(self, chosen_TK: Tensor, own_TK: Tensor, known_T1: Tensor, layer: int) -> None:
        apart_TK = (chosen_TK[:, :, None] != own_TK[:, None, :]).all(-1)
        before_T = torch.zeros_like(known_T1[:, 0]) if layer == 0 else self._apart_T
        self._apart_T = before_T | apart_TK.any(1)
        last = layer == self.layers - 1
        numbers = (
            int(known_T1.sum()) * own_TK.shape[1],
            int(apart_TK.sum()),
            int(known_T1.sum()) if last else 0,
            int(self._apart_T.sum()) if last else 0,
        )
        for name, number in zip(COUNTS, numbers, strict=True):
            self.counts[name] += number


class _Picking(TorchFunctionMode):
    """While a router runs: its topk over all experts answers what was forced. picked: how often that was.

    A router that masks all groups of experts but its own best (DeepSeek-V2, V3) still weighs a forced expert of another group by
    its score before the mask: after it, that weight would be 0 and without a gradient.
    """

    def __init__(self, forced: ForcedExperts, router: nn.Module, layer: int) -> None:
        super().__init__()
        self.forced, self.router, self.layer, self.picked = forced, router, layer, 0
        self._unmasked_TN: Tensor | None = None

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        found = func(*args, **(kwargs or {}))
        if func not in _CHOOSING or args[0].shape[1:] != (self.router.num_experts,):
            return found
        if func not in (torch.topk, Tensor.topk):
            self._unmasked_TN = args[0]
            return found
        scores_TN, own_TK = args[0], found[1]
        if own_TK.shape[1:] != (self.router.top_k,):
            return found
        self.picked += 1
        chosen_TK = self.forced.choose(own_TK, self.layer)
        values_TK = scores_TN.gather(1, chosen_TK)
        if self._unmasked_TN is not None:
            values_TK = torch.where(self.forced.known_T1(), self._unmasked_TN.gather(1, chosen_TK), values_TK)
        return torch.return_types.topk((values_TK, chosen_TK))
