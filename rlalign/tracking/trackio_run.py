"""The only file that knows trackio: a local store in TRACKIO_DIR (its own default in the home folder), no server, no login."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout

import numpy as np
import trackio
from trackio.utils import TRACKIO_DIR

from rlalign.tracking.backends import Cell, Start, cells, finite

LEVELS = {"alert": trackio.AlertLevel.WARN, "mismatch": trackio.AlertLevel.WARN, "failed": trackio.AlertLevel.ERROR}


class TrackioRun:
    """One trackio run. note: where it lies, and why it is another one where that of a resumed run is not there any more."""

    def __init__(self, given: Start) -> None:
        known = given.known.get("id")
        goes_on = bool(known) and _latest(given.project, given.name) == known
        with redirect_stdout(io.StringIO()):  # its advertisement of the dashboard, which the note replaces
            self.run = trackio.init(
                project=given.project,
                name=given.name,
                group=given.places.group or None,
                config=given.config,
                resume="must" if goes_on else "never",
                embed=False,
            )
        self.note = (
            f"trackio keeps run {self.run.name} in {TRACKIO_DIR}; `trackio show --project {given.project}` shows it"
        )
        if known and not goes_on:
            self.note += "; the one this run began with is gone or not the newest of its name, so this is a new one"

    def about(self) -> dict[str, Cell]:
        """Id, name and store."""
        return {"id": self.run.id, "name": self.run.name, "store": str(TRACKIO_DIR)}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row."""
        self.run.log(dict(metrics), step=step)

    def log_histogram(self, step: int, name: str, values: np.ndarray | Sequence[float]) -> None:
        """64 bins of the finite values."""
        if (kept := finite(values)).size:
            self.run.log({name: trackio.Histogram(np_histogram=np.histogram(kept, bins=64))}, step=step)

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """A cell whose number is not finite is empty."""
        if rows:
            self.run.log({name: trackio.Table(columns=list(rows[0]), data=cells(rows))}, step=step)

    def event(self, step: int, kind: str, message: str) -> None:
        """An alert in its list, by level."""
        with redirect_stdout(io.StringIO()):
            level = LEVELS.get(kind.partition("/")[0], trackio.AlertLevel.INFO)
            self.run.alert(title=kind, text=message, level=level, step=max(step, 0))

    def finish(self, summary: dict, *, exit_code: int) -> None:
        """Write what is queued."""
        with redirect_stdout(io.StringIO()):
            trackio.finish()


def _latest(project: str, name: str) -> str | None:
    """The id of the newest run of that name, which is the one trackio would resume."""
    ids = [run.id for run in trackio.Api().runs(project) if run.name == name]
    return ids[-1] if ids else None


def start(given: Start) -> tuple[TrackioRun, str]:
    """The backend, and where it keeps the run."""
    run = TrackioRun(given)
    return run, run.note
