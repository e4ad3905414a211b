"""Calibrators equal scikit-learn's solvers, and obey the laws of what they are."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_expit, softmax

from rlalign.reward.calibration import (
    BetaCalibrator,
    CalibrationWarning,
    IdentityCalibrator,
    IsotonicCalibrator,
    PlattCalibrator,
    TemperatureCalibrator,
)
from rlalign.reward.metrics import expected_calibration_error, negative_log_likelihood

FITTED = [PlattCalibrator, TemperatureCalibrator, IsotonicCalibrator, BetaCalibrator]
STRICT = [PlattCalibrator, TemperatureCalibrator, BetaCalibrator]
EVERY = [*FITTED, IdentityCalibrator]
GRID = np.linspace(-12, 12, 401)
quiet = pytest.mark.filterwarnings("ignore::rlalign.reward.calibration.CalibrationWarning")
pytestmark = quiet


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
    assert report.support.deciles[5] == pytest.approx(np.median(x))
    assert (report.n, report.n_positive, report.effective_n) == (500, y.sum(), 500)
    assert fitted.out_of_support([x.min() - 1, x.max() + 1, np.median(x)]) == 2


data = st.integers(0, 10_000).map(lambda seed: scored(80, seed))


@pytest.mark.parametrize("kind", FITTED)
@settings(max_examples=20, deadline=None)
@given(data=data, order=st.randoms(use_true_random=False))
def test_law_permutation(kind, data, order):
    x, y, w = data
    shuffled = np.array(order.sample(range(len(x)), len(x)))
    one = kind().fit(x, y, sample_weight=w)
    two = kind().fit(x[shuffled], y[shuffled], sample_weight=w[shuffled])
    np.testing.assert_allclose(one.transform(GRID), two.transform(GRID), atol=1e-9)


@pytest.mark.parametrize("kind", FITTED)
@settings(max_examples=20, deadline=None)
@given(data=data)
def test_law_a_weight_is_a_duplicate_and_zero_is_absence(kind, data):
    x, y, w = data
    w = w - 1  # 0, 1 or 2
    repeated = np.repeat(np.arange(len(x)), w.astype(int))
    weighted = kind().fit(x, y, sample_weight=w).transform(GRID)
    np.testing.assert_allclose(weighted, kind().fit(x[repeated], y[repeated]).transform(GRID), atol=1e-9)


@pytest.mark.parametrize("kind", FITTED)
@settings(max_examples=20, deadline=None)
@given(data=data, points=st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=30))
def test_law_monotone_and_finite_at_any_logit(kind, data, points):
    x, y, _ = data
    p = kind().fit(x, y).transform(np.sort([*points, -1e4, -30.0, 30.0, 1e4]))
    assert np.isfinite(p).all() and (p >= 0).all() and (p <= 1).all()
    assert (np.diff(p) >= -1e-15).all()


@pytest.mark.parametrize("kind", STRICT)
def test_law_strictly_monotone_so_no_ties(kind):
    x, y, _ = scored()
    fitted = kind().fit(x, y)
    assert (np.diff(fitted.transform(np.sort(x))) > 0).all()
    assert fitted.diagnostics_.tied_fraction == 0.0


def test_isotonic_says_how_many_rows_it_ties():
    x, y, _ = scored()
    with pytest.warns(CalibrationWarning, match="share their calibrated score"):
        fitted = IsotonicCalibrator().fit(x, y)
    levels = fitted.transform(x)
    tied = sum((levels == level).sum() for level in np.unique(levels) if (levels == level).sum() > 1)
    assert fitted.diagnostics_.tied_fraction == tied / len(x) > 0.9


@pytest.mark.parametrize("kind", [PlattCalibrator, IsotonicCalibrator])
@settings(max_examples=20, deadline=None)
@given(data=data, scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_law_units_of_the_reward_do_not_matter(kind, data, scale, shift):
    x, y, _ = data
    one, two = kind().fit(x, y), kind().fit(scale * x + shift, y)
    np.testing.assert_allclose(one.transform(x), two.transform(scale * x + shift), atol=1e-7)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("cast", [list, np.float32, torch.float32, torch.float64, torch.bfloat16, "column"])
def test_law_the_container_does_not_matter(kind, cast):
    x, y, _ = scored(200)
    x = torch.tensor(x).bfloat16().double().numpy()  # so that every dtype holds the same numbers
    want = kind().fit(x, y).transform(x)
    if cast is list:
        given_x, given_y = x.tolist(), [bool(v) for v in y]
    elif cast == "column":
        given_x, given_y = x[:, None], y[:, None]
    elif cast is np.float32:
        given_x, given_y = x.astype(cast), y.astype(np.int8)
    else:
        given_x, given_y = torch.tensor(x, dtype=cast, requires_grad=True), torch.tensor(y, dtype=torch.bool)
    got = kind().fit(given_x, given_y).transform(given_x)
    assert got.dtype == np.float64 and got.shape == (200,)
    np.testing.assert_array_equal(got, want)


def test_soft_labels_are_the_limit_of_many_hard_ones():
    x, _, _ = scored(60)
    soft = np.round(expit(0.5 * x), 1)
    twice = np.r_[x, x], np.r_[np.ones(60), np.zeros(60)], np.r_[soft, 1 - soft]
    for kind in FITTED:
        hard = kind().fit(twice[0], twice[1], sample_weight=twice[2])
        np.testing.assert_allclose(
            kind().fit(x, soft, soft_labels=True).transform(GRID), hard.transform(GRID), atol=1e-8
        )


def test_identity_changes_nothing():
    x = np.array([-3.0, 0.25, 1e4])
    identity = IdentityCalibrator()
    np.testing.assert_array_equal(identity.transform(x), x)
    np.testing.assert_array_equal(identity.transform(np.stack([x, x])), np.stack([x, x]))
    assert identity.calibration_id == "identity"
    np.testing.assert_array_equal(identity.probabilities(x), expit(x))
    np.testing.assert_array_equal(identity.probabilities([[1.0, 2.0]]), softmax([[1.0, 2.0]], axis=1))


def test_equal_functions_have_equal_ids():
    x, y, _ = scored()
    one, same, other = PlattCalibrator().fit(x, y), PlattCalibrator().fit(x, y), PlattCalibrator().fit(x[:-1], y[:-1])
    assert one.calibration_id == same.calibration_id != other.calibration_id


def test_an_affine_calibration_is_a_no_op_under_group_normalised_advantages():
    """What the documentation states; the sigmoid is what makes Platt more than that."""
    x, y, _ = scored(64)
    fitted = PlattCalibrator().fit(x, y)

    def advantages(reward):
        group = reward.reshape(8, 8)
        return (group - group.mean(1, keepdims=True)) / group.std(1, keepdims=True)

    np.testing.assert_allclose(advantages(fitted.scale_ * (x - fitted.bias_)), advantages(x), atol=1e-12)
    assert np.abs(advantages(fitted.transform(x)) - advantages(x)).max() > 0.1


def test_a_failed_fit_leaves_the_calibrator_as_it_was():
    x, y, _ = scored()
    fitted = PlattCalibrator().fit(x, y)
    before = fitted.calibration_id, fitted.diagnostics_
    with pytest.raises(ValueError):
        fitted.fit(x, 1 - y)
    assert (fitted.calibration_id, fitted.diagnostics_) == before


def test_a_large_good_fit_is_silent():
    x, y, _ = scored()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in STRICT:
            kind().fit(x, y)
