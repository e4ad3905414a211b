"""Which step of which layer: the attribution's first and worst points, as causes."""

from __future__ import annotations

from collections.abc import Sequence

from rlalign.diagnose.attribution.findings import Attribution, PointDifference
from rlalign.diagnose.both_sides import head_put_back
from rlalign.diagnose.suspects.case import Case
from rlalign.mismatch.causes import Cause

COMMAND = "rlalign attribute"
KINDS = {  # what a step over its floor usually means
    "embed": "stale weights",
    "input_norm": "norm epsilon",
    "mlp_norm": "norm epsilon",
    "q_norm": "norm epsilon",
    "k_norm": "norm epsilon",
    "final_norm": "norm epsilon",
    "q_rope": "rope theta",
    "k_rope": "rope theta",
    "attention": "attention",
    "router": "router",
    "logits": "head weight",
    "logprobs": "temperature",
}
OTHERWISE = "stale weights"  # a linear layer that differs on the same input holds other weights
FIRST, FURTHER, FAINT = 0.85, 0.6, 0.4
SURE = 10.0  # times the floor; between three and this a bf16 step may be rounding that the floor did not meet


def causes(case: Case) -> list[Cause]:
    """One cause for the first step over its floor, one for each other kind of step over it."""
    from rlalign.diagnose.attribution.measure import measure

    if case.engine.spec.head_dtype == "master":
        return []
    with head_put_back(case.network):
        found = measure(case.engine, case.network, case.batch, patch=False)
    return of_attribution(found)


def of_attribution(found: Attribution) -> list[Cause]:
    """The causes that an attribution points at."""
    for route in found.routes.values():
        over = [p for p in route.points if p.over_floor]
        if over:
            return _from(route.route, over)
    return []


def _from(route: str, over: Sequence[PointDifference]) -> list[Cause]:
    by_name: dict[str, list[PointDifference]] = {}
    for point in over:
        by_name.setdefault(KINDS.get(point.kind, OTHERWISE), []).append(point)
    causes = []
    for name, points in by_name.items():
        worst = max(points, key=lambda p: p.excess)
        layers = sorted({p.layer for p in points if p.layer is not None})
        where = f" in layer(s) {', '.join(map(str, layers))}" if layers else ""
        why = (
            f"on the {route} path {points[0].point} is the first such step that differs on the same input{where}; worst: "
            f"{worst.point}, {worst.excess:.3g} times its floor"
        )
        score = FAINT if worst.excess < SURE else FIRST if over[0] in points else FURTHER
        causes.append(Cause(name, why, COMMAND, score))
    return causes
