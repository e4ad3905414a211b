"""Buckets: the tensors of a publish in pieces of bounded size; and the parties that fill, carry and take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rlalign.weights.digest import digest

if TYPE_CHECKING:
    from torch import Tensor

MIB = 2**20
ALIGNMENT = 16  # bytes: where a tensor of any dtype may start
# A file of buckets is ordinary safetensors; these are its names of torch's dtypes.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
NAMES = {torch_name: name for name, torch_name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a bucket: bytes [start, end) of its data, and the digest of what was sent."""

    name: str
    dtype: str  # torch's name: "bfloat16"
    shape: list[int]
    start: int
    end: int
    digest: str

    def plain(self) -> dict[str, Any]:
        """As JSON carries it; `Entry(**plain)` is the way back."""
        return asdict(self)

    def view(self, data: Tensor) -> Tensor:
        """This tensor inside the bucket's bytes [uint8]; a copy only where its dtype cannot start at that byte."""
        import torch

        dtype = getattr(torch, self.dtype)
        piece = data[self.start : self.end]
        return (piece if self.start % dtype.itemsize == 0 else piece.clone()).view(dtype).view(self.shape)


def who(answer: dict) -> str:
    """How a worker that answered is called in messages."""
    return f"rank {answer['rank']}" if answer["engine"] == "embedded" else f"{answer['engine']}, rank {answer['rank']}"


def dtype_name(tensor: Tensor, name: str) -> str:
    """torch's name of its dtype. Raises ValueError for one that no transport carries."""
    found = str(tensor.dtype).removeprefix("torch.")
    if found not in NAMES:
        raise ValueError(f"publish: {name} is {found}; weights travel as one of {', '.join(NAMES)}")
    return found


class Bucket(Protocol):
    """Being filled by the trainer, then delivered whole."""

    entries: list[Entry]

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of the tensor; it may be freed afterwards."""

    def has_room(self, name: str, tensor: Tensor) -> bool:
        """True when the tensor fits into what is left of the bucket's size."""
        ...


B = TypeVar("B", bound=Bucket)


def filled(named_weights: Iterable[tuple[str, Tensor]], empty: Callable[[int], B]) -> Iterator[B]:
    """Buckets in the order of the weights. empty: makes one, told the bytes of its first tensor, which it must be able to take.

    Consecutive tensors share a bucket while they fit, so that the parts of a fused projection arrive together or nearly so.
    """
    bucket = None
    for name, tensor in named_weights:
        if bucket is not None and not bucket.has_room(name, tensor):
            yield bucket
            bucket = None
        if bucket is None:
            bucket = empty(tensor.nbytes)
        bucket.add(name, tensor)
    if bucket is not None:
        yield bucket


def differing(entries: Iterable[Entry], data: Tensor) -> list[str]:
    """One line for each tensor whose bytes in `data` are not those that were sent."""
    return [
        f"{e.name}: its bytes are not those that were sent"
        for e in entries
        if digest(data[e.start : e.end]) != e.digest
    ]


class Group(Protocol):
    """The trainer's membership of a group whose rank 0 it is."""

    def send(self, bucket: BufferBucket, *, watch: Callable[[], None]) -> None:
        """Broadcast the bucket to all workers. watch: called while waiting; what it raises ends the wait."""

    def close(self) -> None:
        """Leave."""


class BufferBucket:
    """A bucket in the memory of the device that sends it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.entries = buffer, []
        self._written = 0

    @property
    def data(self) -> Tensor:
        """What has been written so far."""
        return self.buffer[: self._written]

    def has_room(self, name: str, tensor: Tensor) -> bool:
        """See Bucket."""
        return self._start + tensor.nbytes <= self.buffer.numel()

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy the tensor into the buffer."""
        import torch

        start = self._start
        self._written = start + tensor.nbytes
        flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        self.buffer[start : self._written].copy_(flat)
        entry = Entry(name, dtype_name(tensor, name), list(tensor.shape), start, self._written, digest(tensor))
        self.entries.append(entry)

    @property
    def _start(self) -> int:
        return -(-self._written // ALIGNMENT) * ALIGNMENT


class Receiver(Protocol):
    """One or many engines, each with one or many workers."""

    @property
    def engines(self) -> Sequence[str]:
        """Their names: "embedded", or the servers' addresses."""
        ...

    def ask(self, method: str, *args: Any) -> list[dict]:
        """Call a method of every worker of every engine at the same time; each answer carries "rank" and "engine"."""
        ...

    def ask_each(self, method: str, args_of_engine: Sequence[tuple]) -> list[dict]:
        """`ask` with other arguments for each engine, in the order of `engines`."""
        ...

    def suspend(self, reason: str) -> None:
        """Refuse to generate from now on, giving `reason`."""

    def acknowledge(self, version: int) -> None:
        """Stamp the version on everything sampled from now on, which uses no key/value block of older weights, and allow it."""


class Transport(Protocol[B]):
    """The trainer's end of a way to carry buckets. Nothing of it is shared by two publishes at a time."""

    def prepare(self) -> None:
        """Before anything is suspended: be ready for `empty`, or raise ValueError for what this host cannot do."""

    def meet(self, receiver: Receiver, workers: list[dict]) -> dict[str, Any]:
        """Make contact; returns what `rlalign_begin` tells every worker. workers: their `rlalign_whereabouts`."""
        ...

    def empty(self, first: int) -> B:
        """A new bucket whose first tensor has `first` bytes."""
        ...

    def seal(self, bucket: B) -> None:
        """End the filling of a bucket."""

    def deliver(self, receiver: Receiver, bucket: B) -> list[dict]:
        """Have every worker take it; one answer each. Runs in a thread of its own while the next bucket is filled."""
        ...

    def finish(self, *, failed: bool) -> None:
        """The publish is over; free what it held. After a failure also whatever a worker may still wait for."""

    def close(self) -> None:
        """The run is over."""
