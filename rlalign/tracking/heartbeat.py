"""A line every half minute while nothing else is said: a log must show that a long phase is alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

EVERY = 30.0  # seconds


class Heartbeat:
    """A context manager. line: called from a thread of its own; what it returns is printed by it, or nothing where it is "".

    `said()` puts the next line off, since a line has just been printed by someone else.
    """

    def __init__(self, line: Callable[[], str], say: Callable[[str], None], *, every: float = EVERY) -> None:
        self._line, self._say, self._every = line, say, every
        self._last, self._stop = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="rlalign-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def said(self) -> None:
        self._last = time.monotonic()

    def _beat(self) -> None:
        while not self._stop.wait(max(0.0, self._last + self._every - time.monotonic())):
            if time.monotonic() - self._last < self._every:
                continue
            self.said()
            if line := self._line():
                self._say(line)
