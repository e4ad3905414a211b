"""The plots of results/adaptive.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from adaptive_data import FAMILIES
from adaptive_methods import Judged

from rlalign.calibration.metrics import expected_calibration_error as ece

SHOWN = {
    "uncalibrated": "0.45", "temperature, top-label loss": "tab:orange", "histogram binning": "tab:green",
    "ATS linear": "tab:purple", "ATS transformer": "tab:blue",
}  # fmt: skip


def reliability(path: Path, rows: dict[str, list[Judged]]) -> None:
    """What happened against what was promised, with the mass of each bin below."""
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(15, 4.2), sharex=True, sharey="row", height_ratios=[3, 1])
    edges = np.linspace(0, 1, 16)
    for (name, colour), top, bottom in zip(SHOWN.items(), *axes, strict=True):
        judged = rows[name][0]
        at_N = np.clip(np.searchsorted(edges, judged.top_N, side="left") - 1, 0, 14)
        count = np.bincount(at_N, minlength=15)
        shown = count >= 10
        promised = np.bincount(at_N, judged.top_N, minlength=15)[shown] / count[shown]
        happened = np.bincount(at_N, judged.right_N, minlength=15)[shown] / count[shown]
        half = 1.96 * np.sqrt(np.maximum(happened * (1 - happened), 1e-3) / count[shown])
        top.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        top.errorbar(promised, happened, yerr=half, color=colour, marker="o", markersize=4, linewidth=1.2)
        top.set_title(f"{name}\nECE {ece(judged.top_N, judged.right_N):.3f}", fontsize=10)
        bottom.bar((edges[:-1] + edges[1:]) / 2, count / count.sum(), width=1 / 15, color=colour)
        bottom.set_xlabel("confidence")
    axes[0, 0].set_ylabel("share right")
    axes[1, 0].set_ylabel("share of tokens")
    _finish(figure, path)


def families(path: Path, rows: dict[str, list[Judged]], of_N: np.ndarray) -> None:
    """ECE of each family's tokens."""
    figure, axis = plt.subplots(figsize=(10, 3.4))
    width = 0.8 / len(SHOWN)
    for i, (name, colour) in enumerate(SHOWN.items()):
        j = rows[name][0]
        values = [ece(j.top_N[of_N == f], j.right_N[of_N == f]) for f in FAMILIES]
        axis.bar(np.arange(len(FAMILIES)) + i * width, values, width, color=colour, label=name)
    axis.set_xticks(np.arange(len(FAMILIES)) + 0.4 - width / 2, list(FAMILIES))
    axis.set_ylabel("ECE within the family")
    axis.legend(fontsize=8, frameon=False, ncols=len(SHOWN), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _finish(figure, path)


def domains(path: Path, rows: dict[str, dict[tuple[str, str], Judged]]) -> None:
    """ECE of every (fitted on, judged on) pair."""
    figure, axes = plt.subplots(1, len(rows), figsize=(16, 3.6), sharey=True, layout="constrained")
    for (name, cells), axis in zip(rows.items(), axes, strict=True):
        grid = np.array([[ece(cells[a, b].top_N, cells[a, b].right_N) for b in FAMILIES] for a in FAMILIES])
        image = axis.imshow(grid, vmin=0, vmax=0.7, cmap="magma_r")
        for (a, b), value in np.ndenumerate(grid):
            axis.text(
                b, a, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.4 else "black"
            )
        axis.set_xticks(range(len(FAMILIES)), list(FAMILIES), rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(FAMILIES)), list(FAMILIES), fontsize=8)
        axis.set_title(name, fontsize=10)
    axes[0].set_ylabel("fitted on")
    figure.colorbar(image, ax=axes, label="ECE", shrink=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _finish(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
