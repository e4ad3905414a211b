"""Joining the trainer's other ranks: where they meet, whether each belongs there, and that all of them run the same programs.

All of it over torch's store, before any collective: versions that differ may not even be able to talk, and then only wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign import ranks

if TYPE_CHECKING:
    from torch.distributed import Store

MEETING_S = 600.0  # until every rank is there: as long as nodes may differ in loading their programs
SAME = ("torch", "deepspeed", "transformers", "numpy")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HOW = "start the ranks with torchrun, deepspeed or srun (slurm/ has working files), or unset WORLD_SIZE for one process"


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A rank as its launcher describes it."""

    rank: int
    local_rank: int
    size: int
    address: str

    @classmethod
    def from_environment(cls) -> Launched | None:
        """None where no launcher started several ranks. Raises ValueError for variables that do not fit together."""
        size = _number("WORLD_SIZE", "1")
        if size == 1:
            return None
        if missing := [name for name in NEEDED if name not in os.environ]:
            raise ValueError(f"WORLD_SIZE={size}, but {', '.join(missing)} is not set; {HOW}")
        rank, local = _number("RANK"), _number("LOCAL_RANK")
        if not 0 <= rank < size:
            raise ValueError(
                f"{socket.gethostname()}: RANK={rank} with WORLD_SIZE={size}: ranks count from 0 to {size - 1}; {HOW}"
            )
        address = f"{os.environ['MASTER_ADDR']}:{_number('MASTER_PORT')}"
        return cls(rank=rank, local_rank=local, size=size, address=address)


def join_ranks(patience_s: float = MEETING_S) -> int:
    """Join the process group of torchrun, deepspeed or srun, where one of them started this process; returns the rank.

    Alone, nothing is joined yet: the embedded vLLM makes the group of one that the trainer then shares. Raises ValueError for a
    launcher's variables that do not fit together, for ranks whose programs differ, RuntimeError where the ranks do not meet.
    """
    launched = Launched.from_environment()
    if launched is None:
        return 0
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        _take_device(launched)
        # Hours: ranks wait in a collective while the first one samples; one that died is noticed at once by its closed connections.
        patience = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "240")))
        store = meet(launched, programs(), patience_s)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=store, rank=launched.rank, world_size=launched.size, timeout=patience,
        )  # fmt: skip
    from rlalign.trainer.deepspeed_setup import join_process_group

    join_process_group()
    return ranks.rank()


def programs() -> dict[str, str]:
    """What decides a rank's numbers and whether it can talk to the others: versions, and the bytes of rlalign itself."""
    folder = Path(__file__).parents[1]
    sources = hashlib.blake2b(digest_size=6)
    for file in sorted(folder.rglob("*.py")):
        sources.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return {name: version(name) for name in SAME} | {"rlalign": f"{version('rlalign')} ({sources.hexdigest()})"}


def meet(launched: Launched, own: dict[str, str], patience_s: float) -> Store:
    """The store that rank 0 (or torchrun) serves, once every rank is there with the same programs.

    Raises RuntimeError naming what keeps the ranks apart, ValueError on every rank for programs that differ.
    """
    from torch.distributed import DistError
    from torch.distributed.rendezvous import rendezvous

    who = f"rank {launched.rank} of {launched.size} on {socket.gethostname()}"
    try:
        here = f"env://?rank={launched.rank}&world_size={launched.size}"
        store, _, _ = next(rendezvous(here, timeout=timedelta(seconds=patience_s)))
        twice = store.add(f"taken/{launched.rank}", 1) > 1
        verdict = "" if twice else _compared(store, launched, own)
    except DistError as error:
        said = " ".join(str(error).split("\n")[0].split())[:300]
        if "EADDRINUSE" in str(error):
            raise RuntimeError(
                f"{who} cannot listen on {launched.address}: the port is taken there ({said}). Choose another MASTER_PORT; "
                "torchrun --standalone and slurm/ find free ones"
            ) from error
        raise RuntimeError(
            f"{who} did not meet the others at {launched.address} within {patience_s:g} s ({said}). Is MASTER_ADDR the first "
            f"rank's host as this one reaches it, were {launched.size} ranks started (WORLD_SIZE), and did one of them fail?"
        ) from error
    if twice:
        raise ValueError(f"{who}: another process has this RANK already, at {launched.address}; {HOW}")
    if verdict:
        raise ValueError(verdict)
    return store


def _compared(store: Store, launched: Launched, own: dict[str, str]) -> str:
    """What rank 0 finds when it has seen every rank's programs: "" where they are the same."""
    store.set(f"programs/{launched.rank}", json.dumps([socket.gethostname(), own]))
    if launched.rank == 0:
        found = [json.loads(store.get(f"programs/{rank}")) for rank in range(launched.size)]
        differ = [
            f"rank {rank} on {host}: {', '.join(f'{name} {theirs.get(name)}' for name in own if theirs.get(name) != own[name])}"
            for rank, (host, theirs) in enumerate(found)
            if theirs != own
        ]
        here = ", ".join(f"{name} {value}" for name, value in own.items())
        store.set(
            "programs/verdict",
            f"the trainer ranks run different programs. Rank 0 on {found[0][0]}: {here}. {'; '.join(differ[:5])}"
            f"{f'; and {len(differ) - 5} more ranks' if len(differ) > 5 else ''}. Install the same everywhere, for example one "
            "virtual environment on a folder that all nodes mount (RLALIGN_VENV in slurm/)"
            if differ
            else "",
        )
    return store.get("programs/verdict").decode()


def _take_device(launched: Launched) -> None:
    """The GPU of this rank becomes its current one: NCCL refuses two ranks on one. Raises ValueError where it has none."""
    import torch

    if not torch.cuda.is_available():
        return
    if launched.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"{socket.gethostname()}: LOCAL_RANK={launched.local_rank}, but this host shows {torch.cuda.device_count()} GPU(s); "
            "start as many ranks a node as it has GPUs (--ntasks-per-node and --gpus-per-node, --nproc_per_node)"
        )
    torch.cuda.set_device(launched.local_rank)


def _number(name: str, default: str | None = None) -> int:
    text = os.environ.get(name, default) or ""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{socket.gethostname()}: {name}={text!r} is no number; {HOW}") from None
