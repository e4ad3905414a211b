"""Proof by output: every step of the live engine against the trainer's module on the engine's own input.

The read-back of a publish compares an engine with what the engine's own loader makes of the weights, so that a loader which puts a
right tensor in a wrong place vouches for itself. Here nothing of the engine is trusted: what each of its modules made of random
tokens is compared with what the trainer's module makes of the same input. Rounding moves a step by up to a few percent; a
wrong slice, a wrong order or a neighbour's weight moves it as far as an unrelated one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlalign.diagnose.attribution import trainer_side
from rlalign.diagnose.attribution.derived import mapping_of
from rlalign.diagnose.attribution.difference import compared
from rlalign.diagnose.attribution.mapping import LOGITS
from rlalign.diagnose.attribution.trainer_side import Side
from rlalign.rollout.engine import teacher_forcing
from rlalign.rollout.engine.teacher_forcing import Route
from rlalign.types import LogprobSpec, Rollout, RolloutBatch, collate

if TYPE_CHECKING:
    from torch import nn

    from rlalign.rollout.engine.embedded import VLLMEngine

LIMIT = 0.1  # mean relative difference of one step: bfloat16 rounds it by 0.01, an unrelated weight moves it by 1
SEQUENCES, TOKENS = 4, 48  # of the probe
SHOWN = 4


def prove(engine: VLLMEngine, network: nn.Module, *, scratch: Path | None = None) -> dict[str, float]:
    """What `measured` gives. Raises RuntimeError naming the steps beyond LIMIT."""
    found = measured(engine, network, scratch=scratch)
    wrong = sorted((point for point, apart in found.items() if not apart <= LIMIT), key=lambda p: -found[p])
    if wrong:
        told = ", ".join(f"{point} by {found[point]:.0%}" for point in wrong[:SHOWN])
        more = f" and {len(wrong) - SHOWN} more steps" if len(wrong) > SHOWN else ""
        raise RuntimeError(
            f"the engine took the weights and computes something else with them: on its own inputs the trainer's modules differ at "
            f"{told}{more} (limit {LIMIT:.0%}). Its loader puts a tensor where it does not belong, or the two libraries mean "
            "different models by this configuration; rlalign attribute shows every step"
        )
    return found


def measured(engine: VLLMEngine, network: nn.Module, *, scratch: Path | None = None) -> dict[str, float]:
    """{step: mean relative difference} on random tokens. network: whole on this rank, with the weights that were published.

    Raises ValueError where no step of this architecture can be compared.
    """
    network.eval()
    batch = _random_tokens(network.config.get_text_config().vocab_size, engine.config.max_model_len)
    mapping = mapping_of(engine, network, batch, None, scratch)
    with tempfile.TemporaryDirectory(prefix="rlalign-steps-", dir=scratch) as folder:
        forced = teacher_forcing.record(
            engine, batch, mapping.rollout_taps, Path(folder) / "engine", route=Route.prefill
        )
        isolated = trainer_side.record(Side(network, mapping), batch, Path(folder) / "trainer", inputs=forced.recording)
        return {
            point: float(compared(forced.recording, isolated, point, batch, isolated.width(point)).relative_N.mean())
            for point in mapping.points()
            if point != LOGITS
        }


def _random_tokens(vocabulary: int, longest: int) -> RolloutBatch:
    length = min(TOKENS, longest - 1)
    ids_BL = torch.randint(0, vocabulary, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    rollouts = [
        Rollout(
            token_ids=ids,
            loss_mask=[False, *[True] * (length - 1)],
            rollout_logprobs=[0.0] * length,
            prompt_id=i,
            group_id=i,
            finish_reason="length",
            version_spans=[(1, length, 0)],
        )
        for i, ids in enumerate(ids_BL.tolist())
    ]
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec())


__all__ = ["prove"]
