"""A sum over a tensor's elements that does not depend on their order: equal for a tensor and any permutation or split of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**20  # elements mixed at a time
ODD_1, ODD_2 = -7046029254386353131, -4658895280553007687  # SplitMix64's multipliers, as signed numbers


def shuffled_sum(tensor: Tensor) -> int:
    """Sum modulo 2^64 of a 64-bit mixing (SplitMix64's, Steele et al. 2014) of each element's bits.

    Of the pieces of a split tensor, the sums add up to the whole's.
    """
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().reshape(-1).contiguous().view(integers[tensor.dtype.itemsize])
    total = 0
    for piece in flat.split(CHUNK):
        mixed = piece.to(torch.int64) * ODD_1
        mixed = (mixed ^ ((mixed >> 30) & (2**34 - 1))) * ODD_2
        mixed = mixed ^ ((mixed >> 31) & (2**33 - 1))
        total += int(mixed.sum())
    return total % 2**64
