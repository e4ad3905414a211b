"""Heat maps as inline SVG: rectangles with a tooltip, nothing loaded, no text of a run inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# From light to dark, equally far apart for the eye; readable in grey.
BLUES = ("#f4f8fc", "#d3e4f3", "#a3cbe6", "#62a8d3", "#2f7fbc", "#0b4f94", "#06284f")
FAULT = ("#fff3d6", "#fdc25f", "#f07f2e", "#c93a1c", "#8f1414")
NOTHING, BELOW = "#eceef2", "#e7f2ea"
LABEL, CELL, TOP, BOTTOM = 104, 17, 6, 26
WIDTH = 1032  # of the page


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
        return _between(self.palette, at)


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
) -> str:
    """Rows of cells under their label. columns: what each column is called, in tooltips and, as far as there is room, below."""
    count = max(len(columns), 1)
    width = min((WIDTH - LABEL) / count, 56.0)
    height = TOP + CELL * len(rows) + BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="heat map" font-size="11">']
    for r, (label, values) in enumerate(rows):
        y = TOP + r * CELL
        parts.append(f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end" fill="#5d6675">{label}</text>')
        for c, value in enumerate(values):
            said = "no token" if value is None else format(value, spec)
            parts.append(
                f'<rect x="{LABEL + c * width:.2f}" y="{y}" width="{max(width - 0.6, 0.4):.2f}" height="{CELL - 1}" '
                f'fill="{scale.color(value)}"><title>{label}, {columns[c]}: {said}</title></rect>'
            )
    every = max(1, math.ceil(max(map(len, columns), default=1) * 6.6 / width))
    y = TOP + len(rows) * CELL + 13
    parts += [
        f'<text x="{LABEL + (c + 0.5) * width:.1f}" y="{y}" text-anchor="middle" fill="#5d6675">{columns[c]}</text>'
        for c in range(0, count, every)
    ]
    parts.append(f'<text x="{LABEL - 8}" y="{y}" text-anchor="end" fill="#5d6675">{axis}</text></svg>')
    return "".join(parts)


def legend(scale: Scale, *, low: str, high: str, under: str = "") -> str:
    """HTML: the palette with the values at its ends."""
    steps = "".join(
        f'<span style="display:inline-block;width:14px;height:10px;background:{_between(scale.palette, i / 11)}"></span>'
        for i in range(12)
    )
    before = (
        f'<span class="item"><span class="chip" style="background:{scale.under}"></span>{under}</span>'
        if scale.under
        else ""
    )
    empty = f'<span class="item"><span class="chip" style="background:{NOTHING}"></span>nothing there</span>'
    return f'{before}<span class="item">{low} {steps} {high}</span>{empty}'


def _between(palette: Sequence[str], at: float) -> str:
    """The colour at a fraction of the palette."""
    place = at * (len(palette) - 1)
    i = min(int(place), len(palette) - 2)
    one, other = (tuple(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in (palette[i], palette[i + 1]))
    mixed = (round(a + (b - a) * (place - i)) for a, b in zip(one, other, strict=True))
    return "#" + "".join(f"{m:02x}" for m in mixed)
