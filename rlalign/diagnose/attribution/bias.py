"""The systematic part of a difference: rounding has no direction, a fault has.

A wrong epsilon, a stale row or a rescaled weight may be smaller than the rounding of one token and still push every token the
same way. Suffixes: N tokens, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.rollout.worker.recording import Recording

ELEMENTS = 2**22  # compared at once
SIGNIFICANT = (
    7.0  # standard errors: thousands of features are tested at once. At least 50 tokens are needed to get there
)


@dataclass(frozen=True, slots=True)
class Bias:
    """The largest significant deviation of a gain from 1, and where it is: "all" or "feature 17"; 0.0 and "" for none."""

    size: float = 0.0
    where: str = ""


def bias(one: Recording, other: Recording, point: str, rows: tuple[Tensor, Tensor], *, width: int) -> Bias:
    """How much larger `other` is than `one`, in all or along one feature, beyond what rounding explains.

    The gain is the slope of `other` against `one`; its standard error comes from the scatter of the same differences, with the
    features of a token taken together, since one rounded scalar (a norm, a router weight) moves all of them (White, 1980). No
    size of rounding is assumed. rows: of both recordings, pair by pair; tokens with equal values count once, being no new evidence.
    """
    sums_3D, sums_3 = torch.zeros(3, width, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    seen: set[float] = set()
    step = max(1, ELEMENTS // width)
    for mine, theirs in zip(rows[0].split(step), rows[1].split(step), strict=True):
        one_ND, other_ND = one.read(point, mine, width=width).double(), other.read(point, theirs, width=width).double()
        fresh_N = _first_seen(one_ND, seen)
        one_ND, apart_ND = one_ND[fresh_N], other_ND[fresh_N] - one_ND[fresh_N]
        product_ND, squares_ND = apart_ND * one_ND, one_ND.square()
        sums_3D += torch.stack([product_ND.sum(0), product_ND.square().sum(0), squares_ND.sum(0)])
        sums_3 += torch.stack([product_ND.sum(), product_ND.sum(1).square().sum(), squares_ND.sum()])
    size_D, size = _significant(*sums_3D), float(_significant(*sums_3))
    if size and size > float(size_D.max()) / 2:
        return Bias(size, "all")  # said of everything rather than of its worst part
    return Bias(float(size_D.max()), f"feature {int(size_D.argmax())}") if float(size_D.max()) else Bias()


def _significant(product: Tensor, squares: Tensor, norm: Tensor) -> Tensor:
    """|gain - 1| from sums of d*x, (d*x)^2 and x^2; 0 where it is not significant."""
    sure = product.abs() > SIGNIFICANT * squares.sqrt()
    return torch.where(sure & (norm > 0), product.abs() / norm.clamp_min(1e-300), 0.0)


def _first_seen(values_ND: Tensor, seen: set[float]) -> Tensor:
    """Indices of rows whose values did not come before."""
    weights_D = torch.linspace(0.5, 1.5, values_ND.shape[1], dtype=torch.float64).sin()
    fresh = []
    for i, key in enumerate((values_ND @ weights_D).tolist()):
        if key not in seen:
            seen.add(key)
            fresh.append(i)
    return torch.tensor(fresh, dtype=torch.int64)
