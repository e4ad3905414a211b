"""The result as one self-contained HTML page, in the style of the run report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from markupsafe import Markup

from rlalign.diagnose.attribution import words
from rlalign.diagnose.attribution.findings import OVER, Attribution, PointDifference, RouteAttribution
from rlalign.report import html
from rlalign.report.drawings import BELOW, FAULT, Scale, heat_legend, heat_map
from rlalign.report.html import figure, num, short
from rlalign.report.tables import positions
from rlalign.tracking.files import write_atomic

__all__ = ["render", "write"]

ATTENTION, MLP, NEGATIVE = (
    "#0b62a8",
    "#e0a32e",
    "#b9bec8",
)  # colours of the two halves of a layer, and of shares below 0
LABELS = {
    "input_norm": "norm", "q_norm": "q norm", "k_norm": "k norm", "q_rope": "q rope", "k_rope": "k rope", "attention": "attn",
    "attn_out": "o proj", "mid_residual": "resid", "mlp_norm": "norm 2", "activation": "act", "mlp_out": "mlp",
    "residual": "resid 2",
}  # fmt: skip


def write(found: Attribution, notes: Sequence[str], out: Path) -> Path:
    """Write the page atomically; returns its path."""
    write_atomic(out, render(found, notes))
    return out


def render(found: Attribution, notes: Sequence[str]) -> str:
    """The whole document, laid out by templates/attribution.html."""
    first, routes = found.first_over_floor, list(found.routes.values())
    return html.render(
        "attribution.html",
        title="Where the mismatch comes from",
        found=found,
        first=first,
        first_name=words.name(first) if first else "",
        times=words.times(first.excess) if first else "",
        over=f"{OVER:g}",
        lines=[*words.verdict(found), *notes],
        routes=routes,
        largest=max(found.logprob_share.items(), key=lambda item: item[1], default=None),
        steps=[_steps(route, found) for route in routes],
        maps=[positions(r.route, r.heat, found.layers, found.length) for r in routes],
        shares={r.route: _shares(r, found) for r in routes} if found.logprob_share else {},
        experts=[r for r in routes if r.experts_differ],
        points={r.route: [_point(p) for p in r.points] for r in routes},
    )


def _steps(route: RouteAttribution, found: Attribution) -> Markup:
    """Layers x steps: how many times over its floor each step is when it gets the rollout's own inputs."""
    kinds = list(dict.fromkeys(p.kind for p in route.points if p.layer is not None))
    at = {(p.layer, p.kind): p.excess for p in route.points}
    rows = [(f"layer {i}", [at.get((i, kind)) for kind in kinds]) for i in range(found.layers)]
    scale = Scale(1.0, max(100.0, *at.values()), FAULT, under=BELOW)
    over = {True: " (over)", False: ""}
    outside = [
        Markup("{} {}{}").format(p.point, num(p.excess, ".2g"), over[p.over_floor])
        for p in route.points
        if p.layer is None
    ]
    drawn = heat_map(rows, [LABELS.get(kind, kind) for kind in kinds], scale, axis="step", spec=".2g")
    ends = heat_legend(scale, low="1", high=short(scale.high), under="within the floor")
    note = Markup("outside the layers: ") + Markup(", ").join(outside)
    return figure(drawn, f"Each step by itself, {route.route}", note, ends, wide=True)


def _shares(route: RouteAttribution, found: Attribution) -> list[list[str]]:
    """Where the difference in logprobs arises: a row per layer with a bar for attention and for the MLP."""
    share, left = route.logprob_share, {r.cut: r.remaining for r in route.removed}
    largest = max(0.01, *(abs(s) for s in share.values()))

    def row(name: str, last: str, attention: str, mlp: str = "") -> list[str]:
        bars = [
            _bar(share[cut], color, largest) if cut in share else ""
            for cut, color in ((attention, ATTENTION), (mlp, MLP))
        ]
        return [name, *bars, num(left[last], ".2e")]

    halves = [(i, f"layers.{i}.attn_out", f"layers.{i}.residual") for i in range(found.layers)]
    layers = [row(f"layer {i}", residual, attention, residual) for i, attention, residual in halves]
    return [
        row("embed", "embed", "embed"),
        *layers,
        *(row(name, name, name) for name in ("final_norm", "logits", "logprobs")),
    ]


def _bar(share: float, color: str, largest: float) -> Markup:
    bar = '<span style="display:inline-block;width:{:.1f}px;height:10px;background:{};margin-right:8px"></span>{:.1%}'
    return Markup(bar.format(84 * abs(share) / largest, color if share >= 0 else NEGATIVE, share))


def _point(p: PointDifference) -> list[str]:
    """Every number of one point, as a row."""
    spreads = [num(v, ".1e") for spread in (p.absolute, p.relative) for v in astuple(spread)]
    alone = [num(v, ".1e") for v in (max(0.0, 1 - p.cosine), p.floor.mean, p.isolated.mean, p.isolated_floor.mean)]
    times = num(p.excess, ".3g")
    times = Markup('<span class="bad">{}</span>').format(times) if p.over_floor else times
    bias = Markup("{} {}").format(num(p.bias.size, ".1e"), p.bias.where) if p.bias.size else ""
    return [p.point, *spreads, *alone, times, bias]
