"""Shaping: bounded, centred, free of length bias, cautious; each against its own formula, scikit-learn or statsmodels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.calibration.calibrators.cross_fit import ScoreRows
from rlalign.reward.shaping import BootstrapCalibration, centred_sigmoid, loess, tied_share, without_length_bias

X = [7.0, 17.0, 30.0, 70.0, 106.0, 121.0, 200.0, 248.0, 259.0, 323.0, 331.0, 365.0]
Y = [-0.581, 0.214, 0.106, 0.7, 0.818, 0.807, -0.067, -0.524, -0.961, -0.373, -0.893, -0.093]
LOWESS = {  # statsmodels 0.15.0: lowess(Y, X, frac=span, it=0, delta=0)
    2 / 3: [-0.09402454284963961, -0.010159235423194728, 0.09421599218196118, 0.37572787329608076, 0.5513348274230642,
            0.5825004879737563, -0.11044974270729052, -0.4873125784219426, -0.5058746870916715, -0.4958450217289975,
            -0.48781280991572057, -0.4419687883150969],
    1.0: [0.2612177452965082, 0.2601356316647082, 0.25513886237241873, 0.21670953062839463, 0.16054941930051073,
          0.13448908134050355, -0.048872796499135555, -0.25003051791915754, -0.29724772480934064, -0.5553742091250402,
          -0.58409544742434, -0.6949018943549751],
}  # fmt: skip


@pytest.mark.parametrize("span", LOWESS)
def test_loess_is_that_of_statsmodels(span):
    np.testing.assert_allclose(loess(X, Y, span=span), LOWESS[span], rtol=0, atol=1e-13)


def test_loess_reproduces_a_line_and_averages_where_all_neighbours_share_one_length():
    x = np.array([3.0, 5.0, 5.0, 9.0, 20.0])
    np.testing.assert_allclose(loess(x, 2 * x - 1), 2 * x - 1)
    np.testing.assert_allclose(loess([4.0] * 4, [0.0, 1.0, 2.0, 5.0]), [2.0] * 4)
    np.testing.assert_allclose(loess([1.0], [7.0]), [7.0])


def test_a_pure_length_bias_is_taken_off_and_the_mean_stays():
    lengths = np.random.default_rng(0).integers(10, 500, 200)
    quality = np.random.default_rng(1).normal(size=200)
    biased = quality + 0.02 * lengths
    corrected = without_length_bias(biased, lengths)
    assert abs(np.corrcoef(corrected, lengths)[0, 1]) < 0.05 < 0.9 < np.corrcoef(biased, lengths)[0, 1]
    assert np.corrcoef(corrected, quality)[0, 1] > 0.98
    assert corrected.mean() == pytest.approx(biased.mean())


def test_strength_is_a_share_and_equal_lengths_change_nothing():
    lengths, scores = [1, 2, 3, 9], [0.0, 1.0, 5.0, 2.0]
    half, whole = (without_length_bias(scores, lengths, strength=s) for s in (0.5, 1.0))
    np.testing.assert_allclose(half, (whole + scores) / 2)
    np.testing.assert_allclose(without_length_bias(scores, [4] * 4), scores)
    with pytest.raises(ValueError, match="strength"):
        without_length_bias(scores, lengths, strength=1.1)
    with pytest.raises(ValueError, match="shapes"):
        without_length_bias(scores, [1, 2])
    with pytest.raises(ValueError, match="not finite.*index 1"):
        without_length_bias([0.0, math.nan], [1, 2])


@given(st.floats(-50, 50), st.lists(st.floats(-50, 50), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_the_centred_sigmoid_is_bounded_monotone_and_shift_free(score, references):
    value = centred_sigmoid(score, references)
    assert 0.0 <= value <= 1.0
    assert centred_sigmoid(score + 1.0, references) >= value
    assert centred_sigmoid(score + 3.0, [r + 3.0 for r in references]) == pytest.approx(value, abs=1e-9)


def test_the_centred_sigmoid_is_one_half_at_its_reference_and_the_mean_over_several():
    assert centred_sigmoid(1.7, 1.7) == 0.5
    assert centred_sigmoid(1.0, [0.0, 2.0]) == pytest.approx((1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(1))) / 2)
    with pytest.raises(ValueError, match="no reference"):
        centred_sigmoid(1.0, [])


def labelled(n, *, seed=0, groups=None):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, n)
    labels = (random.random(n) < 1 / (1 + np.exp(-0.8 * logits))).astype(float)
    group_N = None if groups is None else np.arange(n) % groups
    return ScoreRows(shape="binary", logits=logits, labels_N=labels, weight_N=None, group_N=group_N)


@pytest.mark.slow
def test_the_lower_bound_is_below_and_closes_in_with_labels():
    grid, gaps = np.linspace(-4, 4, 9), []
    for n in (200, 800, 3200):
        rows = labelled(n)
        platt = PlattCalibrator().fit(rows.logits, rows.labels_N)
        bound = BootstrapCalibration.fit(platt, rows, draws=60).lower(grid)
        assert (bound <= platt.transform(grid)).all() and (np.diff(bound) > 0).all()
        gaps.append(float((platt.transform(grid) - bound).max()))
    assert gaps[0] > 1.5 * gaps[1] > 2.25 * gaps[2]  # about the square root of four each


@pytest.mark.slow
def test_the_lower_bound_covers_as_often_as_it_says():
    truth, hits = 1 / (1 + math.exp(-0.8)), []
    for seed in range(25):
        rows = labelled(200, seed=seed)
        bootstrap = BootstrapCalibration.fit(
            PlattCalibrator(smooth_targets=False).fit(rows.logits, rows.labels_N), rows, draws=30
        )
        hits.append(bootstrap.lower([1.0], 0.9)[0] <= truth)
    assert np.mean(hits) >= 0.76  # 0.9 in the long run; 0.5 without a bound


@pytest.mark.slow
def test_whole_groups_are_resampled_together():
    """Copies of one group are not independent labels: the bound must be as wide as without the copies."""
    alone = labelled(150)
    copies = ScoreRows(
        shape="binary", logits=np.tile(alone.logits, 6), labels_N=np.tile(alone.labels_N, 6), weight_N=None,
        group_N=np.tile(np.arange(150), 6),
    )  # fmt: skip
    apart = ScoreRows(shape="binary", logits=copies.logits, labels_N=copies.labels_N, weight_N=None, group_N=None)

    def gap(rows):
        platt = PlattCalibrator(smooth_targets=False).fit(rows.logits, rows.labels_N)
        return float(platt.transform([1.0])[0] - BootstrapCalibration.fit(platt, rows, draws=80).lower([1.0])[0])

    assert gap(copies) == pytest.approx(gap(alone), rel=0.3)
    assert gap(apart) < 0.6 * gap(copies)


def test_too_few_labels_for_a_bound_is_said():
    rows = ScoreRows(
        shape="binary",
        logits=np.array([-1.0, 0.0, 1.0]),
        labels_N=np.array([0.0, 0.0, 1.0]),
        weight_N=None,
        group_N=None,
    )
    with pytest.warns(UserWarning):  # three rows, and separable ones
        platt = PlattCalibrator(smooth_targets=False).fit([-1.0, 0.0, 1.0], [0, 1, 1])
    with pytest.raises(ValueError, match=r"bootstrap draw \d+ of 3 labelled scores cannot be fitted.*too few labels"):
        BootstrapCalibration.fit(platt, rows)
    with pytest.raises(ValueError, match="confidence"):
        BootstrapCalibration([platt]).lower([0.0], 0.3)


def test_ties_count_only_inside_a_group_and_only_between_different_scores():
    before, after = [1.0, 2.0, 2.0, 3.0, 1.0, 5.0], [0.5, 0.5, 0.5, 0.9, 0.5, 0.9]
    assert tied_share(before, after, [0, 0, 0, 0, 1, 1]) == 3 / 6
    assert tied_share(before, after, [0, 1, 1, 2, 3, 4]) == 0.0
    assert tied_share([], [], []) == 0.0
