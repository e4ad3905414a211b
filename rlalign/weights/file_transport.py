"""Weights through files: shared memory on one box, or a folder of a filesystem that every node mounts.

A bucket is one safetensors file, written tensor by tensor, named once, and removed when every rank has taken it.
Memory: the trainer holds one tensor at a time; the folder at most two buckets (one being taken, one being written), a tensor
larger than a bucket being a bucket of its own; a worker maps (shared memory) or reads (folder) one bucket, and keeps of it
only tensors that wait for the other parts of their fused projection, or for the end of the update where vLLM pads them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.weights.bucket import DTYPES, MIB, NAMES, Entry, Receiver, differing, dtype_name
from rlalign.weights.digest import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

HEADER_BYTES = 2**16  # reserved before the data, since the header is known last; safetensors allows spaces at its end
CHUNK = 2 * MIB  # hashed while it is still in the processor's cache
HELLO = "hello"  # a file that every worker must be able to read before the first bucket


class FileBucket:
    """A bucket on its way into a file."""

    def __init__(self, path: Path, size: int, explain: Callable[[OSError], str]) -> None:
        self.path, self.size, self._explain = path, size, explain
        self.entries: list[Entry] = []
        self._part = path.with_suffix(".part")
        self._file = self._part.open("wb", buffering=0)
        self._file.seek(8 + HEADER_BYTES)
        self._written, self._header_bytes = 0, 2

    def has_room(self, name: str, tensor: Tensor) -> bool:
        """See Bucket."""
        fits = self._written + tensor.nbytes <= self.size
        return fits and self._header_bytes + len(name) + 128 + 24 * tensor.ndim <= HEADER_BYTES

    def add(self, name: str, tensor: Tensor) -> None:
        """Append the tensor. Raises RuntimeError when the folder takes no more."""
        import blake3

        data, hasher = bytes_of(tensor), blake3.blake3()
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            self._write(piece)
            hasher.update(piece)
        start, end = self._written, self._written + len(data)
        digest = hasher.hexdigest(length=16)
        self.entries.append(Entry(name, dtype_name(tensor, name), list(tensor.shape), start, end, digest))
        self._written, self._header_bytes = end, self._header_bytes + len(name) + 128 + 24 * tensor.ndim

    def seal(self, *, durable: bool) -> None:
        """Write the header and give the file its name: from here on it never changes.

        durable: flush it to the disk or server first, which is also when such a folder says that it is full.
        """
        header = {
            e.name: {"dtype": NAMES[e.dtype], "shape": e.shape, "data_offsets": [e.start, e.end]} for e in self.entries
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._write(memoryview(HEADER_BYTES.to_bytes(8, "little") + text.ljust(HEADER_BYTES)), durable=durable)
        self._file.close()
        self._part.rename(self.path)

    def discard(self) -> None:
        """Free its room."""
        self._file.close()
        self._part.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _write(self, data: memoryview, *, durable: bool = False) -> None:
        try:
            while data:
                data = data[os.write(self._file.fileno(), data) :]
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise RuntimeError(self._explain(error)) from error


@dataclass
class FileTransport:
    """The trainer's end. One folder a publish; whatever a killed process of this host left behind goes first."""

    shared: Path
    bucket_bytes: int = 256 * MIB
    timeout_s: float = 120.0
    durable: bool = False  # folder: flushed, and read instead of mapped
    _folder: Path | None = field(default=None, init=False)
    _count: int = field(default=0, init=False)

    def prepare(self) -> None:
        """Make this publish's folder. Raises ValueError where it has no place here."""
        if not self.shared.is_dir():
            raise ValueError(
                f"weights.shared={str(self.shared)!r} is no folder; name one that every rollout rank can read"
            )

        _sweep(self.shared)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_own_prefix()}{os.getpid()}-", dir=self.shared))
        self._folder.chmod(0o755)  # workers may run as somebody else
        (self._folder / HELLO).write_text(socket.gethostname())

    @property
    def _here(self) -> Path:
        if self._folder is None:
            raise RuntimeError("a publish begins with prepare()")
        return self._folder

    def meet(self, receiver: Receiver, workers: list[dict]) -> dict[str, Any]:
        """What a worker must know to begin."""
        return {"route": "files", "hello": str(self._here / HELLO), "timeout_s": self.timeout_s}

    def empty(self, first: int) -> FileBucket:
        """A new bucket whose first tensor has `first` bytes."""
        self._count += 1
        return FileBucket(
            self._here / f"bucket-{self._count:05d}.safetensors", max(first, self.bucket_bytes), self._explain
        )

    def seal(self, bucket: FileBucket) -> None:
        """Make the bucket readable."""
        bucket.seal(durable=self.durable)

    def deliver(self, receiver: Receiver, bucket: FileBucket) -> list[dict]:
        """Have every rank take the bucket; its file is gone afterwards."""
        try:
            told = {"file": str(bucket.path), "mapped": not self.durable, "timeout_s": self.timeout_s}
            return receiver.ask("rlalign_take", told | {"entries": [entry.plain() for entry in bucket.entries]})
        finally:
            bucket.discard()

    def finish(self, *, failed: bool) -> None:
        """Remove the folder."""
        if self._folder is not None:
            shutil.rmtree(
                self._folder, ignore_errors=True
            )  # a network filesystem may hold on to it; a later run sweeps
            self._folder = None

    def _explain(self, error: OSError) -> str:
        """What went wrong with the folder, and what to do."""
        free = shutil.disk_usage(self.shared).free / MIB
        return (
            f"{socket.gethostname()} cannot write weights into {self.shared} ({free:.0f} MiB free): {error}. "
            f"A publish needs room for two buckets of {self.bucket_bytes / MIB:.0f} MiB or two of the largest tensors; free "
            "some, lower weights.bucket_mib, or choose another folder with weights.shared"
        )

    def close(self) -> None:
        """Nothing is held between publishes."""


