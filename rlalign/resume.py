"""Going on after an end that nobody chose: checkpoints while the run lasts, signals that end it in order, and the way back in."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from rlalign import checkpoint, ranks
from rlalign.checkpoint import Checkpoint
from rlalign.config import RunConfig, to_plain
from rlalign.exits import Preempted

if TYPE_CHECKING:
    from rlalign.trainer.policy import Policy

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Log(Protocol):
    """Where the run's events go."""

    directory: Path

    def event(self, kind: str, message: str) -> None: ...


class Stateful(Protocol):
    """A part of the run with a memory of its own."""

    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...


def find(config: RunConfig) -> Checkpoint | None:
    """The checkpoint to go on from, on every rank. Raises ValueError when one must exist and does not, or does not fit.

    `Checkpoints.restore` writes into the run's events what was passed over as damaged.
    """
    if config.checkpoint.resume == "never":
        return None
    directory = Path(config.output_dir)
    found, passed_over = ranks.on_first(lambda: checkpoint.newest(directory))
    if found is None:
        if passed_over or config.checkpoint.resume == "must":
            raise ValueError(
                f"{directory}: nothing to resume from; {'; '.join(passed_over) or 'it holds no checkpoint'}. "
                "Start anew in another output_dir, or with checkpoint.resume=never"
            )
        return None
    checkpoint.require_same(found, to_plain(config), accept_changes=config.checkpoint.accept_changes)
    return found


class Signals:
    """Notes SIGTERM and SIGUSR1 instead of dying of them. Use as a context manager around all of a run, its start included."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Callable | int | None] = {}

    def __enter__(self) -> Signals:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)


@dataclass(kw_only=True)
class Checkpoints:
    """Saves after steps, when due or when a signal asks for the end."""

    config: RunConfig
    log: Log
    policy: Policy
    signals: Signals
    # Of the first rank: name -> what is saved beside the policy.
    parts: dict[str, Stateful] = field(default_factory=dict)

    def restore(self, found: Checkpoint | None) -> int:
        """Load everything; returns the step to run next."""
        if found is None:
            return 0
        self.policy.load_state(found.folder / "policy")

        def others() -> None:
            for name, part in self.parts.items():
                part.load_state(found.folder / name)
            for problem in found.passed_over:
                self.log.event("checkpoint", f"passed over a damaged one: {problem}")
            self.log.event("checkpoint", f"goes on after step {found.step}, policy version {self.policy.version}")

        ranks.on_first(others)
        return found.step + 1

    def before_first(self, step: int) -> None:
        """Call once before the first step. Raises Preempted when a signal came while the run was starting."""
        if ranks.any_of(self.signals.asked is not None, self.policy.device):
            raise Preempted(f"{self._who()} while starting; nothing was done since step {step - 1}")

    def after(self, step: int) -> None:
        """Call at the end of every step. Raises Preempted once a signal has been answered with a checkpoint."""
        every = self.config.checkpoint.every
        asked = ranks.any_of(self.signals.asked is not None, self.policy.device)
        if asked or (every and (step + 1) % every == 0):
            self._save(step)
        if asked:
            raise Preempted(f"{self._who()}: step {step} is finished and saved; checkpoint.resume=auto goes on from it")

    def _who(self) -> str:
        return self.signals.asked.name if self.signals.asked is not None else "a signal to another rank"

    def _save(self, step: int) -> None:
        def write(folder: Path) -> None:
            self.policy.save_state(folder / "policy")
            if ranks.rank() == 0:
                for name, part in self.parts.items():
                    (folder / name).mkdir()
                    part.save_state(folder / name)

        checkpoint.save(
            Path(self.config.output_dir),
            step,
            config=to_plain(self.config),
            state={"version": self.policy.version},
            write=write,
            keep=self.config.checkpoint.keep,
        )
