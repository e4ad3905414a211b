"""The two parties of a publish, as the publisher sees them: the rollout side, and the way there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from rlalign.weights.bucket import Bucket


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


B = TypeVar("B", bound="Bucket")


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
