"""publish(): its two phases, whatever carries the buckets; and which transport a configuration asks for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign import ranks
from rlalign.config.sections import FILE_TRANSPORTS, MEMORY_OF_ONE_BOX, WeightsConfig
from rlalign.weights.bucket import MIB, Receiver, Transport, filled, who
from rlalign.weights.file_transport import FileTransport

if TYPE_CHECKING:
    from torch import Tensor


MASTER_WEIGHT = "rlalign.master_lm_head"  # the unrounded fp32 lm_head, beside the 16-bit weights it belongs to
SHARED_MEMORY = Path(MEMORY_OF_ONE_BOX)
PROBLEMS_TOLD = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What one publish moved and what the ranks said. bytes are those of the published tensors, once.

    repaired: lm_heads and experts re-packed because their kernel went on with an older weight. proof_of: how the first rank proved
    each tensor: "kernel": through a product, "bytes": all of them, "packed": as a fresh engine packs them.
    carry_seconds: until the last bucket was taken; the rest is proof.
    """

    version: int
    tensors: int
    bytes: int
    buckets: int
    ranks: int
    repaired: int
    proof_of: dict[str, str]
    rebuilds: int
    carry_seconds: float
    seconds: float

    @property
    def proofs(self) -> dict[str, int]:
        """How many tensors are proved in which way."""
        return dict(Counter(self.proof_of.values()))


def publish(
    named_weights: Iterable[tuple[str, Tensor]],
    version: int,
    *,
    receiver: Receiver,
    shared: Path = SHARED_MEMORY,
    transport: Transport | None = None,
) -> PublishReport:
    """Move `named_weights` (Hugging Face names, full tensors) to the receiver as policy version `version`.

    transport: as opened for the run; without one the weights go through files in `shared`, which every worker can read.
    A worker whose last update failed or that holds another version than the others needs all its weights, and says so.
    Raises ValueError for what cannot be published, RuntimeError when a worker could not load or verify a tensor; the receiver
    then refuses to generate until a later publish of all weights succeeds.
    """
    started = time.perf_counter()
    transport = transport or FileTransport(shared)
    transport.prepare()
    try:
        update = _Update(version, receiver, transport)
        update.carry(named_weights)
        carried = time.perf_counter() - started
        acks = update.prove()
        receiver.acknowledge(version)
    except Exception as error:
        _give_up(error, version, receiver)
        raise
    return PublishReport(
        version=version,
        tensors=update.tensors,
        bytes=update.bytes,
        buckets=update.buckets,
        ranks=len(acks),
        repaired=sum(len(a["repaired"]) for a in acks),
        proof_of=acks[0].get("proofs", {}),
        rebuilds=max(a["rebuilds"] for a in acks),
        carry_seconds=carried,
        seconds=time.perf_counter() - started,
    )


def publish_from_ranks(
    named_weights: Iterable[tuple[str, Tensor]],
    version: int,
    *,
    receiver: Callable[[], Receiver],
    shared: Path = SHARED_MEMORY,
    transport: Transport | None = None,
) -> PublishReport:
    """`publish` where several trainer ranks hold the weights: all iterate, so that shards can be gathered, and the first publishes.

    receiver: asked for on the first rank only. A failure there is raised on every rank, after the gathering has been finished.
    """
    weights = iter(named_weights)

    def first() -> PublishReport:
        try:
            return publish(weights, version, receiver=receiver(), shared=shared, transport=transport)
        finally:
            _drain(weights)

    if ranks.rank() > 0:
        _drain(weights)
    return ranks.on_first(first)


