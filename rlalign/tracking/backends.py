"""Where a run shows beside its directory: wandb, TensorBoard, trackio, a Prometheus endpoint. Each has one file of its own.

What every one of them is given and can do: `Start` in, a `Backend` out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlalign.config.sections import BACKENDS

if TYPE_CHECKING:
    import numpy as np

    from rlalign.config import TrackingConfig

Cell = str | int | float | None


def finite(values: np.ndarray | Sequence[float]) -> np.ndarray:
    """The values that a histogram has a place for, float64."""
    import numpy

    values = numpy.asarray(values, dtype=numpy.float64)
    return values[numpy.isfinite(values)]


def cells(rows: Sequence[Mapping[str, Cell]]) -> list[list[Cell]]:
    """Rows of a table that is stored as JSON: a cell whose number is not finite is empty."""
    return [[None if isinstance(c, float) and not math.isfinite(c) else c for c in row.values()] for row in rows]


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


ENDPOINT_NEEDS = ("prometheus_client", "prometheus")


def places_of(config: TrackingConfig) -> Places:
    """What the configuration asks for."""
    return Places(
        backends=tuple(config.backends),
        wandb_mode=config.wandb,
        group=config.group,
        job_type=config.job_type,
        tags=tuple(config.tags),
        port=config.prometheus_port,
        host=config.prometheus_host,
    )


def require_installed(places: Places) -> None:
    """Raises ValueError naming the extra for a backend whose package is missing, before anything of the run is touched."""
    used = [name for name in places.backends if not (name == "wandb" and places.wandb_mode == "disabled")]
    wanted = [(f"tracking.backends={name}", *BACKENDS[name]) for name in used]
    if places.port:
        wanted.append((f"tracking.prometheus_port={places.port}", *ENDPOINT_NEEDS))
    for setting, package, extra in wanted:
        if find_spec(package) is None:
            raise ValueError(
                f"{setting} needs the package {package}: pip install 'rlalign[{extra}]', or change the setting"
            )


def endpoint(places: Places, *, name: str, project: str) -> dict[str, Backend]:
    """The Prometheus endpoint, where one is asked for. Raises ValueError for a port that cannot be had."""
    if not places.port:
        return {}
    about = {"name": name, "project": project, "group": places.group}
    prometheus = import_module("rlalign.tracking.prometheus")  # in its file alone, as every backend is
    return {"prometheus": prometheus.Endpoint(host=places.host, port=places.port, run=about)}


def start(backend: str, given: Start) -> tuple[Backend | None, str]:
    """The backend, None where its own settings disable it, and what a reader must know about how it started."""
    if backend == "wandb" and given.places.wandb_mode == "disabled":
        return None, ""  # without the package, which is not asked for then
    return import_module(f"rlalign.tracking.{backend}_run").start(given)
