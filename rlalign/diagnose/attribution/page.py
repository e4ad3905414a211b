"""The result as one self-contained HTML page, in the style of the run report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlalign.diagnose.attribution import words
from rlalign.diagnose.attribution.difference import Spread
from rlalign.diagnose.attribution.result import OVER, Attribution, RouteAttribution
from rlalign.tracking.files import write_atomic
from rlalign.tracking.report_attribution import POSITIONS, positions
from rlalign.tracking.report_heat import BELOW, FAULT, Scale, heat_map, legend
from rlalign.tracking.report_page import details, esc, figure, grid, num, page, prose, section, short, table, wide

MOST_ROWS = 400  # points in the table
GAP = '<div style="height:22px"></div>'  # between the maps of two routes
ATTENTION, MLP = "#0b62a8", "#e0a32e"  # colours of the two halves of a layer


def write(found: Attribution, notes: Sequence[str], out: Path) -> Path:
    """Write the page atomically; returns its path."""
    write_atomic(out, render(found, notes))
    return out


def render(found: Attribution, notes: Sequence[str]) -> str:
    """The whole document."""
    about = (
        f"{esc(found.model)} &middot; {found.body_dtype} body, {found.head_dtype} head &middot; "
        f"tensor parallel {found.tensor_parallel} &middot; {found.sequences} sequences, {found.scored_tokens:,} scored tokens"
    )
    parts = [
        '<p class="over">rlalign attribute</p><h1>Where the mismatch comes from</h1>',
        f'<p class="meta">{about}</p>',
        _verdict(found, notes),
        _cards(found),
    ]
    routes = found.routes.values()
    parts += [
        section("Which step", GAP.join(_steps(route, found) for route in routes), STEPS),
        section(
            "Which position",
            GAP.join(positions(r.route, r.heat, found.layers, found.length) for r in routes),
            POSITIONS,
        ),
        section("Whose logprobs", grid([_shares(r, found) for r in routes]) if found.logprob_share else "", SHARES),
        _experts(found),
        _tables(found),
        section("How to read this", HOW),
    ]
    return page("Where the mismatch comes from", "".join(parts))


def _verdict(found: Attribution, notes: Sequence[str]) -> str:
    lines = words.verdict(found)
    cls = "verdict problem" if found.first_over_floor else "verdict"
    rest = "".join(f"<li>{prose(line)}</li>" for line in [*lines, *notes])
    head = (
        f"{found.first_over_floor.point} differs by itself" if found.first_over_floor else "Rounding, and nothing else"
    )
    return f'<div class="{cls}"><b>{esc(head)}</b><ul>{rest}</ul></div>'


def _cards(found: Attribution) -> str:
    first, (main, *others) = found.first_over_floor, found.routes.values()
    also = "; ".join(f"{r.route} {short(r.delta_logp['abs_mean'])}" for r in others)
    below = f"nats, mean; largest {short(main.delta_logp['abs_max'])}{f'; {also}' if also else ''}"
    cards = [_card(f"|delta logp|, {main.route}", short(main.delta_logp["abs_mean"]), below)]
    cards.append(
        _card("First step over its floor", first.point, f"{words.name(first)}, {words.times(first.excess)} its floor")
        if first
        else _card("First step over its floor", "none", f"no step is {OVER:g} times over its floor")
    )
    largest = max(found.logprob_share.items(), key=lambda item: item[1], default=None)
    if largest is not None:
        cards.append(_card("Largest share of delta logp", largest[0], f"{largest[1]:.0%} of the squared difference"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(title: str, value: str, below: str) -> str:
    return f'<div class="card"><h3>{esc(title)}</h3><div class="value">{esc(value)}</div><p>{esc(below)}</p></div>'


def _steps(route: RouteAttribution, found: Attribution) -> str:
    """Layers x steps: how many times over its floor each step is when it gets the rollout's own inputs."""
    kinds = list(dict.fromkeys(p.kind for p in route.points if p.layer is not None))
    at = {(p.layer, p.kind): p.excess for p in route.points}
    rows = [(f"layer {i}", [at.get((i, kind)) for kind in kinds]) for i in range(found.layers)]
    scale = Scale(1.0, max(100.0, *(v for v in at.values())), FAULT, under=BELOW)
    outside = [
        f"{p.point} {num(p.excess, '.2g')}" + (" (over)" if p.over_floor else "")
        for p in route.points
        if p.layer is None
    ]
    return figure(
        wide(heat_map(rows, [LABELS.get(kind, kind) for kind in kinds], scale, axis="step", spec=".2g")),
        f"Each step by itself, {route.route}",
        f"outside the layers: {', '.join(outside)}",
        legend(scale, low="1", high=short(scale.high), under="within the floor"),
    )


