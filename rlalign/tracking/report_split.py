"""The report's sections on what the mismatch is made of: engine, staleness, noise floor; and what the correction did about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from rlalign.tracking import report_plots as plots
from rlalign.tracking.record import RunRecord
from rlalign.tracking.report_page import chip, figure, grid, num, section, table
from rlalign.tracking.report_plots import Line
from rlalign.tracking.report_runs import DASHES, Shown, chart, legend, lines_of

PARTS = (
    ("engine", "engine, lag 0", "the trainer's own version sampled the token: nothing but the two engines differs"),
    (
        "staleness",
        "staleness, lag 1 and more",
        "an older version sampled it: the policy has moved, and the engines differ as well",
    ),
    (
        "floor",
        "noise floor",
        'the rollout engine against itself, as <code class="whole">rlalign parity --noise-floor</code> measured it',
    ),
)


def parts_of(run: RunRecord) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and k3 of each part, in nats; a part that was not measured has no steps."""
    steps, excess = run.series("mismatch/excess/k3")
    engine = dict(zip(*run.series("mismatch/lag0/k3"), strict=True))
    floor = [engine[step] - value for step, value in zip(steps, excess, strict=True) if step in engine]
    found = {"engine": run.series("mismatch/lag0/k3"), "staleness": run.series("staleness/k3")}
    if not found["staleness"][0]:
        found["staleness"] = run.series("mismatch/lag1/k3")  # runs before the sum over lags was logged
    return found | {"floor": ([step for step in steps if step in engine], floor)}


def three(runs: Sequence[Shown]) -> str:
    """k3 of the three in one chart, and their medians."""
    parts = [parts_of(run.record) for run in runs]
    lines, items = [], []
    for (name, label, _), (style, css), color in zip(PARTS, DASHES, plots.RUN_COLORS, strict=False):
        of_part = [(run, found[name]) for run, found in zip(runs, parts, strict=True) if found[name][0]]
        single = len(runs) == 1
        lines += [
            Line(steps=x, values=y, color=color if single else run.color, style="-" if single else style)
            for run, (x, y) in of_part
        ]
        mark = chip(color) if single else f'<span class="dash" style="border-top-style:{css}"></span>'
        items += [f'<span class="item">{mark}{label}</span>'] if of_part else []
    if not lines:
        return ""
    svg = plots.line_chart(lines, log=True, name="three")
    drawn = figure(svg, "k3 by cause", "nats per token, log scale", "".join(items), legend(runs))
    lead = (
        "Three quantities that one number would mix. Only the first is a fault of the engines, and only what exceeds the floor "
        "can be fixed."
    )
    return section("Mismatch split in three", grid([drawn, _medians(runs, parts)]), lead)


def _medians(runs: Sequence[Shown], parts: Sequence[dict[str, tuple[list[float], list[float]]]]) -> str:
    rows = []
    for name, label, meaning in PARTS:
        cells = []
        for run, found in zip(runs, parts, strict=True):
            values = [value for value in found[name][1] if math.isfinite(value)]
            fresh = name == "staleness" and set(run.record.series("staleness/policy/max")[1]) == {0.0}
            missing = f'<span class="none">{"no such token" if fresh else "not measured"}</span>'
            cells.append(num(median(values), ".2e") if values else missing)
        rows.append([f'{label}<span class="note wrap">{meaning}</span>', *cells])
    return table(["median k3, nats", *(run.html or "" for run in runs)], rows)


def staleness(runs: Sequence[Shown]) -> str:
    """How old the tokens are, the age of their keys and values, and how far the policy moves inside a step."""
    charts = [
        chart(
            runs, "Age of the tokens", "versions behind the trainer",
            ("staleness/policy/mean", "mean"), ("staleness/policy/max", "oldest"), neutral=0.0,
        ),
        chart(
            runs, "Age of the keys and values", "versions behind the trainer",
            ("staleness/kv/mean", "mean"), ("staleness/kv/max", "oldest"), neutral=0.0,
        ),
        chart(
            runs, "Movement inside a step", "k1 from old_logprobs to the policy being trained, nats",
            ("train/k1_old", ""), neutral=0.0,
        ),
    ]  # fmt: skip
    lead = "Versions are optimizer steps. A quantity that stayed 0 has no chart."
    return section("Staleness", grid(charts), lead)


def corrections(runs: Sequence[Shown]) -> str:
    """What the correction kept, weighed and rejected."""
    charts = [
        chart(
            runs, "Effective sample size, tokens kept", "shares of the masked tokens",
            ("correction/ess", "effective sample size"), ("correction/kept_frac", "kept"), neutral=1.0,
        ),
        chart(
            runs, "Importance weights", "of the kept tokens",
            ("correction/weight_max", "largest"), ("correction/weight_mean", "mean"), ("correction/weight_min", "smallest"),
            neutral=1.0,
        ),
        _kept_and_rejected(runs),
        _truncated(runs),
    ]  # fmt: skip
    lead = "After the raw numbers above. A correction that never did anything has no chart."
    return section("Corrections", grid(charts), lead)


def _truncated(runs: Sequence[Shown]) -> str:
    """Only where weights were used: without them every weight is 1, which is never the ratio."""
    if all(value == 1.0 for line in lines_of(runs, "correction/weight_max") for value in line.values):
        return ""
    note = "share of tokens whose weight is not their ratio"
    return chart(runs, "Ratios changed", note, ("correction/changed_share", ""), neutral=0.0)


def _kept_and_rejected(runs: Sequence[Shown]) -> str:
    """Only where something was rejected: otherwise the kept tokens are all tokens."""
    rejected = lines_of(runs, "correction/k3_rejected")
    if not any(math.isfinite(value) for line in rejected for value in line.values):
        return ""
    keys = (("correction/k3_rejected", "rejected"), ("correction/k3_kept", "kept"))
    return chart(runs, "k3 of rejected and kept tokens", "nats per token, log scale", *keys, log=True)
