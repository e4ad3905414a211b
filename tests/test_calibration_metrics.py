"""Metrics against scikit-learn, published values of other packages, and what they must be by definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.calibration.metrics import (
    auroc,
    brier_decomposition,
    brier_score,
    classwise_ece,
    expected_calibration_error,
    negative_log_likelihood,
    smooth_ece,
)
from rlalign.calibration.metrics.reliability import reliability_diagram

METRICS = [expected_calibration_error, brier_score, negative_log_likelihood, smooth_ece, auroc, reliability_diagram]


def scored(n=700, seed=7):
    random = np.random.default_rng(seed)
    p = random.random(n)
    return p, (random.random(n) < p**2).astype(int)


@pytest.mark.parametrize(("closed", "want"), [("right", 0.45), ("left", 0.05)])
def test_edges_belong_to_one_side(closed, want):
    p, y = [0.5, 0.5, 0.1, 0.9], [1, 1, 0, 0]
    assert expected_calibration_error(p, y, n_bins=2, closed=closed) == pytest.approx(want)


@pytest.mark.parametrize(
    ("norm", "want"), [("l1", 0.17030510303513147), ("l2", 0.1877097350169666), ("max", 0.27615994301346153)]
)
def test_ece_is_torchmetrics_and_netcals(norm, want):
    """Values of torchmetrics 1.9.0 binary_calibration_error(n_bins=15) on these rows (left-closed bins); netcal 1.4.0's
    ECE(15) and MCE(15) are the same to the last digit."""
    assert expected_calibration_error(*scored(), norm=norm, closed="left") == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "n_bins", "norm", "debias", "want"),
    [
        ("uniform", 15, "l1", False, 0.17030510303513147),
        ("uniform", 15, "l2", False, 0.1877097350169666),
        ("uniform", 15, "l2", True, 0.1798349060656516),
        ("quantile", 14, "l1", False, 0.16913071093022486),
        ("quantile", 14, "l2", False, 0.18449342302129357),
        ("quantile", 14, "l2", True, 0.17673730185497613),
    ],
)
def test_ece_is_uncertainty_calibrations(strategy, n_bins, norm, debias, want):
    """Values of uncertainty-calibration 0.1.4 lower_bound_scaling_ce on these rows (right-closed bins)."""
    ours = expected_calibration_error(*scored(), n_bins=n_bins, strategy=strategy, norm=norm, debias=debias)
    assert ours == pytest.approx(want, rel=1e-9)


def test_debiased_l1_is_the_limit_of_its_resampling():
    """Kumar et al. estimate the expected |gap| under normal noise by sampling; ours is the closed form."""
    p, y = scored(200)
    random = np.random.default_rng(0)
    bin_N = np.minimum(np.ceil(p * 10).astype(int), 10) - 1
    rows = [np.flatnonzero(bin_N == b) for b in np.unique(bin_N)]
    share = np.array([len(r) for r in rows]) / 200
    gap = np.array([y[r].mean() - p[r].mean() for r in rows])
    sd = np.array([np.sqrt(y[r].mean() * (1 - y[r].mean()) / len(r)) for r in rows])
    resampled = (np.abs(random.normal(gap, sd, (200_000, len(rows)))) @ share).mean()
    ours = expected_calibration_error(p, y, n_bins=10, debias=True)
    assert ours == pytest.approx(2 * np.abs(gap) @ share - resampled, abs=2e-4)


@pytest.mark.parametrize(("norm", "left"), [("l1", 0.7), ("l2", 0.5)])
def test_debiasing_takes_off_what_chance_adds(norm, left):
    """On calibrated scores plain ECE grows as rows get fewer; debiasing removes a third (l1) or more than half (l2)."""
    random = np.random.default_rng(0)
    plain, debiased = [], []
    for _ in range(200):
        p = random.random(150)
        y = random.random(150) < p
        plain.append(expected_calibration_error(p, y, norm=norm))
        debiased.append(expected_calibration_error(p, y, norm=norm, debias=True))
    assert np.mean(debiased) < left * np.mean(plain)


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_bins_are_scikit_learns(strategy):
    from sklearn.calibration import calibration_curve

    p, y = scored()
    diagram = reliability_diagram(p, y, n_bins=14, strategy=strategy)
    outcome, confidence = calibration_curve(y, p, n_bins=14, strategy=strategy)
    np.testing.assert_allclose([each.outcome for each in diagram], outcome)
    np.testing.assert_allclose([each.confidence for each in diagram], confidence)


@pytest.mark.parametrize("weighted", [False, True])
def test_scores_are_scikit_learns(weighted):
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

    p, y = scored()
    p = np.round(p, 2).clip(0.01, 0.99)  # with ties
    w = np.random.default_rng(1).random(700) if weighted else None
    assert brier_score(p, y, sample_weight=w) == pytest.approx(brier_score_loss(y, p, sample_weight=w), rel=1e-12)
    assert negative_log_likelihood(p, y, sample_weight=w) == pytest.approx(log_loss(y, p, sample_weight=w), rel=1e-12)
    assert auroc(p, y, sample_weight=w) == pytest.approx(roc_auc_score(y, p, sample_weight=w), rel=1e-12)
    p_NK = np.random.default_rng(2).dirichlet([1, 1, 1], size=700)
    y_N = np.random.default_rng(3).integers(0, 3, 700)
    theirs = brier_score_loss(y_N, p_NK, sample_weight=w, scale_by_half=False)
    assert brier_score(p_NK, y_N, sample_weight=w) == pytest.approx(theirs, rel=1e-12)
    assert negative_log_likelihood(p_NK, y_N, sample_weight=w) == pytest.approx(log_loss(y_N, p_NK, sample_weight=w))
    each = [expected_calibration_error(p_NK[:, k], y_N == k, sample_weight=w) for k in range(3)]
    assert classwise_ece(p_NK, y_N, sample_weight=w) == pytest.approx(np.mean(each))


def test_smooth_ece_is_relplots():
    """Values of relplot 1.0.3 smECE and smECE_sigma on these rows; its bandwidth search stops at 1e-3, ours at 1e-10."""
    p, y = scored()
    assert smooth_ece(p, y) == pytest.approx(0.16886655309325518, abs=1e-3)
    for bandwidth, want in [(0.02, 0.1688926851473871), (0.05, 0.1685507350343812), (0.3, 0.16902538875999393)]:
        assert smooth_ece(p, y, bandwidth=bandwidth) == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("bandwidth", [0.01, 0.1, 0.7])
def test_smooth_ece_is_its_integral(bandwidth):
    """The definition by brute force: reflected Gaussians summed over images, integrated on a fine grid."""
    p, y = scored(60)
    t = (np.arange(20_000) + 0.5) / 20_000
    smoothed = np.zeros_like(t)
    for p_i, y_i in zip(p, y, strict=True):
        for image in range(-4, 5):
            for centre in (2 * image + p_i, 2 * image - p_i):
                smoothed += (y_i - p_i) * np.exp(-(((t - centre) / bandwidth) ** 2) / 2)
    want = np.abs(smoothed).mean() / (60 * bandwidth * np.sqrt(2 * np.pi))
    assert smooth_ece(p, y, bandwidth=bandwidth) == pytest.approx(want, rel=1e-4)


def test_smooth_ece_is_the_bandwidth_it_is_taken_at():
    p, y = scored()
    value = smooth_ece(p, y)
    assert smooth_ece(p, y, bandwidth=value) == pytest.approx(value, abs=1e-9)
    assert smooth_ece(y.astype(float), y) == 0.0
    assert smooth_ece(np.zeros(10), np.ones(10)) == pytest.approx(1.0)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 1 / 15, 0.2, 1 / 3, 0.5, 0.7, 1.0]) | st.floats(0, 1), st.booleans()),
        min_size=1,
        max_size=60,
    ),
    n_bins=st.integers(1, 20),
    strategy=st.sampled_from(["uniform", "quantile"]),
    closed=st.sampled_from(["left", "right"]),
)
def test_laws_of_binned_metrics(rows, n_bins, strategy, closed):
    p, y = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=float)
    options = {"n_bins": n_bins, "strategy": strategy, "closed": closed}
    l1, l2, worst = (expected_calibration_error(p, y, norm=norm, **options) for norm in ("l1", "l2", "max"))
    assert 0 <= l1 <= l2 + 1e-12 <= worst + 2e-12 <= 1 + 3e-12
    assert abs(y.mean() - p.mean()) <= l1 + 1e-12
    diagram = reliability_diagram(p, y, **options)
    assert sum(each.share for each in diagram) == pytest.approx(1)  # every row in exactly one bin
    parts = brier_decomposition(p, y, **options)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
    assert total == pytest.approx(brier_score(p, y), abs=1e-12)
    assert min(parts.reliability, parts.resolution, parts.uncertainty) >= 0
    order = np.random.default_rng(0).permutation(len(p))
    assert expected_calibration_error(p[order], y[order], **options) == pytest.approx(l1, abs=1e-12)
    for debias_norm in ("l1", "l2"):
        assert 0 <= expected_calibration_error(p, y, norm=debias_norm, debias=True, **options) <= 1
    if strategy == "quantile" and len(set(p)) < len(p):
        assert len(diagram) <= len(set(p))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), strategy=st.sampled_from(["uniform", "quantile"]))
def test_law_a_weight_is_a_duplicate_and_zero_is_absence(seed, strategy):
    p, y = scored(60, seed)
    w = np.random.default_rng(seed).integers(0, 4, 60)
    many = np.repeat(np.arange(60), w)
    for metric in (brier_score, negative_log_likelihood, smooth_ece, auroc):
        assert metric(p, y, sample_weight=w) == pytest.approx(metric(p[many], y[many]), abs=1e-9)
    ours = expected_calibration_error(p, y, sample_weight=w, strategy=strategy)
    assert ours == pytest.approx(expected_calibration_error(p[many], y[many], strategy=strategy), abs=1e-12)
    assert brier_decomposition(p, y, sample_weight=w) == brier_decomposition(p, y, sample_weight=2 * w)


def test_within_bin_vanishes_where_bins_are_levels():
    parts = brier_decomposition([0.1, 0.1, 0.5, 0.9, 0.9], [0, 1, 1, 1, 1])
    assert parts.within_bin == pytest.approx(0, abs=1e-15)


def test_nll_of_a_certain_mistake_is_infinite():
    assert negative_log_likelihood([0.0, 0.5], [1, 1]) == np.inf
    assert negative_log_likelihood([0.0, 1.0], [0, 1]) == 0.0
    assert negative_log_likelihood([[0.0, 1.0]], [0]) == np.inf


def test_single_rows_and_single_classes():
    assert expected_calibration_error([0.3], [1]) == pytest.approx(0.7)
    assert expected_calibration_error([1.0, 1.0], [1, 0]) == pytest.approx(0.5)  # p = 1 is in the last bin
    assert expected_calibration_error([0.0, 0.0], [1, 0], closed="left") == pytest.approx(0.5)
    assert brier_score([0.2, 0.4], [0, 0]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="only one class has weight"):
        auroc([0.1, 0.2], [1, 1])
    with pytest.raises(ValueError, match="only one class has weight"):
        auroc([0.1, 0.2], [1, 0], sample_weight=[1, 0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([], [], "empty"),
        ([0.1, 0.2], [1], "got shapes \\(2,\\) and \\(1,\\)"),
        ([0.1, np.nan], [0, 1], "p: 1 of 2 entries are not finite; the first is nan at index 1"),
        ([0.1, 0.2], [0, np.nan], "y: 1 of 2 .* nan at index 1"),
        ([0.1, 0.2], [0, 2], "y: expected 0 or 1, got 2.0 at index 1"),
    ],
)
def test_bad_rows(metric, p, y, message):
    with pytest.raises(ValueError, match=message):
        metric(p, y)


@pytest.mark.parametrize("metric", [m for m in METRICS if m is not auroc])
@pytest.mark.parametrize("p", [-0.01, 1.01, 3.0])
def test_out_of_range_is_never_passed_through_a_sigmoid(metric, p):
    with pytest.raises(ValueError, match=f"got {p} at index 1; are these logits"):
        metric([0.5, p], [0, 1])


@pytest.mark.parametrize("n_bins", [0, -1, True, 2.0, "3"])
def test_bad_bins(n_bins):
    with pytest.raises(ValueError, match="n_bins: expected a whole number of at least 1"):
        expected_calibration_error([0.1, 0.2], [0, 1], n_bins=n_bins)


def test_bad_options():
    p, y = [0.1, 0.9], [0, 1]
    for option in ("norm", "strategy", "closed"):
        with pytest.raises(ValueError, match=f"{option}: expected one of"):
            expected_calibration_error(p, y, **{option: "l3"})
    with pytest.raises(ValueError, match="debias is defined for"):
        expected_calibration_error(p, y, norm="max", debias=True)
    with pytest.raises(ValueError, match="rows must sum to 1, row 1 sums to 0.5"):
        classwise_ece([[0.5, 0.5], [0.25, 0.25]], [0, 1])
    with pytest.raises(ValueError, match="expected shape \\[N, K\\]"):
        classwise_ece(p, y)
    with pytest.raises(ValueError, match="sample_weight: expected nothing negative, got -1.0 at index 1"):
        brier_score(p, y, sample_weight=[1, -1])
    with pytest.raises(ValueError, match="pick a column"):
        expected_calibration_error([[0.5, 0.5]], [0])
    with pytest.raises(ValueError, match="bandwidth must be in"):
        smooth_ece(p, y, bandwidth=0.0)
