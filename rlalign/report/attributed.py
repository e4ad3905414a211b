"""What `rlalign attribute` found, in the report of the run that it was asked about; and its heat map, layers x positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from rlalign.report.drawings import heat_legend, heat_map, scale_of
from rlalign.report.html import figure, num
from rlalign.tracking import files
from rlalign.tracking.record import RunRecord

__all__ = ["positions", "read_attribution"]


def positions(route: str, heat: Mapping[str, Sequence[float | None]], layers: int, length: int) -> Markup:
    """The accumulated difference of the residual stream, after embedding, layers, norm and logits."""
    named = [("embed", "embed"), *((f"layers.{i}.residual", f"layer {i}") for i in range(layers))]
    named += [("final_norm", "final norm"), ("logits", "logits"), ("logprobs", "logprobs")]
    rows = [(label, heat[point]) for point, label in named if point in heat]
    scale = scale_of([v for _, values in rows for v in values])
    bins = max(len(values) for _, values in rows)
    drawn = heat_map(rows, [str(round(c * length / bins)) for c in range(bins)], scale, axis="position")
    ends = heat_legend(scale, low=num(scale.low, ".1e"), high=num(scale.high, ".1e"))
    return figure(drawn, f"Accumulated difference, {route}", "", ends, wide=True)


def read_attribution(run: RunRecord) -> Markup:
    """Its sentence and its heat maps; empty for a run that has none."""
    path = run.directory / files.ATTRIBUTION
    if not path.exists():
        return Markup()
    try:
        found = files.read_json(path)
        maps = [positions(name, r["heat"], found["layers"], found["length"]) for name, r in found["routes"].items()]
        return Markup("<p>{}</p>").format(_said(found)) + Markup().join(maps)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # a page must come out of every run
        words = Markup(
            '<p class="bad">{} cannot be shown: {}. <code>rlalign attribute --run</code> writes it anew.</p>'
        )
        return words.format(files.ATTRIBUTION, repr(error))


def _said(found: Mapping) -> Markup:
    """One sentence a route: the first step over its floor, and whose logprobs."""
    parts = []
    for name, route in found["routes"].items():
        first, shares = route["first_over_floor"], route["logprob_share"]
        worst = max(shares.items(), key=lambda item: item[1], default=None)
        says = f"{first} differs by itself" if first else "no step is over its noise floor"
        share = f", {worst[1]:.0%} of its square from {worst[0]}" if worst else ""
        delta = num(route["delta_logp"]["abs_mean"], ".1e")
        parts.append(Markup("<b>{}</b>: {}; mean |delta logp| {} nats{}").format(name, says, delta, share))
    about = f"{found['sequences']:,} sequences, {found['scored_tokens']:,} scored tokens"
    return Markup("{}. Measured on {}; attribution.html beside the run has every number.").format(
        Markup(". ").join(parts), about
    )
