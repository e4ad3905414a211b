"""Every bad input of a calibrator is an error of its own, and every doubtful one a warning that says why."""

import numpy as np
import pytest
from scipy.special import expit

from rlalign.calibration.calibrators import (
    BetaCalibrator,
    CalibrationWarning,
    IdentityCalibrator,
    IsotonicCalibrator,
    NotFittedError,
    PlattCalibrator,
    TemperatureCalibrator,
)

FITTED = [PlattCalibrator, TemperatureCalibrator, IsotonicCalibrator, BetaCalibrator]
EVERY = [*FITTED, IdentityCalibrator]
pytestmark = pytest.mark.filterwarnings("ignore::rlalign.calibration.calibrators.CalibrationWarning")

X = [-2.0, -1.0, 0.5, 1.0, 2.0, 3.0]
Y = [0, 0, 1, 0, 1, 1]

BAD = {
    "empty": (([], []), "empty, shapes \\(0,\\) and \\(0,\\)"),
    "unequal lengths": ((X, Y[:-1]), "got shapes \\(6,\\) and \\(5,\\)"),
    "scalar": ((1.0, 1), "logits: expected shape \\[N\\], \\[N, 1\\] or \\[N, K\\], got \\(\\)"),
    "three axes": ((np.zeros((2, 2, 2)), [0, 1]), "got \\(2, 2, 2\\)"),
    "no columns": ((np.zeros((2, 0)), [0, 1]), "got \\(2, 0\\)"),
    "labels with two axes": ((X, np.zeros((6, 2))), "got shapes \\(6,\\) and \\(6, 2\\)"),
    "ragged": (([[1.0], [1.0, 2.0]], [0, 1]), "different lengths"),
    "text": ((["a", "b"], [0, 1]), "expected real numbers"),
    "None": (([1.0, None], [0, 1]), "expected real numbers"),
    "complex": (([1j, 2j], [0, 1]), "expected real numbers"),
    "bool logits": (([True, False], [0, 1]), "expected real numbers"),
    "NaN logit": (([*X[:-1], np.nan], Y), "logits: 1 of 6 entries are not finite; the first is nan at index 5"),
    "inf logit": (([1.0, -np.inf, *X[2:]], Y), "the first is -inf at index 1"),
    "NaN label": ((X, [0, 0, np.nan, 0, 1, 1]), "labels: 1 of 6 entries are not finite; the first is nan at index 2"),
    "label 2": ((X, [0, 0, 2, 0, 1, 1]), "labels: expected 0 or 1, got 2.0 at index 2"),
    "label -1": ((X, [-1, 0, 1, 0, 1, 1]), "got -1.0 at index 0"),
    "soft label unannounced": ((X, [0, 0.5, 1, 0, 1, 1]), "got 0.5 at index 1; pass soft_labels=True"),
    "constant scores": (([3.0] * 6, Y), "all 6 scores are equal \\(3.0\\)"),
    "absurd size": (([1e200, *X[1:]], Y), "is not a score"),
}


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("case", BAD)
def test_bad_rows(kind, case):
    (logits, labels), message = BAD[case]
    with pytest.raises(ValueError, match=message):
        kind().fit(logits, labels)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1, -1, 1, 1, 1], "negative, got -1.0 at index 2"),
        ([0] * 6, "all zero"),
        ([1, np.nan, 1, 1, 1, 1], "not finite; the first is nan at index 1"),
        ([1] * 5, "expected shape \\(6,\\), got \\(5,\\)"),
    ],
)
def test_bad_weights(kind, weights, message):
    with pytest.raises(ValueError, match=f"sample_weight: .*{message}"):
        kind().fit(X, Y, sample_weight=weights)


@pytest.mark.parametrize("soft", [1.5, -0.1])
def test_soft_labels_have_bounds(soft):
    with pytest.raises(ValueError, match="expected numbers in \\[0, 1\\]"):
        PlattCalibrator().fit(X, [soft, *Y[1:]], soft_labels=True)


@pytest.mark.parametrize("kind", [TemperatureCalibrator, IsotonicCalibrator, BetaCalibrator])
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_only(kind, label):
    with pytest.raises(ValueError, match=f"all 6 labels are {label}"):
        kind().fit(X, [label] * 6)


def test_one_class_is_what_has_weight():
    with pytest.raises(ValueError, match="all 3 labels are 1"):
        TemperatureCalibrator().fit(X, Y, sample_weight=Y)


@pytest.mark.parametrize(("label", "rate"), [(0, 1 / 8), (1, 7 / 8)])
def test_one_class_with_smoothing_is_a_rate(label, rate):
    """Platt's smoothed target is all that one class can teach; scikit-learn gives the same constant."""
    with pytest.warns(CalibrationWarning, match=f"every label is {label}"):
        fitted = PlattCalibrator().fit(X, [label] * 6)
    np.testing.assert_allclose(fitted.transform([-1e4, 0, 1e4]), rate, rtol=1e-12)
    assert fitted.scale_ == 0.0 and np.isnan(fitted.bias_)
    with pytest.raises(ValueError, match="all 6 labels"):
        PlattCalibrator(smooth_targets=False).fit(X, [label] * 6)
    for export in (fitted.to_vllm_pooler_config, fitted.to_openrlhf):
        with pytest.raises(ValueError, match="scale is 0"):
            export()


