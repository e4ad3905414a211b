"""The only file that knows wandb. Keys are ours, unchanged; the x axis of every chart is `step`."""

from __future__ import annotations

import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import wandb

MODES = ("auto", "online", "offline", "disabled")
ONLINE_TIMEOUT_S = 30.0  # a compute node with a key but without a network must not hold a job for wandb's 90 s


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
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """True when wandb would find a login: WANDB_API_KEY, or an entry for its host in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # absent, unreadable or foreign: not logged in
        return False


class WandbRun:
    """One wandb run inside a run directory. mode: what it runs as; note: why, where that is not what was asked."""

    def __init__(
        self, directory: Path, *, project: str, name: str, config: dict, mode: str, run_id: str | None
    ) -> None:
        resolved, self.note = resolve_mode(mode), ""
        try:
            self.run = self._init(directory, project, name, config, resolved, run_id)
        except wandb.errors.CommError as error:
            if mode != "auto":
                raise
            self.note = f"wandb could not be reached ({error}); this run is recorded offline, `wandb sync` uploads it"
            resolved = "offline"
            self.run = self._init(directory, project, name, config, resolved, run_id)
        self.mode = resolved
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    @staticmethod
    def _init(directory: Path, project: str, name: str, config: dict, mode: str, run_id: str | None) -> wandb.Run:
        # vLLM imports openai, which wandb takes for an application and advertises its tracing product on stderr.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        settings = wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=ONLINE_TIMEOUT_S)
        return wandb.init(
            dir=str(directory),
            project=project,
            name=name,
            config=config,
            mode=mode,
            id=run_id,
            resume="allow" if run_id else None,
            settings=settings,
        )

    @property
    def run_id(self) -> str:
        """The id under which a later process resumes this run."""
        return self.run.id

    @property
    def url(self) -> str | None:
        """The run's page; None offline."""
        return self.run.url if self.mode == "online" else None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row; calls with the same step share it."""
        self.run.log({"step": step, **metrics}, step=step)

    def log_histogram(self, step: int, name: str, values: np.ndarray | Sequence[float]) -> None:
        """64 bins of the finite values; a histogram has no place for the others, NAME/nonfinite counts them."""
        values = np.asarray(values, dtype=np.float64)
        finite = values[np.isfinite(values)]
        row: dict[str, object] = {"step": step, f"{name}/nonfinite": int(values.size - finite.size)}
        if finite.size:
            row[name] = wandb.Histogram(np_histogram=np.histogram(finite, bins=64))
        self.run.log(row, step=step)

    def finish(self, summary: dict, *, exit_code: int) -> None:
        """Write the summary and close; waits for uploads when online."""
        for key, value in summary.items():
            self.run.summary[key] = value
        self.run.finish(exit_code=exit_code)
