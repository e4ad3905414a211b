"""Several trainer ranks run the same program; this is how one of them acts for all.

Without torch.distributed, or with one rank, everything here is a plain call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_without_launcher() -> dict[str, str]:
    """This process's environment for a program of its own, which would else take itself for one of our ranks."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER}


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Ranks that run the program; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_first(action: Callable[[], T]) -> T:
    """Do it on rank 0 and give every rank what it returned (pickled between our own ranks).

    An exception there is raised on every rank, so that none waits for a rank that has stopped: as itself on rank 0, as
    RuntimeError naming it on the others.
    """
    if world_size() == 1:
        return action()
    message: list[object] = [None, None]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            message[0] = action()
        except BaseException as error:  # also Ctrl-C: the others must not wait for it
            failure = error
            message[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise RuntimeError(f"rank 0 stopped the run: {message[1]}")
    return message[0]


def share_of(count: int, what: str) -> slice:
    """This rank's contiguous share of `count` rows. Raises ValueError when the ranks cannot have equal ones.

    Equal, because every rank must make the same number of passes: under ZeRO-3 each pass gathers weights from all.
    """
    size = world_size()
    if count % size:
        raise ValueError(
            f"{count} {what} cannot be divided evenly among {size} trainer ranks; "
            "choose rollout.prompts_per_step x rollout.group_size / algo.minibatches as a multiple of the ranks"
        )
    share = count // size
    return slice(rank() * share, (rank() + 1) * share)


def gathered(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The ranks' equal shares put together in rank order, on CPU. device: where the process group's backend works."""
    if world_size() == 1:
        return rows.cpu()
    found = [torch.empty_like(rows, device=device) for _ in range(world_size())]
    dist.all_gather(found, rows.to(device).contiguous())
    return torch.cat([part.cpu() for part in found])


def summed(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each value summed over the ranks, which must all have the same names."""
    if world_size() == 1:
        return values
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def any_of(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one."""
    if world_size() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)
