"""Mergeable sufficient statistics of a mismatch: collect on each rank, merge or reduce, summarize.

Everything is a sum, a count, an extreme or a distribution, so any split of the tokens over calls or ranks gives the metrics of the
whole. Ratios enter as exp(d) and as expm1(d): the one keeps tiny ratios, the other differences from 1, and equal policies sum to
exactly 0. Quantiles and trimmed means are exact in one process and come from a sketch across ranks.

B sequences, L padded length, N finite masked tokens, S sequences with at least one of them, W weighted values of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from functools import reduce as fold
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rlalign.mismatch.aligned import require_aligned, sampled, usable

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor
    from torch.distributed import ProcessGroup

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


EXP_LIMIT = 300.0  # exp(2 * 300) is a float64, and so is the sum of a billion of them
OVER = (0.1, 0.5, 1.0)  # nats: shares of tokens beyond
DIFFERENT = 1e-6  # nats: beyond float32 rounding of a logprob
DECILES = 10


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, means and centred second moments of two variables: Pearson's correlation without cancellation."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    @staticmethod
    def of(x_N: Tensor, y_N: Tensor) -> Moments:
        """Two passes: means, then centred products."""
        if not x_N.numel():
            return Moments()
        x, y = x_N.mean(), y_N.mean()
        dx_N, dy_N = x_N - x, y_N - y
        products = torch.stack([x, y, dx_N @ dx_N, dy_N @ dy_N, dx_N @ dy_N]).tolist()
        return Moments(float(x_N.numel()), *products)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union (Chan, Golub, LeVeque 1979)."""
        n = self.n + other.n
        if not n:
            return self
        dx, dy = other.x - self.x, other.y - self.y
        share, between = other.n / n, self.n * other.n / n
        return Moments(
            n,
            self.x + dx * share,
            self.y + dy * share,
            self.xx + other.xx + dx * dx * between,
            self.yy + other.yy + dy * dy * between,
            self.xy + other.xy + dx * dy * between,
        )

    def pearson(self) -> float:
        """Correlation in [-1, 1]; NaN where either side does not vary."""
        if self.xx <= 0.0 or self.yy <= 0.0:
            return math.nan
        return max(-1.0, min(1.0, self.xy / math.sqrt(self.xx) / math.sqrt(self.yy)))


@dataclass(frozen=True, slots=True)
class Stats:
    """What `merge` and `mismatch.reduce` combine. Keys of `sums`, `lowest` and `highest` are this module's own.

    probs: moments of the two probabilities. tables: label kind ("position", "group") -> label -> sums of TABLE.
    lags: lag -> Stats of the tokens sampled by that version.
    """

    sums: dict[str, float]
    lowest: dict[str, float]
    highest: dict[str, float]
    probs: Moments
    distributions: dict[str, Distribution]
    tables: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    lags: dict[int, Stats] = field(default_factory=dict)


TABLE = ("tokens", "k1", "k2", "k3", "abs")  # columns of Stats.tables


def collect(
    old_logprobs_BL: Tensor,
    rollout_logprobs_BL: Tensor,
    loss_mask_BL: Tensor,
    *,
    lag_B: Tensor | None = None,
    group_B: Tensor | None = None,
    positions: bool = True,
) -> Stats:
    """The statistics of one batch; arguments as in `mismatch.compare`. An empty shard is allowed: counts are 0."""
    require_aligned("mismatch", old=old_logprobs_BL, rollout=rollout_logprobs_BL, mask=loss_mask_BL)
    old_BL, rollout_BL = old_logprobs_BL.detach(), rollout_logprobs_BL.detach()
    keep_BL = usable(old_BL, rollout_BL, loss_mask_BL)
    row_N, column_N = keep_BL.nonzero(as_tuple=True)
    old_N, rollout_N = old_BL[row_N, column_N].double(), rollout_BL[row_N, column_N].double()
    count_B = keep_BL.sum(-1)
    stats = _of_tokens(old_N, rollout_N, row_N, count_B)
    stats.sums["nonfinite"] = float((loss_mask_BL & ~keep_BL).sum())
    stats.sums["nonfinite_old"] = float((loss_mask_BL & ~old_BL.isfinite()).sum())
    stats.sums["nonfinite_rollout"] = float((loss_mask_BL & ~sampled(rollout_BL)).sum())
    if positions:
        order_BL = keep_BL.cumsum(-1) - 1
        decile_N = order_BL[row_N, column_N] * DECILES // count_B[row_N]
        stats.tables["position"] = label_table(old_N, rollout_N, decile_N)
    if group_B is not None:
        stats.tables["group"] = label_table(old_N, rollout_N, group_B.to(row_N.device)[row_N])
    if lag_B is not None:
        if lag_B.is_floating_point():
            raise ValueError(f"lag_B counts optimizer steps and must be integers, got {lag_B.dtype}")
        lag_BL = (lag_B if lag_B.ndim == 2 else lag_B[:, None]).to(row_N.device).expand_as(loss_mask_BL)
        for lag in lag_BL[loss_mask_BL].unique().tolist():
            at_lag_BL = loss_mask_BL & (lag_BL == lag)
            everything = bool((at_lag_BL == loss_mask_BL).all())
            stats.lags[int(lag)] = (
                replace(stats, lags={})
                if everything
                else collect(old_BL, rollout_BL, at_lag_BL, group_B=group_B, positions=positions)
            )
    return stats


