"""The head of one decode step, straight from the bf16 weight: the bits of `head.project`, in tiles of the vocabulary.

A decode step reads the whole weight for few rows and writes rows x vocabulary floats. Two things cost more than the product:
packing a tile that does not fit the cache, and touching fresh memory page by page.
Suffixes: N rows, D hidden, V vocabulary (rows of this rank's shard).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlalign import head

TILE = 1024  # rows of the weight in one product: 2 MiB at hidden size 1024, an L2 cache


def decode_logits(hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """float32 logits [..., V] of hidden states [..., D], with the bits of `head.project(hidden, weight, bias)`.

    No gradient. On other routes than MKL_BF16 it is `head.project`.
    """
    route = head.route(hidden, weight_VD)
    if route is not head.Route.MKL_BF16:
        return head.project(hidden, weight_VD, bias_V)
    head.check_operands(hidden, weight_VD, bias_V)
    rows = hidden.numel() // hidden.shape[-1]
    hidden_ND = hidden.reshape(rows, -1)
    if rows == 1:
        hidden_ND = torch.nn.functional.pad(hidden_ND, (0, 0, 0, 1))  # once, instead of in every tile's logits_of
    logits_NV = _empty(hidden_ND.shape[0], weight_VD.shape[0])
    if rows:
        for start in range(0, weight_VD.shape[0], TILE):
            tile = weight_VD[start : start + TILE]
            head.logits_of(hidden_ND, tile, route, out=logits_NV[:, start : start + TILE])
    if bias_V is not None:
        logits_NV.add_(bias_V.float())
    return logits_NV[:rows].view(*hidden.shape[:-1], weight_VD.shape[0])


def _empty(rows: int, columns: int) -> Tensor:
    """Uninitialised float32 memory. numpy asks the kernel for huge pages, torch does not: 500 times fewer page faults."""
    return torch.from_numpy(np.empty((rows, columns), dtype=np.float32))
