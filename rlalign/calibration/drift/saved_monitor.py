"""The monitor on disk: a folder with one npz of rows and the calibration file it names."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import numpy as np

from rlalign.calibration.calibrators import Calibrator
from rlalign.calibration.drift.memory import SCORED, Counts, Ring, Rows

FORMAT, FORMAT_VERSION = "rlalign-drift", 1
ROWS = "drift.npz"


class State(TypedDict):
    """What belongs to the monitor itself."""

    options: dict[str, int]
    limits: dict[str, float]
    calibration_version: int
    tried_at: int


def write(folder: Path, state: State, rows: Rows, calibrator: Calibrator) -> None:
    """The calibration first, under a name of its own, then the rows that name it: never one without the other."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration = f"calibration-{state['calibration_version']}-{calibrator.calibration_id}.calib.json"
    calibrator.save(folder / calibration)
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "calibration": calibration,
        "state": state,
        "counts": asdict(rows.counts),
        "last_step": rows.last_step,
        "loners": rows.loners,
        "totals": [rows.labels.total, rows.scores.total],
        "known": list(rows.known.items()),
        "waiting": list(rows.waiting),
    }
    columns = {f"labels.{name}": column for name, column in rows.labels.rows().items()}
    columns |= {f"scores.{name}": column for name, column in rows.scores.rows().items()}
    waiting = zip(*rows.waiting.values(), strict=True) if rows.waiting else [()] * len(SCORED)
    columns |= {f"waiting.{n}": np.array(c, SCORED[n]) for n, c in zip(SCORED, waiting, strict=True)}
    partial = folder / f".{ROWS}.{os.getpid()}.partial"
    with partial.open("wb") as out:
        np.savez(out, meta=np.array(json.dumps(meta)), **columns)
    os.replace(partial, folder / ROWS)
    for old in folder.glob("calibration-*.calib.json"):
        if old.name != calibration:
            old.unlink()


def read(folder: Path) -> tuple[State, Rows, Calibrator]:
    """What `write` wrote. Raises ValueError on anything else, CalibrationMismatchError on an edited calibration."""
    path = folder / ROWS
    if not path.is_file():
        raise ValueError(f"{folder}: no {ROWS} in it, so no drift monitor was saved there")
    try:
        with np.load(path, allow_pickle=False) as content:
            columns = dict(content)
        meta = json.loads(str(columns["meta"]))
        found = meta["format"], meta["format_version"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a saved drift monitor ({error})") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{path}: holds {found}, this rlalign reads {(FORMAT, FORMAT_VERSION)}")
    state: State = meta["state"]
    rows = Rows(state["options"]["window"])
    for ring, name, total in ((rows.labels, "labels", meta["totals"][0]), (rows.scores, "scores", meta["totals"][1])):
        _fill(ring, {n.removeprefix(f"{name}."): c for n, c in columns.items() if n.startswith(f"{name}.")}, total)
    waiting = zip(*(columns[f"waiting.{n}"].tolist() for n in SCORED), strict=True)
    rows.waiting = dict(zip(meta["waiting"], waiting, strict=True))
    rows.known = dict(meta["known"])
    rows.counts, rows.last_step, rows.loners = Counts(**meta["counts"]), meta["last_step"], meta["loners"]
    return state, rows, Calibrator.load(folder / meta["calibration"])


def _fill(ring: Ring, columns: dict[str, np.ndarray], total: int) -> None:
    """Rows back into their slots: the ring is told how many came before them."""
    ring.total = total - len(next(iter(columns.values())))
    ring.append(columns)
