"""One self-contained HTML page from one run, or from several side by side with the first as the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlalign.tracking import report_config, report_split
from rlalign.tracking import report_plots as plots
from rlalign.tracking import report_tables as tables
from rlalign.tracking.files import write_atomic
from rlalign.tracking.record import read_run
from rlalign.tracking.report_attribution import attributed
from rlalign.tracking.report_page import details, esc, figure, grid, page, prose, section
from rlalign.tracking.report_reward import reward_models, rewards
from rlalign.tracking.report_runs import Shown, each, legend, lines_of, named
from rlalign.tracking.report_time import time_sections
from rlalign.tracking.report_tokens import TokenView, view_tokens
from rlalign.tracking.report_verdict import comparison, k3_limit, problems, sentences


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page atomically and return its path. Runs in any state are reported, unfinished ones as what they are.

    Raises ValueError for a directory that is not a run, a damaged file, or more runs than there are colours.
    """
    if not 1 <= len(run_dirs) <= len(plots.RUN_COLORS):
        raise ValueError(f"a report shows 1 to {len(plots.RUN_COLORS)} runs; got {len(run_dirs)}")
    runs = named([read_run(Path(directory)) for directory in run_dirs])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    title = " against ".join(run.plain for run in runs)
    write_atomic(out, page(f"{title} - rlalign report", _body(runs, title)))
    return out


def _body(runs: Sequence[Shown], title: str) -> str:
    views = [view_tokens(run.record.token_files) for run in runs]
    return "".join(
        (
            _header(runs, title),
            _verdict(runs),
            tables.cards(runs[0].record) if len(runs) == 1 else "",
            _numbers(runs),
            rewards(runs),
            reward_models(runs),
            report_split.three(runs),
            _mismatch(runs),
            _head_alone(runs),
            attributed(runs),
            report_split.staleness(runs),
            report_split.corrections(runs),
            _tokens(runs, views),
            _worst(runs, views),
            _heads(runs),
            _weights(runs),
            time_sections(runs),
            _alerts(runs),
            section("Events", each(runs, [tables.event_table(run.record, alerts=False) for run in runs])),
            _configuration(runs),
        )
    )


def _header(runs: Sequence[Shown], title: str) -> str:
    badges = "".join(f'<span class="badge {esc(r.record.status)}">{esc(r.record.status)}</span>' for r in runs)
    first = runs[0].record
    versions = first.environment.get("versions", {})
    used = ", ".join(f"{n} {versions[n]}" for n in ("rlalign", "vllm", "torch", "deepspeed") if versions.get(n))
    where = f"{first.environment.get('cpu', '')}, {first.environment.get('cores_usable', '?')} cores"
    gpus = first.environment.get("gpus") or []
    where += f", {len(gpus)} x {gpus[0]}" if gpus else ""
    thinned = plots.thinned(max(len(run.record.metrics.rows) for run in runs))
    meta = f"{esc(first.started.replace('T', ' ').replace('+00:00', ' UTC'))} &middot; {esc(where)}<br>{esc(used)}"
    meta += f"<br>{thinned}" if thinned else ""
    return f'<div class="over">rlalign run report</div><h1>{esc(title)} {badges}</h1><p class="meta">{meta}</p>'


def _verdict(runs: Sequence[Shown]) -> str:
    found = [f"{run.plain}: {p}" if len(runs) > 1 else p for run in runs for p in problems(run.record)]
    if len(runs) == 2:
        different = report_config.config_differences([run.record for run in runs])
        said = comparison(runs[0].record, runs[1].record, (runs[0].plain, runs[1].plain), different)
    elif len(runs) == 1:
        said = sentences(runs[0].record)
    else:
        said = "\n".join(f"{run.plain}: {sentences(run.record)}" for run in runs)
    said = "<br>".join(prose(line) for line in said.split("\n"))
    if not found:
        return f'<div class="verdict"><b>OK.</b> {said}</div>'
    listed = "".join(f"<li>{prose(problem)}</li>" for problem in found)
    count = "1 problem." if len(found) == 1 else f"{len(found)} problems."
    return f'<div class="verdict problem"><b>{count}</b><ul>{listed}</ul>{said}</div>'


def _numbers(runs: Sequence[Shown]) -> str:
    body = tables.numbers_table([r.record for r in runs], [r.html or "value" for r in runs])
    if len(runs) == 1:
        return details("All numbers of the run", body)
    return section("Side by side", body, f"Differences are against {esc(runs[0].plain)}; &times; is a factor.")


QUANTILES = (
    ("abs_mean", "-", "solid", "mean"),
    ("p99", "--", "dashed", "p99"),
    ("abs_max", ":", "dotted", "worst token"),
)


def _spread(runs: Sequence[Shown], prefix: str, name: str) -> str:
    """Mean, p99 and worst |log_ratio| in one chart."""
    lines = [line for key, style, _, _ in QUANTILES for line in lines_of(runs, f"{prefix}/{key}", style=style)]
    if not lines:
        return ""
    styles = "".join(
        f'<span class="item"><span class="dash" style="border-top-style:{css}"></span>{label}</span>'
        for _, _, css, label in QUANTILES
    )
    svg = plots.line_chart(lines, log=True, name=name)
    return figure(svg, "|log_ratio| per token", "nats, log scale", styles, legend(runs))


