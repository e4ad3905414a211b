"""A mismatch analysis as Markdown, as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlalign.mismatch import summarize
from rlalign.report.html import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rlalign.diagnose.offline import Analysis, Row

__all__ = ["jsonable", "report", "write_plot"]

COLUMNS = ("tokens", "k1", "k3", "k3_trimmed", "abs_mean", "p50", "p99", "abs_max", "pearson_prob", "ess")
FEW = ("tokens", "k1", "k3", "abs_mean")  # of tables by label
MOST_STEPS = 40


def report(analysis: Analysis) -> str:
    """The analysis as Markdown, ready to paste."""
    overall, deciles = analysis.overall, _deciles(analysis)
    positions = {str(d): {c: overall[f"position{d}/{c}"] for c in FEW} for d in deciles}
    return render(
        "mismatch.md",
        name=analysis.path.name,
        overall=overall,
        columns=COLUMNS,
        few=FEW,
        lags={f"lag {lag}": summarize(s) for lag, s in sorted(analysis.stats.lags.items())},
        steps=_thinned(analysis.by_step),
        tables={"response decile": positions} | analysis.tables,
        worst=analysis.worst,
        nonfinite=analysis.nonfinite,
        masked=f"{analysis.masked_out} masked out by {analysis.masked_by}",
    ).rstrip()


def _deciles(analysis: Analysis) -> list[int]:
    """The tenths of the responses that have tokens."""
    return [d for d in range(10) if f"position{d}/k3" in analysis.overall]


def _thinned(rows: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """At most MOST_STEPS steps, evenly spaced, the first and the last among them; the JSON has all."""
    names, last = list(rows), len(rows) - 1
    if last < MOST_STEPS:
        return rows
    kept = sorted({round(i * last / (MOST_STEPS - 1)) for i in range(MOST_STEPS)})
    return {names[i]: rows[names[i]] for i in kept}


def jsonable(analysis: Analysis) -> dict:
    """Plain data; a number that is not finite becomes null."""

    def plain(row: Mapping[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in row.items()}

    def tokens(rows: Sequence[Row]) -> list[dict]:
        numbers, places = ("old_logprob", "rollout_logprob", "log_ratio"), ("token_id", "sequence", "position")
        return [
            plain({name: getattr(r.at, name) for name in numbers})
            | {"step": r.step, "token": r.token}
            | {name: getattr(r.at, name) for name in places}
            for r in rows
        ]

    return {
        "file": str(analysis.path),
        "masked_by": analysis.masked_by,
        "masked_out": analysis.masked_out,
        "overall": plain(analysis.overall),
        "steps": {step: plain(row) for step, row in analysis.by_step.items()},
        "tables": {title: {k: plain(v) for k, v in table.items()} for title, table in analysis.tables.items()},
        "worst": tokens(analysis.worst),
        "nonfinite": tokens(analysis.nonfinite),
    }


def write_plot(analysis: Analysis, path: Path) -> None:
    """Histogram of d, tail of |d|, k3 by step, k3 by response decile. The extension of `path` chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (histogram, tail), (steps, positions) = figure.subplots(2, 2)
    _histogram(histogram, analysis)
    _tail(tail, analysis)
    _steps(steps, analysis)
    _positions(positions, analysis)
    figure.suptitle(
        f"{analysis.path.name}: k3 {analysis.overall['k3']:.3g} nats/token, {analysis.overall['tokens']:.0f} tokens"
    )
    figure.savefig(path, dpi=120)


def _histogram(axes: Axes, analysis: Analysis) -> None:
    d_N = analysis.stats.distributions["log_ratio"].sorted_N.numpy()
    if len(d_N):
        low, high = (float(d_N[round(share * (len(d_N) - 1))]) for share in (0.0005, 0.9995))
        edges = np.linspace(low - 1e-9, high + 1e-9, 102).astype(np.float32)
        axes.stairs(np.diff(np.searchsorted(d_N, edges)), edges, fill=True, color="#4c72b0")
    axes.set(title="log-ratio, middle 99.9 % of tokens", xlabel="old - rollout (nats)", ylabel="tokens", yscale="log")


def _tail(axes: Axes, analysis: Analysis) -> None:
    size_N = analysis.stats.distributions["abs"].sorted_N.numpy()
    thinned = np.unique(np.geomspace(1, max(1, len(size_N)), 2000).astype(int)) if len(size_N) else np.array([], int)
    axes.loglog(size_N[::-1][thinned - 1], thinned / max(1, len(size_N)), color="#c44e52")
    axes.set(title="tail: share of tokens beyond", xlabel="|old - rollout| (nats)", ylabel="share")


def _steps(axes: Axes, analysis: Analysis) -> None:
    steps = list(analysis.by_step)
    for name, colour in (("k3", "#4c72b0"), ("k3_trimmed", "#55a868"), ("p99", "#c44e52")):
        axes.plot(steps, [row[name] for row in analysis.by_step.values()], label=name, color=colour, marker=".")
    axes.set(title="by step", xlabel="step", yscale="log")
    if steps:
        axes.legend()


def _positions(axes: Axes, analysis: Analysis) -> None:
    found = _deciles(analysis)
    axes.bar(found, [analysis.overall[f"position{d}/k3"] for d in found], color="#4c72b0")
    axes.set(title="by decile of the response", xlabel="decile", ylabel="k3 (nats/token)")
