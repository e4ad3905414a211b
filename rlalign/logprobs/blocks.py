"""How tokens and vocabulary are cut: blocks of columns, tiles of rows, strips that stay in a cache, and the blocks that are kept.

The first vocabulary blocks are stashed from the forward to the backward pass, in the order both take them, as the very numbers
that the backward pass would form again (where one kernel does a tile: the products before their transform): gradients keep their
bits, whatever the budget. N tokens, V vocabulary, S columns of a vocabulary block, E numbers in the stash.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlalign.head.triton import softmax_plan

# Rows a multiple of 4096 bytes apart collide in the caches: without the padding the products take a third longer (AMX).
PAD = 32


# Rows of a strip, which the passes after a product find in the L2 cache: on CPU 1 MiB a thread, elsewhere 32 MiB.
_STRIP, _DEVICE_STRIP = 128, 512
_DEVICE_BLOCK = 8192  # columns


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of logits held at once."""

    tokens: int
    vocab: int

    @staticmethod
    def of(device: torch.device, chunk: int | None) -> Tile:
        """16 MiB of logits on CPU, 128 MiB elsewhere; `chunk` overrides the number of tokens."""
        tokens, vocab = (2048, 2048) if device.type == "cpu" else (4096, _DEVICE_BLOCK)
        return Tile(chunk or tokens, vocab)


def columns_of(vocab: int, width: int) -> list[slice]:
    """The columns 0..vocab in nearly equal blocks of at most `width`; no block is a single column unless all are.

    A GPU's begin at whole tiles of its kernels, which would otherwise write the rows of a block number by number.
    """
    count, step = -(-vocab // width), softmax_plan().columns if width == _DEVICE_BLOCK else 1
    bounds = [min(-(-(vocab * i // count) // step) * step, vocab) for i in range(count + 1)] if count else []
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def token_tiles(n: int, height: int) -> list[slice]:
    """The rows 0..n in slices of `height`."""
    return [slice(start, min(start + height, n)) for start in range(0, n, height)]


def strip_height(device: torch.device) -> int:
    """Rows of a strip."""
    return _STRIP * torch.get_num_threads() if device.type == "cpu" else _DEVICE_STRIP


def strips(rows: slice, device: torch.device) -> list[tuple[slice, slice]]:
    """(tokens, the same as rows of the tile) of a tile's strips."""
    tiles = token_tiles(rows.stop - rows.start, strip_height(device))
    return [(slice(rows.start + strip.start, rows.start + strip.stop), strip) for strip in tiles]


def padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [rows, columns] whose rows do not start a power of two apart."""
    return torch.empty(rows, columns + PAD, dtype=dtype, device=device)[:, :columns]


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
