"""Logits that stay in memory from the forward pass to the backward pass: as many tiles as a budget holds.

The first vocabulary blocks are stashed, in the order both passes take them. What is stashed are the transformed logits,
the very numbers that the backward pass would form again (where one kernel does a tile: the products before their transform):
gradients keep their bits, whatever the budget.

N tokens, V vocabulary, S columns of a vocabulary block, E numbers in the stash.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlalign.logprobs.blocks import PAD, columns_of

_PER_MIB = 2**20 // 4  # float32


def stash_size(tokens: int, vocab: int, width: int, keep_mib: int) -> int:
    """Numbers in a stash of at most `keep_mib` MiB; no more than [N, V] needs. Symbolic sizes of torch.compile too."""
    blocks = -(-vocab // width)
    numbers: Any = torch.sym_min(tokens * (vocab + PAD * blocks), keep_mib * _PER_MIB)
    return numbers


class Stash:
    """The blocks that one flat tensor [E] has room for; the last of them for some rows only."""

    def __init__(self, flat_E: Tensor, tokens: int, vocab: int, width: int) -> None:
        self._blocks: dict[int, Tensor] = {}
        start = 0
        for columns in columns_of(vocab, width):
            row = columns.stop - columns.start + PAD
            rows = min(tokens, (len(flat_E) - start) // row)
            if rows == 0:
                break
            block = flat_E[start : start + rows * row].view(rows, row)
            self._blocks[columns.start] = block[:, : row - PAD]
            start += rows * row

    def tile(self, rows: slice, columns: slice) -> Tensor | None:
        """Where the logits of this tile lie, [T, S]; None if not all of them do."""
        block = self._blocks.get(columns.start)
        return None if block is None or len(block) < rows.stop else block[rows]

    def put(self, rows: slice, x_TV: Tensor) -> None:
        """Copy whole rows of logits into every block that has room for them."""
        for start, block_NS in self._blocks.items():
            room = block_NS[rows]
            room.copy_(x_TV[: len(room), start : start + block_NS.shape[1]])
