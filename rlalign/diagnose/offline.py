"""rlalign mismatch FILE: the mismatch report of a run you already have, from its token dump, as Markdown, as JSON and as a picture.

B sequences, L padded length, N tokens of the whole dump.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce as fold
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlalign.diagnose.offline_read import Tokens, read_tokens
from rlalign.mismatch import collect, merge, summarize
from rlalign.mismatch.aligned import usable
from rlalign.mismatch.breakdown import (
    TOKEN_CLASSES,
    TokenMismatch,
    deciles,
    nonfinite_tokens,
    token_classes,
    worst_tokens,
)
from rlalign.mismatch.stats import label_table, merge_tables
from rlalign.mismatch.summary import label_means
from rlalign.report.html import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from torch import Tensor

    from rlalign.mismatch import Stats

__all__ = ["Analysis", "Labelling", "Row", "analyse", "jsonable", "report", "write_plot"]

CHUNK_TOKENS = 1 << 16  # padded tokens measured at once: bounds the memory, not the result


@dataclass(frozen=True)
class Row:
    """A worst or broken token of the dump; sequence counts from 0 in file order."""

    step: int | None
    token: str
    at: TokenMismatch


@dataclass(frozen=True)
class Analysis:
    """Everything the report shows. tables: title -> label -> tokens, k1, k2, k3, abs_mean."""

    path: Path
    overall: dict[str, float]
    stats: Stats
    by_step: dict[int, dict[str, float]]
    tables: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    worst: list[Row] = field(default_factory=list)
    nonfinite: list[Row] = field(default_factory=list)
    masked_by: str = ""  # the columns, as the product they form
    masked_out: int = 0  # tokens


def analyse(
    path: Path, *, columns: Mapping[str, str] | None = None, worst: int = 10, all_tokens: bool = False
) -> Analysis:
    """Measure a dump: overall, per step, and by every label it has columns for."""
    tokens = read_tokens(path, columns, all_tokens=all_tokens)
    labellings = _labellings(tokens)
    sums: list[dict[int, list[float]]] = [{} for _ in labellings]
    per_step: dict[int, list[Stats]] = {}
    rows: list[Row] = []
    broken: list[Row] = []
    for index_BL, inside_BL in _chunks(tokens):
        old_BL, rollout_BL = (_pad(x, index_BL, inside_BL) for x in (tokens.old_N, tokens.rollout_N))
        mask_BL = _pad(tokens.mask_N, index_BL, inside_BL)
        lag_BL = None if tokens.lag_N is None else _pad(tokens.lag_N, index_BL, inside_BL)
        first = int(index_BL[0, 0])
        step = -1 if tokens.step_N is None else int(tokens.step_N[first])
        per_step.setdefault(step, []).append(collect(old_BL, rollout_BL, mask_BL, lag_B=lag_BL))
        given = (old_BL, rollout_BL, mask_BL)
        keep_BL = usable(old_BL, rollout_BL, mask_BL)
        place_N = index_BL[keep_BL.numpy()]
        for i, labelling in enumerate(labellings):
            label_N = torch.from_numpy(labelling.label_N[place_N])
            table = label_table(old_BL[keep_BL].double(), rollout_BL[keep_BL].double(), label_N)
            sums[i] = merge_tables(sums[i], table)
        rows += [_row(tokens, index_BL, t) for t in worst_tokens(*given, count=worst)]
        broken += [_row(tokens, index_BL, t) for t in nonfinite_tokens(*given, count=worst)]
    merged = {step: fold(merge, parts) for step, parts in sorted(per_step.items())}
    stats = fold(merge, merged.values())
    rows.sort(key=lambda r: -abs(r.at.log_ratio))
    return Analysis(
        path=Path(path),
        overall=summarize(stats),
        stats=stats,
        by_step={} if tokens.step_N is None else {step: summarize(s) for step, s in merged.items()},
        tables={each.title: each.table(total) for each, total in zip(labellings, sums, strict=True)},
        worst=rows[:worst],
        nonfinite=broken[:worst],
        masked_by=tokens.masked_by,
        masked_out=int((~tokens.mask_N).sum()),
    )


def _chunks(tokens: Tokens) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Padded index blocks of whole sequences of one step, of like lengths, CHUNK_TOKENS large or one sequence."""
    sequence_N = tokens.sequence_N
    start_B = np.flatnonzero(np.diff(sequence_N, prepend=-1))
    count_B = np.diff(start_B, append=len(sequence_N))
    step_B = np.zeros(len(start_B), np.int64) if tokens.step_N is None else tokens.step_N[start_B]
    order_B = np.lexsort((count_B, step_B))
    begin = 0
    while begin < len(order_B):
        end = begin + 1
        while (
            end < len(order_B)
            and step_B[order_B[end]] == step_B[order_B[begin]]
            and count_B[order_B[end]] * (end + 1 - begin) <= CHUNK_TOKENS
        ):
            end += 1
        chosen_B = order_B[begin:end]
        offset_L = np.arange(count_B[chosen_B].max())
        inside_BL = offset_L < count_B[chosen_B][:, None]
        yield np.where(inside_BL, start_B[chosen_B][:, None] + offset_L, 0), inside_BL
        begin = end


