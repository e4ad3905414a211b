"""When the phases of a run really ran: taken by a clock, one row each in timeline.jsonl, and added up to utilisation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlalign.tracking import files

GENERATING, TRAINING, WAITING = ("rollout", "eval", "probe"), ("score", "train"), ("wait",)
RESUMED = "resumed"  # a mark without length: a later process goes on
SHORTEST_S = 1e-3  # what is shorter, such as a checkpoint that was not due, is no phase


@dataclass(frozen=True, slots=True)
class Span:
    """One phase of one step. start, end: seconds since 1970; phases of asynchronous steps overlap."""

    phase: str
    start: float
    end: float
    step: int


class Clock:
    """Times the phases of one step: `with clock("rollout"): ...` adds time/rollout_s to `metrics` and a span to `spans`.

    A phase that raises leaves neither. say: told step and phase as it begins.
    """

    def __init__(
        self,
        step: int,
        metrics: MutableMapping[str, float],
        spans: list[Span],
        say: Callable[[int, str], None] = lambda step, phase: None,
    ) -> None:
        self._step, self._metrics, self._spans, self._say = step, metrics, spans, say

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._say(self._step, phase)
        start, began = time.time(), time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._metrics[f"time/{phase}_s"] = seconds
        self._spans.append(Span(phase, start, start + seconds, self._step))


def encode(span: Span) -> dict[str, float | str]:
    """A row of timeline.jsonl, times to the tenth of a millisecond."""
    return asdict(span) | {"start": round(span.start, 4), "end": round(span.end, 4)}


def read_timeline(path: Path) -> tuple[Span, ...]:
    """The spans of a run by their start; a run of an older version, without the file, has none.

    Steps that were run again after a resume are there twice: both took their time. Raises ValueError for damage other than a
    torn last line.
    """
    spans: list[Span] = []
    for number, row in enumerate(files.read_lines(path).rows, start=1):
        try:
            spans.append(Span(str(row["phase"]), float(row["start"]), float(row["end"]), int(row["step"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: no span of phase, start, end and step ({error!r})") from None
    return tuple(sorted(spans, key=lambda span: (span.start, span.end)))


def processes(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans of each process of a run that was resumed; those without any are left out."""
    parts: list[list[Span]] = [[]]
    for span in spans:
        if span.phase == RESUMED:
            parts.append([])
        else:
            parts[-1].append(span)
    return [part for part in parts if part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilisation:
    """Shares of the wall time from a process's first phase to the end of its last one. They sum to 1; overlap has its own.

    other: rewards, publishing, checkpoints and checks while neither side worked; idle: no phase ran. The time between two processes
    of a resumed run is no part of it.
    """

    wall_s: float
    generating: float
    training: float
    both: float
    other: float
    idle: float


def utilisation(spans: Sequence[Span]) -> Utilisation | None:
    """Who worked, over all processes; None where no time passed."""
    wall = generating = training = either = any_phase = 0.0
    for part in processes(spans):
        wall += max(s.end for s in part) - part[0].start
        generating += _covered(s for s in part if s.phase in GENERATING)
        training += _covered(s for s in part if s.phase in TRAINING)
        either += _covered(s for s in part if s.phase in GENERATING + TRAINING)
        any_phase += _covered(s for s in part if s.phase not in WAITING)
    if wall <= 0:
        return None
    return Utilisation(
        wall_s=wall,
        generating=(either - training) / wall,
        training=(either - generating) / wall,
        both=(generating + training - either) / wall,
        other=(any_phase - either) / wall,
        idle=(wall - any_phase) / wall,
    )


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans of the same phase and step as one where they overlap: sampling, and the step that waits for it."""
    last: dict[tuple[str, int], int] = {}
    found: list[Span] = []
    for span in sorted(spans, key=lambda s: s.start):
        at = last.get((span.phase, span.step))
        if at is not None and span.start <= found[at].end:
            found[at] = replace(found[at], end=max(found[at].end, span.end))
        else:
            last[span.phase, span.step] = len(found)
            found.append(span)
    return found


def _covered(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans ran."""
    covered, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start):
        covered += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return covered
