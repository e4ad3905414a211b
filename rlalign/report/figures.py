"""The runs of a page with their names and colours, and the charts of the table drawn from their metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rlalign.report import plots
from rlalign.report.charts import FLOOR, Chart
from rlalign.report.html import MACROS, chip, figure
from rlalign.report.plots import Line
from rlalign.tracking.record import RunRecord

__all__ = ["Shown", "at", "drawn", "items", "k3_limit", "legend", "named", "number_at", "series"]

LOOKS = (("-", "solid"), ("--", "dashed"), (":", "dotted"), ("-.", "double"))  # of matplotlib and of CSS


@dataclass(frozen=True, slots=True)
class Shown:
    """A run on the page: its record, its name as HTML (with a letter and its colour when there are several)."""

    record: RunRecord
    plain: str
    html: Markup
    color: str


def named(records: Sequence[RunRecord]) -> list[Shown]:
    """Names and colours; a single run needs neither."""
    if len(records) == 1:
        return [Shown(records[0], records[0].name, Markup(), plots.RUN_COLORS[0])]
    plain = [f"{letter} {record.name}" for letter, record in zip("ABCDEF", records, strict=False)]
    return [Shown(r, p, chip(c) + p, c) for r, p, c in zip(records, plain, plots.RUN_COLORS, strict=False)]


def at(nested: Mapping, path: str) -> object:
    """A value of nested dictionaries by its dotted path, None where there is none."""
    value: object = nested
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number_at(nested: Mapping, path: str) -> float | None:
    """The same, where it is a number."""
    value = at(nested, path)
    return float(value) if isinstance(value, int | float) else None


def k3_limit(run: RunRecord) -> float | None:
    """The gate's limit, where the configuration has one."""
    return number_at(run.config, "mismatch.k3_limit")


def series(run: RunRecord, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, logged or computed from others; empty where it was not measured."""
    if key == FLOOR:
        engine = dict(zip(*run.series("mismatch/lag0/k3"), strict=True))
        excess = dict(zip(*run.series("mismatch/excess/k3"), strict=True))
        steps = [step for step in excess if step in engine]
        return steps, [engine[step] - excess[step] for step in steps]
    steps, values = run.series(key)
    if key == "staleness/k3" and not steps:
        return run.series("mismatch/lag1/k3")  # runs before the sum over lags was logged
    return steps, values


def drawn(charts: Sequence[Chart], runs: Sequence[Shown], name: str = "*") -> list[Markup]:
    """The charts that have something to show. name: what `*` stands for; without one, every name that was logged."""
    found = (_drawn(chart, runs, name) for chart in charts if not chart.in_table)
    return [each for each in found if each]


def _drawn(chart: Chart, runs: Sequence[Shown], name: str) -> Markup:
    """Labels differ in dashes, so that equal lines do not hide each other, and with a single run in colour as well."""
    keys, note = _expanded(chart, runs, name)
    labels, single = list(dict.fromkeys(keys.values())), len(runs) == 1
    lines: list[Line] = []
    marks: dict[str, Markup] = {}
    for key, label in keys.items():
        (style, css), color = LOOKS[labels.index(label)], plots.RUN_COLORS[labels.index(label)]
        for run in runs:
            steps, values = series(run.record, key)
            if steps:
                look = {"color": color if single else run.color, "style": style}
                lines.append(Line(steps=steps, values=values, smooth=chart.smooth, markers=chart.markers, **look))
                marks[label] = MACROS["dash"](css, color if single else plots.INK)
    if not lines or len(keys) < chart.fewest or _idle(chart, runs, lines):
        return Markup()
    limits = {number_at(run.record.config, chart.limit) for run in runs} - {None} if chart.limit else set()
    limit = limits.pop() if len(limits) == 1 else None
    svg = plots.line_chart(lines, log=chart.log, limit=limit, name=f"{chart.title}-{'-'.join(keys)}")
    return figure(svg, chart.title, note, items(marks) if len(labels) > 1 else "", legend(runs))


def _expanded(chart: Chart, runs: Sequence[Shown], name: str) -> tuple[dict[str, str], str]:
    """{key: label} with names instead of `*`, at most as many as can be told apart, and the note."""
    if name != "*" or not chart.regex:
        return {key.replace("*", name): label for key, label in chart.lines.items()}, chart.note
    pattern = re.compile("|".join(key.replace("*", "([^/]+)") for key in chart.lines))
    logged = {key for run in runs for row in run.record.metrics.rows for key in row}
    found = [(match[0], match[match.lastindex or 0]) for match in map(pattern.fullmatch, sorted(logged)) if match]
    more = len(found) - len(LOOKS)
    note = f"{chart.note}; {more} more are in metrics.jsonl" if more > 0 else chart.note
    return dict(found[: len(LOOKS)]), note


def _idle(chart: Chart, runs: Sequence[Shown], lines: Sequence[Line]) -> bool:
    """Whether it would show something that never did anything."""
    if chart.idle is not None and all(value == chart.idle for line in lines for value in line.values):
        return True
    if chart.active is None:
        return False
    key, idle = chart.active
    return all(value == idle or not math.isfinite(value) for run in runs for value in series(run.record, key)[1])


def items(marks: dict[str, Markup]) -> Markup:
    """A legend from {label: mark}."""
    return Markup().join(MACROS["item"](mark, label) for label, mark in marks.items())


def legend(runs: Sequence[Shown]) -> Markup:
    """Which colour is which run; empty for a single one."""
    return items({run.html: Markup() for run in runs}) if len(runs) > 1 else Markup()
