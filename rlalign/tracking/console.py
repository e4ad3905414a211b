"""What a run or a long command says while it works: one live line on a terminal, plain lines in a log file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

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


LOG_LINES = 20  # about as many step lines as a log file gets, whatever the number of steps


class Progress:
    """Stages before the first step, then steps: number, reward, k3, tokens/s, time left. A context manager.

    every: steps between lines where the output is not a terminal; by default about 20 lines a run.
    """

    def __init__(
        self, steps: int, *, console: Console | None = None, every: int | None = None, heartbeat: float = EVERY
    ) -> None:
        self.steps, self.console = steps, console or Console()
        self.every = every or max(1, steps // LOG_LINES)
        self._phase = ""  # of a step
        self._stage, self._stage_began, self._live = "", time.monotonic(), self.console.is_terminal
        self._first_step_began = 0.0
        self._heart = nullcontext() if self._live else Heartbeat(self._beat, self._print, every=heartbeat)
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}", style="cyan"),
            _TimeLeft(),
            console=self.console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, line="")

    def __enter__(self) -> Progress:
        self._bar.start()
        self._heart.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end_stage()
        self._heart.__exit__(kind, error, trace)
        self._bar.stop()

    def stage(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Say what is being done before the steps begin; `done` of `total` moves the bar without a new line."""
        if text != self._stage:
            self._end_stage()
            self._stage, self._stage_began = text, time.monotonic()
            if not self._live:
                self._say(f"{text} ...")
        self._bar.update(self._task, description=_plain(text), completed=done or 0, total=total)

    def phase(self, step: int, name: str) -> None:
        """Say what step `step` (from 0) is doing: on a terminal at once, in a log only where it takes long."""
        if self._stage:
            self._end_stage()
        self._phase, self._stage_began = f"step {step + 1}/{self.steps}: {name}", time.monotonic()
        self._bar.update(self._task, description=self._phase, completed=step, total=self.steps)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show step `step` (from 0) with its metrics."""
        if self._first_step_began == 0.0:
            self._first_step_began = time.monotonic() - metrics.get("time/step_s", 0.0)
            self._end_stage()
        number, line, self._phase = step + 1, metrics_line(metrics), ""
        self._bar.update(
            self._task, description=f"step {number}/{self.steps}", completed=number, total=self.steps, line=line
        )
        if not self._live and (number % self.every == 0 or number in (1, self.steps)):
            self._say(f"step {number}/{self.steps}  {line}  ETA {clock(self._left(number))}")

    def final_table(self, summary: Mapping[str, Any], report: Path) -> None:
        """The numbers of the run and where its report is."""
        self.console.print(summary_table(summary))
        self.console.print(f"report: {report}", soft_wrap=True, markup=False, highlight=False)

    def _left(self, number: int) -> float:
        return (time.monotonic() - self._first_step_began) / number * (self.steps - number)

    def _end_stage(self) -> None:
        if self._stage and self._live:
            self._say(f"{self._stage}: {time.monotonic() - self._stage_began:.1f} s")
        self._stage = ""

    def _beat(self) -> str:
        doing = self._stage or self._phase
        return f"{doing}: {clock(time.monotonic() - self._stage_began)} so far" if doing else ""

    def _say(self, text: str) -> None:
        if isinstance(self._heart, Heartbeat):
            self._heart.said()
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _TimeLeft(ProgressColumn):
    """Time left from the steps' own pace; empty while no total is known."""

    def render(self, task: Task) -> Text:
        return Text(f"ETA {clock(task.time_remaining)}" if task.time_remaining is not None and task.total else "")


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Reward, k3 and speed of one step; what was not measured is a dash."""
    reward, k3 = metrics.get("reward/mean"), metrics.get("mismatch/lag0/k3")
    speed, accuracy = metrics.get("rollout/tokens_per_s"), metrics.get("eval/accuracy")
    parts = [
        f"reward {_number(reward, '.3f')}",
        f"k3 {_number(k3, '.1e')}",
        f"{_number(speed, ',.0f')} tokens/s",
    ]
    return "  ".join([*parts, f"eval {accuracy:.3f}"] if accuracy is not None else parts)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """First and last reward and accuracy, the mismatch, the head, the publishes, the speed."""
    lag0 = _child(_child(summary, "mismatch"), "lag0")
    head, engine = _child(summary, "head"), _child(summary, "engine")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    first_last = {
        "reward": ("reward_first", "reward_last"),
        "held-out accuracy": ("eval_first", "eval_last"),
    }
    for name, (first, last) in first_last.items():
        table.add_row(name, f"{_number(summary.get(first), '.3f')} -> {_number(summary.get(last), '.3f')}")
    table.add_row(
        "mismatch, lag 0",
        f"k3 {_number(lag0.get('k3'), '.1e')} (median over steps), "
        f"|log_ratio| mean {_number(lag0.get('abs_mean'), '.1e')}, worst {_number(lag0.get('abs_max'), '.1e')} nats",
    )
    table.add_row("head", f"{head.get('dtype', '-')}, mode {head.get('mode', '-')}, {head.get('ranks', '-')} rank(s)")
    table.add_row("engine", f"{engine.get('name', '-')} {engine.get('version', '-')}")
    table.add_row(
        "publishes",
        f"{_number(summary.get('publishes'), ',.0f')} verified, "
        f"{_number(summary.get('rebuilds'), ',.0f')} head rebuilds",
    )
    table.add_row(
        "speed",
        f"{_number(summary.get('steps'), ',.0f')} steps, {_number(summary.get('tokens'), ',.0f')} tokens in "
        f"{_number(summary.get('seconds'), ',.1f')} s: {_number(summary.get('tokens_per_s'), ',.0f')} tokens/s",
    )
    return table


def _number(value: object, spec: str) -> str:
    return format(value, spec) if isinstance(value, int | float) else "-"


def _child(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, Mapping) else {}


class Stages:
    """The stages of a command, one after the other, on standard error, since a command's standard output is its result.

    A context manager; the time left is told from the stages that are done.
    total: how many stages there will be, 0 where nobody knows: then no time left is given. every: seconds between lines of a log.
    """

    def __init__(self, command: str, total: int = 0, *, console: Console | None = None, every: float = EVERY) -> None:
        self.command, self.total = command, total
        self._console = console or Console(stderr=True)
        self._began = time.monotonic()
        self._done, self._text = -1, ""  # stage() counts the one before it as done
        self._heart = nullcontext() if self._console.is_terminal else Heartbeat(self._beat, self._say, every=every)
        self._bar = Bar(
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
