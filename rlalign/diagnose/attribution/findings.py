"""How far two recordings of one point are apart, token by token, and what attribution finds: differences, floors, where they start.

Suffixes: N tokens, D features.
Of one token: absolute = root mean square of the difference over its features; relative = |a - b| / max(|a|, |b|), Euclidean;
cosine of the angle between a and b. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlalign.diagnose.attribution.mapping import LOGITS, ModelMap
from rlalign.diagnose.attribution.trainer_side import LOGPROBS, Removed
from rlalign.rollout.engine import teacher_forcing
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.rollout.engine.teacher_forcing import Forced, Route
from rlalign.rollout.worker.recording import POSITION, SEQUENCE, Recording
from rlalign.types import RolloutBatch

ELEMENTS = 2**22  # compared at once


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one number per token."""

    mean: float
    p99: float
    max: float

    @classmethod
    def of(cls, values_N: Tensor) -> Spread:
        """Raises ValueError for no tokens."""
        if not len(values_N):
            raise ValueError("no tokens to summarise")
        return cls(float(values_N.mean()), float(torch.quantile(values_N.double(), 0.99)), float(values_N.max()))


@dataclass(frozen=True, slots=True)
class TokenDifferences:
    """One point, one row per token. rows_N3: (sequence, position, decoded)."""

    rows_N3: Tensor
    absolute_N: Tensor
    relative_N: Tensor
    cosine_N: Tensor