def greet(hello: Path, timeout_s: float) -> list[str]:
    """The worker's side of `meet`: problems when the trainer's folder cannot be seen from here."""

    def look() -> list[str]:
        return [] if hello.is_file() else ["no such file"]

    if _until_good(look, timeout_s):
        return [
            f"{socket.gethostname()} cannot read {hello.parent}, which the trainer just made. weights.shared must be a folder "
            "that all rollout nodes mount (weights.transport=folder); without one use weights.transport=gloo or nccl"
        ]
    return []


def read(path: Path, entries: list[Entry], *, mapped: bool, timeout_s: float) -> tuple[Tensor | None, list[str]]:
    """The data of a bucket [uint8], every digest of which has been checked, or the problems with it.

    mapped: the file's own pages (shared memory); otherwise a copy, re-opened and read again until it is whole: on a network
    filesystem a file that was just written may be missing, short or old for a moment.
    """
    data: list[Tensor] = []

    def attempt() -> list[str]:
        data.clear()
        try:
            found = _map(path, entries) if mapped else _read_whole(path, entries)
        except (OSError, ValueError) as error:
            return [f"{path.name} on {socket.gethostname()}: {error}"]
        data.append(found)
        return differing(entries, found)

    problems = attempt() if mapped else _until_good(attempt, timeout_s)
    return (None, problems) if problems else (data[0], [])


def _until_good(attempt: Callable[[], list[str]], timeout_s: float) -> list[str]:
    """Problems of the last of several attempts; empty as soon as one has none."""
    deadline, pause = time.monotonic() + timeout_s, 0.05
    while True:
        problems = attempt()
        if not problems or time.monotonic() + pause > deadline:
            return problems
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def _map(path: Path, entries: list[Entry]) -> Tensor:
    import torch

    size = _require_header(path, entries)
    if size == 8 + HEADER_BYTES:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + HEADER_BYTES :]


def _read_whole(path: Path, entries: list[Entry]) -> Tensor:
    import torch

    data = torch.empty(_require_header(path, entries) - 8 - HEADER_BYTES, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(8 + HEADER_BYTES)
        left = data.numpy().data
        while left:
            got = file.readinto(left)
            if not got:
                raise ValueError(f"ends {len(left)} bytes early")
            left = left[got:]
    return data


def _require_header(path: Path, entries: list[Entry]) -> int:
    """The file's size. Raises ValueError for a file that is not the bucket announced, or not all of it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length != HEADER_BYTES:
            raise ValueError(
                f"starts with a header of {length} bytes instead of {HEADER_BYTES}: half written, or no bucket"
            )
        header = json.loads(file.read(HEADER_BYTES))
        size = os.fstat(file.fileno()).st_size
    told = {name: (DTYPES[said["dtype"]], said["shape"], said["data_offsets"]) for name, said in header.items()}
    if told != {e.name: (e.dtype, e.shape, [e.start, e.end]) for e in entries}:
        raise ValueError("its header names other tensors than the trainer announced")
    whole = 8 + HEADER_BYTES + max((e.end for e in entries), default=0)
    if size != whole:
        raise ValueError(f"has {size} bytes instead of {whole}: half written")
    return size


def _own_prefix() -> str:
    return f"rlalign-weights-{socket.gethostname()}-"


def _sweep(shared: Path) -> None:
    """Remove copies that a killed process of this host left behind; they hold memory until the next reboot otherwise."""
    for left in shared.glob(f"{_own_prefix()}*"):
        owner = left.name.removeprefix(_own_prefix()).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)  # another process may be sweeping too
