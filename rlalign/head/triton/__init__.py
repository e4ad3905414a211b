"""The head in Triton: who asked for it, whether it can run here, and the plan of its tiles. Importing this imports no Triton.

RLALIGN_GPU_HEAD, on every process of a run: `cublas` (the default) multiplies by `torch.mm(out_dtype=float32)` and sums in torch's
passes; `cublas_one_pass` multiplies likewise and reads each tile of logits once; `triton` forms logits, sums and gradients in the
kernels of this room, whose logits do not depend on the batch. Kernels and launches: head_kernels.py, launches.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["PLANS", "Plan", "asked", "interpreted", "multiplies_on", "plan_for", "softmax_plan", "sums_on"]

VARIABLE = "RLALIGN_GPU_HEAD"
CUBLAS, ONE_PASS, TRITON = "cublas", "cublas_one_pass", "triton"


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a tile and how it is carried out. columns and inner fix the bits; rows, warps, stages and group do not."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 8


# One shape of instruction for both: a group of four warps multiplies 64 rows by 256 columns, whatever the tile's rows.
PLANS = {64: Plan(64, 256, 64, warps=4, stages=3), 128: Plan(128, 256, 64, warps=8, stages=3)}


def plan_for(rows: int) -> Plan:
    """Of so many rows. Decoding reads the weight once, whatever the rows of a tile; many rows want tall tiles."""
    return PLANS[64 if rows <= 64 else 128]


def softmax_plan() -> Plan:
    """Of the kernels that sum over a row: one for any number of rows, since the order of the sum is a plan's."""
    return PLANS[128]


def asked() -> str:
    """What the environment asks for. Raises ValueError for a name that does not exist."""
    name = os.environ.get(VARIABLE) or CUBLAS
    if name not in (CUBLAS, ONE_PASS, TRITON):
        raise ValueError(f"{VARIABLE} must be {CUBLAS}, {ONE_PASS} or {TRITON}; got {name!r}")
    return name


def interpreted() -> bool:
    """Whether Triton's interpreter takes the place of a GPU (TRITON_INTERPRET=1): the kernels then run on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def multiplies_on(device: torch.device) -> bool:
    """Whether logits of 16-bit operands on this device are formed by the kernels of this room. Raises as `sums_on` does."""
    return asked() == TRITON and sums_on(device)


def sums_on(device: torch.device) -> bool:
    """Whether tiles of logits on this device are summed and differentiated by the kernels of this room: it was asked for, and
    the device is a GPU or interpreted.

    Raises RuntimeError where they were asked for and Triton is missing: nothing is taken in its place in silence.
    """
    if asked() == CUBLAS or device.type not in (("cpu", "cuda") if interpreted() else ("cuda",)):
        return False
    if not _installed():
        raise RuntimeError(
            f"{VARIABLE}={asked()} without Triton: install the triton that belongs to this torch, or unset {VARIABLE}"
        )
    return True


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None
