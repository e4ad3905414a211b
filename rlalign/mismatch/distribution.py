"""Quantiles and trimmed means that survive merging: exact in one process, a quantile sketch across ranks.

N values, W weighted values of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

TRIM = 0.01  # share of the values dropped at each end by trimmed means
TAIL_K = 64  # REQ: rank error vanishes towards the largest value, which is where p99.9 lives
BODY_K = 4096  # KLL: rank error below 0.1 % everywhere, both ends alike


@dataclass(frozen=True)
class Distribution:
    """A multiset of float32 numbers: all of them (`values`, sorted on first use), or a `sketch` of them.

    tail: the right end matters (absolute values); otherwise both ends do (signed values).
    A sketch answers quantiles with a rank error, stated by `rank_error`; reference: REQ arXiv 2004.01668,
    KLL arXiv 1603.05346, both from Apache DataSketches.
    """

    tail: bool
    values: tuple[Tensor, ...] = ()
    sketch: bytes | None = None

    @staticmethod
    def of(values_N: Tensor, *, tail: bool) -> Distribution:
        """All the values of one process; what float32 cannot hold becomes its largest number."""
        most = torch.finfo(torch.float32).max
        return Distribution(tail, values=(values_N.clamp(-most, most).float(),))

    @cached_property
    def sorted_N(self) -> Tensor:
        """Every value, ascending. Exact distributions only."""
        return torch.cat(self.values).sort().values

    def merge(self, other: Distribution) -> Distribution:
        """The union. Exact while both are; a sketch as soon as one is."""
        if self.sketch is None and other.sketch is None:
            return Distribution(self.tail, values=self.values + other.values)
        merged = self._load()
        merged.merge(other._load())
        return Distribution(self.tail, sketch=merged.serialize())

    def sketched(self) -> Distribution:
        """The same distribution in a few kilobytes. Raises RuntimeError when datasketches is not installed."""
        return self if self.sketch is not None else Distribution(self.tail, sketch=self._load().serialize())

    @property
    def rank_error(self) -> float:
        """How far a quantile's rank may be off, as a share of the values, at the median (99 % confidence)."""
        if self.sketch is None:
            return 0.0
        loaded = self._load()
        if loaded.is_empty():
            return 0.0
        return loaded.get_rank_upper_bound(0.5, 3) - 0.5 if self.tail else loaded.normalized_rank_error(False)

    def quantiles(self, shares: tuple[float, ...]) -> list[float]:
        """Values below which these shares of the values lie, linearly interpolated when exact; NaN when empty."""
        if self.sketch is not None:
            loaded = self._load()
            return [math.nan if loaded.is_empty() else float(loaded.get_quantile(s, True)) for s in shares]
        n = len(self.sorted_N)
        if not n:
            return [math.nan] * len(shares)
        place_Q = torch.tensor(shares, dtype=torch.float64, device=self.sorted_N.device) * (n - 1)
        low_Q, high_Q = (self.sorted_N[i_Q.long()].double() for i_Q in (place_Q.floor(), place_Q.ceil()))
        return torch.lerp(low_Q, high_Q, place_Q.frac()).tolist()

    def trimmed_mean(self, transform: Callable[[Tensor], Tensor] | None = None) -> float:
        """Mean of increasing `transform` of the values, without the TRIM lowest and highest; NaN if empty."""
        if self.sketch is None:
            n = len(self.sorted_N)
            cut = math.floor(TRIM * n)
            kept_N = self.sorted_N[cut : n - cut].double()
            return float((kept_N if transform is None else transform(kept_N)).mean())
        pairs_W2 = torch.tensor(sorted(self._load()), dtype=torch.float64).reshape(-1, 2)
        values_W, weight_W = pairs_W2.unbind(1)
        n = float(weight_W.sum())
        cut = math.floor(TRIM * n)
        end_W = weight_W.cumsum(0)
        inside_W = (end_W.clamp(max=n - cut) - (end_W - weight_W).clamp(min=cut)).clamp(min=0.0)
        kept_W = values_W if transform is None else transform(values_W)
        return float((kept_W * inside_W).sum() / inside_W.sum())

    def _load(self) -> Any:
        library = _datasketches()
        kind = library.req_floats_sketch if self.tail else library.kll_floats_sketch
        if self.sketch is not None:
            return kind.deserialize(self.sketch)
        sketch = kind(TAIL_K, True) if self.tail else kind(BODY_K)
        for values_N in self.values:
            sketch.update(values_N.cpu().numpy())
        return sketch


def _datasketches() -> ModuleType:
    try:
        import datasketches
    except ImportError as error:
        raise RuntimeError(
            "merging quantiles over ranks needs the `datasketches` package (part of rlalign[train]): "
            "pip install datasketches. Metrics of a single process need nothing beyond torch."
        ) from error
    return datasketches
