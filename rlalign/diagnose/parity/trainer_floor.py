"""The trainer's own noise floor: the same weights and tokens, gone through in other ways that must not matter in exact arithmetic.

Beside the engine's (`rollout.engine.noise_floor`): what a mismatch has to exceed is both together. B sequences, L padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rlalign import mismatch
from rlalign.rollout.engine.noise_floor import FEW, KEPT
from rlalign.types import RolloutBatch

EXTRA, CHUNK = 37, 7  # columns of padding; tokens of a tile of the head
Score = Callable[..., Tensor]
Sources = dict[str, dict[str, float] | None]


def measure(score: Score, batch: RolloutBatch) -> Sources:
    """Mismatch of the trainer with itself by source, with the keys of `noise_floor.KEPT` (nats).

    score(batch, rows=0, chunk=0, exact=True) -> [B, L] logprobs: `rows` sequences in one forward (0: all), the head in tiles of
    `chunk` tokens (0: its own), exact: as old_logprobs are computed, otherwise as those with a gradient.
    trainer_batch_of_one: each sequence alone and without padding; trainer_padding: behind more of it; trainer_tiles: the head in
    other tiles; trainer_update: the pass that is differentiated. The first `noise_floor.FEW` sequences.
    """
    few = batch.rows(slice(0, FEW))
    whole_BL = score(few)
    alone_BL = torch.zeros_like(whole_BL)
    for row, length in enumerate(few.attention_mask_BL.sum(1).tolist()):
        alone_BL[row, :length] = score(few.rows(slice(row, row + 1), length))[0]
    others = {
        "trainer_batch_of_one": alone_BL,
        "trainer_padding": score(_padded(few))[:, : whole_BL.shape[1]],
        "trainer_tiles": score(few, chunk=CHUNK),
        "trainer_update": score(few, exact=False),
    }
    return {name: _compare(whole_BL, other_BL, few.loss_mask_BL) for name, other_BL in others.items()}


def together(engine: Sources, trainer: Sources) -> Sources:
    """All sources, with `floor` the engine's worst plus the trainer's worst for each key.

    Two independent noises add at most so: |d| by the triangle inequality, k1 and k3 to first order.
    """
    floor = engine["floor"]
    assert floor is not None
    worst = {key: max(abs(source[key]) for source in trainer.values() if source is not None) for key in KEPT}
    apart = {name: source for name, source in engine.items() if name != "floor"}
    return apart | trainer | {"floor": {key: floor[key] + worst[key] for key in KEPT}}


def _compare(one_BL: Tensor, other_BL: Tensor, mask_BL: Tensor) -> dict[str, float]:
    measured: Mapping[str, float] = mismatch.compare(one_BL, other_BL, mask_BL, positions=False)
    return {key: measured[key] + 0.0 for key in KEPT}  # + 0.0: no minus sign before a zero


def _padded(batch: RolloutBatch) -> RolloutBatch:
    """The same sequences behind more padding; pad ids are attended to by nobody."""
    wider = {
        name: torch.nn.functional.pad(tensor, (0, EXTRA)) if tensor.dim() == 2 else tensor
        for name, tensor in batch.tensors().items()
    }
    return replace(batch, **wider, kept=None, spec=batch.spec)
