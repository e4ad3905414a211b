"""Making a directory a run's own: a new one, one to continue, or one whose older run is moved aside."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from rlalign.tracking import files
from rlalign.tracking.record import read_header, read_metrics


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
    return rows[-1]["step"] if rows else -1, lines[files.METRICS].torn


def free_name(path: Path) -> Path:
    """NAME.1, or the first number that is not taken."""
    n = 1
    while (free := path.with_name(f"{path.name}.{n}")).exists():
        n += 1
    return free
