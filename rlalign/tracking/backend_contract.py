"""What every place that shows a run is given and can do: `Start` in, a `Backend` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


Cell = str | int | float | None


class Backend(Protocol):
    """One of them. Keys are the run's own; the x axis of everything is `step`."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of numbers."""

    def log_histogram(self, step: int, name: str, values: np.ndarray | Sequence[float]) -> None:
        """A distribution; only its finite values have a place."""

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """A small table; every row has the same columns."""

    def event(self, step: int, kind: str, message: str) -> None:
        """Something a reader must know; step -1 is before the first."""

    def about(self) -> dict[str, Cell]:
        """What a later process needs to go on with this run, for run.json."""
        ...

    def finish(self, summary: dict, *, exit_code: int) -> None:
        """Close; waits for uploads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Which backends a run has and under which names.

    wandb_mode: auto, online, offline, disabled. group, job_type, tags: how runs are compared. port: of the Prometheus endpoint,
    0 for none.
    """

    backends: tuple[str, ...] = ("wandb",)
    wandb_mode: str = "auto"
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    port: int = 0
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a backend is started with. known: what `about` said in the process that this one continues, else empty."""

    directory: Path
    project: str
    name: str
    config: dict
    places: Places
    last_step: int
    known: Mapping[str, Cell]
