"""The bytes of a tensor and their digest: what "the same weight" means between trainer and rollout workers.

BLAKE3: cryptographic, and at memory speed where BLAKE2b took longer than the copy (5.1 against 0.6 GiB/s on one AVX-512 core).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order, on the CPU; no copy for a contiguous CPU tensor."""
    import torch

    return tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data


def digest(tensor: Tensor) -> str:
    """BLAKE3 of the tensor's bytes, 32 hex digits: equal bytes give equal digests on every machine."""
    import blake3

    return blake3.blake3(bytes_of(tensor)).hexdigest(length=16)
