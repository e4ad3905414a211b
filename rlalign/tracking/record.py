"""Reading a run back: what `Run` wrote, as one frozen record, whether the run finished, failed or was killed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.tracking import files
from rlalign.tracking.run_summary import summarize
from rlalign.tracking.timeline import Span, read_timeline

if TYPE_CHECKING:
    from rlalign.config import RunConfig


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
