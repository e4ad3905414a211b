"""Laws of every calibrator: order, duplication, containers, units, ties, and what a fit leaves behind."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax

from rlalign.calibration.calibrators import (
    BetaCalibrator,
    CalibrationWarning,
    IdentityCalibrator,
    IsotonicCalibrator,
    PlattCalibrator,
    TemperatureCalibrator,
)

FITTED = [PlattCalibrator, TemperatureCalibrator, IsotonicCalibrator, BetaCalibrator]
STRICT = [PlattCalibrator, TemperatureCalibrator, BetaCalibrator]
EVERY = [*FITTED, IdentityCalibrator]
GRID = np.linspace(-12, 12, 401)
pytestmark = pytest.mark.filterwarnings("ignore::rlalign.calibration.calibrators.CalibrationWarning")


def scored(n=500, seed=0, scale=0.6, bias=1.0):
    random = np.random.default_rng(seed)
    x = random.normal(2, 3, n)
    y = (random.random(n) < expit(scale * (x - bias))).astype(float)
    return x, y, random.integers(1, 4, n).astype(float)


data = st.integers(0, 10_000).map(lambda seed: scored(80, seed))


@pytest.mark.parametrize("kind", FITTED)
@settings(max_examples=20, deadline=None)
@given(data=data, order=st.randoms(use_true_random=False))
@pytest.mark.slow
def test_law_permutation(kind, data, order):
    x, y, w = data
    shuffled = np.array(order.sample(range(len(x)), len(x)))
    one = kind().fit(x, y, sample_weight=w)
    two = kind().fit(x[shuffled], y[shuffled], sample_weight=w[shuffled])
    np.testing.assert_allclose(one.transform(GRID), two.transform(GRID), atol=1e-9)


@pytest.mark.parametrize("kind", FITTED)
@settings(max_examples=20, deadline=None)
@given(data=data)
@pytest.mark.slow
def test_law_a_weight_is_a_duplicate_and_zero_is_absence(kind, data):
    x, y, w = data
    w = w - 1  # 0, 1 or 2
    repeated = np.repeat(np.arange(len(x)), w.astype(int))
    weighted = kind().fit(x, y, sample_weight=w).transform(GRID)
    np.testing.assert_allclose(weighted, kind().fit(x[repeated], y[repeated]).transform(GRID), atol=1e-9)


@pytest.mark.parametrize("kind", FITTED)
@settings(max_examples=20, deadline=None)
@given(data=data, points=st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=30))
@pytest.mark.slow
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
