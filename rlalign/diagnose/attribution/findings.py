"""What attribution finds: every matching point with its differences and floors, and where they start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rlalign.diagnose.attribution.bias import Bias
from rlalign.diagnose.attribution.difference import Spread
from rlalign.diagnose.attribution.patching import Removed

OVER = 3.0  # times the floor: rounding differs between machines and shapes by less than this, faults by more


@dataclass(frozen=True, slots=True, kw_only=True)
class PointDifference:
    """One matching point on one route. absolute in the activation's units, relative and cosine without unit.

    floor: relative, what differs without any fault: the engine against itself (alone and chunked), and the trainer against
    wider arithmetic. isolated: relative, when the trainer's module is given the rollout's own inputs, so that only this step
    differs; isolated_floor: the same in wider arithmetic. bias: its systematic part, which rounding does not have.
    """

    point: str
    kind: str
    layer: int | None
    tokens: int
    absolute: Spread
    relative: Spread
    cosine: float
    cosine_min: float
    floor: Spread
    isolated: Spread
    isolated_floor: Spread
    bias: Bias
    bias_floor: float

    @property
    def excess(self) -> float:
        """How many times over its floor this step alone is: by the mean, by the worst token, or by its bias; the largest counts."""
        return max(_times(self.isolated, self.isolated_floor), self.bias.size / self.bias_floor)

    @property
    def over_floor(self) -> bool:
        return self.excess > OVER

    @property
    def accumulated_excess(self) -> float:
        """The same for the difference with all that came before."""
        return _times(self.relative, self.floor)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteAttribution:
    """One route of the engine (prefill or decode) against the trainer.

    delta_logp: trainer - rollout of the scored tokens (nats): mean, mean of the absolute value, largest. removed: the cuts of
    logprob attribution, in order. heat: {point: mean relative difference by position}, None where no token has one.
    """

    route: str
    temperature: float
    points: tuple[PointDifference, ...]
    removed: tuple[Removed, ...]
    delta_logp: Mapping[str, float]
    heat: Mapping[str, tuple[float | None, ...]]
    experts_differ: Mapping[int, float]  # layer: share of chosen experts that the other side did not choose

    @property
    def first_over_floor(self) -> PointDifference | None:
        """The first step, in the order of computation, that by itself differs by more than its floor."""
        return next((point for point in self.points if point.over_floor), None)

    @property
    def suspects(self) -> list[PointDifference]:
        """All steps over their floor, the worst first."""
        return sorted((p for p in self.points if p.over_floor), key=lambda p: -p.excess)

    @property
    def logprob_share(self) -> dict[str, float]:
        """{cut: share of the squared difference in logprobs that arises up to it and after the cut before}; they sum to 1."""
        return {r.cut: r.share for r in self.removed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """The whole measurement. decode_against_prefill: {point: relative difference of the engine with itself}; none for one route."""

    model: str
    body_dtype: str
    head_dtype: str
    tensor_parallel: int
    layers: int
    sequences: int
    length: int
    scored_tokens: int
    routes: Mapping[str, RouteAttribution]
    decode_against_prefill: Mapping[str, Spread]
    floor_sources: tuple[str, ...]
    disk_bytes: int

    @property
    def points(self) -> tuple[PointDifference, ...]:
        """Of the first route."""
        return next(iter(self.routes.values())).points

    @property
    def first_over_floor(self) -> PointDifference | None:
        """Of the first route that has one: a fault of decoding alone shows on that route only."""
        found = (route.first_over_floor for route in self.routes.values())
        return next((point for point in found if point is not None), None)

    @property
    def logprob_share(self) -> dict[str, float]:
        """Of the first route."""
        return next(iter(self.routes.values())).logprob_share

    def as_json(self) -> dict[str, object]:
        """Every number, JSON-able; infinities and NaN become text."""
        return _plain(asdict(self) | {"routes": {n: _route(r) for n, r in self.routes.items()}})


def _route(route: RouteAttribution) -> dict[str, object]:
    first = route.first_over_floor
    points = [asdict(p) | {"excess": p.excess, "over_floor": p.over_floor} for p in route.points]
    return asdict(route) | {
        "points": points,
        "first_over_floor": None if first is None else first.point,
        "suspects": [p.point for p in route.suspects],
        "logprob_share": route.logprob_share,
    }


def _times(found: Spread, floor: Spread) -> float:
    return max(found.mean / floor.mean, found.max / floor.max)


def _plain(value: object) -> object:
    from rlalign.tracking.files import jsonable

    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return jsonable(value, "attribution")
