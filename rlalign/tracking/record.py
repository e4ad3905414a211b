"""Reading a run back: what `Run` wrote as one frozen record, whether it finished, failed or was killed, and its summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from rlalign.tracking import files
from rlalign.tracking.timeline import Span, read_timeline

if TYPE_CHECKING:
    from rlalign.config import RunConfig

LAG0 = {
    "k1": "k1",
    "k3": "k3",
    "abs_mean": "abs_mean",
    "p50": "p50",
    "p99": "p99",
    "pearson": "pearson_prob",
    "ess": "ess",
}
HEAD_ALONE = ("k3", "abs_mean", "p99", "rollout_error", "trainer_error")
PHASES = ("rollout", "reward", "score", "train", "publish")  # of a step; others, such as wait, come after them


def phases_of(rows: Sequence[dict[str, float]]) -> list[str]:
    """The phases that any row has timed as time/PHASE_s, in the order of a step."""
    logged = {key[5:-2] for row in rows for key in row if key.startswith("time/") and key.endswith("_s")} - {"step"}
    return [phase for phase in PHASES if phase in logged] + sorted(logged - set(PHASES))


def column(rows: Sequence[dict[str, float]], key: str) -> list[float]:
    """The finite values of one metric in step order; rows without it are left out."""
    return [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The part of summary.json that follows from metric rows. A metric that was never measured is None, not zero.

    reward_first, reward_last: mean of `reward/mean` over the first and last tenth of the steps (at least one step).
    eval_first, eval_last: first and last `eval/accuracy`.
    seconds: sum of `time/step_s`; tokens_per_s: all sampled tokens over those seconds, so training time counts.
    mismatch.lag0: median over steps; abs_max and k3_max: the worst step; nonfinite: tokens over all steps.
    head_isolated: median over steps, abs_max the worst. publishes: rows with a published version.
    rebuilds, repaired: sums over publishes.
    """
    reward, accuracy = column(rows, "reward/mean"), column(rows, "eval/accuracy")
    tenth = max(1, math.ceil(len(reward) / 10))
    tokens, seconds = _total(rows, "rollout/tokens"), _total(rows, "time/step_s")
    return {
        "steps": len(rows),
        "reward_first": fmean(reward[:tenth]) if reward else None,
        "reward_last": fmean(reward[-tenth:]) if reward else None,
        "eval_first": accuracy[0] if accuracy else None,
        "eval_last": accuracy[-1] if accuracy else None,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds if tokens and seconds else None,
        "mismatch": {
            "lag0": {
                **{name: _median(rows, f"mismatch/lag0/{key}") for name, key in LAG0.items()},
                "abs_max": _worst(rows, "mismatch/lag0/abs_max"),
                "k3_max": _worst(rows, "mismatch/lag0/k3"),
            },
            "nonfinite": _total(rows, "mismatch/nonfinite"),
        },
        "head_isolated": {
            **{name: _median(rows, f"head_isolated/{name}") for name in HEAD_ALONE},
            "abs_max": _worst(rows, "head_isolated/abs_max"),
        },
        "publishes": len(column(rows, "publish/version")),
        "publish_seconds": _median(rows, "publish/seconds"),
        "rebuilds": _total(rows, "publish/rebuilds"),
        "repaired": _total(rows, "publish/repaired"),
    }


def _median(rows: Sequence[dict[str, float]], key: str) -> float | None:
    values = column(rows, key)
    return median(values) if values else None


def _worst(rows: Sequence[dict[str, float]], key: str) -> float | None:
    return max(column(rows, key), default=None)


def _total(rows: Sequence[dict[str, float]], key: str) -> float | None:
    values = column(rows, key)
    return sum(values) if values else None


