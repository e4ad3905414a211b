"""`rlalign mismatch FILE`: read a token dump, print the report, write what was asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlalign.diagnose.offline import analyse


def run(
    path: Path,
    *,
    columns: Sequence[str] = (),
    plot: Path | None = None,
    json_path: Path | None = None,
    k3_limit: float | None = None,
    worst: int = 10,
    all_tokens: bool = False,
) -> int:
    """Read, print, and write what was asked for. Returns 1 when k3 is over k3_limit (or undefined), else 0.

    path: a file, a directory of them, or a glob. all_tokens: no mask is needed, every token counts.
    columns: "field=name" pairs for dumps whose names are unknown. Raises ValueError on a dump that cannot be read.
    """
    from rlalign.diagnose.offline import jsonable, report, write_plot

    pairs = [pair.partition("=") for pair in columns]
    if wrong := ["".join(p) for p in pairs if not (p[0] and p[2])]:
        raise ValueError(f"--column takes field=name, got {wrong}")
    analysis = analyse(path, columns={name: column for name, _, column in pairs}, worst=worst, all_tokens=all_tokens)
    print(report(analysis))
    if json_path:
        json_path.write_text(json.dumps(jsonable(analysis), indent=2, allow_nan=False))
    if plot:
        write_plot(analysis, plot)
        print(f"\nplot: {plot}")
    if k3_limit is not None and not analysis.overall["k3"] <= k3_limit:
        k3 = analysis.overall["k3"]
        undefined = "is undefined, which passes no limit" if k3 != k3 else "is over the limit"
        print(f"\nk3 = {k3:.3g} nats/token {undefined} {k3_limit:g}")
        return 1
    return 0