def _pad(column_N: np.ndarray, index_BL: NDArray[np.int64], inside_BL: NDArray[np.bool_]) -> Tensor:
    """The column in the block's shape, zero outside."""
    return torch.from_numpy(np.where(inside_BL, column_N[index_BL], np.zeros((), column_N.dtype)))


def _row(tokens: Tokens, index_BL: NDArray[np.int64], at: TokenMismatch) -> Row:
    place = int(index_BL[at.sequence, at.position])
    sequence = int(tokens.sequence_N[place])
    return Row(
        step=None if tokens.step_N is None else int(tokens.step_N[place]),
        token="" if tokens.token_N is None else tokens.vocabulary[tokens.token_N[place]],
        at=TokenMismatch(
            sequence=sequence,
            position=at.position,
            token_id=-1 if tokens.token_id_N is None else int(tokens.token_id_N[place]),
            old_logprob=at.old_logprob,
            rollout_logprob=at.rollout_logprob,
        ),
    )


@dataclass(frozen=True)
class Labelling:
    """A title, every token's label, and the labels' names (None: the number itself). worst: show only that many."""

    title: str
    label_N: NDArray[np.integer]
    names: Sequence[str] | None = None
    worst: int | None = None

    def table(self, sums: dict[int, list[float]]) -> dict[str, dict[str, float]]:
        """Means by label name, in label order or, with `worst`, by falling k3."""
        rows = {str(k) if self.names is None else self.names[k]: label_means(sums[k]) for k in sorted(sums)}
        if self.worst is None:
            return rows
        return {name: rows[name] for name in sorted(rows, key=lambda name: -rows[name]["k3"])[: self.worst]}


def _labellings(tokens: Tokens) -> list[Labelling]:
    found = []
    if tokens.token_N is not None:
        special = [i for i, text in enumerate(tokens.vocabulary) if text.startswith("<") and text.endswith(">")]
        class_V = token_classes(
            torch.arange(len(tokens.vocabulary)), tokens=tokens.vocabulary, eos_ids=[], special_ids=special
        ).numpy()
        found.append(Labelling("token class", class_V.astype(np.int8)[tokens.token_N], TOKEN_CLASSES))
    if tokens.entropy_N is not None:
        usable_N = tokens.mask_N & np.isfinite(tokens.entropy_N)
        decile_N = deciles(torch.from_numpy(tokens.entropy_N)[None], torch.from_numpy(usable_N)[None])[0].numpy()
        found.append(
            Labelling(
                "entropy decile", np.where(usable_N, decile_N, 10).astype(np.int8), (*map(str, range(10)), "unknown")
            )
        )
    if tokens.version_N is not None and tokens.step_N is not None:
        steps, index_N = np.unique(tokens.step_N, return_inverse=True)
        newest_S = np.full(len(steps), -1, np.int32)
        np.maximum.at(newest_S, index_N, tokens.version_N)
        found.append(Labelling("versions behind the newest of its step", newest_S[index_N] - tokens.version_N))
    if tokens.group_N is not None:
        found.append(Labelling(f"worst of {len(tokens.groups)} groups", tokens.group_N, tokens.groups, worst=10))
    return found


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
