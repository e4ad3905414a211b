"""The charts of a page as inline SVG, drawn from the metrics of its runs. No text of a run enters one: captions are HTML."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rlalign.calibration.metrics.reliability import draw_reliability
from rlalign.report.charts import FLOOR, Chart
from rlalign.report.html import MACROS, chip, figure, short
from rlalign.tracking.record import RunRecord

__all__ = [
    "Line", "Shown", "at", "drawn", "histogram", "items", "k3_limit", "legend", "line_chart", "named", "number_at",
    "phase_color", "reliability", "series", "stacked", "thinned",
]  # fmt: skip

WIDTH, HEIGHT = 430, 220  # points = SVG units; the page scales a chart to its column
POINTS = 300  # a line has at most this many points; more steps are averaged, with a band from smallest to largest
RUN_COLORS = ("#0b62a8", "#c8501e", "#2a8c5a", "#8a4fbf", "#a07a14", "#444b57")
PHASE_COLORS = {
    "rollout": "#0b62a8", "reward": "#b07d12", "score": "#5a9bc7", "train": "#c8501e", "publish": "#2a8c5a", "eval": "#3f7fb5",
    "probe": "#7fa8c9", "wait": "#9aa1ad", "head": "#8a4fbf", "checkpoint": "#6b7280",
}  # fmt: skip
LIMIT_COLOR, INK, QUIET, GRID, EDGE = "#b3261e", "#1f2430", "#5d6675", "#e6e8ec", "#b9bec8"
STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # widest of the likely fonts, so text laid out with it fits in any other
    "font.size": 10.5, "text.color": INK, "lines.solid_capstyle": "round",
    "axes.edgecolor": EDGE, "axes.labelcolor": QUIET, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "xtick.color": QUIET, "ytick.color": QUIET, "xtick.major.size": 3, "ytick.major.size": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One metric of one run. style: matplotlib's dash pattern; smooth: draw it thin under its running mean."""

    steps: Sequence[float]
    values: Sequence[float]
    color: str
    style: str = "-"
    smooth: bool = False
    markers: bool = False


def line_chart(lines: Sequence[Line], *, log: bool = False, limit: float | None = None, name: str) -> Markup:
    """Metrics over steps; steps whose value is not finite get a cross at the bottom.

    log: a log axis of at least one decade, zeros drawn under the smallest value. limit: a line values must stay under.
    """

    def draw(axes: Axes) -> None:
        floor = _log_axis(axes, lines, limit) if log else None
        for line in lines:
            _draw(axes, line, floor)
        if limit is not None:
            axes.axhline(limit, color=LIMIT_COLOR, linewidth=1.1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"limit {short(limit)}", (1, limit), (0, -4), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="top", color=LIMIT_COLOR,
            )  # fmt: skip
        _step_axis(axes)

    return _svg(draw, name)