LABELS = {
    "input_norm": "norm", "q_norm": "q norm", "k_norm": "k norm", "q_rope": "q rope", "k_rope": "k rope", "attention": "attn",
    "attn_out": "o proj", "mid_residual": "resid", "mlp_norm": "norm 2", "activation": "act", "mlp_out": "mlp",
    "residual": "resid 2",
}  # fmt: skip


def _shares(route: RouteAttribution, found: Attribution) -> str:
    """Where the difference in logprobs arises: bars per layer."""
    share, left = route.logprob_share, {r.cut: r.remaining for r in route.removed}
    largest = max(0.01, *(abs(s) for s in share.values()))
    rows = [["embed", _bar(share["embed"], ATTENTION, largest), "", num(left["embed"], ".2e")]]
    for i in range(found.layers):
        halves = (f"layers.{i}.attn_out", f"layers.{i}.residual")
        bars = [
            _bar(share[h], color, largest) if h in share else ""
            for h, color in zip(halves, (ATTENTION, MLP), strict=True)
        ]
        rows.append([f"layer {i}", *bars, num(left[halves[1]], ".2e")])
    rows += [
        [name, _bar(share[name], ATTENTION, largest), "", num(left[name], ".2e")]
        for name in ("final_norm", "logits", "logprobs")
    ]
    shown = table(["", "attention", "MLP", "|delta logp| left"], rows, cap=MOST_ROWS)
    return figure(shown, f"Share of the difference, {route.route}")


def _bar(share: float, color: str, largest: float) -> str:
    width = 84 * abs(share) / largest
    fill = color if share >= 0 else "#b9bec8"
    return (
        f'<span style="display:inline-block;width:{width:.1f}px;height:10px;background:{fill};margin-right:8px"></span>'
        f"{share:.1%}"
    )


def _experts(found: Attribution) -> str:
    routes = [r for r in found.routes.values() if r.experts_differ]
    if not routes:
        return ""
    rows = [[f"layer {i}", *(f"{r.experts_differ[i]:.3%}" for r in routes)] for i in routes[0].experts_differ]
    shown = table(["", *(r.route for r in routes)], rows, cls="numbers", cap=MOST_ROWS)
    return section(
        "Experts", shown, "Share of the rollout's chosen experts that the trainer did not choose for the same token."
    )


def _tables(found: Attribution) -> str:
    head = [
        "point",
        "abs mean",
        "p99",
        "max",
        "rel mean",
        "p99",
        "max",
        "1 - cos",
        "floor",
        "alone",
        "its floor",
        "times",
        "bias",
    ]
    parts = []
    for route in found.routes.values():
        rows = []
        for p in route.points:
            numbers = [
                *_spread(p.absolute),
                *_spread(p.relative),
                num(max(0.0, 1 - p.cosine), ".1e"),
                num(p.floor.mean, ".1e"),
            ]
            times = num(p.excess, ".3g")
            times = f'<span class="bad">{times}</span>' if p.over_floor else times
            tilt = f"{num(p.bias.size, '.1e')} {esc(p.bias.where)}" if p.bias.size else ""
            rows.append(
                [esc(p.point), *numbers, num(p.isolated.mean, ".1e"), num(p.isolated_floor.mean, ".1e"), times, tilt]
            )
        parts.append(details(f"{route.route}: all {len(rows)} points", table(head, rows, cls="numbers", cap=MOST_ROWS)))
    return section("All numbers", "".join(parts))


def _spread(spread: Spread) -> list[str]:
    return [num(v, ".1e") for v in (spread.mean, spread.p99, spread.max)]


STEPS = (
    f"How many times over its noise floor each step is when the trainer's module gets the rollout's own inputs: {OVER:g} and more "
    "is a finding. Upstream differences do not count here, so a fault lights up where it is."
)
SHARES = (
    "The trainer goes on from the rollout's activation at each place in turn. Share: the part of the squared difference in "
    "logprobs that disappears there and not before; the shares add up to 1, and one can be negative where errors cancel."
)
HOW = (
    "<p><b>Absolute</b>: root mean square of the difference over the features of a token. <b>Relative</b>: the length of the "
    "difference over the length of the longer activation. Mean, p99 and max are over tokens.</p>"
    "<p><b>Floor</b>: the engine against itself (each sequence alone, and in other chunks) and the trainer against wider "
    "arithmetic, whichever is larger. <b>Alone</b>: the same step when the trainer's module gets the rollout's own inputs; its "
    "floor is the rounding of that step. <b>Bias</b>: a gain that differs from 1 by more than 7 standard errors; rounding has "
    "none.</p>"
)
