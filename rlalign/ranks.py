"""Several trainer ranks run the same program; this is how one of them acts for all.

Without torch.distributed, or with one rank, everything here is a plain call.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rlalign.exits import Lost

T = TypeVar("T")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
UNASSIGNED_PORTS = range(
    15_000, 32_000
)  # Linux gives 32,768 and above to outgoing connections (net.ipv4.ip_local_port_range)


def environment_without_launcher() -> dict[str, str]:
    """This process's environment for a program of its own, which would else take itself for one of our ranks."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER}


def free_port(host: str = "") -> int:
    """A TCP port that nobody listens on now, at this address of the machine (empty: all of them).

    Below those that Linux gives to outgoing connections, one of which could take it before its server has started. Raises OSError
    where none of 100 is free.
    """
    *some, last = random.SystemRandom().sample(UNASSIGNED_PORTS, 100)
    for port in some:
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port
    with socket.socket() as probe:
        probe.bind((host, last))
    return last


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Ranks that run the program; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_first(action: Callable[[], T]) -> T:
    """Do it on rank 0 and give every rank what it returned (pickled between our own ranks).

    An exception there is raised on every rank, so that none waits for a rank that has stopped: as itself on rank 0, on the
    others as Lost or ValueError where it is one, so that all end with one exit code, and else as RuntimeError naming it.
    """
    if world_size() == 1:
        return action()
    message: list[Any] = [None, None, RuntimeError]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            message[0] = action()
        except BaseException as error:  # also Ctrl-C: the others must not wait for it
            failure = error
            message[1] = f"{type(error).__name__}: {error}"
            message[2] = next((kind for kind in (Lost, ValueError) if isinstance(error, kind)), RuntimeError)
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise message[2](f"rank 0 stopped the run: {message[1]}")
    return message[0]


def of_all(value: T) -> list[T]:
    """Every rank's value, by rank (pickled between our own ranks)."""
    found = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return found


def merged(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The ranks' parts of one tensor, each zero where the others are not, on CPU. device: where the group's backend works."""
    if world_size() == 1:
        return part
    whole = part.to(device, copy=True)
    dist.all_reduce(whole)
    return whole.cpu()


def summed(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each value summed over the ranks, which must all have the same names."""
    if world_size() == 1:
        return values
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def explained(error: BaseException) -> str:
    """What to tell of an error: gloo and NCCL name sockets where a rank that waited for another one must be told of that one."""
    said = str(error)
    if world_size() > 1 and any(
        words in said for words in ("closed by peer", "reset by peer", "remote process exited")
    ):
        first = " ".join(said.split("\n")[0].split())[:200]
        return (
            f"another trainer rank ended, and its own log says why ({first}). Start again with checkpoint.resume=auto"
        )
    return said


def wait_for_all() -> None:
    """Return when every rank has come here. Raises torch's error where one died first."""
    if world_size() > 1:
        dist.barrier()


def any_of(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one."""
    if world_size() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)
