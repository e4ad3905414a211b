"""What chance does to metrics: noise floor, bootstrap ranges, and the ranges of the reliability diagram."""

import numpy as np
import pytest

from rlalign.calibration.metrics import (
    auroc,
    bootstrap_ci,
    brier_score,
    ece_noise_floor,
    expected_calibration_error,
    negative_log_likelihood,
)
from rlalign.calibration.metrics.reliability import reliability_diagram, write_reliability


def scored(n):
    random = np.random.default_rng(7)
    p = random.random(n)
    return p, (random.random(n) < p**2).astype(int)


def test_the_noise_floor_is_the_ece_of_calibrated_scores():
    random = np.random.default_rng(0)
    p = random.random(100)
    drawn = [expected_calibration_error(p, random.random(100) < p) for _ in range(2000)]
    floor = ece_noise_floor(p, n_draws=2000)
    assert floor.mean == pytest.approx(np.mean(drawn), rel=0.02)
    assert floor.p95 == pytest.approx(np.quantile(drawn, 0.95), rel=0.03)


@pytest.mark.slow
def test_bootstrap_covers_the_truth():
    """The mean outcome is 1/2; 100 draws of 80 rows: a 90 % interval holds it 90 times, give or take 9 (3 sigma)."""
    random = np.random.default_rng(0)
    held = {"percentile": 0, "basic": 0}
    for seed in range(100):
        y = (random.random(80) < 0.5).astype(float)
        for method in held:
            ci = bootstrap_ci(lambda p, y: float(y.mean()), y, y, level=0.9, n_resamples=200, seed=seed, method=method)
            held[method] += ci.low <= 0.5 <= ci.high
    assert all(81 <= count <= 99 for count in held.values())


def test_bootstrap_keeps_clusters_together():
    """Eight equal rows per prompt carry one row's information: the interval is sqrt(8) wider than without clusters."""
    random = np.random.default_rng(0)
    y = np.repeat((random.random(60) < 0.5).astype(float), 8)
    prompt = np.repeat(np.arange(60), 8)
    wide = bootstrap_ci(lambda p, y: float(y.mean()), y, y, cluster=prompt)
    narrow = bootstrap_ci(lambda p, y: float(y.mean()), y, y)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(np.sqrt(8), rel=0.15)
    assert wide == bootstrap_ci(lambda p, y: float(y.mean()), y, y, cluster=prompt)


def test_bootstrap_hides_nothing():
    with pytest.raises(ValueError, match="the metric is inf on resample"):
        bootstrap_ci(negative_log_likelihood, [0.0, 0.5], [1, 1])
    with pytest.raises(ValueError, match="only one class has weight"):
        bootstrap_ci(auroc, [0.2, 0.5], [0, 1])
    with pytest.raises(ValueError, match="level must be in"):
        bootstrap_ci(brier_score, [0.2, 0.5], [0, 1], level=95)
    with pytest.raises(ValueError, match="cluster: expected shape"):
        bootstrap_ci(brier_score, [0.2, 0.5], [0, 1], cluster=[1])


def test_wilson_ranges_are_scipys(tmp_path):
    from scipy.stats import binomtest

    p, y = scored(300)
    diagram = reliability_diagram(p, y, n_bins=5)
    for b in range(5):
        inside = (p > b / 5) & (p <= (b + 1) / 5)
        want = binomtest(int(y[inside].sum()), int(inside.sum())).proportion_ci(method="wilson")
        assert (diagram[b].low, diagram[b].high) == pytest.approx((want.low, want.high), abs=1e-9)
    write_reliability(tmp_path / "deep" / "r.svg", {"raw": diagram}, title="a title")
    assert "<svg" in (tmp_path / "deep" / "r.svg").read_text()
