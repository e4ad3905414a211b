"""Refits of a drifted calibration, and a monitor that survives its process."""

import json
import os

import numpy as np
import pytest
from scipy.special import expit

from rlalign.calibration.calibrators import (
    BetaCalibrator,
    CalibrationMismatchError,
    IdentityCalibrator,
    ModelIdentity,
    PlattCalibrator,
)
from rlalign.calibration.drift import DriftLimits, DriftMonitor, DriftState


def rows(seed: int, count: int = 64, *, shift: float = 0.0, slope: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, count)
    return logits, (random.random(count) < expit(slope * logits - shift)).astype(float)


def watched(*, shift: float = 0.0, slope: float = 0.7, steps: int = 10, seed: int = 0) -> DriftMonitor:
    """A monitor of a Platt fit after `steps` steps of 64 rows from a world that may have moved."""
    calibrator = PlattCalibrator().fit(*rows(999, 4000))
    calibrator.model_ = ModelIdentity(id="rm", head_dtype="float32")
    monitor = DriftMonitor(calibrator)
    for step in range(steps):
        monitor.update(*rows(seed * 1000 + step, shift=shift, slope=slope), step=step, policy_version=step)
    return monitor


def test_a_refit_after_drift_is_taken_and_judged_by_new_rows_only():
    monitor = watched(shift=2.0)
    before = monitor.report()
    assert before.state is DriftState.drift and before.calibration_version == 0
    outcome = monitor.refit()
    assert outcome.adopted and outcome.brier_after < outcome.brier_before and outcome.version == 1
    after = monitor.report()
    assert after.labels is None and after.state is DriftState.insufficient_data
    assert after.calibration_id == outcome.after_id == monitor.calibrator.calibration_id != before.calibration_id
    for step in range(10, 14):
        monitor.update(*rows(step, shift=2.0), step=step)
    settled = monitor.report()
    assert settled.state is DriftState.ok and settled.labels.rows == 256 and settled.calibration_version == 1
    assert monitor.calibrator.model_ == ModelIdentity(id="rm", head_dtype="float32")


def test_the_refit_is_the_fit_of_the_window():
    monitor = watched(shift=2.0, steps=3)
    logits, labels = (np.concatenate(c) for c in zip(*(rows(s, shift=2.0) for s in range(3)), strict=True))
    assert monitor.refit().adopted
    np.testing.assert_allclose(
        monitor.calibrator.transform([-1, 0, 2]), PlattCalibrator().fit(logits, labels).transform([-1, 0, 2])
    )


def test_labels_of_rows_scored_before_the_refit_feed_the_next_one_but_judge_nothing():
    monitor = watched(shift=2.0)
    monitor.remember(["late"], [0.0], step=10)
    monitor.refit()
    assert monitor.label(["late"], [1]).accepted == 1
    assert monitor.report().labels is None
    assert monitor.refit().labels == 641


@pytest.mark.slow
def test_nothing_changes_where_nothing_drifted():
    adopted = [watched(seed=seed, steps=5).refit() for seed in range(8)]
    assert sum(outcome.adopted for outcome in adopted) <= 1  # one in twenty by chance
    kept = next(outcome for outcome in adopted if not outcome.adopted)
    assert kept.before_id == kept.after_id and kept.version == 0 and "not better" in kept.message()


@pytest.mark.parametrize("world", [{"slope": -0.7}, {"shift": 1e9}, {"shift": -1e9}])
def test_scores_that_say_nothing_lose_their_say(world):
    """Platt becomes the rate of success, whatever the score: a constant reward, which teaches nothing."""
    monitor = watched(steps=4, **world)
    assert monitor.report().state is DriftState.drift
    outcome = monitor.refit()
    assert outcome.adopted and "all that can be learned" in outcome.warnings[0]
    labels = np.concatenate([rows(step, **world)[1] for step in range(4)])
    rate = (labels.sum() + 1) / (len(labels) + 2)
    np.testing.assert_allclose(monitor.calibrator.transform([-9.0, 0.0, 9.0]), rate)
    for step in range(4, 8):
        monitor.update(*rows(step, **world), step=step)
    assert {c.name for c in monitor.report().checks if c.state is DriftState.drift} <= {"auroc"}
    for step in range(8, 40):
        monitor.update(*rows(step), step=step)  # the scores mean something again
    assert monitor.refit().adopted and monitor.calibrator.scale_ > 0.5


@pytest.mark.parametrize(("world", "reason"), [({"slope": -0.7}, "fewer successes"), ({"shift": 1e9}, "both outcomes")])
def test_kinds_that_cannot_follow_say_why_and_stay(world, reason):
    monitor = DriftMonitor(BetaCalibrator().fit(*rows(999, 4000)))
    for step in range(4):
        monitor.update(*rows(step, **world), step=step)
    before = monitor.report()
    outcome = monitor.refit()
    assert not outcome.adopted and reason in outcome.reason and outcome.brier_after is None
    assert before.state is DriftState.drift and monitor.report() == before


