"""The groups that weights travel over, beside torch's default one: gloo (ours, any device), NCCL (vLLM's own). Rank 0 sends."""

from __future__ import annotations

import atexit
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rlalign import ranks
from rlalign.weights.bucket import Receiver

if TYPE_CHECKING:
    from torch._C._distributed_c10d import PrefixStore, TCPStore
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

    from rlalign.weights.bucket import BufferBucket
else:
    from torch.distributed import PrefixStore, TCPStore

TRAINER = 0
GLOO_BACKEND = "rlalign_gloo"  # the engine that our plugin registers in vLLM's WeightTransferEngineFactory
NAMESPACE = "rlalign"  # of the keys in the store
RANKS = f"{NAMESPACE}/ranks"  # counts the workers that came; each takes the number as its rank
POLL_S, JOIN_POLL_S = 0.0005, 0.02
NCCL_BACKEND = "nccl"


class GlooGroup:
    """Broadcasts bytes from rank 0. A lost or silent member is a RuntimeError after at most the timeout; then close it."""

    def __init__(self, store: TCPStore, rank: int, size: int, *, address: str, timeout_s: float) -> None:
        """Meet the others. address: this host's, as the others reach it. Raises RuntimeError when one does not come."""
        self._store, self.rank, self.size = store, rank, size
        backend: Any = dist.distributed_c10d.ProcessGroupGloo
        options = backend._Options()  # as torch.distributed itself builds it; there is no public constructor
        options._devices = [backend.create_device(hostname=address)]
        options._timeout = timedelta(seconds=timeout_s)
        self._group = backend(PrefixStore(NAMESPACE, store), rank, size, options)
        atexit.register(self.close)  # its threads must not outlive the interpreter

    @classmethod
    def join(cls, address: str, port: int, size: int, *, name: str, timeout_s: float) -> GlooGroup:
        """A worker's way in: the next free rank of the trainer's store at address:port. Raises RuntimeError without one.

        name: what the trainer calls this worker.
        """
        wait = timedelta(seconds=timeout_s)
        try:
            store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)
        except RuntimeError as error:
            raise RuntimeError(
                f"{socket.gethostname()} cannot reach the trainer at {address}:{port}: {error}. Set weights.address to the "
                "trainer's address as this host reaches it, and weights.port to a port that is open"
            ) from error
        rank = store.add(RANKS, 1)
        if rank >= size:
            raise RuntimeError(f"{name} came as member {rank + 1} of {size}: a worker that nobody counted")
        store.set(_key(name), "joined")
        return cls(store, rank, size, address=towards(address), timeout_s=timeout_s)

    def send(self, bucket: BufferBucket, *, watch: Callable[[], None]) -> None:
        """Broadcast the bucket's bytes from rank 0. watch: called while waiting; what it raises ends the wait."""
        work = self._broadcast(bucket.data)
        while not work.is_completed():
            watch()
            time.sleep(POLL_S)
        work.wait()

    def receive(self, size: int) -> torch.Tensor:
        """[size] uint8: what rank 0 sends next. Raises RuntimeError when it does not come."""
        data = torch.empty(size, dtype=torch.uint8)
        self._broadcast(data).wait()
        return data

    def close(self) -> None:
        """Leave: a member that still waits for this one gets an error."""
        atexit.unregister(self.close)
        self._group = self._store = None

    def _broadcast(self, data: torch.Tensor) -> dist.Work:
        if self._group is None:
            raise RuntimeError("the gloo group of this trainer was closed: the publish that used it failed")
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = TRAINER, 0
        return self._group.broadcast([data], options)


def form_gloo(receiver: Receiver, workers: list[dict], *, address: str, port: int, timeout_s: float) -> GlooGroup:
    """The trainer's side: open a store at address:port (0: any port), call all workers there, and wait until they have come.

    Raises ValueError for a port that is taken or an address that is not this host's, RuntimeError naming who did not come.
    """
    size = 1 + len(workers)
    try:
        store = TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise ValueError(
            f"weights.transport=gloo: {socket.gethostname()} cannot open a store at {address}:{port}: "
            f"{str(error).splitlines()[0]}. Choose another weights.port (0 takes any free one), or this host's weights.address"
        ) from error
    init = {"address": address, "port": store.port, "size": size, "timeout_s": timeout_s}
    with ThreadPoolExecutor(1, thread_name_prefix="rlalign-join") as lane:
        args = [({"backend": GLOO_BACKEND, "init": init | {"engine": engine}},) for engine in receiver.engines]
        joining = lane.submit(receiver.ask_each, "rlalign_join", args)
        _wait_for_all(store, joining, workers, timeout_s)
        group = GlooGroup(store, TRAINER, size, address=address, timeout_s=timeout_s)
        try:
            refuse_problems(joining.result())
        except BaseException:
            group.close()
            raise
    return group


def _wait_for_all(store: TCPStore, joining: Future[list[dict]], workers: list[dict], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while store.add(RANKS, 0) < len(workers):
        if time.monotonic() > deadline or joining.done():
            names = {worker_name(w["engine"], w["rank"]): w["host"] for w in workers}
            missing = [f"{name} on {host}" for name, host in names.items() if not store.check([_key(name)])]
            try:  # what the others say: most likely no more than that they waited
                refuse_problems(joining.result() if joining.done() else [])
            except Exception as error:
                missing.append(str(error))
            raise RuntimeError(
                f"within weights.timeout_s={timeout_s:g} not every worker came to {store.host}:{store.port}: "
                f"{'; '.join(missing)}. Look into their logs, and whether they can reach that port"
            )
        time.sleep(JOIN_POLL_S)


def refuse_problems(answers: list[dict]) -> None:
    """Raise RuntimeError with what the workers report."""
    problems = [f"{worker_name(a['engine'], a['rank'])}: {p}" for a in answers for p in a["problems"]]
    if problems:
        raise RuntimeError("; ".join(problems))


def worker_name(engine: str, rank: int) -> str:
    """How one worker is called in messages and in the store."""
    return f"{engine}, rank {rank}"


def _key(name: str) -> str:
    return f"{NAMESPACE}/member/{name}"


def towards(host: str) -> str:
    """This machine's address on the way to `host`. Nothing is sent. Raises OSError for a host that does not resolve."""
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


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


def form_nccl(receiver: Receiver, workers: list[dict], *, address: str, port: int, timeout_s: float) -> NcclGroup:
    """Call all workers to address:port (0: a free one) and make the communicator with them. Raises ValueError for a taken port."""
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

    port, size = port or ranks.free_port(), 1 + len(workers)
    counts = [sum(w["engine"] == engine for w in workers) for engine in receiver.engines]
    init = {"master_address": address, "master_port": port, "world_size": size, "packed": False}
    args = [
        ({"backend": NCCL_BACKEND, "init": init | {"rank_offset": 1 + sum(counts[:place])}},)
        for place in range(len(counts))
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
