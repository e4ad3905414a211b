"""One run, one directory: plain files that stay readable when the process is killed in the middle.

run.json config.json config.yaml environment.json      written at the start; run.json carries the status
metrics.jsonl events.jsonl timeline.jsonl              one line per step, per event, per phase of a step, flushed
tokens/step-000040.parquet                             one row per token of a sampled step
head_status.json summary.json                          what every rank answered; the numbers of the run
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from rlalign.config.sections import BACKENDS
from rlalign.tracking import backends, environment, files
from rlalign.tracking.backends import Backend, Places
from rlalign.tracking.record import read_header, read_metrics
from rlalign.tracking.timeline import RESUMED, SHORTEST_S, Span, encode
from rlalign.tracking.token_files import Column, sampled_tokens, worst_tokens, write_tokens

if TYPE_CHECKING:
    import numpy as np


def claim(directory: Path, *, resume: bool, overwrite: bool) -> dict | None:
    """Make the directory ours. Returns the header of the run to continue, or None for a new one.

    Raises ValueError for a directory that is in use, holds something else, or holds a run that nobody said what to do with.
    """
    present = [p.name for p in directory.iterdir()] if directory.exists() else []
    if files.RUN not in present:
        if resume:
            raise ValueError(f"{directory}: nothing to resume; it holds no {files.RUN}")
        # Hydra puts .hydra/ and a log file into the same directory before the run starts.
        foreign = [name for name in present if not name.startswith(".") and not name.endswith(".log")]
        if foreign:
            some = ", ".join(sorted(foreign)[:3])
            raise ValueError(f"{directory} holds files that are no run ({some}); choose an empty directory")
        directory.mkdir(parents=True, exist_ok=True)
        return None
    if files.is_live(directory):
        raise ValueError(f"{directory}: a live process is writing this run; stop it or choose another directory")
    if resume:
        return read_header(directory)
    if not overwrite:
        raise ValueError(
            f"{directory} already holds a run. Choose another directory, resume=true to continue it, "
            f"or overwrite=true to move it aside to {free_name(directory).name}"
        )
    directory.rename(free_name(directory))
    directory.mkdir(parents=True)
    return None


def take_lock(directory: Path) -> IO[str]:
    """The run's lock. Raises ValueError where another process was faster."""
    lock = files.hold_lock(directory)
    if lock is None:
        raise ValueError(f"{directory}: another process started a run here at this moment")
    return lock


def reopen(directory: Path) -> tuple[int, str | None]:
    """Cut a torn last line off every file of lines; returns the last step and what was torn off the metrics."""
    lines = {name: files.read_lines(directory / name) for name in (files.METRICS, files.EVENTS, files.TIMELINE)}
    for name, found in lines.items():
        if found.torn is not None:
            with (directory / name).open("r+b") as handle:
                handle.truncate(found.whole_bytes)
    rows = read_metrics(directory / files.METRICS).rows
    return int(rows[-1]["step"]) if rows else -1, lines[files.METRICS].torn


def free_name(path: Path) -> Path:
    """NAME.1, or the first number that is not taken."""
    n = 1
    while (free := path.with_name(f"{path.name}.{n}")).exists():
        n += 1
    return free


# Distributions that every backend with histograms gets at token steps: name -> column of the token file.
HISTOGRAMS = {
    "mismatch/log_ratio": "log_ratio",
    "train/token_entropy": "entropy",
    "train/token_advantage": "advantage",
    "rollout/token_logprob": "rollout_logprob",
}
WORST, ALERTS = "mismatch/worst_tokens", "events/alerts"  # alerts: of this process, in the dashboards only
RESERVED = ("step", "seconds", files.NONFINITE)


