"""The head of one decode step, straight from the bf16 weight: the bits of `head.project`, into memory that is used again.

A decode step writes rows x vocabulary floats (148 MiB for 256 rows of 151,936). From the allocator they come as fresh pages every
time, and having the kernel clear those costs as much as the product itself.
Suffixes: N rows, D hidden, V vocabulary (rows of this rank's shard).
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

from rlalign.head import projection, routes
from rlalign.head.cache import Epoch

# On one thread MKL repacks the weight in blocks that leave the cache (1.5 times slower at 256 rows); several threads share it out
# themselves, and few rows are bound by reading the weight once.
TILE, FEW_ROWS = 256, 16
LINE = 16  # floats of a cache line
KEPT_AT_MOST = 512 * 2**20  # bytes; larger results (scoring whole prompts) get memory of their own


class LogitsMemory:
    """One block that successive results share: lent again only when no tensor, slice or view of the last result is left.

    The tensor holds the numpy view it was made of until its storage goes, so a weak reference to that view tells.
    """

    def __init__(self) -> None:
        self._block = np.empty(0, dtype=np.float32)
        self._lent: weakref.ref[np.ndarray] | None = None
        Epoch.caches.add(self)

    def take(self, rows: int, columns: int) -> Tensor:
        """Uninitialised float32 [rows, columns] on CPU."""
        size = rows * columns
        in_use = self._lent is not None and self._lent() is not None
        if in_use or size * 4 > KEPT_AT_MOST:
            return torch.empty(rows, columns, dtype=torch.float32)
        if self._block.size < size + LINE:
            self.drop()  # the smaller block goes before the larger one comes
            self._block = np.empty(size + LINE, dtype=np.float32)  # numpy asks for huge pages, torch does not
        first = -(self._block.ctypes.data // 4) % LINE  # whole cache lines are written past the cache
        view = self._block[first : first + size]
        self._lent = weakref.ref(view)
        return torch.from_numpy(view).view(rows, columns)

    def drop(self) -> None:
        """Give the block back: with the fp32 copies, whenever weights change or the engine sleeps."""
        self._block, self._lent = np.empty(0, dtype=np.float32), None

    @property
    def nbytes(self) -> int:
        """Bytes held between calls."""
        return self._block.nbytes


MEMORY = LogitsMemory()


def decode_logits(hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """float32 logits [..., V] of hidden states [..., D], with the bits of `head.project(hidden, weight, bias)`.

    No gradient. On other routes than MKL_BF16 and KERNEL_FMA it is `head.project`. Raises ValueError as `head.project` does.
    """
    route = projection.route(hidden, weight_VD)
    rows = hidden.numel() // max(1, hidden.shape[-1])
    if route not in (projection.Route.MKL_BF16, projection.Route.KERNEL_FMA) or rows == 0:
        return projection.project(hidden, weight_VD, bias_V)
    projection.check_operands(hidden, weight_VD, bias_V)
    logits_NV = MEMORY.take(rows, weight_VD.shape[0])
    hidden_ND = hidden.reshape(rows, -1)
    kernel = routes.decode_kernel(route, hidden_ND, weight_VD)
    if kernel is not None:
        kernel(hidden_ND, weight_VD, logits_NV)
    elif route is projection.Route.KERNEL_FMA:  # float16: widened, then as it is
        projection.logits_of(
            projection.stored_for(hidden_ND, route), projection.stored_for(weight_VD, route), route, out=logits_NV
        )
    else:
        _library_product(hidden_ND, weight_VD, logits_NV)
    if bias_V is not None:
        logits_NV.add_(bias_V.float())
    return logits_NV.view(*hidden.shape[:-1], weight_VD.shape[0])


def _library_product(hidden_ND: Tensor, weight_VD: Tensor, logits_NV: Tensor) -> None:
    rows, route = hidden_ND.shape[0], projection.Route.MKL_BF16
    tile = TILE if rows >= FEW_ROWS and torch.get_num_threads() == 1 else weight_VD.shape[0]
    for start in range(0, weight_VD.shape[0], tile):
        projection.logits_of(hidden_ND, weight_VD[start : start + tile], route, out=logits_NV[:, start : start + tile])
