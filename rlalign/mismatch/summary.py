"""The names and formulas of every mismatch metric, from the sums that `mismatch.stats` collects.

d = old - rollout, rho = exp(d), p = exp(old), q = exp(rollout). <x> is the mean over the N finite masked tokens,
<x>_S the mean over the S sequences that have one. Directions: KL(rollout || old) unless a name says otherwise.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

from rlalign.mismatch.stats import OVER, TABLE

if TYPE_CHECKING:
    from rlalign.mismatch.stats import Stats

SHARES = (0.5, 0.9, 0.99, 0.999)


def summarize(stats: Stats) -> dict[str, float]:
    """Metrics of collected (and possibly reduced) statistics; what `mismatch.compare` returns.

    NaN marks an undefined value: a mean over no tokens, a correlation with a constant.
    """
    sums = stats.sums
    counts = ("tokens", "sequences", "nonfinite", "nonfinite_old", "nonfinite_rollout")
    metrics = {name: sums[name] for name in (*counts, "clamped_tokens", "clamped_sequences")}
    metrics |= _divergences(stats) | _absolute(stats) | _probabilities(stats) | _ratios(stats) | _sequences(stats)
    metrics |= _positions(stats.tables.get("position", {})) | _groups(stats.tables.get("group", {}))
    for lag, at_lag in sorted(stats.lags.items()):
        metrics |= {f"lag{lag}/{name}": value for name, value in summarize(at_lag).items()}
    return metrics


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


def _std(total: float, square: float, count: float) -> float:
    """Population standard deviation."""
    return math.sqrt(max(0.0, square / count - (total / count) ** 2)) if count else math.nan


def _found(value: float) -> float:
    """An extreme, or NaN where there was nothing to compare."""
    return value if math.isfinite(value) else math.nan


def _divergences(stats: Stats) -> dict[str, float]:
    """k1 = <-d>, k2 = <d^2>/2, k3 = <expm1(d) - d>: estimators of KL(rollout || old) (Schulman, "Approximating KL").

    k1 and k3 are unbiased, k3 is never negative. `reverse_kl` = <rho d - expm1(d)> estimates KL(old || rollout),
    unbiased too. `k3_swapped` = <expm1(-d) + d> has the roles exchanged without reweighting: no KL under these samples,
    kept because peers log it. `js_k3`: half-sum of the k3 forms of each side against the mixture (p + q) / 2.
    """
    n, sums = stats.sums["tokens"], stats.sums
    signed, k3, absolute = (stats.distributions[name] for name in ("log_ratio", "k3", "abs"))
    middle, middle_abs = signed.quantiles((0.5,))[0], absolute.quantiles((0.5,))[0]
    return {
        "k1": _mean(-sums["log_ratio"], n),
        "k1_median": -middle,
        "k1_trimmed": -signed.trimmed_mean(),
        "k1_std": _std(sums["log_ratio"], sums["square"], n),
        "k2": _mean(0.5 * sums["square"], n),
        "k2_median": 0.5 * middle_abs**2,
        "k2_trimmed": 0.5 * absolute.trimmed_mean(lambda x_N: x_N.square()),
        "k3": _mean(sums["k3"], n),
        "k3_median": k3.quantiles((0.5,))[0],
        "k3_trimmed": k3.trimmed_mean(),
        "k3_max": _found(stats.highest["k3"]),
        "k3_swapped": _mean(sums["k3_swapped"], n),
        "reverse_kl": _mean(sums["reverse_kl"], n),
        "js_k3": _mean(sums["js_k3"], n),
        "k3_per_nll": _mean(sums["k3"], sums["nll_rollout"]),
        "nll_old": _mean(sums["nll_old"], n),
        "nll_rollout": _mean(sums["nll_rollout"], n),
        "nll_old_weighted": _mean(sums["nll_old_weighted"], n),
        "log_ratio_max": _found(stats.highest["log_ratio"]),
        "log_ratio_min": _found(stats.lowest["log_ratio"]),
    }


def _absolute(stats: Stats) -> dict[str, float]:
    """|d| in nats: mean beside median and trimmed mean, tails, shares beyond 0.1, 0.5 and 1 nat."""
    n, sums, absolute = stats.sums["tokens"], stats.sums, stats.distributions["abs"]
    p50, p90, p99, p999 = absolute.quantiles(SHARES)
    return {
        "abs_mean": _mean(sums["abs"], n),
        "abs_trimmed": absolute.trimmed_mean(),
        "abs_std": _std(sums["abs"], sums["square"], n),
        "abs_max": _found(stats.highest["abs"]),
        "abs_min": _found(stats.lowest["abs"]),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "p999": p999,
        **{f"over_{threshold:g}": _mean(sums[f"over_{threshold:g}"], n) for threshold in OVER},
        "different": _mean(sums["different"], n),
        "mult_error": 1.0 + _mean(sums["mult_error"], n),
        "mult_error_median": math.exp(min(p50, 700.0)),
        "mult_error_trimmed": absolute.trimmed_mean(lambda x_N: x_N.clamp(max=300.0).exp()),
    }


def _probabilities(stats: Stats) -> dict[str, float]:
    """|p - q| and Pearson's r of (p, q) (MiniMax-M1, arXiv 2506.13585); probabilities of the sampled tokens."""
    n, sums, prob_abs = stats.sums["tokens"], stats.sums, stats.distributions["prob_abs"]
    return {
        "prob_abs_mean": _mean(sums["prob_abs"], n),
        "prob_abs_median": prob_abs.quantiles((0.5,))[0],
        "prob_abs_trimmed": prob_abs.trimmed_mean(),
        "prob_abs_std": _std(sums["prob_abs"], sums["prob_abs_square"], n),
        "prob_abs_max": _found(stats.highest["prob_abs"]),
        "prob_abs_min": _found(stats.lowest["prob_abs"]),
        "prob_diff_mean": _mean(sums["prob_diff"], n),
        "prob_old_mean": _mean(sums["prob_old"], n),
        "prob_rollout_mean": _mean(sums["prob_rollout"], n),
        "prob_rollout_max": _found(stats.highest["prob_rollout"]),
        "prob_rollout_min": _found(stats.lowest["prob_rollout"]),
        "pearson_prob": stats.probs.pearson(),
    }


