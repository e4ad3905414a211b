"""One route of the engine against the trainer: points, isolated steps, logprobs, patching.

Suffixes: B sequences, L padded length, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlalign.diagnose.attribution import patching, trainer_side
from rlalign.diagnose.attribution.difference import (
    Spread,
    TokenDifferences,
    common_rows,
    compared,
    counted,
    differences,
    distinct,
    scored,
)
from rlalign.diagnose.attribution.findings import (
    Bias,
    PointDifference,
    RouteAttribution,
    bias,
    bias_floor,
    one_unit,
    worst,
)
from rlalign.diagnose.attribution.mapping import ROUTER
from rlalign.diagnose.attribution.patching import LOGPROBS
from rlalign.diagnose.attribution.trainer_side import Side
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.rollout.engine.teacher_forcing import Forced, Route
from rlalign.rollout.worker.recording import POSITION, Recording
from rlalign.types import RolloutBatch

ROPE = ("q_rope", "k_rope")  # one rounded cosine turns every token of its position: their errors are not independent
HEAT_POSITIONS = 160  # columns of the heat map; longer sequences are averaged into as many


@dataclass(frozen=True, slots=True)
class Setup:
    """What both routes share. own, exact: recordings of the trainer in its own and in wider arithmetic; floors: of the engine."""

    engine: VLLMEngine
    batch: RolloutBatch
    side: Side
    wide: Side
    own: Recording
    exact: Recording
    floors: dict[str, Spread]
    folder: Path
    patch: bool
    say: Callable[[str], None]


def attribute_route(setup: Setup, route: Route, forced: Forced) -> RouteAttribution:
    """Every number of one route."""
    batch, mapping, say = setup.batch, setup.side.mapping, setup.say
    temperature = 1.0 if route is Route.prefill else setup.engine.spec.temperature
    say(f"{route.value}: each of the trainer's modules on the rollout's inputs")
    isolated = trainer_side.record(setup.side, batch, setup.folder / "isolated", inputs=forced.recording)
    exact = trainer_side.record(setup.wide, batch, setup.folder / "isolated-exact", inputs=forced.recording)
    points, heat = [], {}
    for point in mapping.points():
        width = setup.own.width(point)
        found = compared(forced.recording, setup.own, point, batch, width, route)
        rows = counted(forced.recording, isolated, point, batch, route)
        step = differences(forced.recording, isolated, point, rows, width=width)
        fresh = distinct(forced.recording, point, rows, batch)
        tilt = bias(forced.recording, isolated, point, fresh, width=width) if _kind(point) not in ROPE else Bias()
        rounding = compared(setup.own, setup.exact, point, batch, width)
        step_rounding = compared(isolated, exact, point, batch, width)
        points.append(_point(setup, point, found, step, tilt, rounding, step_rounding))
        heat[point] = by_position(found, batch.token_ids_BL.shape[1])
    for recording in (isolated, exact):
        recording.delete()
    own_BL = patching.logprobs(setup.side, batch, head_dtype=setup.engine.spec.head_dtype, temperature=temperature)
    points.append(_logprob_point(setup, forced, own_BL, temperature))
    heat[LOGPROBS] = by_position(scored(forced.logprobs_BL, own_BL, batch), batch.token_ids_BL.shape[1])
    removed: list[patching.Removed] = []
    if setup.patch:
        say(f"{route.value}: logprob attribution, {len(patching.cuts(mapping)) + 1} cuts")
        removed = patching.attribute(
            setup.side, batch, forced.recording, forced.logprobs_BL, own_BL,
            head_dtype=setup.engine.spec.head_dtype, temperature=temperature,
        )  # fmt: skip
    delta_N = (own_BL - forced.logprobs_BL)[batch.loss_mask_BL].double()
    return RouteAttribution(
        route=route.value,
        temperature=temperature,
        points=tuple(points),
        removed=tuple(removed),
        delta_logp={
            "mean": float(delta_N.mean()),
            "abs_mean": float(delta_N.abs().mean()),
            "abs_max": float(delta_N.abs().max()),
        },
        heat=heat,
        experts_differ=experts_differ(forced.recording, setup.own, setup.side),
    )


def _kind(point: str) -> str:
    """ "q_rope" of "layers.3.q_rope"; a point outside the layers is its own kind."""
    return point.rpartition(".")[2]


def by_position(found: TokenDifferences, length: int) -> tuple[float | None, ...]:
    """Mean relative difference by position, neighbours together where there are more than a map can show."""
    bins = min(length, HEAT_POSITIONS)
    place_N = found.rows_N3[:, POSITION] * bins // length
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, place_N, found.relative_N)
    counts = torch.zeros(bins, dtype=torch.float64).index_add_(0, place_N, torch.ones_like(found.relative_N))
    return tuple(float(s / n) if n else None for s, n in zip(sums, counts, strict=True))


def _point(
    setup: Setup,
    point: str,
    found: TokenDifferences,
    step: TokenDifferences,
    tilt: Bias,
    rounding: TokenDifferences,
    step_rounding: TokenDifferences,
) -> PointDifference:
    unit = one_unit(next(setup.side.network.parameters()).dtype)
    return PointDifference(
        point=point,
        kind=_kind(point),
        layer=int(point.split(".")[1]) if point != _kind(point) else None,
        tokens=len(found.rows_N3),
        absolute=Spread.of(found.absolute_N),
        relative=Spread.of(found.relative_N),
        cosine=float(found.cosine_N.mean()),
        cosine_min=float(found.cosine_N.min()),
        floor=worst(worst(setup.floors.get(point), Spread.of(rounding.relative_N)), unit),
        isolated=Spread.of(step.relative_N),
        isolated_floor=worst(Spread.of(step_rounding.relative_N), unit),
        bias=tilt,
        bias_floor=bias_floor(unit),
    )


def _logprob_point(setup: Setup, forced: Forced, own_BL: Tensor, temperature: float) -> PointDifference:
    """The logprobs as a last point: isolated, they are the trainer's normalisation of the rollout's logits."""
    batch, unit = setup.batch, one_unit(torch.float32)
    step_BL = patching.from_logits(forced.recording, batch, temperature, torch.float32)
    exact_BL = patching.from_logits(forced.recording, batch, temperature, torch.float64)
    rounded_BL = patching.from_logits(setup.exact, batch, temperature, torch.float64)
    found, step = scored(forced.logprobs_BL, own_BL, batch), scored(forced.logprobs_BL, step_BL, batch)
    rounding = Spread.of(scored(own_BL, rounded_BL, batch).relative_N)
    return PointDifference(
        point=LOGPROBS,
        kind=LOGPROBS,
        layer=None,
        tokens=len(found.rows_N3),
        absolute=Spread.of(found.absolute_N),
        relative=Spread.of(found.relative_N),
        cosine=float(found.cosine_N.mean()),
        cosine_min=float(found.cosine_N.min()),
        floor=worst(worst(setup.floors.get(LOGPROBS), rounding), unit),
        isolated=Spread.of(step.relative_N),
        isolated_floor=worst(Spread.of(scored(step_BL, exact_BL, batch).relative_N), unit),
        bias=Bias(),
        bias_floor=bias_floor(unit),
    )


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