def bounded_exp(x: Tensor) -> Tensor:
    """exp of x clamped to +-EXP_LIMIT."""
    return x.clamp(-EXP_LIMIT, EXP_LIMIT).exp()


def bounded_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 with x clamped to +-EXP_LIMIT."""
    return x.clamp(-EXP_LIMIT, EXP_LIMIT).expm1()


def _of_tokens(old_N: Tensor, rollout_N: Tensor, row_N: Tensor, count_B: Tensor) -> Stats:
    d_N = old_N - rollout_N
    tokens = _token_columns(old_N, rollout_N, d_N)
    sequences = _sequence_columns(old_N, rollout_N, tokens["mult_error"], row_N, count_B)
    columns = tokens | sequences
    ranged = {name: columns[name] for name in _RANGED}
    sums = {name: float(x.sum()) for name, x in columns.items()}
    sums["tokens"] = float(d_N.numel())
    sums["sequences"] = float((count_B > 0).sum())
    for threshold in OVER:
        sums[f"over_{threshold:g}"] = float((tokens["abs"] > threshold).sum())
    return Stats(
        sums=sums,
        lowest={name: float(x.min()) if x.numel() else math.inf for name, x in ranged.items()},
        highest={name: float(x.max()) if x.numel() else -math.inf for name, x in ranged.items()},
        # 1 - p carries Pearson's r of p, and keeps precision where p is nearly 1
        probs=Moments.of(-old_N.expm1(), -rollout_N.expm1()),
        distributions={
            name: Distribution.of(tokens[name], tail=name != "log_ratio")
            for name in ("log_ratio", "abs", "k3", "prob_abs")
        },
    )


def _token_columns(old_N: Tensor, rollout_N: Tensor, d_N: Tensor) -> dict[str, Tensor]:
    e_N, ratio_N = bounded_expm1(d_N), bounded_exp(d_N)
    inverse_N = bounded_expm1(-d_N)
    abs_N = d_N.abs()
    prob_old_N, prob_N = bounded_exp(old_N), bounded_exp(rollout_N)
    prob_diff_N = prob_old_N - prob_N
    prob_abs_N = prob_diff_N.abs()
    # log of the mixture (p + q) / 2 from each side; the difference is at most log 2, so nothing overflows
    mix_N = torch.logaddexp(old_N, rollout_N) - math.log(2.0)
    from_old_N, from_rollout_N = old_N - mix_N, rollout_N - mix_N
    return {
        "log_ratio": d_N,
        "square": d_N.square(),
        "abs": abs_N,
        "k3": e_N - d_N,
        "k3_swapped": inverse_N + d_N,
        "reverse_kl": ratio_N * d_N.clamp(-EXP_LIMIT, EXP_LIMIT) - e_N,
        "js_k3": 0.5 * (from_old_N.expm1() - from_old_N + from_rollout_N.expm1() - from_rollout_N),
        "ratio": ratio_N,
        "ratio_square": ratio_N.square(),
        "ratio_less_1": e_N,
        "ratio_less_1_square": e_N.square(),
        "ratio_less_1_abs": e_N.abs(),
        "mult_error": torch.maximum(e_N, inverse_N),
        "prob_diff": prob_diff_N,
        "prob_abs": prob_abs_N,
        "prob_abs_square": prob_abs_N.square(),
        "prob_old": prob_old_N,
        "prob_rollout": prob_N,
        "nll_old": -old_N,
        "nll_rollout": -rollout_N,
        "nll_old_weighted": -ratio_N * old_N,
        "different": (abs_N > DIFFERENT).double(),
        "clamped_tokens": (abs_N > EXP_LIMIT).double(),
    }


def _sequence_columns(
    old_N: Tensor, rollout_N: Tensor, mult_error_N: Tensor, row_N: Tensor, count_B: Tensor
) -> dict[str, Tensor]:
    some_B = count_B > 0
    count_S = count_B[some_B].double()

    def total(x_N: Tensor) -> Tensor:
        return torch.zeros(len(count_B), dtype=torch.float64, device=x_N.device).index_add_(0, row_N, x_N)[some_B]

    log_ppl_old_S, log_ppl_rollout_S = total(-old_N) / count_S, total(-rollout_N) / count_S
    product_S = total(old_N - rollout_N)
    geometric_S = product_S / count_S
    clamped_S = torch.stack([product_S, log_ppl_old_S, log_ppl_rollout_S]).abs().amax(0) > EXP_LIMIT
    return {
        "seq_log_ppl_old": log_ppl_old_S,
        "seq_log_ppl_rollout": log_ppl_rollout_S,
        "seq_ppl_old": bounded_exp(log_ppl_old_S),
        "seq_ppl_rollout": bounded_exp(log_ppl_rollout_S),
        "seq_log_ppl_diff": -geometric_S,
        "seq_log_ppl_abs_diff": geometric_S.abs(),
        "seq_ppl_ratio": bounded_exp(-geometric_S),
        "seq_log_ratio_product": product_S,
        **_weight_columns("seq_product", product_S),
        **_weight_columns("seq_geometric", geometric_S),
        "seq_mult_error": total(mult_error_N) / count_S,
        "clamped_sequences": clamped_S.double(),
    }


def _weight_columns(name: str, log_weight_S: Tensor) -> dict[str, Tensor]:
    weight_S, less_1_S = bounded_exp(log_weight_S), bounded_expm1(log_weight_S)
    return {
        name: weight_S,
        f"{name}_square": weight_S.square(),
        f"{name}_less_1": less_1_S,
        f"{name}_less_1_square": less_1_S.square(),
    }


_RANGED = (
    "log_ratio", "abs", "k3", "ratio_less_1", "prob_abs", "prob_rollout", "seq_log_ppl_diff",
    "seq_log_ratio_product", "seq_product_less_1", "seq_geometric_less_1", "seq_mult_error",
)  # fmt: skip


def label_table(old_N: Tensor, rollout_N: Tensor, label_N: Tensor) -> dict[int, list[float]]:
    """Sums of TABLE for every label that occurs."""
    labels, index_N = label_N.unique(return_inverse=True)
    d_N = old_N - rollout_N
    k3_N = bounded_expm1(d_N) - d_N
    columns = torch.stack([torch.ones_like(d_N), -d_N, 0.5 * d_N.square(), k3_N, d_N.abs()])
    sums = columns.new_zeros(len(TABLE), len(labels)).index_add_(1, index_N, columns)
    return dict(zip(labels.tolist(), sums.T.tolist(), strict=True))


def merge_tables(a: dict[int, list[float]], b: dict[int, list[float]]) -> dict[int, list[float]]:
    """Label tables of the union of two disjoint sets of tokens."""
    zero = [0.0] * len(TABLE)
    return {k: [x + y for x, y in zip(a.get(k, zero), b.get(k, zero), strict=True)] for k in a.keys() | b.keys()}


def merge(first: Stats, second: Stats) -> Stats:
    """Statistics of the union of two disjoint sets of tokens. A sequence must lie wholly in one of them."""
    lags = dict(first.lags)
    for lag, stats in second.lags.items():
        lags[lag] = merge(lags[lag], stats) if lag in lags else stats
    kinds = first.tables.keys() | second.tables.keys()
    return Stats(
        sums={k: first.sums[k] + second.sums[k] for k in first.sums},
        lowest={k: min(first.lowest[k], second.lowest[k]) for k in first.lowest},
        highest={k: max(first.highest[k], second.highest[k]) for k in first.highest},
        probs=first.probs.merge(second.probs),
        distributions={k: first.distributions[k].merge(second.distributions[k]) for k in first.distributions},
        tables={k: merge_tables(first.tables.get(k, {}), second.tables.get(k, {})) for k in kinds},
        lags=lags,
    )


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
