"""What a growing mismatch follows: rank correlations of k3 with what else changes in a run, at the lead that fits best.

Two series that both grow correlate whatever they are, so the verdict is over the changes from row to row, against what the largest
of as many correlations reaches by chance. A correlation is no cause: it says where to look first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Followed", "follows"]

LEADS, ROWS = 5, 12  # rows that a series may run ahead; fewest rows that a correlation is taken over
DRAWS, TINY = 200, 1e-18


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """One series against k3. levels, changes: Spearman's correlations, -1 to 1; lead: rows it runs ahead, where that of the changes
    is largest. chance: 95 % quantile of the largest |changes| over all series and leads with the changes, or the rows, of k3 in
    random order, whichever is larger.
    """

    name: str
    levels: float
    changes: float
    lead: int
    chance: float

    @property
    def beyond_chance(self) -> bool:
        """The changes go together more than the luckiest of unrelated ones would."""
        return abs(self.changes) > self.chance


def follows(k3: Sequence[float], series: Mapping[str, Sequence[float]], *, seed: int = 0) -> list[Followed]:
    """Every series that changes, the strongest first; rows in the order of steps. Empty for fewer than ROWS rows.

    The k3, nats, is taken by its logarithm (from TINY on), since it grows by factors.
    Raises ValueError for series of other lengths and for numbers that are not finite.
    """
    wanted = torch.tensor(list(k3), dtype=torch.float64)
    given = {name: torch.tensor(list(values), dtype=torch.float64) for name, values in series.items()}
    for name, values in ({"k3": wanted} | given).items():
        if len(values) != len(wanted) or not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"follows: {name} has {len(values)} rows, all of them must be finite; k3 has {len(wanted)}"
            )
    wanted = wanted.clamp(min=TINY).log()
    given = {name: values for name, values in given.items() if float(values.std()) > 0} if len(wanted) >= ROWS else {}
    if not given or float(wanted.std()) == 0:
        return []
    steps_KT = torch.stack([values.diff() for values in given.values()])
    at_LK = _leads(steps_KT, wanted.diff()[None])[..., 0]
    lead_K = at_LK.abs().argmax(0)
    best_K = at_LK.gather(0, lead_K[None])[0]
    draws = torch.Generator().manual_seed(seed)
    orders_DT, orders_DR = (
        torch.rand(DRAWS, n, generator=draws, dtype=torch.float64) for n in (len(wanted) - 1, len(wanted))
    )
    chance = max(  # of changes in random order, and of the changes of rows in random order: what walks and what noise would reach
        float(_leads(steps_KT, shuffled_DT).abs().amax((0, 1)).quantile(0.95))
        for shuffled_DT in (orders_DT, wanted[orders_DR.argsort(1)].diff(dim=1))
    )
    found = [
        Followed(
            name=name, levels=float(_spearman(values[None, : len(values) - lead], wanted[lead:][None])[0, 0]), changes=float(best),
            lead=lead, chance=chance,
        )
        for (name, values), best, lead in zip(given.items(), best_K, lead_K.tolist(), strict=True)
    ]  # fmt: skip
    return sorted(found, key=lambda f: -abs(f.changes))


def _leads(steps_KT: Tensor, wanted_DT: Tensor) -> Tensor:
    """[LEADS + 1, K, D]: correlations with the steps that run so many rows ahead."""
    count = wanted_DT.shape[1]
    return torch.stack([_spearman(steps_KT[:, : count - lead], wanted_DT[:, lead:]) for lead in range(LEADS + 1)])


def _spearman(values_KT: Tensor, wanted_DT: Tensor) -> Tensor:
    """[K, D]: Pearson's correlation of the ranks; 0 for a series without changes."""
    one_KT, other_DT = (ranks - ranks.mean(1, keepdim=True) for ranks in (_ranks(values_KT), _ranks(wanted_DT)))
    scale_KD = one_KT.norm(dim=1)[:, None] * other_DT.norm(dim=1)
    return torch.where(scale_KD > 0, one_KT @ other_DT.T / scale_KD, 0.0)


def _ranks(values_KT: Tensor) -> Tensor:
    """Ranks from 0, those of equal values averaged."""
    ordered_KT, given_KT = values_KT.sort(1).values.contiguous(), values_KT.contiguous()
    below_KT, upto_KT = (torch.searchsorted(ordered_KT, given_KT, right=right) for right in (False, True))
    return (below_KT + upto_KT - 1).double() / 2
