"""Going on after an end that nobody chose: checkpoints while the run lasts, signals that end it in order, and the way back in."""

from __future__ import annotations

import random
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
from rlalign.tracking.files import METRICS

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


def settle_products(config: RunConfig, found: Checkpoint | None, log: Log) -> None:
    """How this run computes bf16 products on CPUs, before anything does: measured, or as in its checkpoint. Every rank calls it."""
    import torch

    from rlalign import widened

    if torch.cuda.is_available() or config.exact:
        return
    if found is not None:
        widened.resume(found.state.get("products", ()))
    choice = widened.decide_together(getattr(torch, config.model.dtype.value))
    if choice is not None:
        log.event("products", choice.describe())


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


class RandomStates:
    """Every generator that a rank may draw from: Python's, numpy's, torch's, those of its devices."""

    def save_state(self, folder: Path) -> None:
        """Every rank its own file."""
        import numpy as np
        import torch

        folder.mkdir(exist_ok=True)
        states = {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        _, keys, *rest = np.random.get_state()
        torch.save(states | {"numpy": (torch.from_numpy(keys.astype(np.int64)), *rest)}, self._file(folder))

    def load_state(self, folder: Path) -> None:
        """Draw on from where this rank was."""
        import numpy as np
        import torch

        states = torch.load(self._file(folder), weights_only=True)
        random.setstate(states["python"])
        torch.set_rng_state(states["torch"])
        torch.cuda.set_rng_state_all(states["cuda"])
        keys, *rest = states["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))

    def _file(self, folder: Path) -> Path:
        return folder / f"rank-{ranks.rank()}.pt"


@dataclass(kw_only=True)
class Checkpoints:
    """Saves after steps, when due or when a signal asks for the end."""

    config: RunConfig
    log: Log
    policy: Policy
    signals: Signals
    # Of the first rank: name -> what is saved beside the policy.
    parts: dict[str, Stateful] = field(default_factory=dict)
    shared: dict[str, Stateful] = field(default_factory=dict)  # the same, of every rank

    def restore(self, found: Checkpoint | None) -> int:
        """Load everything; returns the step to run next."""
        if found is None:
            return 0
        self.policy.load_state(found.folder / "policy")
        for name, part in (self.shared | {"random": RandomStates()}).items():
            part.load_state(found.folder / name)

        def others() -> None:
            for name, part in self.parts.items():
                part.load_state(found.folder / name)
            for problem in found.passed_over:
                self.log.event("checkpoint", f"passed over a damaged one: {problem}")
            for change in checkpoint.require_same(found, to_plain(self.config), accept_changes=True):
                self.log.event("checkpoint", f"accepted another configuration: {change}")
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
        from rlalign import widened

        def write(folder: Path) -> None:
            self.policy.save_state(folder / "policy")
            for name, part in (self.shared | {"random": RandomStates()}).items():
                part.save_state(folder / name)
            if ranks.rank() == 0:
                # The row first: a run cannot go on after a step that was never logged.
                checkpoint.flush(self.log.directory / METRICS)
                for name, part in self.parts.items():
                    (folder / name).mkdir()
                    part.save_state(folder / name)

        checkpoint.save(
            Path(self.config.output_dir),
            step,
            config=to_plain(self.config),
            state={"version": self.policy.version, "products": widened.state()},
            write=write,
            keep=self.config.checkpoint.keep,
        )
