"""One run, one directory: plain files that stay readable when the process is killed in the middle.

run.json config.json config.yaml environment.json      written at the start; run.json carries the status
metrics.jsonl events.jsonl                             one line per step, per event, flushed
tokens/step-000040.parquet                             one row per token of a sampled step
head_status.json summary.json                          what every rank answered; the numbers of the run
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from rlalign.tracking import environment, files
from rlalign.tracking.record import read_header, read_metrics
from rlalign.tracking.tokens import Column, write_tokens

if TYPE_CHECKING:
    import numpy as np

    from rlalign.tracking.wandb_run import WandbRun

RESERVED = ("step", "seconds", files.NONFINITE)


class Run:
    """A run being written. Use it as a context manager: an exception becomes the status of the run and is re-raised.

    directory: created; a directory that already holds a run is refused unless `resume` (append) or `overwrite`
    (the old one is moved aside to NAME.1, NAME.2, ...; nothing is deleted). A live run is refused always.
    wandb_mode: auto (online with an API key, else offline), online, offline, disabled.
    Raises ValueError for a directory that cannot be used, a config that is not plain data, or an unknown mode.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: dict,
        wandb_mode: str,
        project: str,
        name: str,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.directory, self.name, self.last_step = Path(directory), name, -1
        self._config = files.jsonable(config, "config")
        self._began, self._open = time.monotonic(), True
        previous = self._claim(resume=resume, overwrite=overwrite)
        self._lock = self._take_lock()
        (self.directory / files.TOKENS).mkdir(exist_ok=True)
        torn = self._reopen() if previous else None
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
        self._write_start(previous)
        self._metrics = (self.directory / files.METRICS).open("a", encoding="utf-8")
        self._events = (self.directory / files.EVENTS).open("a", encoding="utf-8")
        if previous:
            self.event(
                "resume", f"after step {self.last_step}" + (f"; dropped a torn line: {torn[:80]!r}" if torn else "")
            )
        self._wandb: WandbRun | None = None
        try:
            self._wandb = self._start_wandb(wandb_mode)
        except BaseException as error:
            self._close("failed", f"wandb did not start: {error}", None)
            raise

    def _claim(self, *, resume: bool, overwrite: bool) -> dict | None:
        """Make the directory ours. Returns the header of the run to continue, or None for a new one."""
        present = [p.name for p in self.directory.iterdir()] if self.directory.exists() else []
        if files.RUN not in present:
            if resume:
                raise ValueError(f"{self.directory}: nothing to resume; it holds no {files.RUN}")
            # Hydra puts .hydra/ and a log file into the same directory before the run starts.
            foreign = [name for name in present if not name.startswith(".") and not name.endswith(".log")]
            if foreign:
                some = ", ".join(sorted(foreign)[:3])
                raise ValueError(f"{self.directory} holds files that are no run ({some}); choose an empty directory")
            self.directory.mkdir(parents=True, exist_ok=True)
            return None
        if files.is_live(self.directory):
            raise ValueError(
                f"{self.directory}: a live process is writing this run; stop it or choose another directory"
            )
        if resume:
            return read_header(self.directory)
        if not overwrite:
            raise ValueError(
                f"{self.directory} already holds a run. Choose another directory, resume=true to continue it, "
                f"or overwrite=true to move it aside to {_free_name(self.directory).name}"
            )
        self.directory.rename(_free_name(self.directory))
        self.directory.mkdir(parents=True)
        return None

    def _take_lock(self) -> IO[str]:
        lock = files.hold_lock(self.directory)
        if lock is None:
            raise ValueError(f"{self.directory}: another process started a run here at this moment")
        return lock

    def _reopen(self) -> str | None:
        """Cut a torn last line off metrics and events, and continue the step count."""
        lines = {name: files.read_lines(self.directory / name) for name in (files.METRICS, files.EVENTS)}
        for name, found in lines.items():
            if found.torn is not None:
                with (self.directory / name).open("r+b") as handle:
                    handle.truncate(found.whole_bytes)
        rows = read_metrics(self.directory / files.METRICS).rows
        self.last_step = rows[-1]["step"] if rows else -1
        return lines[files.METRICS].torn

    def _write_start(self, previous: dict | None) -> None:
        import yaml

        config = self.directory / files.CONFIG
        if previous and files.read_json(config) != self._config:
            config.rename(_free_name(config))
        files.write_json(config, self._config)
        files.write_atomic(self.directory / "config.yaml", yaml.safe_dump(self._config, sort_keys=False))
        files.write_json(self.directory / files.ENVIRONMENT, environment.snapshot())
        files.write_json(self.directory / files.RUN, self._header)

    def _start_wandb(self, mode: str) -> WandbRun | None:
        if mode == "disabled":
            return None
        from rlalign.tracking.wandb_run import WandbRun, resolve_mode

        if resolve_mode(mode) == "disabled":
            return None
        header = self._header
        run = WandbRun(
            self.directory,
            project=header["project"],
            name=self.name,
            config=self._config,
            mode=mode,
            run_id=header["wandb"]["id"],
        )
        header["wandb"] = {"mode": run.mode, "id": run.run_id, "url": run.url}
        files.write_json(self.directory / files.RUN, header)
        if run.note:
            self.event("wandb", run.note)
        return run

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
        if self._wandb:
            self._wandb.log(step, row)

    def log_histogram(self, step: int, name: str, values: np.ndarray | Sequence[float]) -> None:
        """A distribution for wandb's dashboard; the values themselves are in the token files."""
        self._require_open("log_histogram")
        if self._wandb:
            self._wandb.log_histogram(step, name, values)

    def log_tokens(self, step: int, columns: Mapping[str, Column]) -> Path:
        """Write tokens/step-NNNNNN.parquet, one row per token; see `tokens.SCHEMA` for the columns."""
        self._require_open("log_tokens")
        return write_tokens(self.directory / files.TOKENS / f"step-{step:06d}.parquet", step, columns)

    def log_head_status(self, statuses: list[dict]) -> None:
        """What each rank answered about its head, one dictionary per rank."""
        self._require_open("log_head_status")
        files.write_json(self.directory / files.HEAD_STATUS, statuses)

    def event(self, kind: str, message: str) -> None:
        """Something a reader of the run must know: an alert, a repair, a failure."""
        line = {"time": _now(), "step": self.last_step, "kind": kind, "message": message}
        self._events.write(json.dumps(line) + "\n")
        self._events.flush()

    def finish(self, summary: dict) -> None:
        """Write summary.json and close the run as finished. Raises ValueError for a summary that is not plain data."""
        self._require_open("finish")
        files.write_json(self.directory / files.SUMMARY, summary)
        self._close("finished", "", summary)

    @property
    def wandb_url(self) -> str | None:
        """The run's page on wandb; None unless online."""
        return self._wandb.url if self._wandb else None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        if error is None:
            self._close("failed", "the run was left without finish(summary)", None)
            return
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        message = f"{type(error).__name__}: {error}".rstrip(": ")
        self.event(status, message)
        self._close(status, message, None)

    def _close(self, status: str, message: str, summary: dict | None) -> None:
        """Set the status first: closing wandb may wait for a network, and the files must not wait with it."""
        self._open = False
        self._header |= {"status": status, "message": message, "ended": _now()}
        files.write_json(self.directory / files.RUN, self._header)
        self._metrics.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish(summary or {}, exit_code=0 if status == "finished" else 1)
        if self._lock:
            self._lock.close()

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


def _free_name(path: Path) -> Path:
    """NAME.1, or the first number that is not taken."""
    n = 1
    while (free := path.with_name(f"{path.name}.{n}")).exists():
        n += 1
    return free


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
