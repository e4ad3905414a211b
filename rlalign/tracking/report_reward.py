"""The report's section on reward models: what they promise against what the verifier says, and the monitor's verdict."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlalign.tracking import files
from rlalign.tracking import report_plots as plots
from rlalign.tracking.record import RunRecord
from rlalign.tracking.report_page import details, esc, figure, grid, num, section, table
from rlalign.tracking.report_plots import Line
from rlalign.tracking.report_runs import DASHES, Shown, chart, each, legend, lines_of

PREFIX = "reward/drift/"
COMPONENT = re.compile("reward/[^/]+/mean")
STATES = {0: "ok", 1: "warn", 2: "drift", -1: "insufficient_data"}
CHECKS = {
    "gap": "E[p] - E[y], newest rows",
    "tilt": "tilt, newest rows",
    "ece": "debiased ECE",
    "auroc": "AUROC since the fit",
    "psi": "PSI of the scores",
    "out_of_support": "out of the fitted range",
}


def watched(run: RunRecord) -> list[str]:
    """Names of the reward models whose drift the run has watched."""
    keys = {key for row in run.metrics.rows for key in row if key.startswith(PREFIX)}
    return sorted({key.removeprefix(PREFIX).partition("/")[0] for key in keys})


def drift_problems(run: RunRecord) -> list[str]:
    """One sentence for every reward model that the monitor saw drift."""
    found = []
    for name in watched(run):
        steps, states = run.series(f"{PREFIX}{name}/state")
        bad = [step for step, state in zip(steps, states, strict=True) if STATES.get(state) == "drift"]
        if bad:
            found.append(
                f"The reward model {name} drifted from the verifier on {len(bad)} of {len(steps)} reports (first: step "
                f"{bad[0]:.0f}, last: step {bad[-1]:.0f})."
            )
    return found


def rewards(runs: Sequence[Shown]) -> str:
    """What was learned, what the reward is made of, and what the completions look like."""
    names = _components(runs)
    shown = names[: len(DASHES)]
    parts = "mean of each, calibrated" + (
        f"; {len(names) - len(shown)} more are in metrics.jsonl" if names[len(shown) :] else ""
    )
    charts = [
        chart(runs, "Mean reward", "thin: each step; bold: running mean over a tenth", ("reward/mean", ""), smooth=True),
        chart(runs, "Held-out accuracy", "mean reward on prompts never trained on", ("eval/accuracy", ""), markers=True),
        chart(
            runs, "Spread of the reward", "groups of equal rewards teach nothing",
            ("reward/std", "standard deviation"), ("reward/frac_zero_std_groups", "share of such groups"),
        ),
        chart(runs, "Components", parts, *((f"reward/{name}/mean", name) for name in shown))
        if len(names) > 1 else "",
        chart(runs, "Length of the completions", "tokens, mean", ("rollout/length_mean", "")),
        chart(runs, "Cut off by max_tokens", "share of the completions", ("rollout/truncated_frac", ""), neutral=0.0),
        chart(runs, "Samples without a reward", "a step", ("reward/failed", ""), neutral=0.0),
    ]  # fmt: skip
    return section("Rewards", grid(charts))


def _components(runs: Sequence[Shown]) -> list[str]:
    """The parts of the reward, of every run."""
    firsts = [row for run in runs for row in run.record.metrics.rows[:1]]
    return sorted({key.split("/")[1] for row in firsts for key in row if COMPONENT.fullmatch(key)})


def reward_models(runs: Sequence[Shown]) -> str:
    """A section for every reward model that any of the runs has watched."""
    names = sorted({name for run in runs for name in watched(run.record)})
    return "".join(_model(runs, name) for name in names)


def _model(runs: Sequence[Shown], name: str) -> str:
    charts = [
        _pair(
            runs, name, "Promise and verifier", "mean over the window", ("expected", "E[p]"), ("observed", "verifier")
        ),
        _pair(
            runs,
            name,
            "Promise minus verifier",
            "range: 95 %",
            ("gap", "E[p] - E[y]"),
            ("gap_low", ""),
            ("gap_high", "range"),
        ),
        _pair(
            runs,
            name,
            "Calibration error",
            "15 bins",
            ("ece", "debiased ECE"),
            ("ece_by_chance", "plain ECE by chance"),
        ),
        _pair(
            runs,
            name,
            "Ranking",
            "area under the ROC curve",
            ("auroc", "AUROC"),
            ("auroc_low", ""),
            ("auroc_high", "range"),
        ),
        _pair(runs, name, "State", "2 drift, 1 warn, 0 ok, -1 too few labels", ("state", "state")),
    ]
    latest = [_latest(run.record, name) for run in runs]
    charts += [
        figure(
            plots.reliability(report["labels"]["reliability"], color=run.color, name=f"reliability-{name}-{run.color}"),
            run.html or "Reliability",
            f"of the last {report['labels']['rows']:,} labelled samples, bars: 95 %",
        )
        for run, report in zip(runs, latest, strict=True)
        if report and report["labels"]
    ]
    tables = each(runs, [_checks(report) if report else "" for report in latest])
    lead = (
        "The calibrated probability of every sample against the verifier's word on the same samples, over the window of the "
        "monitor. Labels decide on drift; scores that only moved (PSI, range) are a warning."
    )
    body = grid(charts) + (details("The last report", tables) if tables else "")
    return section(f"Reward model {esc(name)}: drift", body, lead)


def _pair(runs: Sequence[Shown], name: str, title: str, note: str, *keys: tuple[str, str]) -> str:
    """Up to three metrics of a model in one chart: the first solid, the others dashed; those without a label share one."""
    styles = ("-", "--", "--")
    lines: list[Line] = [
        line
        for (key, _), style in zip(keys, styles, strict=False)
        for line in lines_of(runs, f"{PREFIX}{name}/{key}", style=style)
    ]
    if not lines:
        return ""
    css = {"-": "solid", "--": "dashed"}
    named = [(label, css[style]) for (_, label), style in zip(keys, styles, strict=False) if label]
    items = "".join(
        f'<span class="item"><span class="dash" style="border-top-style:{style}"></span>{label}</span>'
        for label, style in named
    )
    svg = plots.line_chart(lines, name=f"{keys[0][0]}-{name}")
    return figure(svg, title, note, items if len(named) > 1 else "", legend(runs))


def _latest(run: RunRecord, name: str) -> dict | None:
    path = run.directory / "drift" / f"{name}.json"
    return files.read_json(path) if path.exists() else None


def _checks(report: dict) -> str:
    rows = [
        [
            esc(CHECKS.get(check["name"], check["name"])),
            esc(check["state"]),
            num(check["value"], "+.3f"),
            num(check["beyond"], ".3f"),
            num(check["limit"], "g"),
            num(check["rows"], ","),
        ]
        for check in report["checks"]
    ]
    said = (
        f"calibration {esc(report['calibration_id'])}, version {report['calibration_version']}: {esc(report['state'])}"
    )
    return f"<p>{said}</p>" + table(["", "state", "value", "beyond chance", "limit", "rows"], rows)
