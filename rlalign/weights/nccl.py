"""The trainer's end of vLLM's own NCCL weight transfer: one communicator with all workers, one broadcast a tensor."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from rlalign import ranks
from rlalign.weights.gloo import POLL_S, TRAINER, refuse_problems
from rlalign.weights.receiver import Receiver

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

    from rlalign.weights.bucket import BufferBucket

BACKEND = "nccl"


class NcclGroup:
    """Rank 0 of vLLM's communicator between a trainer and its workers."""

    def __init__(self, communicator: PyNcclCommunicator, *, timeout_s: float) -> None:
        self._communicator, self._timeout_s = communicator, timeout_s

    def send(self, bucket: BufferBucket, *, watch: Callable[[], None]) -> None:
        """Broadcast the bucket's tensors in their order, as vLLM's engine receives them. Raises RuntimeError after the timeout."""
        stream = torch.cuda.current_stream()
        for entry in bucket.entries:
            self._communicator.broadcast(entry.view(bucket.buffer), src=TRAINER, stream=stream)
        sent, deadline = stream.record_event(), time.monotonic() + self._timeout_s
        while not sent.query():
            watch()
            if time.monotonic() > deadline:
                raise RuntimeError(f"NCCL did not carry the bucket within weights.timeout_s={self._timeout_s:g}")
            time.sleep(POLL_S)

    def close(self) -> None:
        """Destroy the communicator."""
        self._communicator.destroy()


def form(receiver: Receiver, workers: list[dict], *, address: str, port: int, timeout_s: float) -> NcclGroup:
    """Call all workers to address:port (0: a free one) and make the communicator with them. Raises ValueError for a taken port."""
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

    port, size = port or ranks.free_port(), 1 + len(workers)
    counts = [sum(w["engine"] == engine for w in workers) for engine in receiver.engines]
    init = {"master_address": address, "master_port": port, "world_size": size, "packed": False}
    args = [
        ({"backend": BACKEND, "init": init | {"rank_offset": 1 + sum(counts[:place])}},) for place in range(len(counts))
    ]
    with ThreadPoolExecutor(1, thread_name_prefix="rlalign-join") as lane:
        joining = lane.submit(receiver.ask_each, "rlalign_join", args)
        try:
            communicator = stateless_init_process_group(address, port, TRAINER, size, torch.cuda.current_device())
        except OSError as error:
            raise ValueError(
                f"weights.transport=nccl: {socket.gethostname()} cannot listen at {address}:{port}: {error}. Choose another "
                "weights.port (0 takes any free one), or this host's weights.address"
            ) from error
        refuse_problems(joining.result())
    return NcclGroup(communicator, timeout_s=timeout_s)
