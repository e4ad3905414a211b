"""The drift monitor's rows: what counts, what is refused, and what late, doubled, unknown and outdated labels do."""

import math

import numpy as np
import pytest
from scipy.special import expit

from rlalign.calibration.calibrators import (
    IdentityCalibrator,
    ModelIdentity,
    NotFittedError,
    PlattCalibrator,
    TemperatureCalibrator,
)
from rlalign.calibration.drift import DriftLimits, DriftMonitor, DriftState, LabelOutcome


def rows(seed: int, count: int = 64, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels with P(1) = sigmoid(0.7 logit - shift)."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, count)
    return logits, (random.random(count) < expit(0.7 * logits - shift)).astype(float)


@pytest.fixture(scope="module")
def platt() -> PlattCalibrator:
    return PlattCalibrator().fit(*rows(999, 4000))


@pytest.fixture
def monitor(platt) -> DriftMonitor:
    return DriftMonitor(platt, window=600, min_labels=100)


def numbers_of(monitor: DriftMonitor) -> dict[str, float]:
    return monitor.report().metrics()


def test_without_rows_the_report_is_empty_and_says_so(monitor, platt):
    report = monitor.report()
    assert report.state is DriftState.insufficient_data and report.labels is None and report.checks == ()
    assert report.calibration_id == platt.calibration_id and "after 0 labels" in report.message()
    assert report.metrics() == {
        "state": -1, "labels": 0, "waiting": 0, "calibration_version": 0
    }  # fmt: skip


@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_below_min_labels_nothing_is_ok_and_nothing_is_drift(monitor, shift):
    monitor.update(*rows(1, 99, shift), step=0)
    assert monitor.report().state is DriftState.insufficient_data
    monitor.update(*rows(2, 30, shift), step=1)
    assert monitor.report().state is (DriftState.drift if shift else DriftState.ok)


def test_one_heavy_label_does_not_make_a_hundred(monitor):
    logits, labels = rows(1, 150)
    monitor.update(logits, labels, step=0, weight=np.r_[1000.0, np.ones(149)])
    report = monitor.report()
    assert report.labels.rows == 150 and report.labels.effective < 2
    assert report.state is DriftState.insufficient_data


def test_responses_to_one_prompt_alone_cannot_be_judged(monitor):
    monitor.update(*rows(1, 200, 4.0), step=0, clusters=np.zeros(200, int))
    report = monitor.report()
    assert report.labels.gap is None and report.state is DriftState.insufficient_data


def test_only_the_last_window_counts(platt):
    logits, labels = rows(5, 2000)
    long, short = (DriftMonitor(platt, window=300) for _ in range(2))
    for start in range(0, 2000, 125):
        long.update(logits[start : start + 125], labels[start : start + 125], step=0)
    short.update(logits[-300:], labels[-300:], step=0)
    assert numbers_of(long) == pytest.approx(numbers_of(short))
    whole = DriftMonitor(platt, window=300)
    whole.update(logits, labels, step=0)  # more than the window in one call
    assert numbers_of(whole) == pytest.approx(numbers_of(short))


def test_order_and_cutting_into_calls_change_nothing(platt):
    logits, labels = rows(6, 400)
    prompts, order = np.arange(400) // 8, np.random.default_rng(0).permutation(400)
    one, other = DriftMonitor(platt), DriftMonitor(platt)
    one.update(logits, labels, step=0, clusters=prompts)
    for part in np.split(order, 10):
        other.update(logits[part], labels[part], step=0, clusters=prompts[part])
    assert numbers_of(one) == pytest.approx(numbers_of(other), abs=1e-12)


def test_late_labels_are_labels_that_came_at_once(platt):
    now, later = DriftMonitor(platt), DriftMonitor(platt)
    logits, labels = rows(7, 300)
    names = [f"r{i}" for i in range(300)]
    for start in range(0, 300, 100):
        part = slice(start, start + 100)
        now.update(logits[part], labels[part], step=start, policy_version=start, clusters=np.arange(start, start + 100))
        later.remember(
            names[part], logits[part], step=start, policy_version=start, clusters=np.arange(start, start + 100)
        )
    waiting = later.report()
    assert waiting.state is DriftState.insufficient_data and waiting.waiting == 300 and waiting.labels is None
    assert waiting.shift is not None and waiting.scores == 300  # scores count before their label comes
    order = np.random.default_rng(1).permutation(300)
    outcome = later.label([names[i] for i in order], labels[order])
    assert outcome == LabelOutcome(accepted=300, duplicates=0, revised=0, unknown=())
    assert numbers_of(later) == pytest.approx(numbers_of(now), abs=1e-12)
    assert later.report().labels.segments == now.report().labels.segments


def test_duplicates_are_ignored_and_counted(monitor):
    logits, labels = rows(8, 200)
    monitor.update(logits, labels, step=0, ids=range(200))
    before = numbers_of(monitor)
    assert monitor.update(logits, labels, step=1, ids=range(200)).duplicates == 200
    assert monitor.label([3, 3], [labels[3]] * 2) == LabelOutcome(accepted=0, duplicates=2, revised=0, unknown=())
    monitor.remember([5], [100.0], step=1)  # scored again after its label: the row stays what it was
    assert numbers_of(monitor) == before and monitor.report().counts.duplicates == 202


def test_a_revised_label_counts_instead_of_the_first(monitor, platt):
    logits, labels = rows(9, 200)
    monitor.update(logits, labels, step=0, ids=range(200), clusters=range(200))
    outcome = monitor.label(range(50), 1 - labels[:50])
    assert (outcome.revised, outcome.duplicates) == (50, 0)
    changed = DriftMonitor(platt, window=600, min_labels=100)
    changed.update(logits, np.r_[1 - labels[:50], labels[50:]], step=0, clusters=range(200))
    assert numbers_of(monitor) == pytest.approx(numbers_of(changed), abs=1e-12)
    monitor.remember(["a"], [0.0], step=1)
    assert monitor.label(["a", "a", "a"], [1, 0, 0]) == LabelOutcome(accepted=1, duplicates=1, revised=1, unknown=())


def test_labels_of_unknown_and_forgotten_rows_are_named_and_lose_nothing_else(platt):
    monitor = DriftMonitor(platt, window=10, min_labels=5)
    monitor.remember([f"r{i}" for i in range(101)], np.zeros(101), step=0)  # ten windows wait, the oldest goes
    outcome = monitor.label(["never", "r0", "r1"], [1, 1, 1])
    assert outcome.unknown == ("never", "r0") and outcome.accepted == 1
    counts = monitor.report().counts
    assert (counts.unknown, counts.forgotten, counts.accepted) == (2, 1, 1)
    monitor.update(np.zeros(10), np.ones(10), step=1)  # pushes r1 out of the window
    assert monitor.label(["r1"], [0]).unknown == ("r1",)


def test_a_score_sent_twice_waits_once(monitor):
    monitor.remember(["a", "b"], [1.0, 2.0], step=0)
    monitor.remember(["a"], [1.0], step=0)
    assert monitor.report().waiting == 2 and monitor.report().scores == 2


def test_a_step_that_goes_back_is_refused(monitor):
    monitor.update(*rows(1), step=7)
    for call in (lambda: monitor.update(*rows(2), step=6), lambda: monitor.remember(["a"], [0.0], step=6)):
        with pytest.raises(ValueError, match="step went back: 6 after 7.*DriftMonitor.load"):
            call()
    monitor.update(*rows(2), step=7)


def test_policy_versions_are_segments(monitor):
    for version, shift in ((3, 0.0), (4, 0.0), (5, 2.0)):
        for _ in range(2):
            monitor.update(*rows(version, 60, shift), step=version, policy_version=version)
    labels = monitor.report().labels
    assert labels.policy_versions == (3, 5)
    assert [(s.first_version, s.last_version, s.labels) for s in labels.segments] == [
        (3, 3, 120),
        (4, 4, 120),
        (5, 5, 120),
    ]
    quiet, _, loud = (s.gap for s in labels.segments)
    assert quiet.low < 0 < quiet.high and loud.low > 0.1


def test_small_versions_are_merged_and_every_label_is_in_one_segment(monitor):
    for version in range(13):
        monitor.update(*rows(version, 30), step=version, policy_version=np.full(30, version))
    segments = monitor.report().labels.segments
    assert [(s.first_version, s.last_version) for s in segments] == [(0, 3), (4, 7), (8, 12)]
    assert sum(s.labels for s in segments) == 13 * 30


def test_rows_without_a_version_are_a_segment_too(monitor):
    monitor.update(*rows(0, 120), step=0)
    (segment,) = monitor.report().labels.segments
    assert (segment.first_version, segment.labels) == (None, 120) and monitor.report().labels.policy_versions is None


BAD = {
    "nan logit": ({"logits": [0.0, math.nan]}, "not finite.*index 1"),
    "two logits a row": ({"logits": [[0.0, 1.0], [1.0, 0.0]]}, "one logit per row"),
    "label 2": ({"labels": [0, 2]}, "0 or 1"),
    "soft label": ({"labels": [0, 0.5]}, "0 or 1"),
    "a label short": ({"labels": [1]}, "one per row, got 1 for 2"),
    "negative weight": ({"weight": [1, -1]}, "negative"),
    "zero weights": ({"weight": [0, 0]}, "all zero"),
    "one weight": ({"weight": [1]}, "shape"),
    "an id short": ({"ids": ["a"]}, "ids: expected one per row"),
    "ids as one text": ({"ids": "ab"}, "ids: expected one per row"),
    "id of another type": ({"ids": ["a", 1.5]}, "index 1"),
    "bool step": ({"step": True}, "whole number"),
    "negative step": ({"step": -1}, "whole number"),
    "half a version": ({"policy_version": [1, 1.5]}, "whole numbers"),
    "a cluster short": ({"clusters": [1]}, "clusters"),
    "negative cluster": ({"clusters": [1, -1]}, "clusters.*got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_of_the_call_is_kept(monitor, case):
    change, message = BAD[case]
    monitor.update(*rows(1, 200), step=0)
    before = monitor.report()
    call = {"logits": [0.5, 1.0], "labels": [0, 1], "step": 1} | change
    with pytest.raises(ValueError, match=message):
        monitor.update(**call)
    assert monitor.report() == before


def test_an_empty_call_is_no_row(monitor):
    assert monitor.update([], [], step=3).accepted == 0
    assert monitor.report().labels is None


def test_what_cannot_be_watched_is_refused(platt):
    with pytest.raises(NotFittedError):
        DriftMonitor(PlattCalibrator())
    random = np.random.default_rng(0)
    better = random.normal(1, 1, 100)
    with pytest.raises(ValueError, match="fitted on pairs"):
        DriftMonitor(PlattCalibrator().fit_pairs(better, np.zeros(100)))
    classes = TemperatureCalibrator().fit(
        random.normal(size=(200, 3)) + 2 * np.eye(3)[np.arange(200) % 3], np.arange(200) % 3
    )
    with pytest.raises(ValueError, match="one logit per row"):
        DriftMonitor(classes)
    with pytest.raises(ValueError, match="never holds"):
        DriftMonitor(platt, window=100)
    with pytest.raises(ValueError, match="drift limit gap"):
        DriftLimits(gap=0.0)


def test_raw_scores_are_watched_without_a_fit_to_compare_with():
    monitor = DriftMonitor(IdentityCalibrator())
    logits, _ = rows(1, 400)
    labels = (np.random.default_rng(0).random(400) < expit(logits)).astype(float)
    monitor.update(logits, labels, step=0)
    report = monitor.report()
    assert report.state is DriftState.ok and report.shift is None and report.auroc_at_fit is None


def test_scores_alone_only_warn(monitor):
    logits = rows(3, 300)[0] + 6
    monitor.update(logits, (np.random.default_rng(0).random(300) < expit(0.7 * logits)).astype(float), step=0)
    report = monitor.report()
    assert report.state is DriftState.warn and report.shift.psi > 0.25
    assert {c.name for c in report.checks if c.state is DriftState.warn} == {"psi", "out_of_support"}


def test_the_model_changes_and_rows_of_the_old_one_go(monitor, platt):
    monitor.update(*rows(1, 200, 4.0), step=0)
    monitor.swap(PlattCalibrator().fit(*rows(2, 300)))
    assert monitor.report().labels is None and monitor.calibration_version == 1
    assert monitor.report().scores == 200  # the same model's scores
    other = PlattCalibrator().fit(*rows(2, 300))
    other.model_ = ModelIdentity(id="another")
    monitor.swap(other)
    assert monitor.report().scores == 0
