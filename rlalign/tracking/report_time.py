"""The report's sections on time: seconds per step, when the phases of the last steps really ran, and who was busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rlalign.tracking import report_plots as plots
from rlalign.tracking import report_tables as tables
from rlalign.tracking.report_page import chip, esc, figure, grid, num, section, short, table, wide
from rlalign.tracking.report_runs import Shown, chart, each
from rlalign.tracking.summary import phases_of
from rlalign.tracking.timeline import Span, Utilisation, merged, processes, utilisation

LAST_STEPS = 8  # of the Gantt chart
BARS = 400  # a chart with more is cut to its last ones, and says so
LANE, LABEL, TOP, BOTTOM, WIDTH = 24, 92, 18, 34, 1032
ORDER = ("eval", "rollout", "probe", "reward", "score", "train", "wait", "publish", "head", "checkpoint")
SHARES = {
    "generating": ("rollout engine alone", "#0b62a8"),
    "both": ("both at once", "#6d4fbf"),
    "training": ("trainer alone", "#c8501e"),
    "other": ("neither: rewards, publishing and the rest", "#2a8c5a"),
    "idle": ("nothing that is timed", "#d5d9e0"),
}


def time_sections(runs: Sequence[Shown]) -> str:
    """All of them; empty for runs that timed nothing."""
    return _steps(runs) + _busy(runs) + _gantts(runs)


def _steps(runs: Sequence[Shown]) -> str:
    charts, data = [], []
    for run in runs:
        found = phases_of(run.record.metrics.rows)
        rows = [row for row in run.record.metrics.rows if any(f"time/{p}_s" in row for p in found)]
        data.append(
            ([row["step"] for row in rows], {p: [row.get(f"time/{p}_s") or 0.0 for row in rows] for p in found})
        )
    totals = [sum(column) for _, phases in data for column in zip(*phases.values(), strict=True)]
    if not totals:
        return ""
    every = dict.fromkeys(phase for _, phases in data for phase in phases)
    legend = "".join(f'<span class="item">{chip(plots.phase_color(p))}{esc(p)}</span>' for p in every)
    for run, (steps, phases) in zip(runs, data, strict=True):
        if steps:
            svg = plots.stacked(steps, phases, top=max(totals), name=f"phases-{run.color}")
            charts.append(figure(svg, run.html or "Seconds per step", "", legend))
    if len(charts) == 1:
        charts.append(tables.phase_table(data[0][1]))
    charts.append(chart(runs, "Sampling speed", "tokens per second of the rollout phase", ("rollout/tokens_per_s", "")))
    return section("Where the time goes", grid(charts))


def _busy(runs: Sequence[Shown]) -> str:
    found = [(run, busy) for run in runs if (busy := utilisation(run.record.timeline)) is not None]
    if not found:
        return ""
    shares = [asdict(busy) for _, busy in found]
    rows = [
        [f"{chip(color)}{label}", *(num(share[name], ".1%") for share in shares)]
        for name, (label, color) in SHARES.items()
    ]
    tokens = [run.record.summary["tokens"] for run, _ in found]
    speeds = [None if n is None else n / busy.wall_s for n, (_, busy) in zip(tokens, found, strict=True)]
    rows.append(["wall time, s", *(num(busy.wall_s, ",.1f") for _, busy in found)])
    rows.append(["sampled tokens per second of it", *(num(speed, ",.0f") for speed in speeds)])
    bars = "".join(f"<p><b>{run.html}</b></p>{_bar(busy)}" if run.html else _bar(busy) for run, busy in found)
    lead = (
        "Shares of wall time, from the first phase to the last one of each process, evaluation included. The engine is busy while "
        "it samples, the trainer while it scores and trains; asynchronous schedules do both at once."
    )
    return section("Utilisation", bars + table(["", *(run.html or "" for run, _ in found)], rows, cls="numbers"), lead)


def _bar(busy: Utilisation) -> str:
    parts, x, shares = [], 0.0, asdict(busy)
    for name, (label, color) in SHARES.items():
        width = shares[name] * WIDTH
        said = f"<title>{label}: {shares[name]:.1%}</title>"
        parts.append(f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="22" fill="{color}">{said}</rect>')
        x += width
    style = "display:block;width:100%;height:22px"
    return f'<svg viewBox="0 0 {WIDTH} 22" preserveAspectRatio="none" role="img" style="{style}">{"".join(parts)}</svg>'


def _gantts(runs: Sequence[Shown]) -> str:
    bodies = []
    for run in runs:
        parts = processes(run.record.timeline)
        bodies.append(_gantt(parts[-1]) if parts else "")
    lead = (
        f"When each phase of the last {LAST_STEPS} steps ran, by the clock: bars above each other ran at the same time. "
        "Shades alternate with the step, whose number is in the bar."
    )
    return section("Timeline of the last steps", each(runs, bodies), lead)


def _gantt(spans: Sequence[Span]) -> str:
    """One lane a phase; x: seconds since the first bar."""
    last = max(span.step for span in spans)
    recent = merged(span for span in spans if span.step > last - LAST_STEPS)
    shown, left = recent[-BARS:], max(0, len(recent) - BARS)
    begin, end = min(s.start for s in shown), max(s.end for s in shown)
    scale = (WIDTH - LABEL - 8) / max(end - begin, 1e-9)
    present = {span.phase for span in shown}
    lanes = [p for p in ORDER if p in present] + sorted(present - set(ORDER))
    height = TOP + LANE * len(lanes) + BOTTOM
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="timeline" font-size="12">',
        *_ruler(end - begin, scale, height),
    ]
    for i, phase in enumerate(lanes):
        y = TOP + i * LANE
        parts.append(f'<text x="{LABEL - 10}" y="{y + 15}" text-anchor="end" fill="#1f2430">{esc(phase)}</text>')
        parts += [
            _rect(span, LABEL + (span.start - begin) * scale, y, (span.end - span.start) * scale, begin)
            for span in shown
            if span.phase == phase
        ]
    parts.append("</svg>")
    note = f'<p class="note">{left} earlier bars of these steps are left out.</p>' if left else ""
    return wide("".join(parts)) + note


def _rect(span: Span, x: float, y: int, width: float, begin: float) -> str:
    even = span.step % 2 == 0
    said = f"{esc(span.phase)} of step {span.step}: {span.end - span.start:.3f} s from {span.start - begin:.3f} s"
    place = f'x="{x:.1f}" y="{y + 2}" width="{max(width, 1.0):.1f}" height="{LANE - 4}" rx="2"'
    fill = f'fill="{plots.phase_color(span.phase)}" fill-opacity="{1 if even else 0.55}"'
    bar = f"<rect {place} {fill}><title>{said}</title></rect>"
    if width < 7 * len(str(span.step)) + 8:
        return bar
    ink = "#fff" if even else plots.INK
    return bar + f'<text x="{x + width / 2:.1f}" y="{y + 16}" text-anchor="middle" fill="{ink}">{span.step}</text>'


def _ruler(seconds: float, scale: float, height: int) -> list[str]:
    """Vertical lines at round seconds with their numbers below."""
    step = next(s * 10.0**d for d in range(-4, 9) for s in (1, 2, 5) if s * 10.0**d >= seconds / 8)
    parts = []
    for k in range(int(seconds / step) + 1):
        x = LABEL + k * step * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{height - BOTTOM + 4}" stroke="#e6e8ec"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle" fill="#5d6675">{short(round(k * step, 6))}</text>'
        )
    parts.append(f'<text x="{LABEL - 10}" y="{height - BOTTOM + 18}" text-anchor="end" fill="#5d6675">seconds</text>')
    return parts
