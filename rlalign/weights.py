"""publish(): carry the trainer's weights to every rollout worker, and do not return before each has proved it computes with them.

Two phases: every rank loads and verifies; only when all have answered without a problem is the version acknowledged and
generation allowed again. Whatever goes wrong in between leaves the receiver marked unusable until a later publish succeeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlalign import ranks

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "weights.safetensors"
MANIFEST_KEY = "rlalign"
MASTER_WEIGHT = "rlalign.master_lm_head"  # the unrounded fp32 lm_head, beside the 16-bit weights it belongs to
SHARED_MEMORY = Path("/dev/shm")


class Receiver(Protocol):
    """The rollout side, as the publisher sees it."""

    def suspend(self, reason: str) -> None:
        """Refuse to generate from now on, giving `reason`."""

    def load(self, directory: Path) -> list[dict]:
        """Load the published folder on every rank; one acknowledgement a rank."""

    def reset_prefix_cache(self) -> None:
        """Forget key/value blocks computed with older weights."""

    def acknowledge(self, version: int) -> None:
        """Stamp the version on everything sampled from now on, and allow generation again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What one publish moved and what the ranks said. bytes are those of the published tensors, once."""

    version: int
    tensors: int
    bytes: int
    ranks: int
    repaired: int
    rebuilds: int
    seconds: float


def digest(tensor: Tensor) -> str:
    """BLAKE2b of the tensor's bytes, 16 hex digits: equal bytes give equal digests on every machine."""
    import torch

    flat = tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8)
    return hashlib.blake2b(memoryview(flat.numpy()), digest_size=8).hexdigest()


def publish(
    named_weights: Iterable[tuple[str, Tensor]],
    version: int,
    *,
    receiver: Receiver,
    shared: Path = SHARED_MEMORY,
) -> PublishReport:
    """Move `named_weights` (Hugging Face names, full tensors) to the receiver as policy version `version`.

    shared: a folder that every rollout rank can read; shared memory on one box. The copy is removed afterwards.
    Raises RuntimeError when a rank could not load or verify a tensor; the receiver then refuses to generate.
    """
    started = time.perf_counter()
    if not shared.is_dir():
        raise ValueError(f"weights.shared={str(shared)!r} is no folder; name one that every rollout rank can read")
    receiver.suspend(f"publishing policy version {version} did not finish")
    _sweep(shared)
    directory = Path(tempfile.mkdtemp(prefix=f"{_own_prefix()}{os.getpid()}-", dir=shared))
    try:
        _write(named_weights, version, directory)
        acks = receiver.load(directory)
    finally:
        shutil.rmtree(directory)
    problems = [f"rank {ack['rank']}: {p}" for ack in acks for p in ack["problems"]]
    problems += [f"rank {a['rank']}: acknowledged version {a['version']}" for a in acks if a["version"] != version]
    if problems or not acks:
        reason = f"publishing policy version {version} failed: " + ("; ".join(problems[:5]) or "no rank answered")
        reason += f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        receiver.suspend(reason)
        raise RuntimeError(f"{reason}. The engine must not generate until a full publish succeeds.")
    receiver.reset_prefix_cache()
    receiver.acknowledge(version)
    return PublishReport(
        version=version,
        tensors=acks[0]["tensors"],
        bytes=acks[0]["bytes"],
        ranks=len(acks),
        repaired=sum(len(a["repaired"]) for a in acks),
        rebuilds=max(a["rebuilds"] for a in acks),
        seconds=time.perf_counter() - started,
    )


def publish_from_ranks(
    named_weights: Iterable[tuple[str, Tensor]],
    version: int,
    *,
    receiver: Callable[[], Receiver],
    shared: Path = SHARED_MEMORY,
) -> PublishReport:
    """`publish` where several trainer ranks hold the weights: all iterate, so that shards can be gathered, and the first publishes.

    receiver: asked for on the first rank only. A failure there is raised on every rank, after the gathering has been finished.
    """
    weights = iter(named_weights)

    def first() -> PublishReport:
        try:
            return publish(weights, version, receiver=receiver(), shared=shared)
        finally:
            _drain(weights)

    if ranks.rank() > 0:
        _drain(weights)
    return ranks.on_first(first)


def _drain(weights: Iterator[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass


def _own_prefix() -> str:
    return f"rlalign-weights-{socket.gethostname()}-"


def _sweep(shared: Path) -> None:
    """Remove copies that a killed process of this host left behind; they hold memory until the next reboot otherwise."""
    for left in shared.glob(f"{_own_prefix()}*"):
        owner = left.name.removeprefix(_own_prefix()).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(left)


def _write(named_weights: Iterable[tuple[str, Tensor]], version: int, directory: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in named_weights}
    if not tensors:
        raise ValueError("publish: the trainer offered no weights")
    need, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(directory).free
    if need > free:
        raise ValueError(
            f"publish: {need / 2**20:.0f} MiB of weights do not fit into {directory.parent} ({free / 2**20:.0f} MiB free); "
            "free some of it or choose another folder with weights.shared"
        )
    manifest = {"version": version, "digests": {name: digest(t) for name, t in tensors.items()}}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={MANIFEST_KEY: json.dumps(manifest)})
