"""Mergeable sufficient statistics of a mismatch: collect on each rank, merge, summarize.

Everything is a sum, a count, an extreme or a distribution, so any split of the tokens over calls or ranks gives the
metrics of the whole. Ratios enter as exp(d) and as expm1(d): the one keeps tiny ratios, the other
differences from 1, and equal policies sum to exactly 0.

B sequences, L padded length, N finite masked tokens, S sequences with at least one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from rlalign.mismatch.aligned import require_aligned, sampled, usable
from rlalign.mismatch.distribution import Distribution

if TYPE_CHECKING:
    from torch import Tensor

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
