"""The only file that logs to wandb. Keys are ours, unchanged; the x axis of every chart is `step`."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import wandb
from wandb.errors import CommError

from rlalign.tracking.backends import Cell, Start, cells, finite

MODES = ("auto", "online", "offline", "disabled")
ONLINE_TIMEOUT_S = 30.0  # a compute node with a key but without a network must not hold a job for wandb's 90 s
# What the table of runs shows of a metric; every other one shows its last value.
SUMMARIES = {
    "mismatch/lag0/k3": "max,mean,last",
    "mismatch/lag0/abs_max": "max,last",
    "mismatch/excess/k3": "max,mean,last",
    "mismatch/nonfinite": "max,last",
    "reward/mean": "max,last",
    "eval/accuracy": "max,last",
    "correction/ess": "min,mean,last",
    "correction/kept_frac": "min,mean,last",
    "staleness/policy/max": "max,last",
    "publish/seconds": "mean,max,last",
    "time/step_s": "mean,max,last",
    "rollout/tokens_per_s": "mean,last",
}
ALERTS = ("alert", "mismatch", "failed", "interrupted", "diagnosis")  # kinds of events that wandb is told to send on


def resolve_mode(mode: str) -> str:
    """ "auto" becomes what WANDB_MODE says, else online with an API key, else offline.

    Raises ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"wandb mode {mode!r}: choose one of {', '.join(MODES)}")
    if mode != "auto":
        return mode
    asked = os.environ.get("WANDB_MODE")
    if asked:
        return resolve_mode(asked)
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """True when wandb would find a login: WANDB_API_KEY, or an entry for its host in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(path).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):  # absent, unreadable or foreign: not logged in
        return False


class WandbRun:
    """One wandb run inside a run directory. mode: what it runs as; note: why, where that is not what was asked."""

    def __init__(self, given: Start) -> None:
        asked = given.places.wandb_mode
        self.mode, self.note = resolve_mode(asked), ""
        try:
            self.run = self._init(given, self.mode)
        except CommError as error:
            if asked != "auto":
                raise
            self.note = f"wandb could not be reached ({error}); this run is recorded offline, `wandb sync` uploads it"
            self.mode = "offline"
            self.run = self._init(given, self.mode)
        self._offset: int | None = None
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        for key, summary in SUMMARIES.items():
            self.run.define_metric(key, step_metric="step", summary=summary)

    @staticmethod
    def _init(given: Start, mode: str) -> wandb.Run:
        # vLLM imports openai, which wandb takes for an application and advertises its tracing product on stderr.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=ONLINE_TIMEOUT_S,
            x_stats_track_process_tree=True,  # vLLM's workers and servers are processes of their own
        )
        run_id = given.known.get("id")
        return wandb.init(
            dir=str(given.directory),
            project=given.project,
            name=given.name,
            group=given.places.group or None,
            job_type=given.places.job_type or None,
            tags=given.places.tags,
            config=given.config,
            mode=cast("Any", mode),  # one of MODES
            id=None if run_id is None else str(run_id),
            resume="allow" if run_id else None,
            settings=settings,
        )

    def about(self) -> dict[str, Cell]:
        """The mode, the id under which a later process resumes this run, and its page; no page offline."""
        return {"mode": self.mode, "id": self.run.id, "url": self.run.url if self.mode == "online" else None}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row; calls with the same step share it."""
        self._log(step, dict(metrics))

    def log_histogram(self, step: int, name: str, values: np.ndarray | Sequence[float]) -> None:
        """64 bins of the finite values; a histogram has no place for the others, NAME/nonfinite counts them."""
        kept = finite(values)
        row: dict[str, Any] = {f"{name}/nonfinite": int(np.size(values) - kept.size)}
        if kept.size:
            row[name] = wandb.Histogram(np_histogram=np.histogram(kept, bins=64))
        self._log(step, row)

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """A cell whose number is not finite is empty: wandb's tables are JSON."""
        if rows:
            self._log(step, {name: wandb.Table(columns=list(rows[0]), data=cells(rows))})

    def event(self, step: int, kind: str, message: str) -> None:
        """Alerts and failures go out as wandb's alerts: by mail or chat, as the user has set it there."""
        if kind.partition("/")[0] in ALERTS:
            self.run.alert(title=f"{self.run.name}: {kind}", text=f"after step {step}: {message}", level="WARN")

    def finish(self, summary: dict, *, exit_code: int) -> None:
        """Write the summary and close; waits for uploads when online."""
        for key, value in summary.items():
            self.run.summary[key] = value
        self.run.finish(exit_code=exit_code)

    def _log(self, step: int, row: dict[str, Any]) -> None:
        """wandb drops rows under its own counter, where a resumed run stands that goes back to a checkpoint: count on from there.

        Charts are drawn over our `step`, which stays what it is.
        """
        if self._offset is None:
            self._offset = max(0, self.run.step - step)
        self.run.log({"step": step, **row}, step=step + self._offset)


def start(given: Start) -> tuple[WandbRun | None, str]:
    """The backend, None where wandb is switched off, and why it runs otherwise than was asked."""
    if resolve_mode(given.places.wandb_mode) == "disabled":
        return None, ""
    run = WandbRun(given)
    return run, run.note
