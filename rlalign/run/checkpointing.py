"""Checkpoints: RUN/checkpoints/step-000010, whole or absent, verified before they are trusted; signals, and going on from one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from rlalign import ranks
from rlalign.config import RunConfig, to_plain
from rlalign.exits import Preempted
from rlalign.tracking.files import METRICS

if TYPE_CHECKING:
    from rlalign.trainer.policy import Policy

FOLDER, MANIFEST, FORMAT = "checkpoints", "checkpoint.json", 2
WRITING = ".writing"
FULL = 2**20  # bytes; with less left a failed write is taken for a full disk's
# What may differ between a checkpoint and the run that goes on from it: none of it changes a number. Sections, or single keys.
FREE_KEYS = (
    "name", "output_dir", "overwrite", "steps", "checkpoint", "tracking",
    "rollout.servers", "rollout.server_folder", "rollout.wait_for", "weights.address", "weights.port", "weights.shared",
)  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint. step: the last one completed; state: what the run stored beside its folders.

    passed_over: newer ones that were damaged, and how.
    """

    folder: Path
    step: int
    ranks: int
    config: dict
    state: dict
    passed_over: list[str]


def save(
    run: Path, step: int, *, config: dict, state: Mapping[str, object], write: Callable[[Path], None], keep: int
) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep`. Every trainer rank must call it.

    write: puts its files into the folder it is given; called on every rank. A failure (a full disk) on any rank is raised there
    and leaves the older checkpoints as they are.
    """
    final = run / FOLDER / f"step-{step:06d}"
    hidden = final.with_name(f".{final.name}{WRITING}")

    def prepare() -> None:
        for left in final.parent.glob(f".step-*{WRITING}"):  # by a run that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        hidden.mkdir(parents=True)

    def complete() -> None:
        for path in (*hidden.rglob("*"), hidden):
            flush(path)
        manifest = {
            "format": FORMAT, "step": step, "ranks": ranks.world_size(), "config": config, "state": dict(state),
            "files": _digests(hidden),
        }  # fmt: skip
        (hidden / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        flush(hidden / MANIFEST)
        if final.exists():
            shutil.rmtree(final)
        os.replace(hidden, final)
        flush(final.parent)
        for old in _folders(run)[:-keep]:
            shutil.rmtree(old)

    ranks.on_first(prepare)
    try:
        write(hidden)
    except BaseException as error:
        free = shutil.disk_usage(final.parent).free
        if ranks.world_size() == 1:  # the others may still be writing, and the next save clears what is left
            shutil.rmtree(hidden, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError) and free < FULL:  # torch says only that a write failed
            raise OSError(
                errno.ENOSPC,
                f"No space left on device for the checkpoint of step {step}; the older ones are kept",
                str(final.parent),
            ) from error
        raise
    ranks.wait_for_all()  # a rank that failed never comes: what is not whole is not made visible
    ranks.on_first(complete)
    return final


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all there and unchanged, and why newer ones were passed over."""
    passed_over = []
    for folder in reversed(_folders(run)):
        problem = _problem(folder)
        if problem is None:
            found = json.loads((folder / MANIFEST).read_text())
            names = ("step", "ranks", "config", "state")
            kept = {name: found[name] for name in names}
            return Checkpoint(folder=folder, passed_over=passed_over, **kept), passed_over
        passed_over.append(f"{folder.name}: {problem}")
    return None, passed_over


def require_same(checkpoint: Checkpoint, config: Mapping[str, object], *, accept_changes: bool) -> list[str]:
    """Differences between the checkpoint's configuration and this one's, as `key: old -> new`.

    Raises ValueError for any, unless they were accepted, and for another number of trainer ranks: DeepSpeed's optimizer shards
    belong to as many ranks as wrote them.
    """
    if checkpoint.ranks != ranks.world_size():
        raise ValueError(
            f"{checkpoint.folder}: written by {checkpoint.ranks} trainer ranks, this run has {ranks.world_size()}; "
            f"resume with {checkpoint.ranks}"
        )
    before, now = _flat(checkpoint.config), _flat(config)
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if not {key, key.split(".")[0]} & set(FREE_KEYS) and before.get(key) != now.get(key)
    ]
    if changed and not accept_changes:
        raise ValueError(
            f"{checkpoint.folder} was made with another configuration ({'; '.join(changed[:5])}"
            f"{f'; and {len(changed) - 5} more' if len(changed) > 5 else ''}). Resume with the same one, or say "
            "checkpoint.accept_changes=true"
        )
    return changed


def _folders(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*")) if (run / FOLDER).is_dir() else []


def _problem(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"no readable {MANIFEST} ({error})"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')!r}, this version reads {FORMAT}"
    found = _digests(folder, only=manifest["files"])
    wrong = [name for name, digest in manifest["files"].items() if found.get(name) != digest]
    return f"missing or changed: {', '.join(wrong[:3])}" if wrong else None


def _digests(folder: Path, only: Mapping[str, str] | None = None) -> dict[str, str]:
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    if only is not None:
        paths = [p for p in paths if str(p.relative_to(folder)) in only]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip((str(p.relative_to(folder)) for p in paths), pool.map(_digest, paths), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def flush(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on disk when this returns: a power cut must not take it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


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

    from rlalign.head import widened

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
    found, passed_over = ranks.on_first(lambda: newest(directory))
    if found is None:
        if passed_over or config.checkpoint.resume == "must":
            raise ValueError(
                f"{directory}: nothing to resume from; {'; '.join(passed_over) or 'it holds no checkpoint'}. "
                "Start anew in another output_dir, or with checkpoint.resume=never"
            )
        return None
    require_same(found, to_plain(config), accept_changes=config.checkpoint.accept_changes)
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
            for change in require_same(found, to_plain(self.config), accept_changes=True):
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
        from rlalign.head import widened

        def write(folder: Path) -> None:
            self.policy.save_state(folder / "policy")
            for name, part in (self.shared | {"random": RandomStates()}).items():
                part.save_state(folder / name)
            if ranks.rank() == 0:
                # The row first: a run cannot go on after a step that was never logged.
                flush(self.log.directory / METRICS)
                for name, part in self.parts.items():
                    (folder / name).mkdir()
                    part.save_state(folder / name)

        save(
            Path(self.config.output_dir),
            step,
            config=to_plain(self.config),
            state={"version": self.policy.version, "products": widened.state()},
            write=write,
            keep=self.config.checkpoint.keep,
        )
