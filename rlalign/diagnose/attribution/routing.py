"""Mixtures of experts: how often the two sides send a token to different experts.

Suffixes: N tokens, E experts, K chosen ones.
"""

from __future__ import annotations

import torch

from rlalign.diagnose.attribution.difference import common_rows
from rlalign.diagnose.attribution.mapping import ROUTER
from rlalign.diagnose.attribution.trainer_pass import Side
from rlalign.rollout.recording import Recording


def experts_differ(rollout: Recording, trainer: Recording, side: Side) -> dict[int, float]:
    """{layer: share of the rollout's chosen experts that the trainer did not choose}; empty for a dense model.

    Chosen: the largest router logits, as many as the model takes per token. Raises ValueError where its config does not say.
    """
    found = {}
    for pair in (p for p in side.mapping.pairs if p.kind == ROUTER):
        width, chosen = trainer.width(pair.point), getattr(side.network.config, "num_experts_per_tok", None)
        if chosen is None:
            raise ValueError(f"{type(side.network).__name__} has routers, but its config names no num_experts_per_tok")
        rows_N, other_rows_N = common_rows(rollout.table(pair.point), trainer.table(pair.point))
        one_NK = _chosen(rollout.read(pair.point, rows_N, width=width), chosen)
        other_NK = _chosen(trainer.read(pair.point, other_rows_N, width=width), chosen)
        shared_N = (one_NK[:, :, None] == other_NK[:, None, :]).any(2).sum(1)
        found[pair.layer] = 1 - float(shared_N.double().mean()) / chosen
    return found


def _chosen(logits_NE: torch.Tensor, count: int) -> torch.Tensor:
    return logits_NE.float().topk(count).indices
