"""Reliability diagrams: what happened against what was promised, with the uncertainty of every bin.

N rows, M non-empty bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlalign.calibration.metrics.ece import Closed, Strategy, bin_stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rlalign.calibration.arrays import Floats, Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityDiagram:
    """One point per non-empty bin: mean p, observed rate with its 95 % Wilson range, and share of the weight."""

    confidence_M: Floats
    outcome_M: Floats
    low_M: Floats
    high_M: Floats
    share_M: Floats


def reliability_diagram(
    p: Numbers,
    y: Numbers,
    *,
    n_bins: int = 15,
    strategy: Strategy = "uniform",
    closed: Closed = "right",
    sample_weight: Numbers | None = None,
    soft_labels: bool = False,
) -> ReliabilityDiagram:
    """The diagram's numbers; bins and errors as in `expected_calibration_error` (Wilson 1927 for the ranges)."""
    bins = bin_stats(
        p, y, n_bins=n_bins, strategy=strategy, closed=closed, sample_weight=sample_weight, soft_labels=soft_labels
    )
    n_M, rate_M, z2 = bins.effective_M, bins.outcome_M, 1.959963984540054**2
    centre_M = (rate_M + z2 / (2 * n_M)) / (1 + z2 / n_M)
    half_M = np.sqrt(z2 * (rate_M * (1 - rate_M) / n_M + z2 / (4 * n_M**2))) / (1 + z2 / n_M)
    return ReliabilityDiagram(
        confidence_M=bins.confidence_M,
        outcome_M=rate_M,
        low_M=np.clip(centre_M - half_M, 0, 1),
        high_M=np.clip(centre_M + half_M, 0, 1),
        share_M=bins.share_M,
    )


def draw_reliability(axes: Axes, diagram: ReliabilityDiagram, *, label: str, color: str) -> None:
    """Points with ranges; a point's area grows with its share of the rows."""
    error = np.abs(np.stack([diagram.outcome_M - diagram.low_M, diagram.high_M - diagram.outcome_M]))
    axes.errorbar(
        diagram.confidence_M, diagram.outcome_M, yerr=error, fmt="none", ecolor=color, elinewidth=1, alpha=0.5
    )
    axes.plot(diagram.confidence_M, diagram.outcome_M, color=color, linewidth=1.2, label=label)
    axes.scatter(
        diagram.confidence_M, diagram.outcome_M, s=12 + 300 * diagram.share_M, color=color, alpha=0.8, zorder=3
    )


def write_reliability(path: Path, diagrams: dict[str, ReliabilityDiagram], *, title: str) -> None:
    """One picture (PNG, SVG or PDF, by the file's ending) with every diagram over the diagonal of perfect calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", label="perfect")
    for color, (label, diagram) in zip(["#c44e52", "#4c72b0", "#55a868", "#8172b3"], diagrams.items(), strict=False):
        draw_reliability(axes, diagram, label=label, color=color)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", title=title)
    axes.set(xlabel="predicted probability", ylabel="observed rate (bars: 95 %)")
    axes.legend(loc="upper left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
