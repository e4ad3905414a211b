"""A run and its progress on ranks that write nothing: the first rank's files are the run's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from rlalign.tracking.timeline import Span
    from rlalign.tracking.tokens import Column


class SilentRun:
    """Takes what `Run` takes and keeps none of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def rewind(self, step: int) -> None: ...
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def log_histogram(self, step: int, name: str, values: np.ndarray | Sequence[float]) -> None: ...
    def log_tokens(self, step: int, columns: Mapping[str, Column]) -> None: ...
    def log_timeline(self, spans: Iterable[Span]) -> None: ...
    def timed(self, step: int, phase: str) -> AbstractContextManager[None]:
        return nullcontext()

    def log_head_status(self, statuses: list[dict]) -> None: ...
    def event(self, kind: str, message: str) -> None: ...
    def finish(self, summary: dict) -> None: ...
    def __enter__(self) -> SilentRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SilentProgress:
    """Takes what `Progress` takes and prints none of it."""

    def stage(self, text: str, done: int | None = None, total: int | None = None) -> None: ...
    def phase(self, step: int, name: str) -> None: ...
    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def final_table(self, summary: Mapping[str, object], report: Path) -> None: ...
    def __enter__(self) -> SilentProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
