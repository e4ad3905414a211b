"""HeadCache: the fp32 copy of an lm_head weight that can never be stale.

vLLM's own update paths write through `param.data`, which leaves `Tensor._version`, the object and its pointer unchanged.
So no key made of tensor metadata is enough; ours has three layers, cheapest first:

1. metadata `(id, data_ptr, _version, dtype, shape)`: catches replaced and in-place updated parameters;
2. an epoch, bumped by hooks on every route by which weights can change (`rlalign.rollout.epoch_hooks`);
3. a strided fingerprint of the content, which catches writes that no hook sees (raw memcpy, `.data.copy_` in user code).

Suffixes: V vocabulary (rows of this rank's shard), D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

FINGERPRINT_ELEMENTS = 1024


class Epoch:
    """Process-wide counter of weight updates. Anything that may have written weights calls `bump()`."""

    value = 0

    @classmethod
    def bump(cls) -> None:
        cls.value += 1


def fingerprint(weight_VD: Tensor, elements: int = FINGERPRINT_ELEMENTS) -> Tensor:
    """Every n-th element of the weight, at most `elements` of them, in the weight's own dtype and device.

    A write that changes a random share p of the elements is missed with probability (1-p)^elements: 3.5e-5 for p = 1 %.
    The stride is odd, so it visits every column of a weight whose hidden size is even.
    """
    flat = weight_VD.detach().reshape(-1)
    stride = max(1, flat.numel() // elements) | 1
    return flat[::stride].clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True when both hold the same bits; unlike `==`, a NaN equals itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


@dataclass(slots=True)
class _Entry:
    key: tuple
    weight_f32_VD: Tensor
    seen: Tensor


class HeadCache:
    """fp32 copies of the lm_head weights of one process, rebuilt whenever the weight may have changed.

    check_every: compare the fingerprint on every n-th use of an unchanged key (1 = always; about 10 us on CPU).
        The first use after an epoch change always rebuilds.
    Memory: one fp32 copy (4*V*D bytes) per head; the old copy is dropped before the new one is made, so the peak is one.
    """

    def __init__(self, *, check_every: int = 1) -> None:
        if check_every < 1:
            raise ValueError(f"check_every counts uses of the head and must be at least 1, got {check_every}")
        self.check_every = check_every
        self.calls = 0
        self.rebuilds = 0
        self.caught_by_fingerprint = 0
        self._entries: dict[int, _Entry] = {}

    def get(self, weight_VD: Tensor) -> Tensor:
        """The fp32 copy of `weight_VD` as it is now; the weight itself when it is fp32 already.

        Raises RuntimeError for a weight on the meta device: weights are being replaced and no forward may run.
        """
        self.calls += 1
        if weight_VD.is_meta:
            raise RuntimeError(
                "lm_head.weight is on the meta device: a weight update has started and not finished. "
                "Pause generation before start_weight_update and resume after finish_weight_update."
            )
        if weight_VD.dtype == torch.float32:
            return weight_VD.detach()
        key = _key(weight_VD)
        entry = self._entries.get(id(weight_VD))
        if entry is not None and entry.key == key:
            if self.calls % self.check_every or same_bits(fingerprint(weight_VD), entry.seen):
                return entry.weight_f32_VD
            self.caught_by_fingerprint += 1
        del entry
        return self.refresh(weight_VD)

    def refresh(self, weight_VD: Tensor) -> Tensor:
        """Rebuild the copy now, whatever the key says, and return it."""
        self._entries.pop(id(weight_VD), None)
        self.rebuilds += 1
        copy = weight_VD.detach().to(torch.float32)
        self._entries[id(weight_VD)] = _Entry(_key(weight_VD), copy, fingerprint(weight_VD))
        return copy

    def drop(self) -> None:
        """Forget every copy: before sleep, or when the model goes away."""
        self._entries.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(e.weight_f32_VD.nbytes for e in self._entries.values())


def _key(weight: Tensor) -> tuple:
    version = -1 if weight.is_inference() else weight._version  # inference tensors have no version counter
    return (Epoch.value, id(weight), weight.data_ptr(), version, weight.dtype, tuple(weight.shape))
