"""The only file that knows TensorBoard: event files in RUN/tensorboard, so that `tensorboard --logdir runs` shows every run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from rlalign.tracking.backends import Cell, Start, finite

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
        if (kept := finite(values)).size:
            self._writer.add_histogram(name, kept, step, bins=cast("str", 64))  # typed too narrowly: numpy takes both

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


def start(given: Start) -> tuple[TensorBoardRun, str]:
    """The backend; nothing is to be said of it."""
    return TensorBoardRun(given), ""
