"""What a long command says while it works: one live line on a terminal, elsewhere one line every half minute.

On standard error, since a command's standard output is its result.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rlalign.tracking.console import clock

EVERY = 30.0  # seconds between lines where there is no terminal


class Stages:
    """The stages of a command, one after the other. A context manager; the time left is told from the stages that are done.

    total: how many stages there will be, 0 where nobody knows: then no time left is given. every: seconds between lines of a log.
    """

    def __init__(self, command: str, total: int = 0, *, console: Console | None = None, every: float = EVERY) -> None:
        self.command, self.total, self.every = command, total, every
        self._console = console or Console(stderr=True)
        self._began = time.monotonic()
        self._done, self._text = -1, ""  # stage() counts the one before it as done
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="stages", daemon=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[left]}", style="cyan"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(command, total=total or None, left="")

    def __enter__(self) -> Stages:
        self._began = time.monotonic()
        self._bar.start()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        self._bar.stop()

    def stage(self, text: str) -> None:
        """The one before is done; this one begins."""
        self._done, self._text = self._done + 1, text
        self._bar.update(self._task, description=self.line(), completed=self._done, left=self._eta())

    def line(self) -> str:
        """Command, number, and what is being done."""
        of = f"/{self.total}" if self.total else ""
        return f"{self.command} {self._done + 1}{of}: {self._text}"

    def left(self) -> float | None:
        """Seconds left if the stages to come take as long as those that are done; None while that cannot be told."""
        if not self.total or self._done < 1:
            return None
        return (time.monotonic() - self._began) / self._done * max(0, self.total - self._done)

    def _eta(self) -> str:
        seconds = self.left()
        return "" if seconds is None else f"ETA {clock(seconds)}"

    def _beat(self) -> None:
        if self._console.is_terminal:
            return
        while not self._stop.wait(self.every):
            spent = clock(time.monotonic() - self._began)
            parts = [self.line(), f"{spent} so far", self._eta()]
            self._console.print(", ".join(p for p in parts if p), markup=False, highlight=False, soft_wrap=True)
