"""Calibrators equal the solvers of scikit-learn and betacal, recover the truth, and report what they did."""

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit
from sklearn.metrics import roc_auc_score

from rlalign.calibration.calibrators import BetaCalibrator, IsotonicCalibrator, PlattCalibrator, TemperatureCalibrator
from rlalign.calibration.metrics import expected_calibration_error, negative_log_likelihood

FITTED = [PlattCalibrator, TemperatureCalibrator, IsotonicCalibrator, BetaCalibrator]
GRID = np.linspace(-12, 12, 401)
pytestmark = pytest.mark.filterwarnings("ignore::rlalign.calibration.calibrators.CalibrationWarning")


def scored(n=500, seed=0, scale=0.6, bias=1.0):
    random = np.random.default_rng(seed)
    x = random.normal(2, 3, n)
    y = (random.random(n) < expit(scale * (x - bias))).astype(float)
    return x, y, random.integers(1, 4, n).astype(float)


@pytest.mark.parametrize("weighted", [False, True])
def test_platt_is_scikit_learns(weighted):
    from sklearn.calibration import _SigmoidCalibration

    x, y, w = scored()
    w = w if weighted else None
    ours, theirs = PlattCalibrator().fit(x, y, sample_weight=w), _SigmoidCalibration().fit(x, y, w)
    np.testing.assert_allclose([ours.scale_, ours.bias_], [-theirs.a_, -theirs.b_ / theirs.a_], rtol=1e-7)
    np.testing.assert_allclose(ours.transform(GRID), theirs.predict(GRID), atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
def test_unsmoothed_platt_is_logistic_regression(weighted):
    from sklearn.linear_model import LogisticRegression

    x, y, w = scored()
    w = w if weighted else None
    ours = PlattCalibrator(smooth_targets=False).fit(x, y, sample_weight=w)
    theirs = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky").fit(x[:, None], y, w)
    np.testing.assert_allclose([ours.scale_, ours.intercept_], [theirs.coef_[0, 0], theirs.intercept_[0]], rtol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_temperature_is_scikit_learns(weighted):
    from sklearn.calibration import _TemperatureScaling

    x, y, w = scored()
    w = w if weighted else None
    theirs = _TemperatureScaling().fit(x, y, w)
    ours = TemperatureCalibrator().fit(x, y, sample_weight=w)
    assert ours.temperature_ == pytest.approx(1 / (2 * theirs.beta_), rel=1e-7)  # theirs takes (-x, x), ours (0, x)

    random = np.random.default_rng(1)
    x_NK = random.normal(0, 3, (400, 5))
    y_N = (x_NK / 2.5 + random.gumbel(size=x_NK.shape)).argmax(1)
    w = None if w is None else w[:400]
    theirs, ours = _TemperatureScaling().fit(x_NK, y_N, w), TemperatureCalibrator().fit(x_NK, y_N, sample_weight=w)
    assert ours.temperature_ == pytest.approx(1 / theirs.beta_, rel=1e-7)
    np.testing.assert_allclose(ours.transform(x_NK), theirs.predict(x_NK), atol=1e-8)
    assert (ours.transform(x_NK).argmax(1) == x_NK.argmax(1)).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_isotonic_is_scikit_learns(weighted, ties):
    from sklearn.isotonic import IsotonicRegression

    x, y, w = scored()
    x, w = np.round(x) if ties else x, w if weighted else None
    theirs = IsotonicRegression(out_of_bounds="clip").fit(x, y, w)
    np.testing.assert_allclose(
        IsotonicCalibrator().fit(x, y, sample_weight=w).transform(GRID), theirs.predict(GRID), atol=1e-12
    )


def test_beta_is_the_constrained_optimum():
    """Where no bound is active it is the logistic regression on the two features."""
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(3)
    x = random.normal(1, 2, 500)
    y = random.random(500) < expit(0.9 * log_expit(x) - 0.4 * log_expit(-x) - 0.5)
    features = np.column_stack([log_expit(x), -log_expit(-x)])
    theirs = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky").fit(features, y)
    ours = BetaCalibrator().fit(x, y)
    np.testing.assert_allclose([ours.a_, ours.b_, ours.c_], [*theirs.coef_[0], theirs.intercept_[0]], rtol=1e-8)


def test_beta_is_betacals():
    """Values of betacal 1.1.0 (BetaCalibration("abm")), whose solver stops at about 1e-3, on these rows."""
    random = np.random.default_rng(7)
    random.random(1400)
    x = random.normal(1, 2, 500)
    y = random.random(500) < expit(0.6 * (x - 1))
    ours = BetaCalibrator().fit(x, y)
    theirs = [0.0180618, 0.18946535, 0.32817562, 0.48160952, 0.82110355]
    np.testing.assert_allclose([ours.a_, ours.b_, ours.c_], [0.88598198, 0.49391079, -0.44468505], atol=2e-3)
    np.testing.assert_allclose(ours.transform([-4, -1, 0, 1, 4]), theirs, atol=5e-4)


def test_beta_keeps_a_side_flat_rather_than_falling():
    random = np.random.default_rng(0)
    x = random.normal(0, 3, 2000)
    y = random.random(2000) < expit(np.where(x > 0, x, -0.3 * x) - 0.5)  # success rises again on the far left
    ours = BetaCalibrator().fit(x, y)
    right_only = PlattCalibrator(smooth_targets=False).fit(-log_expit(-x), y)
    assert ours.a_ == 0.0
    np.testing.assert_allclose([ours.b_, ours.c_], [right_only.scale_, right_only.intercept_], rtol=1e-6)
    assert (np.diff(ours.transform(GRID)) >= 0).all()


def test_beta_stays_platt_where_one_side_is_unseen():
    x, y, _ = scored(bias=60)
    x = x + 60
    y = (np.random.default_rng(2).random(len(x)) < expit(0.5 * (x - 62))).astype(float)
    platt = PlattCalibrator(smooth_targets=False).fit(x, y)
    beta = BetaCalibrator().fit(x, y)
    np.testing.assert_allclose([beta.a_, beta.b_], platt.scale_, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "truth"),
    [(PlattCalibrator, {"scale_": 0.6, "bias_": 1.0}), (TemperatureCalibrator, {"temperature_": 1 / 0.6})],
)
def test_the_truth_is_recovered_and_covered(kind, truth):
    """On 20 draws the 95 % interval misses the truth at most 4 times (chance of more: 0.3 %)."""
    missed = 0
    for seed in range(20):
        x, y, _ = scored(1000, seed, bias=truth.get("bias_", 0.0))
        fitted = kind().fit(x, y)
        for name, value in truth.items():
            low, high = fitted.diagnostics_.intervals[name.rstrip("_")]
            missed += not low <= value <= high
            assert vars(fitted)[name] == pytest.approx(value, abs=0.4)
    assert missed <= 4 * len(truth)


@pytest.mark.parametrize("weighted", [False, True])
def test_intervals_are_the_sandwich(weighted):
    """HC0 in raw units, written out: H^-1 S H^-1, and the delta method for -intercept / scale."""
    x, y, w = scored()
    w = w if weighted else np.ones(len(x))
    fitted = PlattCalibrator(smooth_targets=False).fit(x, y, sample_weight=w)
    z = np.column_stack([x, np.ones(len(x))])
    p = fitted.transform(x)
    bread = np.linalg.inv((z * (w * p * (1 - p))[:, None]).T @ z)
    score = z * (w * (p - y))[:, None]
    covariance = bread @ score.T @ score @ bread
    gradient = np.array([fitted.intercept_ / fitted.scale_**2, -1 / fitted.scale_])
    half = {"scale": np.sqrt(covariance[0, 0]), "bias": np.sqrt(gradient @ covariance @ gradient)}
    for name, centre in (("scale", fitted.scale_), ("bias", fitted.bias_)):
        want = (centre - 1.959964 * half[name], centre + 1.959964 * half[name])
        np.testing.assert_allclose(fitted.diagnostics_.intervals[name], want, rtol=1e-5)


def test_pairs_are_bradley_terry():
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    chosen, rejected = random.normal(1, 2, 400), random.normal(0, 2, 400)
    margin = chosen - rejected
    both = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, solver="newton-cholesky").fit(
        np.r_[margin, -margin][:, None], np.r_[np.ones(400), np.zeros(400)]
    )
    platt, temperature = PlattCalibrator(), TemperatureCalibrator()
    assert platt.fit_pairs(chosen, rejected) is platt
    temperature.fit_pairs(torch.tensor(chosen), torch.tensor(rejected))
    assert platt.scale_ == pytest.approx(both.coef_[0, 0], rel=1e-7)
    assert temperature.temperature_ == pytest.approx(1 / platt.scale_, rel=1e-9)
    assert platt.bias_ == 0.0 and temperature.bias_ == 0.0
    assert PlattCalibrator().fit_pairs(chosen + 100, rejected + 100).scale_ == pytest.approx(platt.scale_, rel=1e-9)
    assert platt.diagnostics_.pairs
    p = platt.transform(margin)
    top_label = expected_calibration_error(np.maximum(p, 1 - p), margin > 0)
    assert platt.diagnostics_.ece_after == pytest.approx(top_label, rel=1e-12)
    assert platt.diagnostics_.support.max == max(chosen.max(), rejected.max())
    assert platt.diagnostics_.nll_after == pytest.approx(-log_expit(platt.scale_ * margin).mean(), rel=1e-12)


@pytest.mark.parametrize("kind", FITTED)
def test_the_fit_lowers_the_loss_and_its_report_says_so(kind):
    x, y, _ = scored()
    fitted = kind().fit(x, y)
    report = fitted.diagnostics_
    assert report.nll_after < report.nll_before and report.brier_after < report.brier_before
    assert report.nll_before == pytest.approx(negative_log_likelihood(expit(x), y), rel=1e-12)
    assert report.nll_after == pytest.approx(negative_log_likelihood(fitted.transform(x), y), rel=1e-12)
    low, high = report.intervals["brier_after"]
    assert low < report.brier_after < high
    assert report.support.deciles[5] == pytest.approx(np.median(x)) and report.support.below[5] == 0.5
    assert report.auroc == pytest.approx(roc_auc_score(y, x), rel=1e-12)
    assert (report.n, report.n_positive, report.effective_n) == (500, y.sum(), 500)
    assert fitted.out_of_support([x.min() - 1, x.max() + 1, np.median(x)]) == 2
