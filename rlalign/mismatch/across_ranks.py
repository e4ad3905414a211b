"""One set of mismatch statistics for a job: sums and counts exactly, quantiles through sketches."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce as fold
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from rlalign.mismatch.stats import Stats, merge

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def reduce(stats: Stats, group: ProcessGroup | None = None) -> Stats:
    """The statistics of all ranks' tokens, identical on every rank of `group` (None: the default group).

    Counts, sums, extremes, moments and tables equal a single process's up to float64 rounding. Quantiles come from
    mergeable sketches: right to the rank error that `Distribution.rank_error` states, and the largest values exactly.
    A few tens of kilobytes per rank travel, whatever the number of tokens; gloo and nccl both do.
    Every rank must call it, with `positions`, `lag_B` and `group_B` given alike; a rank with no tokens takes part.
    Without an initialised process group, or in a group of one, `stats` comes back as it is, quantiles exact.
    Raises RuntimeError when datasketches is missing.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return stats
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, _sketched(stats), group=group)
    # merging sketches draws random numbers: one rank does it, or ranks would disagree on whether to stop
    merged: list[Any] = [fold(merge, gathered) if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(merged, group=group, group_src=0)
    return merged[0]


def _sketched(stats: Stats) -> Stats:
    return replace(
        stats,
        distributions={name: d.sketched() for name, d in stats.distributions.items()},
        lags={lag: _sketched(s) for lag, s in stats.lags.items()},
    )