def _ratios(stats: Stats) -> dict[str, float]:
    """Raw token ratios rho. chi2_token = <rho^2> - 1, its centred form <(rho - 1)^2>, ess = <rho>^2 / <rho^2>."""
    n, sums, signed = stats.sums["tokens"], stats.sums, stats.distributions["log_ratio"]
    first, second = _mean(sums["ratio_less_1"], n), _mean(sums["ratio_less_1_square"], n)
    return {
        "ratio_mean": 1.0 + first,
        "ratio_median": math.exp(min(signed.quantiles((0.5,))[0], 700.0)),
        "ratio_trimmed": signed.trimmed_mean(lambda x_N: x_N.clamp(max=300.0).exp()),
        "ratio_std": _std(sums["ratio_less_1"], sums["ratio_less_1_square"], n),
        "ratio_max": 1.0 + _found(stats.highest["ratio_less_1"]),
        "ratio_min": 1.0 + _found(stats.lowest["ratio_less_1"]),
        "ratio_abs_dev": _mean(sums["ratio_less_1_abs"], n),
        "chi2_token": second + 2.0 * first,
        "chi2_token_centered": second,
        "ess": _ess(sums["ratio"], sums["ratio_square"], n),
    }


def _ess(total: float, square: float, count: float) -> float:
    """Effective sample size as a share of `count`: (sum w)^2 / (count * sum w^2), in (0, 1]."""
    return total / square * total / count if square > 0.0 else math.nan


def _sequences(stats: Stats) -> dict[str, float]:
    """Per sequence: product exp(sum d), geometric exp(mean d), perplexities, <exp|d|>; chi2 = <w^2>_S - 1."""
    n, sums = stats.sums["sequences"], stats.sums
    metrics = {
        "log_ppl_old": _mean(sums["seq_log_ppl_old"], n),
        "log_ppl_rollout": _mean(sums["seq_log_ppl_rollout"], n),
        "ppl_old": _mean(sums["seq_ppl_old"], n),
        "ppl_rollout": _mean(sums["seq_ppl_rollout"], n),
        "log_ppl_diff": _mean(sums["seq_log_ppl_diff"], n),
        "log_ppl_abs_diff": _mean(sums["seq_log_ppl_abs_diff"], n),
        "log_ppl_diff_max": _found(stats.highest["seq_log_ppl_diff"]),
        "log_ppl_diff_min": _found(stats.lowest["seq_log_ppl_diff"]),
        "ppl_ratio": _mean(sums["seq_ppl_ratio"], n),
        "seq_log_ratio_mean": _mean(sums["seq_log_ratio_product"], n),
        "seq_log_ratio_max": _found(stats.highest["seq_log_ratio_product"]),
        "seq_log_ratio_min": _found(stats.lowest["seq_log_ratio_product"]),
        "seq_mult_error_mean": 1.0 + _mean(sums["seq_mult_error"], n),
        "seq_mult_error_max": 1.0 + _found(stats.highest["seq_mult_error"]),
        "seq_mult_error_min": 1.0 + _found(stats.lowest["seq_mult_error"]),
    }
    for level in ("product", "geometric"):
        less_1, square = sums[f"seq_{level}_less_1"], sums[f"seq_{level}_less_1_square"]
        high, low = stats.highest[f"seq_{level}_less_1"], stats.lowest[f"seq_{level}_less_1"]
        first, second = _mean(less_1, n), _mean(square, n)
        metrics |= {
            f"chi2_seq_{level}": second + 2.0 * first,
            f"ess_seq_{level}": _ess(sums[f"seq_{level}"], sums[f"seq_{level}_square"], n),
            f"ratio_seq_{level}_mean": 1.0 + first,
            f"ratio_seq_{level}_std": _std(less_1, square, n),
            f"ratio_seq_{level}_max": 1.0 + _found(high),
            f"ratio_seq_{level}_min": 1.0 + _found(low),
            f"ratio_seq_{level}_max_dev": max(abs(_found(high)), abs(_found(low))),
        }
    return metrics


def _positions(table: dict[int, list[float]]) -> dict[str, float]:
    """Means by decile of the response (0: its first tenth). A rise towards the end is a KV-cache or attention bug."""
    return {
        f"position{decile}/{name}": value
        for decile, row in sorted(table.items())
        for name, value in label_means(row).items()
    }


def _groups(table: dict[int, list[float]]) -> dict[str, float]:
    """Spread over prompt groups, and which is worst; the table itself: `mismatch.breakdown.by_label`."""
    if not table:
        return {}
    k3 = {label: label_means(row)["k3"] for label, row in table.items()}
    worst = max(k3, key=lambda label: (k3[label], -label))
    return {
        "group/count": float(len(k3)),
        "group/k3_median": median(k3.values()),
        "group/k3_max": k3[worst],
        "group/k3_worst": float(worst),
        "group/k1_max_abs": max(abs(label_means(row)["k1"]) for row in table.values()),
    }


def label_means(row: list[float]) -> dict[str, float]:
    """Token count and means of one row of a label table: k1, k2, k3, abs_mean."""
    tokens, *totals = row
    names = (*TABLE[1:-1], "abs_mean")
    return {"tokens": tokens} | {name: _mean(x, tokens) for name, x in zip(names, totals, strict=True)}
