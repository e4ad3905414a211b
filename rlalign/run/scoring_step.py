"""Score a batch over the support its tokens were sampled from: the whole vocabulary, or the kept set of each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from rlalign.logprobs.truncation import LIMIT
from rlalign.run.step_metrics import route_metrics, support_metrics
from rlalign.types import RolloutBatch

if TYPE_CHECKING:
    from rlalign.run.parties import Trainer


def scored(trainer: Trainer, batch: RolloutBatch) -> tuple[RolloutBatch, Tensor, Tensor, dict[str, float]]:
    """(batch, logprobs, entropies, metrics) under the current weights, over the support that the tokens were sampled from.

    Of a truncated spec the batch comes back with its kept sets, which every later pass renormalises over, and without the tokens
    whose set is too large to keep.
    """
    batch.spec.require_repeatable(what="scoring rollouts")
    if not batch.spec.truncated:
        old_BL, entropy_BL = trainer.score(batch)
        return batch, old_BL, entropy_BL, _routes(trainer, batch)
    old_BL, entropy_BL, found = trainer.score_truncated(batch)
    metrics = support_metrics(found, batch) | _routes(trainer, batch)
    left_BL = batch.loss_mask_BL & ~found.too_large_BL
    if not bool(left_BL.any()):
        raise RuntimeError(
            f"every token's kept set has more than {LIMIT} ids ({batch.spec.support}): nothing is left to train on. Sample with a "
            "smaller top_p or a top_k"
        )
    return replace(batch, kept=found.kept, loss_mask_BL=left_BL), old_BL, entropy_BL, metrics


def _routes(trainer: Trainer, batch: RolloutBatch) -> dict[str, float]:
    return {} if batch.routes is None else route_metrics(trainer.routes_taken(), batch)
