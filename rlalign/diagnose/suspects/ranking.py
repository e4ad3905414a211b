"""All experiments, and their causes in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlalign.diagnose.suspects import asking, calling, holding, layer_at_fault
from rlalign.diagnose.suspects.case import Case
from rlalign.mismatch.causes import Cause, Evidence, likely_causes


def rank(case: Case, *, with_layers: bool = True) -> list[Cause]:
    """The likely causes, most likely first; the same cause from several experiments once, with all its evidence.

    Never empty: without a sign of a fault the first is plain numerical difference. with_layers: also the attribution, which takes
    longest.
    """
    found = [*asking.causes(case), *calling.causes(case), *holding.causes(case)]
    found += _layers(case) if with_layers else []
    return merged([*found, *likely_causes(case.measured, _evidence(case))])


def _layers(case: Case) -> list[Cause]:
    """The attribution, or why there is none: an architecture it does not know must not hide the other causes."""
    try:
        return layer_at_fault.causes(case)
    except (ValueError, RuntimeError) as error:
        return [Cause("layers not looked at", str(error), layer_at_fault.COMMAND, 0.05)]


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