def _mismatch(runs: Sequence[Shown]) -> str:
    charts = []
    if lines := lines_of(runs, "mismatch/lag0/k3"):
        limits = {limit for run in runs if (limit := k3_limit(run.record)) is not None}
        limit = limits.pop() if len(limits) == 1 else None
        svg = plots.line_chart(lines, log=True, limit=limit, name="k3")
        charts.append(figure(svg, "k3 at lag 0", "nats per token, log scale", legend(runs)))
    charts.append(_spread(runs, "mismatch/lag0", "log-ratio"))
    lead = (
        "Same weights, same tokens: log_ratio is the trainer's log-probability minus the rollout engine's. "
        "A red cross marks a step whose value is not finite; zeros are drawn on the lower edge."
    )
    return section("Mismatch at lag 0", grid(charts), lead)


def _head_alone(runs: Sequence[Shown]) -> str:
    charts = []
    if lines := lines_of(runs, "head_isolated/k3", markers=True):
        svg = plots.line_chart(lines, log=True, name="head-k3")
        charts.append(figure(svg, "k3 of the heads", "nats per token, log scale", legend(runs)))
    charts.append(_spread(runs, "head_isolated", "head-log-ratio"))
    if lines := lines_of(runs, "head_isolated/rollout_error", markers=True):
        svg = plots.line_chart(lines, log=True, name="head-error")
        charts.append(figure(svg, "Rollout head to float64", "mean, nats per token, log scale", legend(runs)))
    lead = (
        "Both heads on the same hidden states: what remains is the projection alone, without the two bodies. Two heads that "
        "round alike can agree with each other and still be far from the policy they stand for: the last chart shows that."
    )
    return section("The head in isolation", grid(charts), lead)


def _tokens(runs: Sequence[Shown], views: Sequence[TokenView | None]) -> str:
    """One histogram per run, all over the same decades."""
    positive = [view.abs_log_ratio[view.abs_log_ratio > 0] for view in views if view]
    positive = [values for values in positive if values.size]
    if not any(views):
        return ""
    high = max((float(v[-1]) for v in positive), default=1.0)
    low = max(min((float(v[0]) for v in positive), default=high / 10), high * 1e-12)
    charts = []
    for run, view in zip(runs, views, strict=True):
        if view is None:
            continue
        name = f"histogram-{run.color}"
        svg = plots.histogram(view.abs_log_ratio, color=run.color, low=low, high=high, name=name)
        note = f"{view.abs_log_ratio.size:,} tokens of {len(view.steps)} step(s)"
        note += f"; {view.nonfinite:,} more are not finite and not drawn" if view.nonfinite else ""
        charts.append(figure(svg, run.html or "|log_ratio| of sampled tokens", note))
    shown = [(view, run.html or "nats") for run, view in zip(runs, views, strict=True) if view]
    numbers = tables.quantile_table(*zip(*shown, strict=True))
    body = grid([*charts, numbers]) if len(charts) == 1 else grid(charts) + numbers
    lead = "From the token files. Both axes are logarithmic; the pale bar holds the tokens that are exactly equal."
    return section("Distribution of |log_ratio|", body, lead)


def _worst(runs: Sequence[Shown], views: Sequence[TokenView | None]) -> str:
    bodies = [tables.worst_table(view) if view and view.worst else "" for view in views]
    lead = "Largest |log_ratio| in the token files, log-probabilities in nats. \u2423 is a space, \u23ce a line break."
    return section("Worst tokens", each(runs, bodies), lead)


def _heads(runs: Sequence[Shown]) -> str:
    lead = "What each rank of the rollout engine answered; ranks that agree share a column."
    return section("Heads", each(runs, [tables.head_table(run.record) for run in runs]), lead)


def _weights(runs: Sequence[Shown]) -> str:
    bodies = []
    for run in runs:
        s, body = run.record.summary, tables.publish_table(run.record)
        typical = f"median {s['publish_seconds']:.3f} s, " if s["publish_seconds"] is not None else ""
        note = f"{typical}{s['repaired'] or 0:,.0f} tensors repaired"
        label = f'{s["publishes"]:,} publishes <span class="note">{note}</span>'
        bodies.append(details(label, body) if body else "")
    return section("Publishes", each(runs, bodies), "Every tensor is verified on every rank before a version counts.")


def _alerts(runs: Sequence[Shown]) -> str:
    bodies = [tables.event_table(run.record, alerts=True) or "<p>No alert.</p>" for run in runs]
    lead = "What the rules, the gate and the drift monitors said, in order; the step is the last one logged before."
    return section("Alerts", each(runs, bodies), lead)


def _configuration(runs: Sequence[Shown]) -> str:
    records = [run.record for run in runs]
    body = report_config.difference_table(records, [run.html for run in runs]) if len(runs) > 1 else ""
    return section(
        "Configuration", body + "".join(report_config.config_details(run.record, esc(run.plain)) for run in runs)
    )