def differences(
    one: Recording, other: Recording, point: str, rows: tuple[Tensor, Tensor], *, width: int
) -> TokenDifferences:
    """These rows of both recordings, compared pair by pair. width: features of the whole point."""
    step = max(1, ELEMENTS // width)
    found = [
        _compare(one.read(point, mine, width=width), other.read(point, theirs, width=width))
        for mine, theirs in zip(rows[0].split(step), rows[1].split(step), strict=True)
    ]
    stacked = torch.cat(found, dim=1) if found else torch.zeros(3, 0, dtype=torch.float64)
    return TokenDifferences(one.table(point)[rows[0]], *stacked)


def common_rows(one_N3: Tensor, other_N3: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers in both tables of the tokens that are in both."""
    places = {(s, p): i for i, (s, p) in enumerate(other_N3[:, [SEQUENCE, POSITION]].tolist())}
    pairs = [
        (i, places[(s, p)]) for i, (s, p) in enumerate(one_N3[:, [SEQUENCE, POSITION]].tolist()) if (s, p) in places
    ]
    both = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _compare(one_ND: Tensor, other_ND: Tensor) -> Tensor:
    """[3, N]: absolute, relative, cosine."""
    one_ND, other_ND = one_ND.double(), other_ND.double()
    apart_N = (one_ND - other_ND).norm(dim=1)
    norm_N, other_norm_N = one_ND.norm(dim=1), other_ND.norm(dim=1)
    largest_N, product_N = torch.maximum(norm_N, other_norm_N), norm_N * other_norm_N
    relative_N = torch.where(largest_N > 0, apart_N / largest_N, torch.zeros_like(apart_N))  # both zero: equal
    cosine_N = torch.where(product_N > 0, (one_ND * other_ND).sum(1) / product_N, (largest_N == 0).double())
    return torch.stack([apart_N / one_ND.shape[1] ** 0.5, relative_N, cosine_N])


def scalar_differences(one_N: Tensor, other_N: Tensor, rows_N3: Tensor) -> TokenDifferences:
    """The same for one number per token, such as its logprob: the cosine then only tells the signs."""
    return TokenDifferences(rows_N3, *_compare(one_N[:, None], other_N[:, None]))


def compared(
    one: Recording, other: Recording, point: str, batch: RolloutBatch, width: int, route: Route = Route.prefill
) -> TokenDifferences:
    """The differences at the tokens that count."""
    return differences(one, other, point, counted(one, other, point, batch, route), width=width)


def counted(
    one: Recording, other: Recording, point: str, batch: RolloutBatch, route: Route = Route.prefill
) -> tuple[Tensor, Tensor]:
    """Row numbers in both recordings of the tokens that precede a scored token; for logits, that directly precede one.

    On the decode route only tokens that `one` decoded count; the logits behind the prompt are sampled from too.
    """
    rows_N, other_rows_N = common_rows(one.table(point), other.table(point))
    sequence_N, position_N, decoded_N = one.table(point)[rows_N].unbind(1)
    if point == LOGITS:
        predicts_BL = torch.nn.functional.pad(batch.loss_mask_BL[:, 1:], (0, 1))
        keep_N = predicts_BL[sequence_N, position_N]
    else:
        last_B = torch.where(batch.loss_mask_BL, torch.arange(batch.token_ids_BL.shape[1]), 0).amax(1)
        keep_N = (position_N < last_B[sequence_N]) & ((decoded_N == 1) | (route is Route.prefill))
    return rows_N[keep_N], other_rows_N[keep_N]


def scored(one_BL: Tensor, other_BL: Tensor, batch: RolloutBatch) -> TokenDifferences:
    """Logprobs of the scored tokens, at the position that predicts them."""
    sequence_N, position_N = batch.loss_mask_BL.nonzero(as_tuple=True)
    rows_N3 = torch.stack([sequence_N, position_N - 1, torch.zeros_like(position_N)], dim=1)
    return scalar_differences(one_BL[batch.loss_mask_BL], other_BL[batch.loss_mask_BL], rows_N3)


def distinct(one: Recording, point: str, rows: tuple[Tensor, Tensor], batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """The first row of every context: samples of one prompt share its tokens, and so their activations."""
    seen: set[tuple[int, ...]] = set()
    keep = []
    for i, (sequence, position, _) in enumerate(one.table(point)[rows[0]].tolist()):
        context = tuple(batch.token_ids_BL[sequence, : position + 1].tolist())
        if context not in seen:
            seen.add(context)
            keep.append(i)
    return rows[0][keep], rows[1][keep]


# standard errors, as thousands of features are tested at once; at least 50 tokens are needed to get there
SIGNIFICANT = 7.0


@dataclass(frozen=True, slots=True)
class Bias:
    """The largest significant deviation of a gain from 1, and where it is: "all" or "feature 17"; 0.0 and "" for none."""

    size: float = 0.0
    where: str = ""


def bias(one: Recording, other: Recording, point: str, rows: tuple[Tensor, Tensor], *, width: int) -> Bias:
    """How much larger `other` is than `one`, in all or along one feature, beyond what rounding explains.

    The gain is the slope of `other` against `one`; its standard error comes from the scatter of the same differences, with the
    features of a token taken together, since one rounded scalar (a norm, a router weight) moves all of them (White, 1980). No
    size of rounding is assumed. rows: of both recordings, pair by pair; tokens with equal values count once, being no new evidence.
    """
    sums_3D, sums_3 = torch.zeros(3, width, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    seen: set[float] = set()
    step = max(1, ELEMENTS // width)
    for mine, theirs in zip(rows[0].split(step), rows[1].split(step), strict=True):
        one_ND, other_ND = one.read(point, mine, width=width).double(), other.read(point, theirs, width=width).double()
        fresh_N = _first_seen(one_ND, seen)
        one_ND, apart_ND = one_ND[fresh_N], other_ND[fresh_N] - one_ND[fresh_N]
        product_ND, squares_ND = apart_ND * one_ND, one_ND.square()
        sums_3D += torch.stack([product_ND.sum(0), product_ND.square().sum(0), squares_ND.sum(0)])
        sums_3 += torch.stack([product_ND.sum(), product_ND.sum(1).square().sum(), squares_ND.sum()])
    size_D, size = _significant(*sums_3D), float(_significant(*sums_3))
    if size and size > float(size_D.max()) / 2:
        return Bias(size, "all")  # said of everything rather than of its worst part
    return Bias(float(size_D.max()), f"feature {int(size_D.argmax())}") if float(size_D.max()) else Bias()


def _significant(product: Tensor, squares: Tensor, norm: Tensor) -> Tensor:
    """|gain - 1| from sums of d*x, (d*x)^2 and x^2; 0 where it is not significant."""
    sure = product.abs() > SIGNIFICANT * squares.sqrt()
    return torch.where(sure & (norm > 0), product.abs() / norm.clamp_min(1e-300), 0.0)


def _first_seen(values_ND: Tensor, seen: set[float]) -> Tensor:
    """Indices of rows whose values did not come before."""
    weights_D = torch.linspace(0.5, 1.5, values_ND.shape[1], dtype=torch.float64).sin()
    fresh = []
    for i, key in enumerate((values_ND @ weights_D).tolist()):
        if key not in seen:
            seen.add(key)
            fresh.append(i)
    return torch.tensor(fresh, dtype=torch.int64)


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
