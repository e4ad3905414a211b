"""One self-contained HTML page from one run, or from several side by side with the first as the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlalign.report import charts, drawings, plots, tables, verdict
from rlalign.report.figures import Shown, drawn, items, k3_limit, named
from rlalign.report.html import chip, figure, num, render
from rlalign.report.tables import TokenView, read_attribution, view_tokens
from rlalign.tracking.files import read_json, write_atomic
from rlalign.tracking.record import phases_of, read_run
from rlalign.tracking.timeline import processes, utilisation

__all__ = ["write_report"]

CHECKS = {
    "gap": "E[p] - E[y], newest rows", "tilt": "tilt, newest rows", "ece": "debiased ECE", "auroc": "AUROC since the fit",
    "psi": "PSI of the scores", "out_of_support": "out of the fitted range",
}  # fmt: skip


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page atomically and return its path. Runs in any state are reported, unfinished ones as what they are.

    Raises ValueError for a directory that is not a run, a damaged file, or more runs than there are colours.
    """
    if not 1 <= len(run_dirs) <= len(plots.RUN_COLORS):
        raise ValueError(f"a report shows 1 to {len(plots.RUN_COLORS)} runs; got {len(run_dirs)}")
    runs = named([read_run(Path(directory)) for directory in run_dirs])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, render("run.html", **_content(runs)))
    return out


def _content(runs: Sequence[Shown]) -> dict[str, Any]:
    """What templates/run.html lays out."""
    records = [run.record for run in runs]
    views = [view_tokens(record.token_files) for record in records]
    differences = tables.config_differences(records)
    return {
        "title": " against ".join(run.plain for run in runs),
        "runs": runs,
        "names": [run.html for run in runs],
        "first": records[0],
        "k3_limit": k3_limit(records[0]),
        "published": records[0].series("publish/version")[1],
        "thinned": plots.thinned(max(len(record.metrics.rows) for record in records)),
        "problems": [f"{r.plain}: {p}" if len(runs) > 1 else p for r in runs for p in verdict.problems(r.record)],
        "said": _said(runs, list(differences)),
        "numbers": tables.number_rows(records),
        "figures": {name: drawn(getattr(charts, name), runs) for name in FIGURES},
        "models": _models(runs),
        "causes": tables.cause_rows(records),
        "attributions": {run.plain: read_attribution(run.record) for run in runs},
        "views": [(run, view) for run, view in zip(runs, views, strict=True) if view],
        "histograms": _histograms(runs, views),
        "quantiles": tables.quantile_rows([view for view in views if view]),
        "tables": tables,
        "time": _time(runs),
        "busy": _busy(runs),
        "timelines": {r.plain: drawings.timeline(part[-1]) for r in runs if (part := processes(r.record.timeline))},
        "last_steps": drawings.LAST_STEPS,
        "differences": differences,
    }


FIGURES = ("REWARDS", "CAUSES", "LAG0", "HEAD", "STALENESS", "CORRECTIONS", "SPEED")


def _said(runs: Sequence[Shown], differences: list[str]) -> list[str]:
    """What the verdict says about the runs, a line each."""
    if len(runs) == 2:
        a, b = runs
        return [verdict.comparison(a.record, b.record, (a.plain, b.plain), differences)]
    return [f"{r.plain}: {verdict.sentences(r.record)}" if len(runs) > 1 else verdict.sentences(r.record) for r in runs]


