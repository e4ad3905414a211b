"""Peak memory of a process and all its children: the largest sum of their shares, sampled from /proc."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

EVERY = 0.5  # seconds


class Peak:
    """A context manager around a running process. mib: the largest sum seen; a page shared by several is counted once."""

    def __init__(self, pid: int) -> None:
        self.mib = 0.0
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.mib = max(self.mib, sum(_pss_kib(pid) for pid in family(self._pid)) / 1024)
            self._stop.wait(EVERY)


def family(pid: int) -> list[int]:
    """The process and its descendants, as far as they are alive."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def _pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
