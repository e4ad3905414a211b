"""The runs of a page: their names and colours, and their metrics as lines of a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlalign.tracking import report_plots as plots
from rlalign.tracking.record import RunRecord
from rlalign.tracking.report_page import chip, esc, figure
from rlalign.tracking.report_plots import Line


@dataclass(frozen=True, slots=True)
class Shown:
    """A run on the page: its record, its name as HTML (with a letter and its colour when there are several)."""

    record: RunRecord
    plain: str
    html: str
    color: str


def named(records: Sequence[RunRecord]) -> list[Shown]:
    """Names and colours; a single run needs neither."""
    if len(records) == 1:
        return [Shown(records[0], records[0].name, "", plots.RUN_COLORS[0])]
    plain = [f"{letter} {record.name}" for letter, record in zip("ABCDEF", records, strict=False)]
    colors = plots.RUN_COLORS[: len(records)]
    return [Shown(r, p, f"{chip(c)}{esc(p)}", c) for r, p, c in zip(records, plain, colors, strict=True)]


def lines_of(
    runs: Sequence[Shown], key: str, *, style: str = "-", smooth: bool = False, markers: bool = False
) -> list[Line]:
    """One metric of every run that logged it."""
    lines = []
    for run in runs:
        steps, values = run.record.series(key)
        if steps:
            lines.append(Line(steps=steps, values=values, color=run.color, style=style, smooth=smooth, markers=markers))
    return lines


DASHES = (("-", "solid"), ("--", "dashed"), (":", "dotted"), ("-.", "double"))


def chart(
    runs: Sequence[Shown],
    title: str,
    note: str,
    *keys: tuple[str, str],
    log: bool = False,
    neutral: float | None = None,
    smooth: bool = False,
    markers: bool = False,
) -> str:
    """Up to four metrics (key, label) in one chart; empty where no run logged any of them.

    One run tells its metrics apart by colour, several by dashes, as the colours are the runs'. neutral: the value of a quantity
    that never did anything; a chart of such values is left out.
    """
    lines, shown = [], []
    for (key, label), (style, css), color in zip(keys, DASHES, plots.RUN_COLORS, strict=False):
        found = lines_of(runs, key, style=style if len(runs) > 1 else "-", smooth=smooth, markers=markers)
        if len(runs) == 1:
            found = [replace(line, color=color) for line in found]
        if found:
            mark = chip(color) if len(runs) == 1 else f'<span class="dash" style="border-top-style:{css}"></span>'
            shown.append(f'<span class="item">{mark}{esc(label)}</span>')
        lines += found
    if neutral is not None and all(value == neutral for line in lines for value in line.values):
        return ""
    if not lines:
        return ""
    svg = plots.line_chart(lines, log=log, name=f"{keys[0][0]}-{len(keys)}".replace("/", "-"))
    return figure(svg, title, note, "".join(shown) if len(shown) > 1 else "", legend(runs))


def legend(runs: Sequence[Shown]) -> str:
    """Which colour is which run; empty for a single one."""
    return "".join(f'<span class="item">{run.html}</span>' for run in runs) if len(runs) > 1 else ""


def each(runs: Sequence[Shown], bodies: Sequence[str]) -> str:
    """The parts of all runs under one heading, each with its run's name when there are several."""
    return "".join(
        f"<p><b>{run.html}</b></p>{body}" if run.html else body for run, body in zip(runs, bodies, strict=True) if body
    )
