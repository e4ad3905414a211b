"""The noise floor: what differs at a point although nothing is wrong.

The rollout engine against itself, in other batches and other chunks; and rounding, the trainer against wider arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from rlalign.diagnose.attribution.compare import compared, scored
from rlalign.diagnose.attribution.difference import Spread
from rlalign.diagnose.attribution.mapping import ModelMap
from rlalign.diagnose.attribution.patching import LOGPROBS
from rlalign.rollout.engine import teacher_forcing
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.rollout.engine.teacher_forcing import Forced, Route
from rlalign.types import RolloutBatch


def worst(one: Spread | None, other: Spread) -> Spread:
    """Entry by entry."""
    if one is None:
        return other
    return Spread(max(one.mean, other.mean), max(one.p99, other.p99), max(one.max, other.max))


def one_unit(dtype: torch.dtype) -> Spread:
    """What rounding once more makes of an activation: no floor is lower, since two correct implementations may round differently.

    Rounding to nearest is wrong by eps/2 at most and by about eps/4 on average over the features of a token.
    """
    eps = torch.finfo(dtype).eps
    return Spread(eps / 4, eps / 2, eps)


def bias_floor(unit: Spread) -> float:
    """A gain that is off by less than this is nobody's concern: a thirtieth of what rounding does, and never under 1e-8."""
    return max(unit.mean / 32, 1e-8)


def engine_against_itself(
    engine: VLLMEngine,
    chunked: VLLMEngine | None,
    batch: RolloutBatch,
    mapping: ModelMap,
    widths: dict[str, int],
    reference: Forced,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Spread]:
    """{point: relative difference}, the worst source: each sequence alone, and another chunking where an engine for it is given."""
    found: dict[str, Spread] = {}
    for name, other, alone in (("alone", engine, True), ("chunked", chunked, False)):
        if other is None:
            continue
        say(f"noise floor: the engine against itself, {name}")
        again = teacher_forcing.record(
            other, batch, mapping.rollout_taps, folder / name, route=Route.prefill, alone=alone
        )
        for point, width in widths.items():
            spread = Spread.of(compared(reference.recording, again.recording, point, batch, width).relative_N)
            found[point] = worst(found.get(point), spread)
        found[LOGPROBS] = worst(
            found.get(LOGPROBS), Spread.of(scored(reference.logprobs_BL, again.logprobs_BL, batch).relative_N)
        )
        again.recording.delete()
    return found