@pytest.mark.parametrize("kind", EVERY)
def test_probabilities_are_recognised(kind):
    with pytest.warns(CalibrationWarning, match="looks like probabilities"):
        kind().fit([0.1, 0.3, 0.6, 0.5, 0.9, 1.0], Y)


@pytest.mark.parametrize("kind", EVERY)
def test_few_rows_are_announced(kind):
    with pytest.warns(CalibrationWarning, match="6 rows; below 50"):
        fitted = kind().fit(X, Y)
    low, high = fitted.diagnostics_.intervals["brier_after"]
    assert low < fitted.diagnostics_.brier_after < high


SEPARABLE = [-2.0, -1.5, -1.0, 3.0, 3.5, 4.0], [0, 0, 0, 1, 1, 1]


def test_separable_labels_reach_the_bound():
    with pytest.warns(CalibrationWarning, match="separates the labels perfectly"):
        temperature = TemperatureCalibrator(bounds=(0.05, 20)).fit(*SEPARABLE)
    assert temperature.temperature_ == pytest.approx(0.05) and temperature.diagnostics_.at_bound
    with pytest.warns(CalibrationWarning, match="separates the labels perfectly"):
        platt = PlattCalibrator(smooth_targets=False).fit(*SEPARABLE)
    assert platt.scale_ == pytest.approx(100 / np.std(SEPARABLE[0])) and platt.diagnostics_.at_bound
    assert platt.bias_ == pytest.approx(1.0)  # the middle of the gap, though every probability there rounds to 0 or 1
    beta = BetaCalibrator().fit(*SEPARABLE)
    assert beta.diagnostics_.at_bound and beta.diagnostics_.separable
    assert set(np.round(beta.transform(SEPARABLE[0]), 12)) == {0.0, 1.0}
    with pytest.warns(CalibrationWarning, match="separates"):
        smoothed = PlattCalibrator().fit(*SEPARABLE)
    assert not smoothed.diagnostics_.at_bound and smoothed.diagnostics_.separable
    np.testing.assert_allclose(smoothed.transform([-10, 12]), [0, 1], atol=0.03)


def test_the_boundary_of_a_wide_gap_is_exact():
    """Where every probability is 0 or 1 in float64 the balance of the two nearest rows still decides the bias."""
    x, y = [-1000.0] * 99 + [1e6], [0] * 99 + [1]
    platt = PlattCalibrator(smooth_targets=False).fit(x, y)
    assert platt.scale_ == pytest.approx(100 / np.std(x))
    assert platt.bias_ == pytest.approx((1e6 - 1000) / 2 + np.log(99) / (2 * platt.scale_), rel=1e-12)


def test_touching_classes_are_separable_too():
    """One shared score with both labels: the slope still has no finite optimum, and that score keeps its rate."""
    x, y = [-1.0, -1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]
    platt = PlattCalibrator(smooth_targets=False).fit(x, y)
    assert platt.diagnostics_.at_bound
    assert platt.transform([0.0])[0] == pytest.approx(0.25)


def test_a_temperature_outside_the_bounds_is_announced():
    random = np.random.default_rng(0)
    x = random.normal(0, 3, 300)
    with pytest.warns(CalibrationWarning, match="stopped at its bound"):
        fitted = TemperatureCalibrator(bounds=(0.5, 2)).fit(x, random.random(300) < expit(x / 5))
    assert fitted.temperature_ == pytest.approx(2) and fitted.diagnostics_.at_bound


@pytest.mark.parametrize("bounds", [(0, 1), (2, 1), (1, 1), (-1, 1)])
def test_bounds_are_checked(bounds):
    with pytest.raises(ValueError, match="expected 0 < lowest < highest"):
        TemperatureCalibrator(bounds=bounds)


@pytest.mark.parametrize("kind", FITTED)
def test_scores_that_fall_with_success(kind):
    with pytest.raises(ValueError, match="fewer successes|do not score higher"):
        kind().fit(X, [1 - y for y in Y])


def test_falling_scores_can_be_made_a_rate():
    with pytest.warns(CalibrationWarning, match="fewer successes; the smoothed rate"):
        flat = PlattCalibrator(flat_if_falling=True).fit(X, 1 - np.array(Y))
    np.testing.assert_allclose(flat.transform([-5, 0, 5]), 0.5)
    np.testing.assert_allclose(flat.log_odds([-5, 5]), 0.0)
    with pytest.raises(ValueError, match="no mean and sigma express"):
        flat.to_vllm_pooler_config()
    rising = PlattCalibrator(flat_if_falling=True).fit(X, Y)
    assert rising.calibration_id == PlattCalibrator().fit(X, Y).calibration_id
    with pytest.raises(ValueError, match="contradict"):
        PlattCalibrator(flat_if_falling=True, allow_negative_scale=True)


