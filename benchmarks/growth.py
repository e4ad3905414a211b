"""What the k3 of finished runs follows: correlation and lead of each traced series. Writes results/growth.md.

rlalign train ... tracking.trace_every=N
python -m benchmarks.growth NAME=RUN_DIRECTORY ...
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from rlalign.report.run_page import growth
from rlalign.tracking import environment
from rlalign.tracking.record import RunRecord, read_run

OUT = Path(__file__).parent / "results" / "growth.md"
SHOWN = 8  # strongest series of each run
K3 = "mismatch/lag0/k3"
ABOUT = """\
# Why a mismatch grows: what k3 follows

`rlalign train ... tracking.trace_every=N`, then `python -m benchmarks.growth NAME=RUN ...`. **changes**: Spearman's correlation of
the changes from row to row of a series with those of log k3, at the **lead** (rows) that fits best; **levels**: of the series
themselves, at that lead, which two unrelated trends reach as well. **chance**: what the largest of as many unrelated series reaches
in 5 % of the cases; a series counts only beyond it.

{cpu}, vllm {vllm}, torch {torch}; shared with other work.
"""


def tenths(rows: list[dict], key: str) -> tuple[float, float]:
    """Means over the first and the last tenth of the rows that have it."""
    values = [row[key] for row in rows if key in row]
    count = max(1, len(values) // 10)
    return fmean(values[:count]), fmean(values[-count:])


def section(name: str, run: RunRecord) -> str:
    """One run: whether k3 grew, and the strongest series."""
    rows, found = list(run.metrics.rows), growth(run)
    (k3_0, k3_1), (entropy_0, entropy_1) = tenths(rows, K3), tenths(rows, "train/entropy")
    reward_0, reward_1 = tenths(rows, "reward/mean")
    evaluated = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    beyond = [f for f in found if f.beyond_chance]
    lines = [
        f"## {name}",
        "",
        f"{len(rows)} steps; first and last tenth: reward {reward_0:.3f}, {reward_1:.3f}; entropy {entropy_0:.3f}, "
        f"{entropy_1:.3f} nats; k3 {k3_0:.2e}, {k3_1:.2e} ({k3_1 / k3_0:.2g} times); held-out "
        f"{evaluated[0]:.3f}, {evaluated[-1]:.3f}.",
    ]
    if not found:
        return "\n".join([*lines, "", "Too few traced rows for a correlation.", ""])
    lines += [
        f"{len(beyond)} of {len(found)} series are beyond chance ({found[0].chance:.2f}).", "",
        "| series | changes | lead | levels | beyond chance |", "|---|--:|--:|--:|---|",
    ]  # fmt: skip
    named = [f for f in found if not f.name.startswith("trace/apart/")]
    shown = found[:SHOWN] + [f for f in named if f not in found[:SHOWN]][:SHOWN]
    lines += [
        f"| `{f.name}` | {f.changes:+.2f} | {f.lead} | {f.levels:+.2f} | {'yes' if f.beyond_chance else ''} |"
        for f in shown
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Read the runs and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_DIRECTORY")
    items = [item.partition("=") for item in parser.parse_args().runs]
    versions = environment.snapshot()["versions"]
    about = ABOUT.format(cpu=environment.cpu_model(), **versions)
    OUT.write_text("\n".join([about, *(section(name, read_run(Path(folder))) for name, _, folder in items)]))
    print(OUT.read_text())


if __name__ == "__main__":
    main()
