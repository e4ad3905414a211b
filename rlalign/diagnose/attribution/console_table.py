"""The result on the console: one line per point, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping

from rlalign.diagnose.attribution import words
from rlalign.diagnose.attribution.difference import Spread
from rlalign.diagnose.attribution.findings import Attribution, PointDifference, RouteAttribution

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
    return "\n".join([*parts, "", *words.verdict(found)])


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