@dataclass(frozen=True, slots=True)
class Metrics:
    """Rows in step order, NaN and infinities restored. torn: the unfinished last line of a killed run, or None."""

    rows: tuple[dict[str, float], ...]
    torn: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Everything a run left behind.

    status: running, finished, failed, interrupted, or killed (it says running but no process holds its lock).
    summary: numbers from the metric rows, overlaid with what summary.json says where the run wrote one.
    """

    directory: Path
    name: str
    status: str
    message: str
    started: str
    ended: str | None
    config: dict
    environment: dict
    metrics: Metrics
    events: tuple[dict, ...]
    timeline: tuple[Span, ...]  # none in runs of older versions
    head_status: tuple[dict, ...]
    summary: dict
    token_files: tuple[Path, ...]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, non-finite values included; empty where it was never logged."""
        points = [(row["step"], row[key]) for row in self.metrics.rows if row.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]


def read_metrics(path: Path) -> Metrics:
    """The rows of a metrics.jsonl. After a resume a step can be logged twice: the later row counts.

    Raises ValueError for damage other than a torn last line.
    """
    lines = files.read_lines(path)
    by_step: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines.rows, start=1):
        if not isinstance(line.get("step"), int):
            raise ValueError(f"{path}, line {number}: a metric row needs an integer step; got {line.get('step')!r}")
        by_step[line["step"]] = files.decode_row(line)
    return Metrics(tuple(by_step[step] for step in sorted(by_step)), lines.torn)


def read_header(directory: Path) -> dict:
    """run.json, checked. Raises ValueError for a directory that is missing, foreign, or of another schema."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such run directory")
    if not (directory / files.RUN).exists():
        raise ValueError(
            f"{directory} is not a run directory: it has no {files.RUN}. Pass the folder that holds metrics.jsonl"
        )
    header = files.read_json(directory / files.RUN)
    found = header.get("schema_version") if isinstance(header, dict) else None
    if found != files.SCHEMA_VERSION:
        raise ValueError(
            f"{directory}: run directory of schema {found!r}; this rlalign reads schema {files.SCHEMA_VERSION}. "
            "Read it with the version of rlalign that wrote it (environment.json names it)"
        )
    return header


def read_run(directory: Path) -> RunRecord:
    """The record of a run in any state. Raises ValueError for a directory that is not a readable run."""
    directory = Path(directory)
    header = read_header(directory)
    metrics = read_metrics(directory / files.METRICS)
    status, message = header["status"], header["message"]
    if status == "running" and not files.is_live(directory):
        last = metrics.rows[-1]["step"] if metrics.rows else "none"
        status, message = "killed", f"the process ended without closing the run; last logged step: {last}"
    summary, written = summarize(metrics.rows), directory / files.SUMMARY
    if written.exists():
        summary = overlay(summary, files.read_json(written))
    head = directory / files.HEAD_STATUS
    return RunRecord(
        directory=directory,
        name=header["name"],
        status=status,
        message=message,
        started=header["started"],
        ended=header["ended"],
        config=files.read_json(directory / files.CONFIG),
        environment=files.read_json(directory / files.ENVIRONMENT),
        metrics=metrics,
        events=files.read_lines(directory / files.EVENTS).rows,
        timeline=read_timeline(directory / files.TIMELINE),
        head_status=tuple(files.read_json(head)) if head.exists() else (),
        summary=summary,
        token_files=tuple(sorted((directory / files.TOKENS).glob("step-*.parquet"))),
    )


def overlay(under: dict, over: dict) -> dict:
    """Nested dictionaries merged; `over` wins wherever it has a value."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(under.get(key), dict)
        merged[key] = overlay(under[key], value) if both else value
    return merged


def config_of(record: RunRecord) -> RunConfig:
    """The run's configuration as this version reads it. Raises ValueError, naming who wrote it, when it cannot."""
    from rlalign.config import load

    try:
        return load(record.config)
    except ValueError as error:
        wrote = record.environment.get("versions", {}).get("rlalign")
        raise ValueError(
            f"{record.directory}: its configuration, by rlalign {wrote}, is not one of this version: {error}"
        ) from error
