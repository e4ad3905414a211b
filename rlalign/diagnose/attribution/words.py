"""What the points are called, what usually is wrong with each, and the table on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlalign.diagnose.attribution.difference import Spread
from rlalign.diagnose.attribution.findings import Attribution, PointDifference, RouteAttribution

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
            lines.append(f"{size}. No step by itself differs by more than rounding explains{_shares(route)}.")
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


def _shares(route: RouteAttribution) -> str:
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


MAIN = (
    "embed",
    "attn_out",
    "mlp_out",
    "residual",
    "final_norm",
    "logits",
    "logprobs",
)  # the others show when over their floor
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
