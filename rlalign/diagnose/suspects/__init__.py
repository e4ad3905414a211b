"""Which setting, which weight, which layer, which side: the likely causes of a mismatch, most likely first.

Given a live engine, the trainer's model and the trainer's own scoring function, a few experiments are made that change nothing:

    case          the sides, and the trainer's model asked in the plainest way (each sequence alone)
    experiments   how the engine answers: logprobs mode, temperature, truncation, tokenizer, prefix cache, key/value cache;
                  how the trainer calls its model: temperature, head, padding and mask, positions;
                  what the engine holds: every weight on every rank, epsilons, rotary frequencies, adapters

Each gives causes with its evidence and a score as in `rlalign.mismatch.causes`; `rank` puts them in order, with the step and layer
that `rlalign.diagnose.attribution` finds at fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlalign.diagnose.attribution.findings import Attribution, PointDifference
from rlalign.diagnose.both_sides import head_put_back
from rlalign.diagnose.suspects import experiments
from rlalign.diagnose.suspects.case import Case
from rlalign.mismatch.causes import Cause, Evidence, likely_causes

__all__ = ["Case", "rank", "report"]


def rank(case: Case, *, with_layers: bool = True) -> list[Cause]:
    """The likely causes, most likely first; the same cause from several experiments once, with all its evidence.

    Never empty: without a sign of a fault the first is plain numerical difference. with_layers: also the attribution, which takes
    longest.
    """
    found = [*experiments.of_answers(case), *experiments.of_calls(case), *experiments.of_weights(case)]
    found += _layers(case) if with_layers else []
    return merged([*found, *likely_causes(case.measured, _evidence(case))])


def _layers(case: Case) -> list[Cause]:
    """The attribution, or why there is none: an architecture it does not know must not hide the other causes."""
    try:
        return of_layers(case)
    except (ValueError, RuntimeError) as error:
        return [Cause("layers not looked at", str(error), COMMAND, 0.05)]


def merged(causes: Iterable[Cause]) -> list[Cause]:
    """One entry a name: the highest score and its command, every reason, the strongest first."""
    by_name: dict[str, list[Cause]] = {}
    for cause in causes:
        by_name.setdefault(cause.name, []).append(cause)
    found = []
    for name, same in by_name.items():
        same.sort(key=lambda c: -c.score)
        reasons = "; ".join(dict.fromkeys(c.why for c in same))
        found.append(Cause(name, reasons, same[0].command, same[0].score))
    return sorted(found, key=lambda c: -c.score)


def report(causes: Sequence[Cause]) -> str:
    """A numbered list: name, evidence, and the command that would confirm it."""
    lines = []
    for i, cause in enumerate(causes, 1):
        lines += [f"{i}. {cause.name} ({cause.score:.2f}): {cause.why}", f"   confirm: {cause.command}"]
    return "\n".join(lines)


def _evidence(case: Case) -> Evidence:
    """What the run would record of itself. Whether it is true is what the experiments found out."""
    spec = case.engine.spec
    return Evidence(
        rollout_head=spec.head_dtype,
        trainer_head=spec.head_dtype,
        processed=spec.processed,
        rollout_temperature=spec.temperature,
        trainer_temperature=spec.temperature,
        truncated=spec.truncated,
        replayed=case.batch.spec.truncated and case.batch.kept is not None,
        prefix_cache_reset=True,
        publish_verified=True,
        retokenized=0,
    )


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


def of_layers(case: Case) -> list[Cause]:
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
