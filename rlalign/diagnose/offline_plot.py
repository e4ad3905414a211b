"""The picture of a mismatch analysis: four panels in one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rlalign.diagnose.offline import Analysis


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
    found = [d for d in range(10) if f"position{d}/k3" in analysis.overall]
    axes.bar(found, [analysis.overall[f"position{d}/k3"] for d in found], color="#4c72b0")
    axes.set(title="by decile of the response", xlabel="decile", ylabel="k3 (nats/token)")