def test_a_refit_keeps_the_kind_and_its_options():
    calibrator = PlattCalibrator(smooth_targets=False, allow_negative_scale=True).fit(*rows(1, 500))
    monitor = DriftMonitor(calibrator)
    monitor.update(*rows(2, 500, slope=-0.7), step=0)
    assert monitor.refit().adopted and monitor.calibrator.scale_ < 0 and not monitor.calibrator.smooth_targets
    beta = DriftMonitor(BetaCalibrator().fit(*rows(1, 500)))
    beta.update(*rows(2, 500, shift=3), step=0)
    assert beta.refit().adopted and isinstance(beta.calibrator, BetaCalibrator)
    with pytest.raises(ValueError, match="nothing to fit"):
        DriftMonitor(IdentityCalibrator()).refit()


def test_a_refit_is_due_after_its_steps_and_with_labels_to_judge_by():
    monitor = watched(steps=3)
    assert not monitor.refit_due(every=2)  # 192 labels
    monitor.update(*rows(1), step=3)
    assert monitor.refit_due(every=3) and not monitor.refit_due(every=4)
    monitor.swap(PlattCalibrator().fit(*rows(5, 100)))
    assert not monitor.refit_due(every=0)


@pytest.fixture
def lived() -> DriftMonitor:
    """One of everything: a refit, labels late and doubled, ids of both kinds, weights, prompts, own limits."""
    calibrator = PlattCalibrator().fit(*rows(999, 4000))
    monitor = DriftMonitor(calibrator, window=300, min_labels=50, bins=7, limits=DriftLimits(gap=0.02), seed=4)
    for step in range(6):
        logits, labels = rows(step, shift=2.0)
        weight = np.random.default_rng(step).uniform(1, 3, 64)
        clusters = step * 8 + np.arange(64) // 8
        monitor.update(
            logits, labels, step=step, weight=weight, ids=range(64 * step, 64 * step + 64), clusters=clusters
        )
    monitor.refit()
    monitor.remember(["7", 7000, "x"], [0.1, 0.2, 0.3], step=7, policy_version=3)
    monitor.label(["7", "nobody", 383], [1, 1, 0])
    monitor.update(*rows(50), step=8, policy_version=4)
    return monitor


def test_a_saved_monitor_goes_on_as_if_nothing_had_happened(lived, tmp_path):
    lived.save(tmp_path / "state")
    loaded = DriftMonitor.load(tmp_path / "state")
    assert loaded.report() == lived.report() and loaded.report().counts.unknown == 1
    for monitor in (lived, loaded):
        assert monitor.label([7000, "x", "7", 7, 383], [1, 0, 1, 1, 1]).unknown == (7,)
        monitor.update(*rows(51, 400), step=9)
        monitor.refit()
    assert loaded.report() == lived.report() and loaded.calibration_version == lived.calibration_version
    with pytest.raises(ValueError, match="step went back: 2 after 9"):
        loaded.update(*rows(1), step=2)
    lived.save(tmp_path / "state")
    assert len(list((tmp_path / "state").iterdir())) == 2


def test_an_empty_monitor_can_be_saved(tmp_path):
    monitor = DriftMonitor(IdentityCalibrator())
    monitor.save(tmp_path)
    assert DriftMonitor.load(tmp_path).report() == monitor.report()


def test_a_process_killed_while_saving_leaves_the_older_state(lived, tmp_path, monkeypatch):
    lived.save(tmp_path)
    before = lived.report()
    lived.update(*rows(1, 300, shift=-4), step=20)
    assert lived.refit().adopted

    def killed(source, target):
        if str(target).endswith(".npz"):
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        lived.save(tmp_path)
    assert DriftMonitor.load(tmp_path).report() == before


def test_what_was_not_saved_by_a_monitor_is_refused(lived, tmp_path):
    with pytest.raises(ValueError, match="no drift.npz"):
        DriftMonitor.load(tmp_path)
    lived.save(tmp_path)
    content = (tmp_path / "drift.npz").read_bytes()
    for broken in (content[: len(content) // 2], b"", b"not a zip"):
        (tmp_path / "drift.npz").write_bytes(broken)
        with pytest.raises(ValueError, match="not a saved drift monitor"):
            DriftMonitor.load(tmp_path)
    (tmp_path / "drift.npz").write_bytes(content)
    (calibration,) = tmp_path.glob("*.calib.json")
    edited = json.loads(calibration.read_text())
    edited["params"]["scale"] *= 2
    calibration.write_text(json.dumps(edited))
    with pytest.raises(CalibrationMismatchError, match="digest"):
        DriftMonitor.load(tmp_path)