def test_falling_scores_can_be_allowed():
    fitted = PlattCalibrator(allow_negative_scale=True).fit(X, [1 - y for y in Y])
    rising = PlattCalibrator().fit(X, Y)
    np.testing.assert_allclose([fitted.scale_, fitted.bias_], [-rising.scale_, rising.bias_], rtol=1e-6)


@pytest.mark.parametrize("kind", FITTED)
def test_use_before_fit(kind, tmp_path):
    calibrator = kind()
    for use in (
        lambda: calibrator.transform(X),
        lambda: calibrator.out_of_support(X),
        lambda: calibrator.calibration_id,
        lambda: calibrator.save(tmp_path / "c.json"),
    ):
        with pytest.raises(NotFittedError, match=kind.__name__):
            use()


@pytest.mark.parametrize("kind", EVERY)
def test_transform_checks_its_input(kind):
    fitted = kind().fit(X, Y)
    with pytest.raises(ValueError, match="nan at index 1"):
        fitted.transform([0.0, np.nan])
    with pytest.raises(ValueError, match="expected shape"):
        fitted.transform(0.0)
    assert fitted.transform([]).shape == (0,)
    np.testing.assert_array_equal(fitted.transform(np.array(X)[:, None]), fitted.transform(X))


@pytest.mark.parametrize("kind", [PlattCalibrator, IsotonicCalibrator, BetaCalibrator])
def test_several_logits_per_row_are_for_temperature_only(kind):
    with pytest.raises(ValueError, match="scalar bias cannot act under a softmax"):
        kind().fit(np.zeros((6, 3)), Y)
    with pytest.raises(ValueError, match="one logit per row|logits per row"):
        kind().fit(X, Y).transform(np.zeros((6, 3)))


def test_the_number_of_classes_is_fixed_by_the_fit():
    random = np.random.default_rng(0)
    x = random.normal(0, 2, (60, 3))
    fitted = TemperatureCalibrator().fit(x, (x + random.gumbel(size=x.shape)).argmax(1))
    for wrong in (np.zeros((2, 4)), np.zeros(3)):
        with pytest.raises(ValueError, match="fitted on 3 logits per row"):
            fitted.transform(wrong)
    with pytest.raises(ValueError, match="expected a class 0..2, got 3.0 at index 0"):
        TemperatureCalibrator().fit(x, [3] * 60)
    with pytest.raises(ValueError, match="soft_labels is for one logit per row"):
        TemperatureCalibrator().fit(x, [0] * 60, soft_labels=True)


def test_isotonic_outside_its_support():
    clipped, strict = IsotonicCalibrator().fit(X, Y), IsotonicCalibrator(out_of_bounds="raise").fit(X, Y)
    np.testing.assert_array_equal(clipped.transform([-1e4, 1e4]), clipped.transform([min(X), max(X)]))
    with pytest.raises(ValueError, match="2 of 3 logits lie outside \\[-2, 3\\]"):
        strict.transform([-3, 0, 4])
    with pytest.raises(ValueError, match="out_of_bounds: expected one of clip, raise"):
        IsotonicCalibrator(out_of_bounds="nan")


@pytest.mark.parametrize("kind", [PlattCalibrator, TemperatureCalibrator])
@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ([], [], "empty"),
        ([1.0, 2.0], [0.0], "got shapes \\(2,\\) and \\(1,\\)"),
        ([1.0, np.nan], [0.0, 0.0], "chosen: 1 of 2 .* nan at index 1"),
        ([[1.0, 2.0]], [0.0], "one logit per response"),
        ([1.0, 2.0], [1.0, 2.0], "score the same in all 2 pairs"),
        ([0.0, 1.0], [2.0, 2.0], "right answers do not score higher"),
    ],
)
def test_bad_pairs(kind, chosen, rejected, message):
    with pytest.raises(ValueError, match=message):
        kind().fit_pairs(chosen, rejected)


@pytest.mark.parametrize("kind", [IsotonicCalibrator, BetaCalibrator])
def test_pairs_need_a_method_with_a_scale_only(kind):
    with pytest.raises(TypeError, match="pairs identify only a scale"):
        kind().fit_pairs([1.0, 2.0], [0.0, 0.0])


def test_pairs_that_always_agree_reach_the_bound():
    with pytest.warns(CalibrationWarning, match="separates"):
        fitted = TemperatureCalibrator(bounds=(0.1, 10)).fit_pairs([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert fitted.temperature_ == pytest.approx(0.1) and fitted.diagnostics_.at_bound


def test_importing_is_light():
    import subprocess
    import sys

    code = "import sys, rlalign.calibration.calibrators; print([m for m in ('torch', 'scipy', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
