"""One answer of the doctor, groups of them, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

STATES = ("ok", "problem", "unknown")


@dataclass(frozen=True, slots=True)
class Check:
    """One answer. state: ok, problem or unknown (could not be looked at, which is not the same as fine)."""

    name: str
    state: str
    found: str
    remedy: str = ""


def judged(name: str, fine: bool, found: str, remedy: str) -> Check:
    """ok, or a problem with its remedy."""
    return Check(name, "ok" if fine else "problem", found, "" if fine else remedy)


def guarded(name: str, checks: Callable[[], Iterator[Check]]) -> list[Check]:
    """The checks of a group. An error of ours is a problem with its own remedy in the message, and ends only this group."""
    found = []
    try:
        for check in checks():
            found.append(check)
    except (ValueError, RuntimeError, OSError) as error:
        found.append(Check(name, "problem", str(error)))
    return found


def report(checks: Sequence[Check]) -> str:
    """One line a check, and one more where something is to be done."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:8} {check.name:{width}}  {check.found}")
        lines += [f"{'':8} {'':{width}}  -> {check.remedy}"] if check.remedy else []
    counts = {state: sum(c.state == state for c in checks) for state in STATES}
    return "\n".join([*lines, "", ", ".join(f"{n} {state}" for state, n in counts.items())])


def as_json(checks: Sequence[Check]) -> str:
    """The checks as a JSON list."""
    return json.dumps([asdict(check) for check in checks], indent=2)
