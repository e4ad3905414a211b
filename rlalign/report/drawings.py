"""Heat maps, timelines and bars as inline SVG: rectangles with a tooltip, nothing loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from markupsafe import Markup

from rlalign.report.html import MACROS, chip, esc, short
from rlalign.report.plots import INK, QUIET, phase_color
from rlalign.tracking.timeline import Span, Utilisation, merged

__all__ = ["Scale", "heat_legend", "heat_map", "scale_of", "timeline", "utilisation_bar"]

# From light to dark, equally far apart for the eye; readable in grey.
BLUES = ("#f4f8fc", "#d3e4f3", "#a3cbe6", "#62a8d3", "#2f7fbc", "#0b4f94", "#06284f")
FAULT = ("#fff3d6", "#fdc25f", "#f07f2e", "#c93a1c", "#8f1414")
NOTHING, BELOW = "#eceef2", "#e7f2ea"
WIDTH = 1032  # of the page
LABEL, CELL, TOP, BOTTOM = 104, 17, 6, 26  # of a heat map
LAST_STEPS = 8  # of the timeline
BARS = 400  # a timeline with more is cut to its last ones, and says so
LANE, MARGIN, HEAD, FOOT = 24, 92, 18, 34  # of a timeline
ORDER = ("eval", "rollout", "probe", "reward", "score", "train", "wait", "publish", "head", "checkpoint")
SHARES = {
    "generating": ("rollout engine alone", "#0b62a8"),
    "both": ("both at once", "#6d4fbf"),
    "training": ("trainer alone", "#c8501e"),
    "other": ("neither: rewards, publishing and the rest", "#2a8c5a"),
    "idle": ("nothing that is timed", "#d5d9e0"),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """Colours of values on a log axis. under: the colour of what is below low, None for the palette's first."""

    low: float
    high: float
    palette: tuple[str, ...] = BLUES
    under: str | None = None

    def color(self, value: float | None) -> str:
        if value is None or math.isnan(value):
            return NOTHING
        if value < self.low and self.under is not None:
            return self.under
        at = 0.0 if value <= self.low else min(1.0, math.log(value / self.low) / math.log(self.high / self.low))
        return self.between(at)

    def between(self, at: float) -> str:
        """The colour at a fraction of the palette."""
        place = at * (len(self.palette) - 1)
        i = min(int(place), len(self.palette) - 2)
        one, other = (tuple(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in self.palette[i : i + 2])
        return "#" + "".join(f"{round(a + (b - a) * (place - i)):02x}" for a, b in zip(one, other, strict=True))


def scale_of(values: Sequence[float | None], *, decades: float = 4.0) -> Scale:
    """From the largest value down, at most so many decades: what is smaller still is drawn like the smallest."""
    finite = [v for v in values if v is not None and v > 0 and math.isfinite(v)]
    high = max(finite, default=1.0)
    low = max(min(finite, default=high / 10), high / 10**decades)
    return Scale(low if low < high else high / 10, high)


def heat_map(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    columns: Sequence[str],
    scale: Scale,
    *,
    axis: str,
    spec: str = ".1e",
) -> Markup:
    """Rows of cells under their label. columns: what each column is called, in tooltips and, as far as there is room, below."""
    width = min((WIDTH - LABEL) / max(len(columns), 1), 56.0)
    parts = []
    for r, (label, values) in enumerate(rows):
        y = TOP + r * CELL
        parts.append(_text(LABEL - 8, y + 12, label, anchor="end"))
        for c, value in enumerate(values):
            said = f"{label}, {columns[c]}: {'no token' if value is None else format(value, spec)}"
            parts.append(_rect(LABEL + c * width, y, max(width - 0.6, 0.4), CELL - 1, scale.color(value), said))
    every = max(1, math.ceil(max(map(len, columns), default=1) * 6.6 / width))
    y = TOP + len(rows) * CELL + 13
    parts += [_text(LABEL + (c + 0.5) * width, y, columns[c]) for c in range(0, len(columns), every)]
    parts.append(_text(LABEL - 8, y, axis, anchor="end"))
    return _svg(TOP + CELL * len(rows) + BOTTOM, parts, 'aria-label="heat map" font-size="11"')


def heat_legend(scale: Scale, *, low: str, high: str, under: str = "") -> Markup:
    """The palette with the values at its ends."""
    box = Markup('<span style="display:inline-block;width:14px;height:10px;background:{}"></span>')
    palette = Markup().join(box.format(scale.between(i / 11)) for i in range(12))
    found = MACROS["item"](chip(scale.under), under) if scale.under else Markup()
    return (
        found
        + MACROS["item"](Markup("{} {} {}").format(low, palette, high), "")
        + MACROS["item"](chip(NOTHING), "nothing there")
    )


def utilisation_bar(busy: Utilisation) -> Markup:
    """Shares of the wall time side by side."""
    parts, x, shares = [], 0.0, asdict(busy)
    for name, (label, color) in SHARES.items():
        parts.append(_rect(x, 0, shares[name] * WIDTH, 22, color, f"{label}: {shares[name]:.1%}"))
        x += shares[name] * WIDTH
    return _svg(22, parts, 'preserveAspectRatio="none" style="display:block;width:100%;height:22px"')


def timeline(spans: Sequence[Span]) -> tuple[Markup, int]:
    """When each phase of the last steps ran, one lane a phase; x: seconds since the first bar. And how many bars are left out."""
    last = max(span.step for span in spans)
    recent = merged(span for span in spans if span.step > last - LAST_STEPS)
    shown = recent[-BARS:]
    begin, end = min(s.start for s in shown), max(s.end for s in shown)
    scale = (WIDTH - MARGIN - 8) / max(end - begin, 1e-9)
    present = {span.phase for span in shown}
    lanes = [p for p in ORDER if p in present] + sorted(present - set(ORDER))
    height = HEAD + LANE * len(lanes) + FOOT
    parts = _ruler(end - begin, scale, height)
    for i, phase in enumerate(lanes):
        y = HEAD + i * LANE
        parts.append(_text(MARGIN - 10, y + 15, phase, anchor="end", ink=INK))
        for span in shown:
            if span.phase == phase:
                x, width = MARGIN + (span.start - begin) * scale, (span.end - span.start) * scale
                said = f"{phase} of step {span.step}: {span.end - span.start:.3f} s from {span.start - begin:.3f} s"
                parts += _bar(span, x, y, width, said)
    return _svg(height, parts, 'aria-label="timeline" font-size="12"'), len(recent) - len(shown)


def _bar(span: Span, x: float, y: int, width: float, said: str) -> list[Markup]:
    """Shades alternate with the step, whose number is in the bar where it fits."""
    even = span.step % 2 == 0
    shade = f'rx="2" fill-opacity="{1 if even else 0.55}"'
    parts = [_rect(x, y + 2, max(width, 1.0), LANE - 4, phase_color(span.phase), said, shade)]
    if width >= 7 * len(str(span.step)) + 8:
        parts.append(_text(x + width / 2, y + 16, str(span.step), ink="#fff" if even else INK))
    return parts


def _ruler(seconds: float, scale: float, height: int) -> list[Markup]:
    """Vertical lines at round seconds with their numbers below."""
    step = next(s * 10.0**d for d in range(-4, 9) for s in (1, 2, 5) if s * 10.0**d >= seconds / 8)
    parts, y = [_text(MARGIN - 10, height - FOOT + 18, "seconds", anchor="end")], height - FOOT + 18
    for k in range(int(seconds / step) + 1):
        x = MARGIN + k * step * scale
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD - 4}" y2="{height - FOOT + 4}" stroke="#e6e8ec"/>'
        parts += [Markup(line), _text(x, y, short(round(k * step, 6)))]
    return parts


def _rect(x: float, y: float, width: float, height: float, fill: str, said: str, more: str = "") -> Markup:
    place = f'x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{fill}"'
    return Markup(f"<rect {place} {more}><title>{esc(said)}</title></rect>")


def _text(x: float, y: float, words: str, *, anchor: str = "middle", ink: str = QUIET) -> Markup:
    return Markup(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{ink}">{esc(words)}</text>')


def _svg(height: float, parts: Sequence[Markup], attributes: str) -> Markup:
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img" {attributes}>{"".join(parts)}</svg>')
