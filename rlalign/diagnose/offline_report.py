"""A mismatch analysis as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlalign.mismatch import summarize

if TYPE_CHECKING:
    from rlalign.diagnose.offline import Analysis, Row

COLUMNS = ("tokens", "k1", "k3", "k3_trimmed", "abs_mean", "p50", "p99", "abs_max", "pearson_prob", "ess")

_LABEL_COLUMNS = ("tokens", "k1", "k3", "abs_mean")
_MOST_ROWS = 40


def report(analysis: Analysis) -> str:
    """The analysis as Markdown, ready to paste."""
    overall = analysis.overall
    lines = [
        f"# Mismatch of {analysis.path.name}",
        "",
        "d = old - rollout, in nats; KL(rollout || old). Raw ratios, before any clip or mask.",
        f"{overall['tokens']:.0f} tokens in {overall['sequences']:.0f} sequences. Left out: "
        f"{overall['nonfinite']:.0f} non-finite ({overall['nonfinite_rollout']:.0f} rollout, "
        f"{overall['nonfinite_old']:.0f} trainer), {analysis.masked_out} masked out by {analysis.masked_by}.",
        "",
        *_lines("", {"all": overall}, COLUMNS),
        "",
        "| share of tokens over | 0.1 nat | 0.5 nat | 1 nat |",
        "|---|---|---|---|",
        f"| | {overall['over_0.1']:.3%} | {overall['over_0.5']:.3%} | {overall['over_1']:.3%} |",
    ]
    lags = {f"lag {lag}": summarize(s) for lag, s in sorted(analysis.stats.lags.items())}
    if lags:
        lines += ["", *_lines("version lag (lag 0: engine mismatch alone)", lags, COLUMNS)]
    else:
        lines += ["", "The dump has no lag column: engine mismatch and staleness are not told apart here."]
    steps = {str(step): row for step, row in analysis.by_step.items()}
    if len(steps) > 1:
        lines += ["", *_lines("step", _thinned(steps), COLUMNS)]
    positions = {
        str(d): {c: overall[f"position{d}/{c}"] for c in _LABEL_COLUMNS}
        for d in range(10)
        if f"position{d}/k3" in overall
    }
    for title, table in ({"response decile": positions} | analysis.tables).items():
        lines += ["", *_lines(title, table, _LABEL_COLUMNS)]
    for title, found in (("worst tokens", analysis.worst), ("non-finite tokens", analysis.nonfinite)):
        lines += ["", *_token_lines(title, found)] if found else []
    return "\n".join(lines)


def _lines(title: str, rows: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> list[str]:
    head = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    return head + [f"| {name} | " + " | ".join(_number(row[c]) for c in columns) + " |" for name, row in rows.items()]


def _token_lines(title: str, rows: Sequence[Row]) -> list[str]:
    head = [f"| {title}: step | sequence | position | token id | token | old | rollout | d |", "|---" * 8 + "|"]
    return head + [
        f"| {'' if r.step is None else r.step} | {r.at.sequence} | {r.at.position} | {r.at.token_id} | "
        f"{r.token!r} | {r.at.old_logprob:.4f} | {r.at.rollout_logprob:.4f} | {r.at.log_ratio:+.4f} |"
        for r in rows
    ]


def _thinned(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """At most _MOST_ROWS steps, evenly spaced, the first and the last among them; the JSON has all."""
    if len(rows) <= _MOST_ROWS:
        return rows
    names = list(rows)
    kept = sorted({round(i * (len(names) - 1) / (_MOST_ROWS - 1)) for i in range(_MOST_ROWS)})
    return {names[i]: rows[names[i]] for i in kept}


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


def jsonable(analysis: Analysis) -> dict:
    """Plain data; a number that is not finite becomes null."""

    def plain(row: Mapping[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in row.items()}

    def tokens(rows: Sequence[Row]) -> list[dict]:
        return [
            plain(
                {"old_logprob": r.at.old_logprob, "rollout_logprob": r.at.rollout_logprob, "log_ratio": r.at.log_ratio}
            )
            | {"step": r.step, "token": r.token, "token_id": r.at.token_id}
            | {"sequence": r.at.sequence, "position": r.at.position}
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
