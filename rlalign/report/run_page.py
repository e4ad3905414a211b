"""One self-contained HTML page from one run, or from several side by side with the first as the baseline; first what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from rlalign.mismatch.causes import Followed, follows
from rlalign.report import charts, drawings, plots, tables
from rlalign.report.html import chip, figure, num, render, short
from rlalign.report.plots import Shown, drawn, items, k3_limit, named, number_at
from rlalign.report.tables import TokenView, read_attribution, view_tokens
from rlalign.tracking.files import read_json, write_atomic
from rlalign.tracking.record import RunRecord, phases_of, read_run
from rlalign.tracking.timeline import processes, utilisation
from rlalign.types import LogprobSpec

__all__ = ["comparison", "drift_problems", "growth", "problems", "sentences", "watched", "write_report"]

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
        "problems": [f"{r.plain}: {p}" if len(runs) > 1 else p for r in runs for p in problems(r.record)],
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
    if len(runs) == 2:
        a, b = runs
        return [comparison(a.record, b.record, (a.plain, b.plain), differences)]
    return [f"{r.plain}: {sentences(r.record)}" if len(runs) > 1 else sentences(r.record) for r in runs]


def _models(runs: Sequence[Shown]) -> dict[str, dict[str, Any]]:
    """{reward model: its charts, and the last report of each run} for every one whose drift a run has watched."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({name for run in runs for name in watched(run.record)}):
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


DRIFT, DRIFTED = "reward/drift/", 2
ENDINGS = {"running": "is still running", "interrupted": "was interrupted", "killed": "was killed"}
IDENTITY = ("class", "mode", "rlalign", "vllm", "policy_version")  # what must be the same on every rank


def problems(run: RunRecord) -> list[str]:
    """Everything in a run that a reader has to know before believing its curves; empty when there is nothing."""
    found, lag0 = [], run.summary["mismatch"]["lag0"]
    if run.status != "finished":
        found.append(f"The run {ENDINGS.get(run.status, run.status)}" + (f": {run.message}" if run.message else "."))
    if run.metrics.torn is not None:
        found.append(
            "The last line of metrics.jsonl is torn: the process was killed while it wrote. It is left out here."
        )
    if lag0["k3"] is None:
        found.append("The mismatch at lag 0 was never measured, so nothing here says whether the ratios are right.")
    limit, (steps, values) = k3_limit(run), run.series("mismatch/lag0/k3")
    # Written so that NaN is over every limit.
    over = [] if limit is None else [step for step, value in zip(steps, values, strict=True) if not value <= limit]
    if limit is not None and over:
        lost = sum(not math.isfinite(value) for value in values)
        missing = f", {lost} not finite" if lost else ""
        found.append(
            f"k3 was over its limit {short(limit)} on {len(over)} of {len(steps)} steps (first: step {over[0]}, "
            f"largest finite value: {short(lag0['k3_max'] or 0.0)}{missing})."
        )
    if run.summary["mismatch"]["nonfinite"]:
        found.append(f"{run.summary['mismatch']['nonfinite']:,.0f} sampled tokens had no finite log-ratio.")
    raised = [e for e in run.events if e["kind"].startswith("alert/") and e["kind"] != "alert/log"]
    if raised:
        first = raised[0]["message"].partition("\n")[0]
        count = "An alert was" if len(raised) == 1 else f"{len(raised)} alerts were"
        found.append(f"{count} raised; the first, after step {raised[0]['step']}: {first}")
    return found + _learning(run) + drift_problems(run) + _head_problems(run)


def _learning(run: RunRecord) -> list[str]:
    s, names = run.summary, {"reward": "Reward", "eval": "Held-out accuracy"}
    if run.status != "finished" or s["steps"] <= 1:
        return []
    ends = [(name, s[f"{key}_first"], s[f"{key}_last"]) for key, name in names.items()]
    return [
        f"{name} did not rise: {first:.3f} at the start, {last:.3f} at the end."
        for name, first, last in ends
        if first is not None and last <= first
    ]


def watched(run: RunRecord) -> list[str]:
    """Names of the reward models whose drift the run has watched."""
    keys = {key for row in run.metrics.rows for key in row if key.startswith(DRIFT)}
    return sorted({key.removeprefix(DRIFT).partition("/")[0] for key in keys})


def drift_problems(run: RunRecord) -> list[str]:
    """One sentence for every reward model that the monitor saw drift."""
    found = []
    for name in watched(run):
        steps, states = run.series(f"{DRIFT}{name}/state")
        if bad := [step for step, state in zip(steps, states, strict=True) if state == DRIFTED]:
            found.append(
                f"The reward model {name} drifted from the verifier on {len(bad)} of {len(steps)} reports (first: step "
                f"{bad[0]:.0f}, last: step {bad[-1]:.0f})."
            )
    return found


