"""Forward and backward over a step's sequences in micro-batches, padded or packed: the same for the policy and the critic.

Every rank is given the whole batch, works on its own share of the sequences, and gets the whole result back.
B sequences of a step, b of one micro-batch, L padded length, T tokens of a packed row, C what the head gives for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from rlalign import ranks
from rlalign.config import TrainerConfig
from rlalign.logprobs.truncation import Found, Truncation
from rlalign.trainer import packing
from rlalign.trainer.forced_experts import ForcedExperts
from rlalign.trainer.head_mirror import Tokens
from rlalign.trainer.network import padded_inputs
from rlalign.trainer.packing import MicroBatch, pack, plan
from rlalign.types import KeptSets, RolloutBatch, TrainBatch

_FOUND = tuple(f.name for f in fields(Found) if f.name != "kept")
_NATS = ("log_mass_BL", "differ_mass_BL")  # the others are flags
LossFunction = Callable[[Tensor, TrainBatch], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How one network is gone through. attention: its body's implementation; temperature: divides its logits, if it has any.

    experts: its routers, forced to the routes of a batch that has them.
    """

    config: TrainerConfig
    device: torch.device
    attention: str
    temperature: float = 1.0
    experts: ForcedExperts | None = None

    @torch.no_grad()
    def score(self, module: nn.Module, batch: RolloutBatch, *, columns: int) -> Tensor:
        """[C, B, L] float32 on CPU of what the head gives for the sampled tokens; 0.0 elsewhere. columns: how many those are."""
        share_CBL = self.share(module, batch, columns=columns, rank=ranks.rank(), of=ranks.world_size())
        return ranks.merged(share_CBL, self.device)

    @torch.no_grad()
    def share(self, module: nn.Module, batch: RolloutBatch, *, columns: int, rank: int, of: int) -> Tensor:
        """What one rank of so many adds to `score`: [C, B, L], 0.0 where another has the sequence."""
        found_CBL = torch.zeros(columns, *batch.token_ids_BL.shape)
        for micro in self._micro_batches(batch, rank, of):
            rows = batch.rows(micro.index_b, micro.length)
            with self._routed(rows):
                given = self._forward(module, rows, exact=True)
            found_CBL[:, micro.index_b, : micro.length] = torch.stack(given).cpu()
        return found_CBL

    @torch.no_grad()
    def score_truncated(self, module: nn.Module, batch: RolloutBatch) -> tuple[Tensor, Tensor, Found]:
        """(logprobs, entropies, sets): [B, L] float32 on CPU over the kept set of each token, found in the same pass."""
        columns_CBL = torch.zeros(2 + len(_FOUND), *batch.token_ids_BL.shape)
        sets: dict[int, tuple[Tensor, Tensor]] = {}
        for micro in self._micro_batches(batch, ranks.rank(), ranks.world_size()):
            rows = batch.rows(micro.index_b, micro.length)
            with self._routed(rows):
                logprobs_bL, entropy_bL, found = self._forward(
                    module, rows, exact=True, truncation=Truncation.of(batch.spec)
                )
            numbers = [logprobs_bL.cpu(), entropy_bL.cpu(), *(getattr(found, name).float() for name in _FOUND)]
            columns_CBL[:, micro.index_b, : micro.length] = torch.stack(numbers)
            for i, row in enumerate(micro.index_b.tolist()):
                of_row = found.kept.rows(slice(i, i + 1))
                sets[row] = of_row.ids_E, of_row.count_BL[0]
        columns_CBL = ranks.merged(columns_CBL, self.device)
        everyone = {row: found for part in ranks.of_all(sets) for row, found in part.items()}
        count_BL = torch.zeros(batch.token_ids_BL.shape, dtype=torch.int64)
        for row, (_, count_L) in everyone.items():
            count_BL[row, : len(count_L)] = count_L
        ids_E = torch.cat([everyone[row][0] for row in range(len(batch))])
        flags = {n: x_BL if n in _NATS else x_BL > 0 for n, x_BL in zip(_FOUND, columns_CBL[2:], strict=True)}
        return columns_CBL[0], columns_CBL[1], Found(kept=KeptSets(ids_E=ids_E, count_BL=count_BL), **flags)

    def accumulate(self, engine: nn.Module, batch: TrainBatch, loss_function: LossFunction) -> dict[str, float]:
        """The gradient of one optimizer step, of the first thing the head gives. Returns the loss's metrics, summed up.

        The loss must be normalised by `batch.num_tokens`, the count over the whole step; micro-batches and ranks then simply
        add up. Raises RuntimeError on every rank for a loss that is not finite on one, before any gradient reaches the optimizer.
        """
        engine.train()
        totals: dict[str, float] = {}
        micro_batches = self._micro_batches(batch.rollouts, ranks.rank(), ranks.world_size())
        for micro in micro_batches:
            rows = batch.rows(micro.index_b, micro.length)
            with self._routed(rows.rollouts):  # a backward pass with checkpoints goes through the routers again
                given_bL = self._forward(engine, rows.rollouts, exact=False)[0]
                loss, metrics = loss_function(given_bL, rows)
                if ranks.any_of(not bool(torch.isfinite(loss)), self.device):
                    raise RuntimeError(_describe_bad_loss(loss, given_bL, rows, micro.index_b))
                engine.set_gradient_accumulation_boundary(micro is micro_batches[-1])
                engine.backward(loss * ranks.world_size())  # DeepSpeed averages gradients over the ranks
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return ranks.summed(totals, self.device)

    def _routed(self, batch: RolloutBatch) -> AbstractContextManager[None]:
        if self.experts is None:
            return nullcontext()
        return self.experts.of(batch, batch.attention_mask_BL if self.config.pack_tokens else None)

    def _micro_batches(self, batch: RolloutBatch, rank: int, of: int) -> list[MicroBatch]:
        return plan(
            batch.attention_mask_BL.sum(1).tolist(),
            rank=rank,
            ranks=of,
            rows=self.config.micro_batch_size,
            tokens=self.config.pack_tokens,
        )

    def _forward(
        self, module: nn.Module, batch: RolloutBatch, *, exact: bool, truncation: Truncation | None = None
    ) -> tuple:
        """C tensors [b, L] of a micro-batch, on the device; with a truncation its sets follow.

        Raises ValueError for a truncated batch whose sets are neither known nor asked for.
        """
        if batch.spec.truncated and batch.kept is None and truncation is None:
            raise ValueError(
                f"these tokens were sampled over {batch.spec.support}, and their kept sets are not known: the softmax "
                "would run over the whole vocabulary and bias every ratio. Let `Policy.score_truncated` find them, or say "
                "spec.untruncated()"
            )
        if not batch.spec.truncated:
            batch = replace(batch, kept=None)
        if not self.config.pack_tokens:
            inputs = padded_inputs(batch, self.device)
            mask_BL = batch.loss_mask_BL.to(self.device)
            tokens = Tokens(
                inputs["input_ids"], mask_BL, self.temperature, batch.kept, truncation, batch.spec.vocab_size
            )
            return module(inputs, tokens, exact=exact)
        row = pack(batch, self.device)
        tokens = Tokens(
            row.token_ids_1T, row.loss_mask_1T, self.temperature, row.kept, truncation, batch.spec.vocab_size
        )
        given = module(packing.inputs(row, self.attention), tokens, exact=exact)
        if truncation is None:
            return tuple(row.unpack(value_1T) for value_1T in given)
        *values, found = given
        numbers = {name: row.unpack(getattr(found, name).to(self.device)).cpu() for name in _FOUND}
        return *(row.unpack(value_1T) for value_1T in values), Found(kept=row.unpack_sets(found.kept), **numbers)


def _describe_bad_loss(loss: Tensor, given_bL: Tensor, batch: TrainBatch, index_b: Tensor) -> str:
    if bool(torch.isfinite(loss)):
        return "the loss of another rank is not finite; its message says where. No gradient was applied, no weights were published."
    what = "logprobs" if batch.values_BL is None else "logprobs or values"
    bad = (~torch.isfinite(given_bL) & batch.correction.keep.to(given_bL.device)).nonzero()
    where = f"the {what} are finite: look at rewards, advantages and correction weights"
    if len(bad):
        row, position = bad[0].tolist()
        token = int(batch.rollouts.token_ids_BL[row, position])
        where = f"{len(bad)} {what} are not, the first at sequence {int(index_b[row])}, position {position}, token id {token}"
    return f"the loss is {loss.item()}; {where}. No gradient was applied and no weights were published."