class Run:
    """A run being written. Use it as a context manager: an exception becomes the status of the run and is re-raised.

    directory: created; a directory that already holds a run is refused unless `resume` (append) or `overwrite`
    (the old one is moved aside to NAME.1, NAME.2, ...; nothing is deleted). A live run is refused always.
    wandb_mode: auto (online with an API key, else offline), online, offline, disabled. places: all other backends and names;
    with it, its own wandb_mode counts.
    Raises ValueError for a directory that cannot be used, a config that is not plain data, an unknown mode, a backend whose
    package is missing, or a port that is taken; nothing of an older run has been touched by then.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: dict,
        project: str,
        name: str,
        wandb_mode: str = "auto",
        places: Places | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.directory, self.name, self.last_step = Path(directory), name, -1
        self._config: dict[str, Any] = files.jsonable(config, "config")
        self._began, self._open, self._alerts = time.monotonic(), True, 0
        self._one = threading.RLock()  # events come from other threads too, and backends are made for one
        self._places = places or Places(wandb_mode=wandb_mode)
        backends.require_installed(self._places)
        self._backends: dict[str, Backend] = backends.endpoint(self._places, name=name, project=project)
        try:
            previous = claim(self.directory, resume=resume, overwrite=overwrite)
            self._lock = take_lock(self.directory)
        except BaseException:
            self._finish_backends({}, exit_code=1)
            raise
        self.last_step, torn = reopen(self.directory) if previous else (-1, None)
        self._header = {
            "schema_version": files.SCHEMA_VERSION,
            "name": name,
            "project": project,
            "status": "running",
            "message": "",
            "started": previous["started"] if previous else _now(),
            "ended": None,
            "host": socket.gethostname(),
            "wandb": {"mode": "disabled", "id": previous["wandb"]["id"] if previous else None},
        }
        self._header = {name: previous[name] for name in BACKENDS if previous and name in previous} | self._header
        self._write_start(previous)
        self._metrics, self._events, self._timeline = (
            (self.directory / file).open("a", encoding="utf-8")
            for file in (files.METRICS, files.EVENTS, files.TIMELINE)
        )
        if previous:
            self.log_timeline([Span(RESUMED, time.time(), time.time(), self.last_step)])
            self.event(
                "resume", f"after step {self.last_step}" + (f"; dropped a torn line: {torn[:80]!r}" if torn else "")
            )
        try:
            self._start_backends()
        except BaseException as error:
            self._close("failed", f"tracking did not start: {error}", {})
            raise

    def _write_start(self, previous: dict | None) -> None:
        import yaml

        # First: a start that is killed from here on is known as a run, and the same command can begin again.
        files.write_json(self.directory / files.RUN, self._header)
        (self.directory / files.TOKENS).mkdir(exist_ok=True)
        config = self.directory / files.CONFIG
        if previous and files.read_json(config) != self._config:
            config.rename(free_name(config))
        files.write_json(config, self._config)
        files.write_atomic(self.directory / "config.yaml", yaml.safe_dump(self._config, sort_keys=False))
        files.write_json(self.directory / files.ENVIRONMENT, environment.snapshot())

    def _start_backends(self) -> None:
        header = self._header
        for name in self._places.backends:
            given = backends.Start(
                directory=self.directory,
                project=header["project"],
                name=self.name,
                config=self._config,
                places=self._places,
                last_step=self.last_step,
                known=header.get(name, {}),
            )
            backend, note = backends.start(name, given)
            if note:
                self.event(name, note)
            if backend is not None:
                self._backends[name] = backend
        header |= {name: about for name, backend in self._backends.items() if (about := backend.about())}
        files.write_json(self.directory / files.RUN, header)

    def rewind(self, step: int) -> None:
        """Go on after `step`, as from a checkpoint: later steps are logged again, and their later rows count."""
        self._require_open("rewind")
        if step > self.last_step:
            raise ValueError(
                f"{self.directory}: cannot go on after step {step}; the last one logged is {self.last_step}"
            )
        self.last_step = step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row. Non-finite values are kept (null in the file, with their kind beside them).

        Raises ValueError for keys that are not text, values that are not numbers, and a step that does not increase.
        """
        self._require_open("log")
        if step <= self.last_step:
            raise ValueError(f"step {step} was logged after step {self.last_step}; steps only increase within a run")
        row = numbers({k: v for k, v in metrics.items() if k != "step"})
        self._metrics.write(files.encode_row({"step": step, "seconds": round(self._seconds(), 3), **row}) + "\n")
        self._metrics.flush()
        self.last_step = step
        with self._one:
            for backend in self._backends.values():
                backend.log(step, row | {ALERTS: self._alerts})

    def log_histogram(self, step: int, name: str, values: np.ndarray | Sequence[float]) -> None:
        """A distribution for the dashboards; the values themselves are in the token files."""
        self._require_open("log_histogram")
        with self._one:
            for backend in self._backends.values():
                backend.log_histogram(step, name, values)

    def log_tokens(self, step: int, columns: Mapping[str, Column]) -> Path:
        """Write tokens/step-NNNNNN.parquet, one row per token; see `tokens.SCHEMA` for the columns.

        The dashboards get the distributions of HISTOGRAMS over the sampled tokens, and a table of the worst of them.
        """
        self._require_open("log_tokens")
        path = write_tokens(self.directory / files.TOKENS / f"step-{step:06d}.parquet", step, columns)
        if self._backends:
            sampled = sampled_tokens(columns)
            for name, column in HISTOGRAMS.items():
                self.log_histogram(step, name, sampled[column])
            worst = worst_tokens(step, sampled)
            with self._one:
                for backend in self._backends.values():
                    backend.log_table(step, WORST, worst)
        return path

    def log_timeline(self, spans: Iterable[Span]) -> None:
        """Append when phases ran, one row each."""
        self._require_open("log_timeline")
        self._timeline.writelines(json.dumps(encode(span)) + "\n" for span in spans)
        self._timeline.flush()

    @contextmanager
    def timed(self, step: int, phase: str) -> Iterator[None]:
        """A phase of the timeline that is no part of the step itself. Left out below a millisecond, and when it raises."""
        start, began = time.time(), time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        if seconds >= SHORTEST_S:
            self.log_timeline([Span(phase, start, start + seconds, step)])

    def log_head_status(self, statuses: list[dict]) -> None:
        """What each rank answered about its head, one dictionary per rank."""
        self._require_open("log_head_status")
        files.write_json(self.directory / files.HEAD_STATUS, statuses)

    def event(self, kind: str, message: str) -> None:
        """Something a reader of the run must know: an alert, a repair, a failure. From any thread."""
        line = {"time": _now(), "step": self.last_step, "kind": kind, "message": message}
        with self._one:
            self._events.write(json.dumps(line) + "\n")
            self._events.flush()
            self._alerts += kind.startswith(("alert/", "drift/drift"))
            for backend in self._backends.values():
                backend.event(self.last_step, kind, message)

    def finish(self, summary: dict) -> None:
        """Write summary.json and close the run as finished. Raises ValueError for a summary that is not plain data."""
        self._require_open("finish")
        files.write_json(self.directory / files.SUMMARY, summary)
        self._close("finished", "", summary)

    @property
    def wandb_url(self) -> str | None:
        """The run's page on wandb; None unless online."""
        return self._header["wandb"].get("url")

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        if error is None:
            self._close("failed", "the run was left without finish(summary)", {})
            return
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        message = f"{type(error).__name__}: {error}".rstrip(": ")
        self.event(status, message)
        self._close(status, message, {})

    def _close(self, status: str, message: str, summary: dict) -> None:
        """Set the status first: closing wandb may wait for a network, and the files must not wait with it."""
        self._open = False
        self._header |= {"status": status, "message": message, "ended": _now()}
        files.write_json(self.directory / files.RUN, self._header)
        for file in (self._metrics, self._events, self._timeline):
            file.close()
        self._finish_backends(summary, exit_code=0 if status == "finished" else 1)
        self._lock.close()

    def _finish_backends(self, summary: dict, *, exit_code: int) -> None:
        for backend in self._backends.values():
            backend.finish(summary, exit_code=exit_code)

    def _require_open(self, what: str) -> None:
        if not self._open:
            raise RuntimeError(f"Run.{what} after the run was closed as {self._header['status']!r}")

    def _seconds(self) -> float:
        return time.monotonic() - self._began