def _models(runs: Sequence[Shown]) -> dict[str, dict[str, Any]]:
    """{reward model: its charts, and the last report of each run} for every one whose drift a run has watched."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({name for run in runs for name in verdict.watched(run.record)}):
        files = {run.plain: run.record.directory / "drift" / f"{name}.json" for run in runs}
        reports = {plain: read_json(path) for plain, path in files.items() if path.exists()}
        figures = drawn(charts.CALIBRATION, runs, name)
        for run in runs:
            if labels := reports.get(run.plain, {}).get("labels"):
                svg = plots.reliability(labels["reliability"], color=run.color, name=f"reliability-{name}-{run.color}")
                note = f"of the last {labels['rows']:,} labelled samples, bars: 95 %"
                figures.append(figure(svg, run.html or "Reliability", note))
        found[name] = {"figures": figures, "reports": {plain: _checks(report) for plain, report in reports.items()}}
    return found


def _checks(report: dict) -> dict[str, Any]:
    specs = {"state": "", "value": "+.3f", "beyond": ".3f", "limit": "g", "rows": ","}
    rows = [
        [CHECKS.get(check["name"], check["name"]), *(num(check[key], spec) for key, spec in specs.items())]
        for check in report["checks"]
    ]
    return report | {"rows": rows}


def _histograms(runs: Sequence[Shown], views: Sequence[TokenView | None]) -> list[Markup]:
    """One of |log_ratio| per run, all over the same decades."""
    positive = [view.abs_log_ratio[view.abs_log_ratio > 0] for view in views if view]
    high = max((float(v[-1]) for v in positive if v.size), default=1.0)
    low = max(min((float(v[0]) for v in positive if v.size), default=high / 10), high * 1e-12)
    found = []
    for run, view in zip(runs, views, strict=True):
        if view is not None:
            svg = plots.histogram(
                view.abs_log_ratio, color=run.color, low=low, high=high, name=f"histogram-{run.color}"
            )
            note = f"{view.abs_log_ratio.size:,} tokens of {len(view.steps)} step(s)"
            note += f"; {view.nonfinite:,} more are not finite and not drawn" if view.nonfinite else ""
            found.append(figure(svg, run.html or "|log_ratio| of sampled tokens", note))
    return found


def _time(runs: Sequence[Shown]) -> dict[str, Any]:
    """Charts of the seconds per step, and for a single run the rows of its table."""
    data = []
    for run in runs:
        found = phases_of(run.record.metrics.rows)
        rows = [row for row in run.record.metrics.rows if any(f"time/{p}_s" in row for p in found)]
        phases = {p: [row.get(f"time/{p}_s") or 0.0 for row in rows] for p in found}
        data.append((run, [row["step"] for row in rows], phases))
    totals = [sum(column) for *_, phases in data for column in zip(*phases.values(), strict=True)]
    if not totals:
        return {"charts": [], "rows": []}
    legend = items({p: chip(plots.phase_color(p)) for *_, phases in data for p in phases})
    (declared,) = (chart for chart in charts.PHASES if chart.stacked)
    drawings = [
        figure(
            plots.stacked(steps, phases, top=max(totals), name=f"phases-{run.color}"),
            run.html or declared.title,
            "",
            legend,
        )
        for run, steps, phases in data
        if steps
    ]
    return {"charts": drawings, "rows": tables.phase_rows(data[0][2]) if len(drawings) == 1 else []}


def _busy(runs: Sequence[Shown]) -> dict[str, Any] | None:
    """Who worked: bars, and the rows of their table; None for runs without a timeline."""
    found = [(run, busy) for run in runs if (busy := utilisation(run.record.timeline)) is not None]
    if not found:
        return None
    rows: list[list[Any]] = [
        [chip(color) + label, *(num(asdict(busy)[name], ".1%") for _, busy in found)]
        for name, (label, color) in drawings.SHARES.items()
    ]
    tokens = [(run.record.summary["tokens"], busy.wall_s) for run, busy in found]
    rows.append(["wall time, s", *(num(busy.wall_s, ",.1f") for _, busy in found)])
    rows.append(["sampled tokens per second of it", *(num(None if n is None else n / s, ",.0f") for n, s in tokens)])
    bars = {run.plain: drawings.utilisation_bar(busy) for run, busy in found}
    return {"bars": bars, "rows": rows, "names": [run.html for run, _ in found]}
