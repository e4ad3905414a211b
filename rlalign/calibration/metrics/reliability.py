"""Reliability diagrams: what happened against what was promised, with the uncertainty of every bin."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from rlalign.calibration.metrics.ece import bin_stats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from rlalign.calibration.arrays import Floats, Numbers
    from rlalign.calibration.metrics.ece import Binning


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A point of the diagram, of a bin with rows: mean p, observed rate with its 95 % range, share of the weight."""

    confidence: float
    outcome: float
    low: float
    high: float
    share: float


def reliability_diagram(p: Numbers, y: Numbers, **binning: Unpack[Binning]) -> tuple[Bin, ...]:
    """One point per non-empty bin, by rising p; bins and errors as in `expected_calibration_error`."""
    bins = bin_stats(p, y, **binning)
    low_M, high_M = wilson(bins.outcome_M, bins.effective_M)
    columns = {
        "confidence": bins.confidence_M, "outcome": bins.outcome_M, "low": low_M, "high": high_M, "share": bins.share_M,
    }  # fmt: skip
    return tuple(
        Bin(**dict(zip(columns, row, strict=True)))
        for row in zip(*map(np.ndarray.tolist, columns.values()), strict=True)
    )


def wilson(rate: Floats, rows: Floats | float) -> tuple[Floats, Floats]:
    """The 95 % range of rates seen in so many rows each, within [0, 1] (Wilson 1927)."""
    z2 = 1.959963984540054**2
    centre = (rate + z2 / (2 * rows)) / (1 + z2 / rows)
    half = np.sqrt(z2 * (rate * (1 - rate) / rows + z2 / (4 * rows**2))) / (1 + z2 / rows)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def draw_reliability(axes: Axes, bins: Sequence[Mapping[str, float]], *, color: str, label: str = "") -> None:
    """Rates with their ranges; a point's area grows with its share of the rows. bins: fields of `Bin` by name."""
    p, rate, low, high, share = (
        np.array([each[name] for each in bins]) for name in ("confidence", "outcome", "low", "high", "share")
    )
    axes.vlines(p, low, high, color=color, linewidth=1.2, alpha=0.45)
    axes.plot(p, rate, color=color, linewidth=1.4, label=label)
    axes.scatter(p, rate, s=8 + 260 * share, color=color, alpha=0.85, zorder=3, linewidth=0)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def write_reliability(path: Path, diagrams: dict[str, tuple[Bin, ...]], *, title: str) -> None:
    """One picture (PNG, SVG or PDF, by the file's ending) with every diagram over the diagonal of perfect calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", label="perfect")
    for color, (label, bins) in zip(["#c44e52", "#4c72b0", "#55a868", "#8172b3"], diagrams.items(), strict=False):
        draw_reliability(axes, [asdict(each) for each in bins], label=label, color=color)
    axes.set(aspect="equal", title=title, xlabel="predicted probability", ylabel="observed rate (bars: 95 %)")
    axes.legend(loc="upper left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