def _head_problems(run: RunRecord) -> list[str]:
    found = []
    for key in IDENTITY:
        answers = sorted({str(status[key]) for status in run.head_status if key in status})
        if len(answers) > 1:
            found.append(f"The ranks do not have the same head: {key} is {' and '.join(answers)}.")
    wanted, got = run.config.get("head_dtype"), run.summary.get("head", {}).get("dtype")
    if wanted and got and wanted != got:
        found.append(f"The configuration asks for a {wanted} head; the engine reports {got}.")
    if run.status == "finished" and not run.head_status:
        found.append("No rank reported its head, so it is not known which head computed these numbers.")
    return found


def sentences(run: RunRecord) -> str:
    """Two sentences: what was learned, and how well the two engines agree."""
    s = run.summary
    lag0, limit = s["mismatch"]["lag0"], k3_limit(run)
    learned = f"Over {s['steps']:,} steps"
    if s["reward_first"] is None:
        learned += " no reward was logged"
    else:
        learned += f" the mean reward went from {s['reward_first']:.3f} to {s['reward_last']:.3f}"
    if s["eval_first"] is not None:
        learned += f" and held-out accuracy from {s['eval_first']:.3f} to {s['eval_last']:.3f}"
    if lag0["k3"] is None:
        return f"{learned}."
    agree = f"Rollout engine and trainer differ by k3 = {short(lag0['k3'])} nats per token at lag 0 (median over steps"
    agree += f"; worst step {short(lag0['k3_max'])}" + (f", limit {short(limit)})" if limit is not None else ")")
    agree += f", with {s['publishes']:,} publishes verified" if s["publishes"] else ""
    return f"{learned}. {agree}.{_support(run)}{_growth(run)}"


def growth(run: RunRecord) -> list[Followed]:
    """What k3 at lag 0 follows of trace/* and the entropy, over the steps that were traced; empty where too few were."""
    wanted = "mismatch/lag0/k3"
    rows = [row for row in run.metrics.rows if any(key.startswith("trace/") for key in row)]
    rows = [row for row in rows if math.isfinite(row.get(wanted, math.nan))]
    names = [key for key in (rows[0] if rows else ()) if key.startswith("trace/") or key == "train/entropy"]
    whole = [name for name in names if all(math.isfinite(row.get(name, math.nan)) for row in rows)]
    return follows([row[wanted] for row in rows], {name: [row[name] for row in rows] for name in whole})


def _growth(run: RunRecord) -> str:
    found = growth(run)
    if not found:
        return ""
    best = [f for f in found if f.beyond_chance][:3]
    chance = f"beyond the {found[0].chance:.2f} of chance (rank correlation of changes from row to row)"
    if not best:
        return f" Of {len(found)} traced series none changes with k3 {chance}."
    told = "; ".join(f"{f.name} ({f.changes:+.2f}, {f.lead} rows ahead)" for f in best)
    return f" k3 changes with {told}, {chance}."


def _support(run: RunRecord) -> str:
    """A sentence on the sets that a truncated run's probabilities are over; empty where nothing was truncated."""
    spec = LogprobSpec.of_sampling(run.config.get("rollout", {}), processed=True)
    if not spec.truncated:
        return ""
    size, mass, outside = (
        median(run.series(f"support/{name}")[1] or [math.nan]) for name in ("size_mean", "log_mass", "outside")
    )
    return (
        f" Ratios, entropies and KLs are over {spec.support}: {size:.1f} ids a token, with a log mass of {mass:+.3g} nats; "
        f"{outside:.2%} of the tokens lie outside the trainer's own set (medians over steps)."
    )


COMPARED = {
    "k3 of rollout engine and trainer": "mismatch.lag0.k3",
    "k3 of the heads in isolation": "head_isolated.k3",
    "the rollout head's distance from float64": "head_isolated.rollout_error",
}


def comparison(a: RunRecord, b: RunRecord, names: tuple[str, str], different: list[str]) -> str:
    """Two sentences about a pair: what is different, and what that did to mismatch and reward."""
    listed = ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
    first = f"{names[0]} and {names[1]} have the same configuration" if not different else f"They differ in {listed}"
    parts = []
    for of, path in COMPARED.items():
        x, y = (number_at(run.summary, path) for run in (a, b))
        if x is not None and y is not None:
            parts.append(f"{of} is {short(x)} in {names[0]} and {short(y)} in {names[1]}{_times(x, y, names)}")
    gains = [_gain(r) for r in (a, b)]
    if None not in gains:
        parts.append(f"the reward changed by {gains[0]:+.3f} and {gains[1]:+.3f}")
    return f"{first}. " + ("; ".join(parts) + "." if parts else "")


def _gain(run: RunRecord) -> float | None:
    first, last = run.summary["reward_first"], run.summary["reward_last"]
    return None if first is None else last - first


def _times(x: float, y: float, names: tuple[str, str]) -> str:
    if min(x, y) <= 0 or x == y:
        return ""
    ratio, lower = float(f"{max(x, y) / min(x, y):.2g}"), names[0] if x < y else names[1]
    return f", {short(ratio)} times lower in {lower}" if ratio > 1 else ""
