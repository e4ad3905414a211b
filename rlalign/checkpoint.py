"""Checkpoints of a run: RUN/checkpoints/step-000010, whole or absent, the newest few kept, verified before they are used.

A checkpoint is written into a hidden folder and renamed when every file is on disk; what is hidden is never read. step-N is
the state after step N: a resumed run goes on with N + 1.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rlalign import ranks

FOLDER, MANIFEST, FORMAT = "checkpoints", "checkpoint.json", 2
WRITING = ".writing"
FULL = 2**20  # bytes; with less left a failed write is taken for a full disk's
# What may differ between a checkpoint and the run that goes on from it: none of it changes a number. Sections, or single keys.
FREE_KEYS = (
    "name", "output_dir", "overwrite", "steps", "checkpoint", "tracking",
    "rollout.servers", "rollout.server_folder", "rollout.wait_for", "weights.address", "weights.port", "weights.shared",
)  # fmt: skip


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
        _flush(hidden)
        manifest = {
            "format": FORMAT, "step": step, "ranks": ranks.world_size(), "config": config, "state": dict(state),
            "files": _digests(hidden),
        }  # fmt: skip
        _write_durably(hidden / MANIFEST, json.dumps(manifest, indent=1))
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


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        flush(path)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