def histogram(values: np.ndarray, *, color: str, low: float, high: float, name: str) -> Markup:
    """Tokens per |log_ratio| on two log axes, exact zeros as a bar of their own, median and p99 marked.

    values: sorted, finite, >= 0. low, high: the decades shown, equal for all runs of a page; values outside are in the
    first and last bin.
    """
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    last = max(last, first + 1)
    edges = np.logspace(first, last, (last - first) * 6 + 1)
    counts, _ = np.histogram(np.clip(values[values > 0], edges[0], edges[-1]), edges)
    zeros = int((values == 0).sum())
    left = edges[0] / 10**0.75 if zeros else edges[0]

    def draw(axes: Axes) -> None:
        axes.set(xscale="log", yscale="log", ylim=(0.7, max(counts.max(initial=1), zeros) * 12))
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=color, alpha=0.85, linewidth=0)
        if zeros:
            axes.bar(left * 10**0.15, zeros, left * (10**0.55 - 10**0.15), align="edge", color=color, alpha=0.45)
        axes.set_xlim(left, edges[-1])
        ticks = [10.0**d for d in range(first, last + 1, max(1, (last - first) // 7))]
        labels = [short(t) for t in ticks]
        if zeros:
            ticks, labels = [left * 10**0.35, *ticks[1:]], ["0", *labels[1:]]
        axes.set_xticks(ticks, labels)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(10, numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.yaxis.set_minor_locator(NullLocator())
        for q, label, height in ((0.5, "median", 0.985), (0.99, "p99", 0.89)):
            _mark(axes, float(np.quantile(values, q)) if values.size else 0.0, label, height, left, edges[-1])
        axes.set(xlabel="|log_ratio| in nats", ylabel="tokens")

    return _svg(draw, name)


def stacked(steps: Sequence[float], phases: dict[str, Sequence[float]], *, top: float, name: str) -> Markup:
    """Seconds per step, phases on top of each other. top: the y limit, equal for all runs of a page."""

    def draw(axes: Axes) -> None:
        grouped = [_groups(np.asarray(steps), np.asarray(values, dtype=float)) for values in phases.values()]
        x = grouped[0][0]
        step = (x[1] - x[0]) if len(x) > 1 else 1.0
        width, base = step * (0.86 if len(x) <= 80 else 1.0), np.zeros(len(x))
        for phase, (_, mean, _, _) in zip(phases, grouped, strict=True):
            axes.bar(x, mean, width, bottom=base, color=phase_color(phase), linewidth=0)
            base = base + np.nan_to_num(mean)
        axes.set(ylim=(0, top * 1.05), xlim=(x[0] - step * 0.6, x[-1] + step * 0.6), ylabel="seconds")
        axes.grid(axis="x", visible=False)
        _step_axis(axes)

    return _svg(draw, name, HEIGHT - 30)


def reliability(bins: Sequence[Mapping[str, float]], *, color: str, name: str) -> Markup:
    """Observed rate against promised probability with 95 % ranges; a point's area grows with its share of the samples."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=EDGE, linewidth=1.1, linestyle=(0, (4, 3)))
        draw_reliability(axes, bins, color=color)
        axes.set(xlabel="calibrated probability", ylabel="share that is right")

    return _svg(draw, name)


def phase_color(phase: str) -> str:
    """Its colour in every chart; phases nobody has named share one."""
    return PHASE_COLORS.get(phase, "#444b57")


def thinned(steps: int) -> str:
    """What a page says about charts with more steps than points; empty where every step is drawn."""
    size = -(-steps // POINTS)
    said = f"Charts draw means of {size} neighbouring steps; the band reaches from the smallest to the largest."
    return said if size > 1 else ""


def _step_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step")


def _draw(axes: Axes, line: Line, floor: float | None) -> None:
    steps, values = np.asarray(line.steps, dtype=float), np.asarray(line.values, dtype=float)
    bad = ~np.isfinite(values)
    shown = np.where(bad, np.nan, values)
    if floor is not None:
        shown = np.where(shown <= 0, floor, shown)
    x, mean, low, high = _groups(steps, shown)
    if len(x) < len(steps):
        axes.fill_between(x, low, high, color=line.color, alpha=0.15, linewidth=0)
    marker = "o" if (line.markers and len(x) <= 60) or len(x) == 1 else None
    if line.smooth and len(x) >= 10:
        axes.plot(x, mean, color=line.color, linewidth=0.9, alpha=0.35)
        axes.plot(x, _running_mean(mean), color=line.color, linewidth=2.0, linestyle=line.style)
    else:
        axes.plot(x, mean, color=line.color, linewidth=1.6, linestyle=line.style, marker=marker, markersize=4.5)
    if bad.any():
        bottom = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(steps[bad], np.full(bad.sum(), 0.03), "x", color=LIMIT_COLOR, markersize=5, **bottom)


def _groups(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most POINTS points: step, mean, smallest and largest finite value of neighbouring steps; NaN where all are."""
    size = max(1, int(np.ceil(len(steps) / POINTS)))
    parts = [values[i : i + size][np.isfinite(values[i : i + size])] for i in range(0, len(steps), size)]
    at = np.array([steps[i : i + size].mean() for i in range(0, len(steps), size)])
    stats = [(p.mean(), p.min(), p.max()) if p.size else (np.nan,) * 3 for p in parts]
    mean, low, high = np.array(stats).T
    return at, mean, low, high


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a tenth of the points, shrinking at the ends; NaN is left out."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([w[np.isfinite(w)].mean() if np.isfinite(w).any() else np.nan for w in windows])


def _log_axis(axes: Axes, lines: Sequence[Line], limit: float | None) -> float:
    """A log axis around the positive values and the limit; returns where zeros are drawn, at its lower edge.

    At least one decade, because less would magnify noise. Ticks at decades, or at 1-2-5 where few decades are shown.
    """
    values = np.concatenate([np.asarray(line.values, dtype=float) for line in lines])
    shown = [*values[np.isfinite(values) & (values > 0)], *([limit] if limit else [])] or [1e-12]
    low, high = np.log10(min(shown)) - 0.15, np.log10(max(shown)) + 0.15
    if (values <= 0).any():
        low -= 0.35
    spare = max(0.0, 1.0 - (high - low)) / 2
    low, high = max(low - spare, -320.0), high + spare
    axes.set_yscale("log")
    axes.set_ylim(10**low, 10**high)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high - low < 2.2 else (1,), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    axes.yaxis.set_minor_locator(NullLocator())
    return 10 ** (low + 0.1)


def _mark(axes: Axes, value: float, label: str, height: float, left: float, right: float) -> None:
    at = max(value, left)
    axes.axvline(at, color=INK, linewidth=1.1, linestyle=(0, (2, 2)))
    late = np.log10(at / left) > 0.6 * np.log10(right / left)
    axes.annotate(
        f"{label} {short(value)}", (at, height), (-4 if late else 4, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="right" if late else "left", va="top",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def _svg(draw: Callable[[Axes], None], name: str, height: float = HEIGHT) -> Markup:
    """What `draw` draws, as an SVG element for an HTML page: no prologue, no addresses, ids unique by `name`, reproducible."""
    buffer = io.StringIO()
    with matplotlib.rc_context(cast("Any", {**STYLE, "svg.hashsalt": name})):
        drawing = Figure(figsize=(WIDTH / 72, height / 72), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03))
        draw(drawing.add_subplot())
        FigureCanvasSVG(drawing).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#(\w+)', svg))  # names of groups and lines repeat between charts: drop them
    svg = re.sub(r'\sid="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    head = r'<svg viewBox="\1" role="img" aria-hidden="true">'
    return Markup(re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', head, svg, count=1))


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
        return [Shown(records[0], records[0].name, Markup(), RUN_COLORS[0])]
    plain = [f"{letter} {record.name}" for letter, record in zip("ABCDEF", records, strict=False)]
    return [Shown(r, p, chip(c) + p, c) for r, p, c in zip(records, plain, RUN_COLORS, strict=False)]


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
        (style, css), color = LOOKS[labels.index(label)], RUN_COLORS[labels.index(label)]
        for run in runs:
            steps, values = series(run.record, key)
            if steps:
                look = {"color": color if single else run.color, "style": style}
                lines.append(Line(steps=steps, values=values, smooth=chart.smooth, markers=chart.markers, **look))
                marks[label] = MACROS["dash"](css, color if single else INK)
    if not lines or len(keys) < chart.fewest or _idle(chart, runs, lines):
        return Markup()
    limits = {number_at(run.record.config, chart.limit) for run in runs} - {None} if chart.limit else set()
    limit = limits.pop() if len(limits) == 1 else None
    svg = line_chart(lines, log=chart.log, limit=limit, name=f"{chart.title}-{'-'.join(keys)}")
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