def numbers(metrics: Mapping[str, float]) -> dict[str, int | float]:
    """Metrics as Python numbers. Raises ValueError naming the key that is not text or the value that is no number."""
    row: dict[str, int | float] = {}
    for key, value in metrics.items():
        if not isinstance(key, str) or key in RESERVED:
            raise ValueError(f"metric key {key!r}: use text such as room/name; {', '.join(RESERVED)} are reserved")
        if not isinstance(value, Real):
            raise ValueError(f"metric {key}: expected a number, got {type(value).__name__} (call .item() on a tensor)")
        row[key] = int(value) if isinstance(value, Integral) else float(value)
    return row


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class SilentRun:
    """Takes what `Run` takes and keeps none of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def rewind(self, step: int) -> None: ...
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def log_histogram(self, step: int, name: str, values: np.ndarray | Sequence[float]) -> None: ...
    def log_tokens(self, step: int, columns: Mapping[str, Column]) -> None: ...
    def log_timeline(self, spans: Iterable[Span]) -> None: ...
    def timed(self, step: int, phase: str) -> AbstractContextManager[None]:
        return nullcontext()

    def log_head_status(self, statuses: list[dict]) -> None: ...
    def event(self, kind: str, message: str) -> None: ...
    def finish(self, summary: dict) -> None: ...
    def __enter__(self) -> SilentRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SilentProgress:
    """Takes what `Progress` takes and prints none of it."""

    def stage(self, text: str, done: int | None = None, total: int | None = None) -> None: ...
    def phase(self, step: int, name: str) -> None: ...
    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def final_table(self, summary: Mapping[str, Any], report: Path) -> None: ...
    def __enter__(self) -> SilentProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
