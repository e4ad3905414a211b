"""Peak memory of a process and all its children: the largest sum of their shares, by psutil."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

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
            self.mib = max(self.mib, sum(_pss(each) for each in family(self._pid)) / 2**20)
            self._stop.wait(EVERY)


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants, as far as they are alive."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # ended meanwhile
        return 0
