"""The two sides of a mismatch, and what the trainer's model says when it is asked in the plainest way.

B sequences, L padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlalign import mismatch
from rlalign.diagnose.both_sides import head_logprobs, head_put_back, hidden_states
from rlalign.types import RolloutBatch
from rlalign.weights import SHARED_MEMORY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.rollout.engine.embedded import VLLMEngine

ROUNDING = 2e-5  # nats: what float32 arithmetic in another order may change in a logprob


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is to be explained. batch: just sampled by the engine, at the weights that both sides should hold now.

    score: the trainer's own scoring, [B, L] logprobs as in `Policy.score`; network: the model inside it, whose
    parameters the engine should hold, unless `weights` yields others: merged adapters. tokenizer: the trainer's. master_VD: with
    head_dtype=master.
    """

    engine: VLLMEngine
    network: nn.Module
    batch: RolloutBatch
    score: Callable[[RolloutBatch], Tensor]
    tokenizer: PreTrainedTokenizerBase | None = None
    master_VD: Tensor | None = None
    shared: Path = SHARED_MEMORY
    weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None

    @cached_property
    def old_BL(self) -> Tensor:
        """What the trainer says."""
        return self.score(self.batch).cpu()

    @cached_property
    def hidden_BLD(self) -> Tensor:
        """[B, L, D] of the model with every sequence alone: no padding that a mask or a position could get wrong."""
        length = self.batch.token_ids_BL.shape[1]
        rows = [hidden_states(self.network, part) for part in self.alone]
        return torch.cat([torch.nn.functional.pad(h, (0, 0, 0, length - h.shape[1])) for h in rows])

    @cached_property
    def alone(self) -> list[RolloutBatch]:
        """Each sequence as a batch of its own, without padding."""
        return [_trimmed(self.batch.rows(slice(i, i + 1))) for i in range(len(self.batch))]

    @cached_property
    def together_BLD(self) -> Tensor:
        """[B, L, D] of the model with the padded batch, as a trainer in good order calls it."""
        return hidden_states(self.network, self.batch)

    @cached_property
    def reference_BL(self) -> Tensor:
        """What the trainer's model says under the engine's convention, each sequence alone."""
        return self.plain(self.temperature, self.head)

    @cached_property
    def floor(self) -> float:
        """Mean |difference| of the model with itself, alone against together: nothing smaller is evidence (nats)."""
        return max(ROUNDING, self.apart(self.plain(self.temperature, self.head, together=True), self.reference_BL))

    @property
    def temperature(self) -> float:
        """What was asked for."""
        return self.engine.spec.temperature

    @property
    def head(self) -> str:
        """The head dtype that was asked for."""
        return self.engine.spec.head_dtype

    def plain(self, temperature: float, head: str, *, together: bool = False) -> Tensor:
        """[B, L]: the same hidden states under another temperature or head; together: those of the padded batch."""
        hidden_BLD = self.together_BLD if together else self.hidden_BLD
        with head_put_back(self.network):
            return head_logprobs(
                self.network, hidden_BLD, self.batch, head, temperature=temperature, master_VD=self.master_VD
            )

    def apart(self, one_BL: Tensor, other_BL: Tensor) -> float:
        """Mean |difference| over the sampled tokens, in nats."""
        mask_BL = self.batch.loss_mask_BL
        return float((one_BL[mask_BL].double() - other_BL[mask_BL].double()).abs().mean())

    @cached_property
    def measured(self) -> dict[str, float]:
        """The run's metrics of this batch, by their logged names."""
        found = mismatch.compare(self.old_BL, self.batch.rollout_logprobs_BL, self.batch.loss_mask_BL)
        return {f"mismatch/{'' if n.startswith('position') else 'lag0/'}{n}": v for n, v in found.items()}


def _trimmed(row: RolloutBatch) -> RolloutBatch:
    """Without padding."""
    return row.rows(slice(None), int(row.attention_mask_BL.sum()))
