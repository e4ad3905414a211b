"""The result in words, as tables on the console, and as one self-contained HTML page in the style of the run report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from markupsafe import Markup

from rlalign.diagnose.attribution.findings import OVER, Attribution, PointDifference, RouteAttribution, Spread
from rlalign.report import html
from rlalign.report.drawings import BELOW, FAULT, Scale, heat_legend, heat_map
from rlalign.report.html import figure, num, short
from rlalign.report.tables import positions
from rlalign.tracking.files import write_atomic

MEANING = {
    "embed": ("embedding", "embedding rows, token ids, the scale of the embedding"),
    "input_norm": ("norm before attention", "its weight or epsilon"),
    "q": ("query projection", "the q rows of its weight or bias"),
    "k": ("key projection", "the k rows of its weight or bias"),
    "v": ("value projection", "the v rows of its weight or bias"),
    "q_norm": ("query norm", "its weight or epsilon"),
    "k_norm": ("key norm", "its weight or epsilon"),
    "q_rope": ("queries after rope", "rope theta or scaling, position ids"),
    "k_rope": ("keys after rope", "rope theta or scaling, position ids"),
    "attention": ("attention", "mask, softmax scale, window, the dtype or staleness of the key/value cache"),
    "attn_out": ("attention output", "the weight of o_proj, or its all-reduce"),
    "mid_residual": ("residual after attention", "how the residual is added"),
    "mlp_norm": ("norm before the MLP", "its weight or epsilon"),
    "router": ("router logits", "the weight or dtype of the router"),
    "gate": ("gate projection", "the gate rows of its weight"),
    "up": ("up projection", "the up rows of its weight"),
    "activation": ("activation", "the activation function"),
    "mlp_out": ("MLP output", "the weight of down_proj or of the experts, or its all-reduce"),
    "residual": ("residual after the layer", "how the residual is added"),
    "final_norm": ("final norm", "its weight or epsilon"),
    "logits": ("logits", "the weight or dtype of the lm_head, soft cap or scale"),
    "logprobs": ("logprobs", "temperature, truncation, raw instead of processed logprobs"),
}


def name(point: PointDifference) -> str:
    """ "norm before attention, layer 3"."""
    words = MEANING.get(point.kind, (point.kind,))[0]
    return words if point.layer is None else f"{words}, layer {point.layer}"


def verdict(found: Attribution) -> list[str]:
    """Sentences, the most important first."""
    lines = []
    for route in found.routes.values():
        delta = route.delta_logp
        size = f"{route.route}: mean |delta logp| {delta['abs_mean']:.2e}, largest {delta['abs_max']:.2e} nats"
        first = route.first_over_floor
        if first is None and not delta["abs_max"]:
            lines.append(f"{route.route}: every scored token has the same logprob on both sides, bit for bit.")
            continue
        if first is None:
            lines.append(f"{size}. No step by itself differs by more than rounding explains{_said_shares(route)}.")
            continue
        cause = MEANING.get(first.kind, ("", "the modules that the mapping pairs there"))[1]
        lines.append(
            f"{size}. First step over its noise floor: {first.point} ({name(first)}), {times(first.excess)} its floor"
            f"{_tilt(first)}. Look at {cause}."
        )
        others = grouped(route.suspects, first)
        lines += [f"{route.route}: also over their floors: {'; '.join(others)}."] if others else []
    different = {layer: share for r in found.routes.values() for layer, share in r.experts_differ.items() if share}
    if different:
        worst = max(different, key=lambda layer: different[layer])
        lines.append(f"Experts chosen differently: up to {different[worst]:.2%} of the choices (layer {worst}).")
    return lines


def grouped(suspects: Sequence[PointDifference], first: PointDifference) -> list[str]:
    """Points of one kind in several layers as one phrase; the worst kind first."""
    kinds: dict[str, list[PointDifference]] = {}
    for point in suspects:
        if point is not first:
            kinds.setdefault(point.kind, []).append(point)
    phrases = []
    for kind, points in list(kinds.items())[:5]:
        layers = sorted(p.layer for p in points if p.layer is not None)
        where = "" if not layers else f" in layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}"
        phrases.append(f"{kind}{where} ({times(max(p.excess for p in points))})")
    return phrases


def times(excess: float) -> str:
    """ "12 times"."""
    return (
        f"{excess:.0f} times"
        if 10 <= excess < 1e5
        else f"{excess:.1e} times"
        if excess >= 1e5
        else f"{excess:.1f} times"
    )


def _tilt(point: PointDifference) -> str:
    if not point.bias.size:
        return ""
    where = "everywhere" if point.bias.where == "all" else f"at {point.bias.where}"
    return f", systematically off by {point.bias.size:.1e} {where}"


def _said_shares(route: RouteAttribution) -> str:
    largest = sorted(route.removed, key=lambda r: -r.share)[:3]
    said = ", ".join(f"{r.cut} {r.share:.0%}" for r in largest if r.share > 0.05)
    return f"; the difference in logprobs arises at {said}" if said else ""


def _ranges(layers: Sequence[int]) -> str:
    """ "0-3, 7"."""
    groups: list[list[int]] = []
    for layer in layers:
        if groups and layer == groups[-1][-1] + 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)


# the others show when over their floor
MAIN = ("embed", "attn_out", "mlp_out", "residual", "final_norm", "logits", "logprobs")
HEADER = (
    f"{'':24} {'absolute':^26} {'relative':^26} {'':>8} {'':>8} {'this step alone':^26} {'share of':>8}\n"
    f"{'point':24} {'mean':>8} {'p99':>8} {'max':>8} {'mean':>8} {'p99':>8} {'max':>8} {'1-cos':>8} {'floor':>8} "
    f"{'mean':>8} {'floor':>8} {'times':>8} {'dlogp^2':>8}"
)


def text(found: Attribution, *, every: bool = False) -> str:
    """Tables of all routes, then the verdict. every: all points, not only the usual ones and those over their floor."""
    about = (
        f"{found.model}, {found.body_dtype} body, {found.head_dtype} head, tensor parallel {found.tensor_parallel}; "
        f"{found.sequences} sequences, {found.scored_tokens} scored tokens"
    )
    parts = [about]
    for route in found.routes.values():
        parts += ["", f"{route.route} against trainer, temperature {route.temperature:g}", HEADER]
        parts += [_line(p, route) for p in route.points if every or p.kind in MAIN or p.over_floor]
        if route.experts_differ:
            differ = ", ".join(f"{layer}: {share:.2%}" for layer, share in route.experts_differ.items())
            parts.append(f"experts chosen differently, by layer: {differ}")
    if found.decode_against_prefill:
        parts += ["", f"rollout engine, decode against its own prefill: {_itself(found.decode_against_prefill)}"]
    return "\n".join([*parts, "", *verdict(found)])


def _itself(spreads: Mapping[str, Spread]) -> str:
    worst = max(spreads, key=lambda point: spreads[point].mean)
    if not spreads[worst].max:
        return "equal, bit for bit"
    return f"largest at {worst}, relative mean {spreads[worst].mean:.1e}, max {spreads[worst].max:.1e}"


def _line(point: PointDifference, route: RouteAttribution) -> str:
    a, r = point.absolute, point.relative
    share = route.logprob_share.get(point.point)
    numbers = (a.mean, a.p99, a.max, r.mean, r.p99, r.max, max(0.0, 1 - point.cosine), point.floor.mean)
    step = f"{point.isolated.mean:8.1e} {point.isolated_floor.mean:8.1e} {point.excess:8.3g}"
    shown = " ".join(f"{n:8.1e}" for n in numbers)
    last = "" if share is None else f"{share:8.1%}"
    return f"{point.point:24} {shown} {step} {last:8}{'  <-' if point.over_floor else ''}".rstrip()


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
        first_name=name(first) if first else "",
        times=times(first.excess) if first else "",
        over=f"{OVER:g}",
        lines=[*verdict(found), *notes],
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
