"""How tokens and vocabulary are cut: blocks of columns, tiles of rows, strips that stay in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Rows a multiple of 4096 bytes apart collide in the caches: without the padding the products take a third longer (AMX).
PAD = 32
# Rows of a strip, which the passes after a product find in the L2 cache: on CPU 1 MiB a thread, elsewhere 32 MiB.
_STRIP, _DEVICE_STRIP = 128, 512


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of logits held at once."""

    tokens: int
    vocab: int

    @staticmethod
    def of(device: torch.device, chunk: int | None) -> Tile:
        """16 MiB of logits on CPU, 128 MiB elsewhere; `chunk` overrides the number of tokens."""
        tokens, vocab = (2048, 2048) if device.type == "cpu" else (4096, 8192)
        return Tile(chunk or tokens, vocab)


def columns_of(vocab: int, width: int) -> list[slice]:
    """The columns 0..vocab in nearly equal blocks of at most `width`; no block is a single column unless all are."""
    count = -(-vocab // width)
    bounds = [vocab * i // count for i in range(count + 1)] if count else []
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
