"""Weights over vLLM's weight-transfer interface: gloo (our engine, any device) or nccl (vLLM's own, GPUs).

The trainer's first rank and all workers of all servers form one group, kept from publish to publish and made again after a
failure or when a worker is another process than before.
Memory: the trainer holds two buckets (one being sent, one being filled) and one tensor; a worker one bucket, and of it what
waits for the other parts of its layer. A tensor larger than a bucket is a bucket of its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlalign.weights.bucket import BufferBucket, Group, Receiver

if TYPE_CHECKING:
    from torch import Tensor


class WireTransport:
    """The trainer's end. kind: "gloo" or "nccl"."""

    def __init__(self, kind: str, *, bucket_bytes: int, timeout_s: float, address: str = "", port: int = 0) -> None:
        self.kind, self.bucket_bytes, self.timeout_s = kind, bucket_bytes, timeout_s
        self._address, self._port = address, port
        self._group: Group | None = None
        self._members: list[tuple] = []
        self._buffers: list[Tensor] = []

    def prepare(self) -> None:
        """Raise ValueError for nccl on a host without a CUDA device."""
        import torch

        if self.kind == "nccl" and not torch.cuda.is_available():
            raise ValueError(
                f"weights.transport=nccl: {socket.gethostname()}, the first trainer rank's host, has no CUDA device for NCCL; "
                "use weights.transport=gloo (or folder, or shared_memory on one box)"
            )

    def meet(self, receiver: Receiver, workers: list[dict]) -> dict[str, Any]:
        """Form the group, unless the one of the last publish still has exactly these members."""
        from rlalign.weights.groups import form_gloo, form_nccl

        self._refuse(workers)
        members = [(w["engine"], w["rank"], w["host"], w["pid"]) for w in workers]
        if self._group is None or members != self._members:
            self.close()
            address = self._address or _address_for(receiver.engines)
            form = form_gloo if self.kind == "gloo" else form_nccl
            self._group = form(receiver, workers, address=address, port=self._port, timeout_s=self.timeout_s)
            self._members = members
        return {"route": "wire"}

    def empty(self, first: int) -> BufferBucket:
        """A new bucket whose first tensor has `first` bytes."""
        import torch

        if first <= self.bucket_bytes and self._buffers:
            return BufferBucket(self._buffers.pop())
        device = "cuda" if self.kind == "nccl" else "cpu"
        return BufferBucket(torch.empty(max(first, self.bucket_bytes), dtype=torch.uint8, device=device))

    def seal(self, bucket: BufferBucket) -> None:
        """Nothing to do: the bucket is in memory."""

    def deliver(self, receiver: Receiver, bucket: BufferBucket) -> list[dict]:
        """Have every worker receive the bucket while it is sent."""
        if self._group is None:
            raise RuntimeError("a publish begins with meet()")
        told = {"entries": [entry.plain() for entry in bucket.entries], "update": self._update(bucket)}
        with ThreadPoolExecutor(1, thread_name_prefix="rlalign-take") as lane:
            taken = lane.submit(receiver.ask, "rlalign_take", told)
            try:
                self._group.send(bucket, watch=lambda: _raise_what_failed(taken))
            except BaseException as error:
                members = self._members
                self.close()  # the workers that still wait for the bucket hear of it
                raise RuntimeError(f"a bucket did not reach every worker: {_told(members, taken, error)}") from error
            if bucket.buffer.numel() == self.bucket_bytes:
                self._buffers.append(bucket.buffer)
            return taken.result()

    def finish(self, *, failed: bool) -> None:
        """After a failure the group is given up: a member may be missing, or hold half of a bucket."""
        if failed:
            self.close()

    def close(self) -> None:
        """Leave the group."""
        group, self._group, self._members = self._group, None, []
        if group is not None:
            group.close()

    def _refuse(self, workers: list[dict]) -> None:
        """Raise ValueError for workers that this transport cannot reach."""
        here = (socket.gethostname(), os.getpid())
        if any((w["host"], w["pid"]) == here for w in workers):
            raise ValueError(
                f"weights.transport={self.kind} with an engine inside the trainer's own process on {here[0]}: sender and receiver "
                "would wait for each other; use weights.transport=shared_memory, or rollout.backend=server"
            )
        if self.kind == "nccl" and (lame := [w for w in workers if w["device"] != "cuda"]):
            names = ", ".join(f"{w['engine']}, rank {w['rank']} on {w['host']} ({w['device']})" for w in lame)
            raise ValueError(f"weights.transport=nccl: no CUDA device at {names}; use weights.transport=gloo")

    def _update(self, bucket: BufferBucket) -> dict[str, Any]:
        """What vLLM's engine of this kind is told about one update."""
        if self.kind == "gloo":
            return {"entries": [entry.plain() for entry in bucket.entries]}
        return {
            "names": [e.name for e in bucket.entries],
            "dtype_names": [e.dtype for e in bucket.entries],
            "shapes": [e.shape for e in bucket.entries],
        }


def _address_for(engines: Sequence[str]) -> str:
    """This host's address as every server sees it: the one on the way to them, and a loopback address only if all are here."""
    from rlalign.weights.groups import towards

    found = [towards(urlsplit(engine).hostname or engine) for engine in engines]
    return next((address for address in found if not ip_address(address).is_loopback), found[0])


def _raise_what_failed(taken: Future[list[dict]]) -> None:
    """The answers come after the last byte; one that is there while bytes are under way tells of a failure, or is just early."""
    from rlalign.weights.groups import refuse_problems

    if taken.done():
        refuse_problems(taken.result())


def _told(members: list[tuple], taken: Future[list[dict]], error: BaseException) -> str:
    """What each worker says of it once it has noticed, or that it says nothing any more."""
    try:
        answers = {(a["engine"], a["rank"]): a["problems"] for a in taken.result()}
    except Exception as failure:  # not one of them could be asked
        return f"{failure}; {error}"
    told = [
        f"{engine}, rank {rank} on {host}: {problem}"
        for engine, rank, host, _ in members
        for problem in answers.get((engine, rank), ["did not answer"])
    ]
    return "; ".join(told) or str(error)
