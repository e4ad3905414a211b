"""The fp32 weights an lm_head is projected with when the engine's own weight is 16-bit: HeadCache and MasterHead.

vLLM's own update paths write through `param.data`, which leaves `Tensor._version`, the object and its pointer unchanged.
So no key made of tensor metadata is enough; ours has three layers, cheapest first:

1. metadata `(id, data_ptr, _version, dtype, shape)`: catches replaced and in-place updated parameters;
2. an epoch, bumped by hooks on every route by which weights can change (`rlalign.rollout.hooks`);
3. a sample of the content, which catches writes that no hook sees (raw memcpy, `.data.copy_` in user code).

Suffixes: V vocabulary (rows of this rank's shard), D hidden; K sampled elements.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from torch import Tensor

FINGERPRINT_ELEMENTS = 1024
ROWS_AT_ONCE = 4096  # of a check of the whole weight: bounds its temporary memory


class Epoch:
    """Process-wide counter of weight updates. Anything that may have written weights calls `bump()`."""

    value = 0
    reasons: ClassVar[Counter[str]] = Counter()  # which hook bumped how often
    caches: ClassVar[weakref.WeakSet] = weakref.WeakSet()  # of what is released at a bump: anything with drop()

    @classmethod
    def bump(cls, reason: str = "caller") -> None:
        """Every fp32 copy is out of date now; its memory is released at once, before new weights need it."""
        cls.value += 1
        cls.reasons[reason] += 1
        for cache in cls.caches:
            cache.drop()


def fingerprint(weight_VD: Tensor, elements: int = FINGERPRINT_ELEMENTS, *, offset: int = 0) -> Tensor:
    """[K]: every n-th element of the weight from `offset` on, at most `elements` of them, in its own dtype and device.

    n is coprime to D, so one sample visits K different rows (V > K) and every column (D <= K). A write that changes
    - a random share p of the elements or of the rows is missed with probability (1-p)^K: for K = 1024, 3.5e-5 at 1 %
      and 0.36 at 0.1 %;
    - a whole column is never missed for D <= K, nor is a run of V/K + 1 whole rows.
    Samples at all n offsets together visit every element.
    """
    flat = weight_VD.detach().reshape(-1)
    stride = stride_of(tuple(weight_VD.shape), elements)
    return flat[offset % stride :: stride]


@lru_cache(maxsize=64)
def stride_of(shape: tuple[int, ...], elements: int = FINGERPRINT_ELEMENTS) -> int:
    """Distance between two sampled elements: the first from numel/elements on that is coprime to the hidden size."""
    return next(n for n in count(max(1, -(-math.prod(shape) // elements))) if math.gcd(n, shape[-1]) == 1)


@lru_cache(maxsize=64)
def _jump(stride: int) -> int:
    """Step between the offsets of successive samples: near the golden section, coprime to the stride (visits all)."""
    return next(s for s in count(max(1, round(stride * 0.618))) if math.gcd(s, stride) == 1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True when both hold the same bits; unlike `==`, a NaN equals itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


@dataclass(slots=True)
class _Entry:
    key: tuple
    weight_f32_VD: Tensor


class HeadCache:
    """fp32 copies of the lm_head weights of one process, rebuilt whenever the weight may have changed.

    check_every: compare weight and copy on a sample at every n-th use of an unchanged key (1: always). Successive
        samples differ, so k uses miss a write to a share p of the elements with probability (1-p)^(1024 k), and after
        `stride_of` uses every element has been compared. Costs tens of microseconds on CPU; on CUDA it waits for the device.
    Memory: one fp32 copy (4*V*D bytes) per head; it is released by `Epoch.bump`, before the next one is made: the peak is one.
    """

    def __init__(self, *, check_every: int = 1) -> None:
        if check_every < 1:
            raise ValueError(f"check_every counts uses of the head and must be at least 1, got {check_every}")
        self.check_every = check_every
        self.calls = 0
        self.rebuilds = 0
        self.caught_by_fingerprint = 0
        self._entries: dict[int, _Entry] = {}
        Epoch.caches.add(self)

    def get(self, weight_VD: Tensor) -> Tensor:
        """The fp32 copy of `weight_VD` as it is now; the weight itself when it is fp32 already.

        Raises RuntimeError for a weight on the meta device: weights are being replaced and no forward may run.
        """
        self.calls += 1
        require_data(weight_VD)
        if weight_VD.dtype == torch.float32:
            return weight_VD.detach()
        entry = self._entries.get(id(weight_VD))
        if entry is not None and entry.key == _key(weight_VD):
            if self.calls % self.check_every or self._sample_agrees(weight_VD, entry.weight_f32_VD):
                return entry.weight_f32_VD
            self.caught_by_fingerprint += 1
        del entry  # the old copy must go before the new one is made
        return self.refresh(weight_VD)

    def refresh(self, weight_VD: Tensor) -> Tensor:
        """Rebuild the copy now, whatever the key says, and return it."""
        self._entries.pop(id(weight_VD), None)
        self.rebuilds += 1
        copy = weight_VD.detach().to(torch.float32)
        self._entries[id(weight_VD)] = _Entry(_key(weight_VD), copy)
        return copy

    def drop(self) -> None:
        """Forget every copy: before sleep, before an update, or when the model goes away."""
        self._entries.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(e.weight_f32_VD.nbytes for e in self._entries.values())

    def _sample_agrees(self, weight_VD: Tensor, copy_VD: Tensor) -> bool:
        return _sample_agrees(weight_VD, copy_VD, turn=self.calls // self.check_every)


class MasterHead:
    """The unrounded fp32 lm_head that the trainer published, good only for the 16-bit weight that it rounds to.

    Before the first one arrives the weight itself stands in: an optimizer's master copy starts as exactly that.
    Memory: one fp32 weight (4*V*D bytes) beside the engine's own. It survives `Epoch.bump`, since it cannot be rebuilt here.
    """

    def __init__(self) -> None:
        self.loads = 0  # masters received from a trainer
        self.verifications = 0  # comparisons of the whole master with the weight
        self.calls = 0
        self._master_VD: Tensor | None = None
        self._key: tuple | None = None

    def load(self, weight_VD: Tensor, master_VD: Tensor) -> None:
        """Take the master of `weight_VD`. Raises RuntimeError when rounding it does not give that weight, bit for bit."""
        require_data(weight_VD)
        if master_VD.dtype != torch.float32 or master_VD.shape != weight_VD.shape:
            raise RuntimeError(
                f"master lm_head: expected float32 {tuple(weight_VD.shape)}, got {master_VD.dtype} {tuple(master_VD.shape)}"
            )
        if not rounds_to(master_VD, weight_VD):
            raise RuntimeError(
                f"master lm_head: rounded to {weight_VD.dtype} it is not the engine's lm_head.weight; "
                "publish both from the same optimizer step"
            )
        self._master_VD, self._key = master_VD.to(weight_VD.device), _key(weight_VD)
        self.loads += 1

    def get(self, weight_VD: Tensor) -> Tensor:
        """The master of `weight_VD` as it is now; an fp32 weight is its own.

        Raises RuntimeError when the weight has changed and no master came with it.
        """
        self.calls += 1
        require_data(weight_VD)
        if weight_VD.dtype == torch.float32:
            return weight_VD.detach()
        if self._master_VD is None:
            self._master_VD, self._key = weight_VD.detach().float(), _key(weight_VD)
        unchanged = self._key == _key(weight_VD)
        if unchanged and _sample_agrees(weight_VD, self._master_VD, turn=self.calls):
            return self._master_VD
        self.verifications += 1
        if not rounds_to(self._master_VD, weight_VD):
            raise RuntimeError(
                "lm_head.weight has changed and no unrounded weight came with it: its fp32 master is stale. "
                "Publish through rlalign with head_dtype=master, which ships both, or run with head_dtype=float32."
            )
        self._key = _key(weight_VD)
        return self._master_VD

    def drop(self) -> None:
        """Forget the master: the mode was left, or a new model took the process over."""
        self._master_VD = self._key = None

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return 0 if self._master_VD is None else self._master_VD.nbytes


def require_data(weight_VD: Tensor) -> None:
    """Raise RuntimeError for a weight on the meta device."""
    if weight_VD.is_meta:
        raise RuntimeError(
            "lm_head.weight is on the meta device: a weight update has started and not finished. "
            "Pause generation before start_weight_update and resume after finish_weight_update."
        )


def _sample_agrees(weight_VD: Tensor, wide_VD: Tensor, *, turn: int) -> bool:
    """True when a sample of `wide`, rounded to the weight's dtype, has the weight's bits; another sample at every turn."""
    offset = turn * _jump(stride_of(tuple(weight_VD.shape)))
    expected = fingerprint(weight_VD, offset=offset)
    return same_bits(fingerprint(wide_VD, offset=offset).to(weight_VD.dtype), expected.contiguous())


def rounds_to(wide_VD: Tensor, weight_VD: Tensor) -> bool:
    """True when the fp32 weight, rounded to the other's dtype, has its bits; a bounded number of rows at a time."""
    return all(
        same_bits(wide.to(weight_VD.device, weight_VD.dtype), rows.contiguous())
        for wide, rows in zip(wide_VD.split(ROWS_AT_ONCE), weight_VD.detach().split(ROWS_AT_ONCE), strict=True)
    )


def _key(weight: Tensor) -> tuple:
    version = -1 if weight.is_inference() else weight._version  # inference tensors have no version counter
    return (Epoch.value, id(weight), weight.data_ptr(), version, weight.dtype, tuple(weight.shape))
