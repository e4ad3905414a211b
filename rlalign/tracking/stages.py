"""What a long command says while it works: one live line on a terminal, elsewhere one line every half minute.

On standard error, since a command's standard output is its result.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rlalign.tracking.console import EVERY, Heartbeat, clock


class Stages:
    """The stages of a command, one after the other. A context manager; the time left is told from the stages that are done.

    total: how many stages there will be, 0 where nobody knows: then no time left is given. every: seconds between lines of a log.
    """

    def __init__(self, command: str, total: int = 0, *, console: Console | None = None, every: float = EVERY) -> None:
        self.command, self.total = command, total
        self._console = console or Console(stderr=True)
        self._began = time.monotonic()
        self._done, self._text = -1, ""  # stage() counts the one before it as done
        self._heart = nullcontext() if self._console.is_terminal else Heartbeat(self._beat, self._say, every=every)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
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
        self._heart.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heart.__exit__(kind, error, trace)
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

    def _beat(self) -> str:
        spent = clock(time.monotonic() - self._began)
        return ", ".join(part for part in (self.line(), f"{spent} so far", self._eta()) if part)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
