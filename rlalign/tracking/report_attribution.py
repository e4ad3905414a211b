"""The heat map of `rlalign attribute`, layers x positions: in its own page, and in the report of a run that it was asked about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlalign.tracking import files
from rlalign.tracking.record import RunRecord
from rlalign.tracking.report_heat import heat_map, legend, scale_of
from rlalign.tracking.report_page import esc, figure, num, section, wide
from rlalign.tracking.report_runs import Shown, each

POSITIONS = (
    "Relative difference of the two sides with all that came before, mean over the sequences. A column is a position, or several "
    "neighbours."
)


def positions(route: str, heat: Mapping[str, Sequence[float | None]], layers: int, length: int) -> str:
    """The accumulated difference of the residual stream, after embedding, layers, norm and logits."""
    named = [("embed", "embed"), *((f"layers.{i}.residual", f"layer {i}") for i in range(layers))]
    named += [("final_norm", "final norm"), ("logits", "logits"), ("logprobs", "logprobs")]
    rows = [(label, heat[point]) for point, label in named if point in heat]
    scale = scale_of([v for _, values in rows for v in values])
    bins = max(len(values) for _, values in rows)
    columns = [str(round(c * length / bins)) for c in range(bins)]
    return figure(
        wide(heat_map(rows, columns, scale, axis="position")),
        f"Accumulated difference, {esc(route)}",
        "",
        legend(scale, low=num(scale.low, ".1e"), high=num(scale.high, ".1e")),
    )


def attributed(runs: Sequence[Shown]) -> str:
    """A section for the runs whose directory holds an attribution.json."""
    return section("Where the mismatch comes from", each(runs, [_of(run.record) for run in runs]), POSITIONS)


def _of(run: RunRecord) -> str:
    path = run.directory / files.ATTRIBUTION
    if not path.exists():
        return ""
    try:
        found = files.read_json(path)
        said = _said(found)
        maps = [positions(name, r["heat"], found["layers"], found["length"]) for name, r in found["routes"].items()]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # a page must come out of every run
        anew = "<code>rlalign attribute --run</code> writes it anew."
        return f'<p class="bad">{files.ATTRIBUTION} cannot be shown: {esc(repr(error))}. {anew}</p>'
    return f"<p>{said}</p>" + "".join(maps)


def _said(found: Mapping[str, object]) -> str:
    """One sentence a route: the first step over its floor, and whose logprobs."""
    parts = []
    for name, route in found["routes"].items():
        first, shares = route["first_over_floor"], route["logprob_share"]
        worst = max(shares.items(), key=lambda item: item[1], default=None)
        says = f"<b>{esc(name)}</b>: " + (
            f"{esc(first)} differs by itself" if first else "no step is over its noise floor"
        )
        says += f"; mean |delta logp| {num(route['delta_logp']['abs_mean'], '.1e')} nats"
        says += f", {worst[1]:.0%} of its square from {esc(worst[0])}" if worst else ""
        parts.append(says)
    about = f"{found['sequences']:,} sequences, {found['scored_tokens']:,} scored tokens"
    return f"{'. '.join(parts)}. Measured on {about}; attribution.html beside the run has every number."
