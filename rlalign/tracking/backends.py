"""Where a run shows beside its directory: TensorBoard and trackio here, wandb and the Prometheus endpoint in their own files."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import trackio
from trackio.utils import TRACKIO_DIR

from rlalign.tracking.backend_contract import Backend, Cell, Places, Start

if TYPE_CHECKING:
    from rlalign.config import TrackingConfig

NEEDS = {"wandb": ("wandb", "train"), "tensorboard": ("tensorboard", "tensorboard"), "trackio": ("trackio", "trackio")}
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
    wanted = [(f"tracking.backends={name}", *NEEDS[name]) for name in used]
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
    from rlalign.tracking.prometheus import Endpoint

    about = {"name": name, "project": project, "group": places.group}
    return {"prometheus": Endpoint(host=places.host, port=places.port, run=about)}


def start(backend: str, given: Start) -> tuple[Backend | None, str]:
    """The backend, None where its own settings disable it, and what a reader must know about how it started."""
    if backend == "tensorboard":
        pass

        return TensorBoardRun(given), ""
    if backend == "trackio":
        pass

        run = TrackioRun(given)
        return run, run.note
    if given.places.wandb_mode == "disabled":
        return None, ""
    from rlalign.tracking.wandb_run import WandbRun, resolve_mode

    if resolve_mode(given.places.wandb_mode) == "disabled":
        return None, ""
    run = WandbRun(given)
    return run, run.note


FOLDER = "tensorboard"
FLUSH_S = 10  # a killed run loses no more; the run directory itself loses nothing


class TensorBoardRun:
    """Event files of one run; a resumed run adds another file to the same folder."""

    def __init__(self, given: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(given.directory) / FOLDER
        self._new = lambda purge: SummaryWriter(str(folder), purge_step=purge, flush_secs=FLUSH_S)
        self._writer, self._next = self._new(given.last_step + 1 or None), given.last_step + 1
        self._writer.add_text("config", _code(json.dumps(given.config, indent=2)), 0)

    def about(self) -> dict[str, Cell]:
        """Nothing: the folder is the run's."""
        return {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar a key; NaN and infinities stay what they are. A step that comes again hides what was logged from it on."""
        if step < self._next:
            self._writer.close()
            self._writer = self._new(step)
        self._next = step + 1
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def log_histogram(self, step: int, name: str, values: np.ndarray | Sequence[float]) -> None:
        """64 bins of the finite values."""
        values = np.asarray(values, dtype=np.float64)
        finite = values[np.isfinite(values)]
        if finite.size:
            self._writer.add_histogram(name, finite, step, bins=64)

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """A markdown table under "text"."""
        if rows:
            head = [list(rows[0]), ["---"] * len(rows[0])]
            lines = [*head, *([_cell(cell) for cell in row.values()] for row in rows)]
            self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def event(self, step: int, kind: str, message: str) -> None:
        """Under "text", at the step it belongs to."""
        self._writer.add_text(f"events/{kind}", _code(message), max(step, 0))

    def finish(self, summary: dict, *, exit_code: int) -> None:
        """Close the files."""
        self._writer.add_text("summary", _code(json.dumps({**summary, "exit_code": exit_code}, indent=2)), 0)
        self._writer.close()


def _code(text: str) -> str:
    """Text as it is, for a markdown page."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _cell(value: Cell) -> str:
    """A cell that neither markdown nor HTML reads as its own: tokens can be anything."""
    if isinstance(value, float):
        return f"{value:.6g}"
    shown = "" if value is None else ascii(value)[1:-1] if isinstance(value, str) else str(value)
    for character, spelled in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "&#124;"),
        ("`", "&#96;"),
        ("*", "&#42;"),
        ("_", "&#95;"),
    ):
        shown = shown.replace(character, spelled)
    return shown


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
        values = np.asarray(values, dtype=np.float64)
        finite = values[np.isfinite(values)]
        if finite.size:
            self.run.log({name: trackio.Histogram(np_histogram=np.histogram(finite, bins=64))}, step=step)

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """A cell whose number is not finite is empty."""
        if rows:
            cells = [
                [None if isinstance(c, float) and not math.isfinite(c) else c for c in row.values()] for row in rows
            ]
            self.run.log({name: trackio.Table(columns=list(rows[0]), data=cells)}, step=step)

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