class _Update:
    """One publish under way."""

    def __init__(self, version: int, receiver: Receiver, transport: Transport) -> None:
        self.version, self._receiver, self._transport = version, receiver, transport
        self.tensors = self.bytes = self.buckets = 0
        self._workers: list[dict] = []

    def carry(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Every bucket to every worker: while a thread has the workers begin, or take one, the caller's fills the next."""
        failed = True
        with _lane() as lane:
            try:
                self._carry(named_weights, lane)
                failed = False
            finally:
                self._transport.finish(failed=failed)

    def _carry(self, named_weights: Iterable[tuple[str, Tensor]], lane: ThreadPoolExecutor) -> None:
        taken: Future[list[dict]] = lane.submit(self._begin)
        for bucket in filled(named_weights, self._transport.empty):
            self._transport.seal(bucket)
            self.buckets += 1
            self.tensors += len(bucket.entries)
            self.bytes += sum(entry.end - entry.start for entry in bucket.entries)
            self._require(taken.result())
            taken = lane.submit(self._transport.deliver, self._receiver, bucket)
        self._require(taken.result())
        if not self.buckets:
            raise ValueError("publish: the trainer offered no weights")

    def _begin(self) -> list[dict]:
        """Nobody generates any more, contact is made, and every worker is open for the weights."""
        self._receiver.suspend(f"publishing policy version {self.version} did not finish")
        self._workers = self._receiver.ask("rlalign_whereabouts")
        told = self._transport.meet(self._receiver, self._workers) | {"version": self.version}
        return self._receiver.ask("rlalign_begin", told)

    def prove(self) -> list[dict]:
        """End the update on every worker; their acknowledgements, none of them with a problem."""
        uneven = len({worker["version"] for worker in self._workers}) > 1
        acks = self._receiver.ask("rlalign_finish", {"version": self.version, "whole": uneven})
        self._require(acks)
        problems = [
            f"{who(a)}: took {a['tensors']} tensors of {a['bytes']} bytes for version {a['version']}"
            for a in acks
            if (a["version"], a["tensors"], a["bytes"]) != (self.version, self.tensors, self.bytes)
        ]
        self._refuse(problems + _different_replicas(acks))
        return acks

    def _require(self, acks: list[dict]) -> None:
        """Raise RuntimeError unless every worker answered, and none with a problem. Servers that left the receiver do not count."""
        self._workers = [w for w in self._workers if w["engine"] in self._receiver.engines]
        missing = [f"{who(w)}: did not answer" for w in self._workers if who(w) not in {who(a) for a in acks}]
        self._refuse(missing + [f"{who(a)}: {problem}" for a in acks for problem in a["problems"]])

    def _refuse(self, problems: list[str]) -> None:
        if not self._workers:
            problems = ["no worker answered"]
        if problems:
            told = "; ".join(problems[:PROBLEMS_TOLD])
            more = f"; and {len(problems) - PROBLEMS_TOLD} more" if len(problems) > PROBLEMS_TOLD else ""
            raise RuntimeError(
                f"publishing policy version {self.version} failed: {told}{more}. The engine must not generate until a full "
                "publish succeeds."
            )


def _lane() -> ThreadPoolExecutor:
    """A thread on the caller's GPU, where there is one: a new thread would start on the first."""
    import torch

    name = "rlalign-publish"
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(1, name)
    return ThreadPoolExecutor(1, name, torch.cuda.set_device, (torch.cuda.current_device(),))


def _different_replicas(acks: list[dict]) -> list[str]:
    """Workers of one rank in different engines hold the same shard, so that they must compute with the same numbers."""
    found: dict[int, dict[str, str]] = {}
    for ack in acks:
        found.setdefault(ack["rank"], {}).setdefault(ack["fingerprint"], who(ack))
    return [
        f"{' and '.join(owners.values())} took the same weights and compute with different ones"
        for owners in found.values()
        if len(owners) > 1
    ]


def _give_up(error: Exception, version: int, receiver: Receiver) -> None:
    """Leave a known state: no update open anywhere, nobody generating, everybody knowing why."""
    reason = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    prefix = f"publishing policy version {version}"
    reason = reason if reason.startswith(prefix) else f"{prefix} failed: {reason}"
    for step in (lambda: receiver.ask("rlalign_abandon"), lambda: receiver.suspend(reason)):
        try:
            step()
        except Exception as second:  # of an engine that is gone, most likely: the first error is the one to raise
            error.add_note(f"and then: {type(second).__name__}: {second}")


def _drain(weights: Iterator[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass


def open_transport(config: WeightsConfig) -> Transport:
    """The transport of a run, for every publish of it; close it at the end. Raises ValueError for what this host cannot do."""
    size = config.bucket_mib * MIB
    if config.transport in FILE_TRANSPORTS:
        durable = config.transport == "folder"
        return FileTransport(Path(config.shared), bucket_bytes=size, timeout_s=config.timeout_s, durable=durable)
    from rlalign.weights.wire_transport import WireTransport

    transport = WireTransport(
        config.transport, bucket_bytes=size, timeout_s=config.timeout_s, address=config.address, port=config.port
    )
    transport.prepare()
    return transport
