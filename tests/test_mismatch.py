"""Laws of mismatch.compare: directions, denominators, invariances, numerics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign import mismatch
from rlalign.mismatch.breakdown import by_label

seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=25, deadline=None)


def batch(seed, B=5, L=9, noise=0.3):
    g = torch.Generator().manual_seed(seed)
    rollout = -3.0 * torch.rand(B, L, generator=g)
    old = rollout + noise * torch.randn(B, L, generator=g)
    mask = torch.rand(B, L, generator=g) < 0.7
    mask[0, 1] = True
    return old, rollout, mask


def close(a, b, *, rel=1e-9, ignore=()):
    assert a.keys() == b.keys()
    for name in a.keys() - set(ignore):
        assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-12, nan_ok=True), name


@quick
@given(seeds)
def test_equal_policies_have_no_mismatch(seed):
    old, _, mask = batch(seed)
    m = mismatch.compare(old, old, mask)
    zero = ("k1", "k2", "k3", "k3_swapped", "reverse_kl", "js_k3", "abs_mean", "abs_max", "p50", "p999", "over_0.1",
            "prob_abs_mean", "chi2_token", "chi2_seq_product", "chi2_seq_geometric", "log_ppl_abs_diff",
            "different")  # fmt: skip
    one = (
        "ess",
        "ratio_mean",
        "ratio_max",
        "ratio_min",
        "ess_seq_product",
        "ess_seq_geometric",
        "ppl_ratio",
        "mult_error",
    )
    assert {n: m[n] for n in zero} == dict.fromkeys(zero, 0.0)
    assert {n: m[n] for n in one} == dict.fromkeys(one, 1.0)


@quick
@given(seeds)
def test_masked_equals_sliced_whatever_lies_outside(seed):
    old, rollout, mask = batch(seed, B=1)
    inside = mask[0]
    garbage = torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(mask.numel()) % 3][None]
    sliced = mismatch.compare(old[:, inside], rollout[:, inside], mask[:, inside])
    close(mismatch.compare(old.where(mask, garbage), rollout.where(mask, -garbage), mask), sliced)


@quick
@given(seeds)
def test_order_and_padding_do_not_matter(seed):
    old, rollout, mask = batch(seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    pad = [torch.nn.functional.pad(x[order], (2, 3)) for x in (old, rollout, mask)]
    group = torch.arange(5) // 2
    close(mismatch.compare(*pad, group_B=group[order]), mismatch.compare(old, rollout, mask, group_B=group))


@quick
@given(seeds)
def test_token_metrics_do_not_see_packing(seed):
    """Packed into one row, the same tokens give the same token metrics; sequence metrics see other sequences."""
    old, rollout, mask = batch(seed)
    whole = mismatch.compare(old, rollout, mask, positions=False)
    packed = mismatch.compare(*(x.reshape(1, -1) for x in (old, rollout, mask)), positions=False)
    sequence = {n for n in whole if "seq" in n or "ppl" in n}
    close({n: v for n, v in whole.items() if n not in sequence}, {n: packed[n] for n in whole if n not in sequence})


@quick
@given(seeds)
def test_merging_shards_equals_the_whole(seed):
    old, rollout, mask = batch(seed)
    lag, group = torch.tensor([0, 1, 0, 2, 1]), torch.tensor([3, 3, 4, 4, 4])
    parts = [
        mismatch.collect(old[s], rollout[s], mask[s], lag_B=lag[s], group_B=group[s])
        for s in (slice(0, 2), slice(2, 2), slice(2, 5))
    ]
    merged = mismatch.summarize(mismatch.merge(mismatch.merge(parts[0], parts[1]), parts[2]))
    close(merged, mismatch.compare(old, rollout, mask, lag_B=lag, group_B=group))


def reference(old, rollout, mask):
    """Independent float64 formulas, per sequence in a loop."""
    p = [np.asarray(o[m], np.float64) for o, m in zip(old, mask, strict=True) if m.any()]
    q = [np.asarray(r[m], np.float64) for r, m in zip(rollout, mask, strict=True) if m.any()]
    P, Q = np.concatenate(p), np.concatenate(q)
    r = P - Q
    seq = [a - b for a, b in zip(p, q, strict=True)]
    mix = np.log((np.exp(P) + np.exp(Q)) / 2)
    product = np.exp([x.sum() for x in seq])
    geometric = np.exp([x.mean() for x in seq])
    trimmed = np.sort(np.abs(r))[int(0.01 * len(r)) : len(r) - int(0.01 * len(r))]
    return {
        "k1": -r.mean(), "k2": (r**2).mean() / 2, "k3": (np.exp(r) - 1 - r).mean(),
        "k3_swapped": (np.exp(-r) - 1 + r).mean(), "reverse_kl": (np.exp(r) * r - np.exp(r) + 1).mean(),
        "js_k3": (np.exp(P - mix) - (P - mix) - 1).mean() / 2 + (np.exp(Q - mix) - (Q - mix) - 1).mean() / 2,
        "abs_mean": np.abs(r).mean(), "abs_std": np.abs(r).std(), "abs_max": np.abs(r).max(),
        "abs_trimmed": trimmed.mean(),
        "p50": np.quantile(np.abs(r), 0.5), "p99": np.quantile(np.abs(r), 0.99), "p999": np.quantile(np.abs(r), 0.999),
        "k3_median": np.median(np.exp(r) - 1 - r), "k1_median": -np.median(r), "over_0.1": (np.abs(r) > 0.1).mean(),
        "prob_abs_mean": np.abs(np.exp(P) - np.exp(Q)).mean(), "prob_abs_std": np.abs(np.exp(P) - np.exp(Q)).std(),
        "pearson_prob": np.corrcoef(np.exp(P), np.exp(Q))[0, 1], "mult_error": np.exp(np.abs(r)).mean(),
        "ratio_mean": np.exp(r).mean(), "ratio_std": np.exp(r).std(), "ratio_abs_dev": np.abs(np.exp(r) - 1).mean(),
        "ess": np.exp(r).mean() ** 2 / np.exp(2 * r).mean(), "chi2_token": np.exp(2 * r).mean() - 1,
        "chi2_token_centered": ((np.exp(r) - 1) ** 2).mean(),
        "chi2_seq_product": (product**2).mean() - 1, "chi2_seq_geometric": (geometric**2).mean() - 1,
        "ess_seq_product": product.mean() ** 2 / (product**2).mean(), "ratio_seq_geometric_std": geometric.std(),
        "ppl_old": np.mean([np.exp(-x.mean()) for x in p]), "log_ppl_diff": -np.mean([x.mean() for x in seq]),
        "ppl_ratio": np.mean([np.exp(-x.mean()) for x in seq]), "nll_old_weighted": -(np.exp(r) * P).mean(),
        "seq_mult_error_max": max(np.exp(np.abs(x)).mean() for x in seq),
        "ratio_seq_product_max_dev": np.abs(product - 1).max(), "k3_per_nll": (np.exp(r) - 1 - r).mean() / -Q.mean(),
    }  # fmt: skip


@quick
@given(seeds)
def test_formulas_equal_an_independent_float64_reference(seed):
    old, rollout, mask = batch(seed, B=6, L=40)
    m = mismatch.compare(old, rollout, mask)
    for name, value in reference(old.numpy(), rollout.numpy(), mask.numpy()).items():
        assert m[name] == pytest.approx(value, rel=2e-6, abs=1e-9), name


@pytest.mark.parametrize("name, exact", [("k1", "forward"), ("k3", "forward"), ("reverse_kl", "reverse")])
def test_estimators_converge_to_the_enumerated_kl(name, exact):
    """Unbiased within 4 standard errors, and far from the other direction: KL(rollout || old) unless reverse."""
    g = torch.Generator().manual_seed(0)
    q, p = (torch.softmax(2.5 * torch.randn(12, generator=g, dtype=torch.float64), 0) for _ in range(2))
    kl = {"forward": float((q * (q / p).log()).sum()), "reverse": float((p * (p / q).log()).sum())}
    n = 400_000
    x = torch.multinomial(q, n, replacement=True, generator=g)[None]
    m = mismatch.compare(p.log()[x], q.log()[x], torch.ones_like(x, dtype=torch.bool), positions=False)
    d = p.log() - q.log()
    per_token = {"k1": -d, "k3": d.expm1() - d, "reverse_kl": d.exp() * d - d.expm1()}[name]
    error = float((q * (per_token - kl[exact]) ** 2).sum()) ** 0.5 / n**0.5
    assert abs(m[name] - kl[exact]) < 4 * error
    other = kl["reverse" if exact == "forward" else "forward"]
    assert abs(m[name] - other) > 10 * error


def test_nonfinite_tokens_are_counted_and_left_out():
    old = torch.tensor([[0.0, -1.0, -1.0, -2.0, -1.0]])
    rollout = torch.tensor([[0.0, -1.5, math.nan, -math.inf, -1.0]])
    mask = torch.tensor([[False, True, True, True, True]])
    m = mismatch.compare(old, rollout, mask)
    assert (m["tokens"], m["nonfinite"], m["nonfinite_rollout"], m["nonfinite_old"]) == (2, 2, 2, 0)
    assert m["k1"] == pytest.approx(-0.25) and m["abs_max"] == 0.5
    swapped = mismatch.compare(rollout, old, mask)
    assert (swapped["nonfinite_rollout"], swapped["nonfinite_old"]) == (0, 2)


def test_no_finite_token_is_nan_and_never_a_silent_zero():
    old = torch.full((2, 3), math.nan)
    m = mismatch.compare(old, old, torch.ones(2, 3, dtype=torch.bool))
    assert m["tokens"] == 0 and m["nonfinite"] == 6
    assert all(math.isnan(m[n]) for n in ("k1", "k3", "abs_max", "p99", "ess", "pearson_prob", "ratio_max", "ppl_old"))
    assert not m["k3"] <= 1e9


@pytest.mark.parametrize("d", [80.0, -80.0, 290.0, -290.0])
def test_huge_ratios_stay_exact(d):
    old, rollout = torch.tensor([[-1.0, d - 1.0, -1.0]]), torch.tensor([[-1.0, -1.0, -1.0]])
    mask = torch.tensor([[False, True, True]])
    m = mismatch.compare(old, rollout, mask)
    assert m["k3"] == pytest.approx((math.expm1(d) - d) / 2) and m["clamped_tokens"] == 0
    assert m["chi2_token"] == pytest.approx((math.exp(2 * d) + 1) / 2 - 1)
    assert m["ratio_seq_product_max"] == pytest.approx(math.exp(d))
    assert all(math.isfinite(v) for n, v in m.items() if n != "pearson_prob")  # one side is constant


def test_beyond_the_limit_is_clamped_and_counted_while_k1_is_not():
    old, rollout = torch.full((1, 3), -1e4), torch.zeros(1, 3)
    m = mismatch.compare(rollout, old, torch.ones(1, 3, dtype=torch.bool))
    assert m["clamped_tokens"] == 3 and m["clamped_sequences"] == 1
    assert m["k1"] == pytest.approx(-1e4) and m["p50"] == pytest.approx(1e4)
    assert m["ratio_max"] == pytest.approx(math.exp(mismatch.EXP_LIMIT))
    assert all(math.isfinite(v) for n, v in m.items() if n != "pearson_prob")


def test_a_product_over_a_long_sequence_clamps_only_the_sequence():
    old, rollout = torch.full((1, 4000), -0.9), torch.full((1, 4000), -1.0)
    m = mismatch.compare(old, rollout, torch.ones(1, 4000, dtype=torch.bool))
    assert (m["clamped_tokens"], m["clamped_sequences"]) == (0, 1)
    assert m["seq_log_ratio_max"] == pytest.approx(400, rel=1e-5)
    assert m["ratio_seq_geometric_mean"] == pytest.approx(math.exp(0.1), rel=1e-5)


def test_one_outlier_moves_the_mean_and_not_its_companions():
    old, rollout = torch.zeros(1, 1001), torch.zeros(1, 1001)
    old[0, 7] = 10.0
    m = mismatch.compare(old, rollout, torch.ones(1, 1001, dtype=torch.bool))
    assert m["k3"] > 20 and m["mult_error"] > 20
    assert m["k3_median"] == m["k3_trimmed"] == 0.0 and m["mult_error_median"] == m["mult_error_trimmed"] == 1.0


def test_a_tenth_of_broken_tokens_shows_in_the_trimmed_mean_too():
    old, rollout = torch.zeros(1, 1000), torch.zeros(1, 1000)
    old[0, :100] = -5.0
    m = mismatch.compare(old, rollout, torch.ones(1, 1000, dtype=torch.bool))
    assert m["k3_median"] == 0.0 and m["k3_trimmed"] > 0.3 and m["over_1"] == 0.1


def test_lag_zero_is_separate_from_staleness():
    old, rollout, mask = batch(3)
    lag = torch.tensor([0, 1, 0, 1, 1])
    m = mismatch.compare(old, rollout, mask, lag_B=lag, positions=False)
    for v in (0, 1):
        alone = mismatch.compare(*(x[lag == v] for x in (old, rollout, mask)), positions=False)
        close({n.removeprefix(f"lag{v}/"): x for n, x in m.items() if n.startswith(f"lag{v}/")}, alone)


def test_lag_may_change_inside_a_sequence():
    old, rollout, mask = batch(4)
    lag = torch.zeros(5, 9, dtype=torch.long)
    lag[:, 5:] = 2
    m = mismatch.compare(old, rollout, mask, lag_B=lag)
    assert m["lag0/k3"] == pytest.approx(mismatch.compare(old, rollout, mask & (lag == 0))["k3"])
    assert m["lag0/tokens"] + m["lag2/tokens"] == m["tokens"]


def test_positions_are_deciles_of_the_response():
    old, rollout = torch.zeros(1, 25), torch.zeros(1, 25)
    mask = torch.zeros(1, 25, dtype=torch.bool)
    mask[0, 5:] = True
    old[0, 23:] = 1.0
    m = mismatch.compare(old, rollout, mask)
    assert [m[f"position{d}/tokens"] for d in range(10)] == [2.0] * 10
    assert [m[f"position{d}/abs_mean"] for d in range(10)] == [0.0] * 9 + [1.0]
    assert m["position9/k1"] == -1.0


def test_groups_name_the_worst():
    old, rollout, mask = batch(5)
    group = torch.tensor([7, 7, 9, 9, 9])
    m = mismatch.compare(old, rollout, mask, group_B=group)
    rows = by_label(old, rollout, mask, group[:, None])
    worst = max(rows, key=lambda g: rows[g]["k3"])
    assert m["group/k3_worst"] == worst
    assert m["group/k3_max"] == pytest.approx(rows[worst]["k3"]) and m["group/count"] == 2


def test_excess_is_lag_zero_minus_the_floor():
    old, rollout, mask = batch(6)
    m = mismatch.compare(old, rollout, mask, lag_B=torch.tensor([0, 0, 1, 1, 1]))
    e = mismatch.excess(m, {"k3": 0.01, "p99": 0.5})
    assert e == {"excess/k3": m["lag0/k3"] - 0.01, "excess/p99": m["lag0/p99"] - 0.5}
    with pytest.raises(ValueError, match="Pass lag_B"):
        mismatch.excess(mismatch.compare(old, rollout, mask), {"k3": 0.01})
    with pytest.raises(ValueError, match="noise-floor"):
        mismatch.excess(m, {})


def test_bad_input_is_named():
    old, rollout, mask = batch(7)
    with pytest.raises(ValueError, match=r"\(5, 9\).*\(5, 8\)"):
        mismatch.compare(old, rollout[:, 1:], mask)
    with pytest.raises(ValueError, match="bool"):
        mismatch.compare(old, rollout, mask.float())
