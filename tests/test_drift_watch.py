"""The drift watch of a run: what it feeds, logs, writes, refits and stops on, with reward models that are plain numbers."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.special import expit

from rlalign.calibration.calibrators import Calibrator, PlattCalibrator
from rlalign.config import DriftConfig, RewardConfig, RewardModelConfig
from rlalign.reward.drift_watch import DriftWatch, RewardDriftError
from rlalign.reward.mixture import ComponentScore, Rewards
from rlalign.types import RewardScore


@dataclass
class Model:
    calibrator: Calibrator | None


class Log:
    def __init__(self) -> None:
        self.events, self.said = [], []

    def event(self, kind: str, message: str) -> None:
        self.events.append((kind, message))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


def world(seed: int, count: int = 128, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, count)
    return logits, (random.random(count) < expit(0.7 * logits - shift)).astype(float)


def component(values) -> ComponentScore:
    raw = torch.tensor(values, dtype=torch.float32)
    return ComponentScore(score=RewardScore(raw=raw, calibrated=raw))


def rewards(logits: np.ndarray, labels: np.ndarray) -> Rewards:
    return Rewards(
        values_B=torch.zeros(len(labels)), group_B=torch.zeros(len(labels), dtype=torch.int64), failed={},
        components={"verifier": component(labels), "rm": component(logits), "other": component(logits)},
    )  # fmt: skip


@pytest.fixture
def platt() -> PlattCalibrator:
    return PlattCalibrator().fit(*world(999, 4000))


@pytest.fixture
def log() -> Log:
    return Log()


def watch_of(model: Model, log: Log, folder, **options) -> DriftWatch:
    models = {"rm": model, "other": Model(None)}
    return DriftWatch(models, DriftConfig(**options), folder=folder, log=log, say=log.said.append)


def run(watch: DriftWatch, steps: range, *, shift: float = 0.0, seed: int = 0) -> list[dict[str, float]]:
    rows = []
    for step in steps:
        given = rewards(*world(seed * 10_000 + step, shift=shift))
        ids = step * 16 + np.arange(128) // 8
        rows.append(watch.step(step, given, policy_versions=np.full(128, step), prompt_ids=ids))
    return rows


def test_every_calibrated_model_has_its_metrics_and_its_file(platt, log, tmp_path):
    rows = run(watch_of(Model(platt), log, tmp_path / "drift"), range(4))
    assert {key.split("/")[2] for row in rows for key in row} == {"rm"}  # the other has no calibration
    assert [row["reward/drift/rm/state"] for row in rows] == [-1, 0, 0, 0]
    assert rows[-1]["reward/drift/rm/labels"] == 512 and rows[-1]["reward/drift/rm/calibration_version"] == 0
    assert all(math.isfinite(value) for row in rows for value in row.values())
    latest = json.loads((tmp_path / "drift" / "rm.json").read_text())
    assert latest["state"] == "ok" and latest["labels"]["rows"] == 512 and latest["labels"]["policy_versions"] == [0, 3]
    assert latest["labels"]["clusters"] == 64 and sum(
        b["share"] for b in latest["labels"]["reliability"]
    ) == pytest.approx(1)
    assert log.events == [] and len(list((tmp_path / "drift").iterdir())) == 1


def test_samples_without_a_score_are_left_out_and_labels_follow_the_verifier(platt, log, tmp_path):
    watch = watch_of(Model(platt), log, tmp_path, right=0.5, min_labels=50)
    logits, labels = world(3)
    logits[:28] = math.nan
    row = watch.step(0, rewards(logits, 0.5 * labels), policy_versions=np.zeros(128, int), prompt_ids=np.arange(128))
    assert row["reward/drift/rm/labels"] == 100
    assert row["reward/drift/rm/observed"] == pytest.approx(labels[28:].mean())


def test_drift_is_one_event_and_calm_another_one_later(platt, log, tmp_path):
    watch = watch_of(Model(platt), log, tmp_path, window=400)
    run(watch, range(4))
    assert log.kinds == []
    run(watch, range(4, 12), shift=3.0)
    assert log.kinds[-1] == "drift/drift" and log.kinds.count("drift/drift") == 1
    assert "E[p] - E[y]" in log.events[-1][1] and log.said == [log.events[-1][1]]
    watch.stop_if_asked()  # the action is warn
    run(watch, range(12, 17))
    assert log.kinds[-1] == "drift/drift"
    run(watch, range(17, 30))
    assert log.kinds[-1] == "drift/ok" and len(log.said) == 1


def test_stop_stops_after_the_step_is_written(platt, log, tmp_path):
    watch = watch_of(Model(platt), log, tmp_path, action="stop")
    run(watch, range(3))
    watch.stop_if_asked()
    assert run(watch, range(3, 6), shift=3.0)[-1]["reward/drift/rm/state"] == 2
    with pytest.raises(RewardDriftError, match=r"(?s)reward model rm.*drift.*reward.drift.action=stop"):
        watch.stop_if_asked()


def test_a_refit_changes_the_reward_of_the_next_step_and_its_version_is_logged(platt, log, tmp_path):
    model = Model(platt)
    watch = watch_of(model, log, tmp_path, refit_every=4)
    rows = run(watch, range(10), shift=2.0)
    assert [row["reward/drift/rm/calibration_version"] for row in rows] == [0] * 5 + [1] * 5
    assert model.calibrator is not platt and log.kinds.count("drift/refit") == 2
    (kept,) = tmp_path.glob("rm-1-*.calib.json")
    assert (
        Calibrator.load(kept).calibration_id
        == model.calibrator.calibration_id
        == json.loads((tmp_path / "rm.json").read_text())["calibration_id"]
    )
    assert rows[-1]["reward/drift/rm/state"] == 0 and "stays" in log.events[-1][1]


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_refitted_calibration(platt, log, tmp_path):
    whole = run(watch_of(Model(platt), log, tmp_path / "a", refit_every=4), range(12), shift=2.0)
    first = watch_of(Model(platt), log, tmp_path / "b", refit_every=4)
    rows = run(first, range(7), shift=2.0)
    first.save_state(tmp_path / "state")
    model = Model(PlattCalibrator().fit(*world(999, 4000)))
    second = watch_of(model, log, tmp_path / "b", refit_every=4)
    second.load_state(tmp_path / "state")
    assert model.calibrator.calibration_id != platt.calibration_id
    assert rows + run(second, range(7, 12), shift=2.0) == whole


def test_another_calibration_than_the_saved_run_had_is_refused(platt, log, tmp_path):
    first = watch_of(Model(platt), log, tmp_path)
    run(first, range(2))
    first.save_state(tmp_path / "state")
    other = watch_of(Model(PlattCalibrator().fit(*world(5, 400))), log, tmp_path)
    with pytest.raises(RuntimeError, match="was saved with calibration platt-.*its file now holds platt-"):
        other.load_state(tmp_path / "state")


def test_a_calibration_of_pairs_is_not_watched_and_the_run_knows(log, tmp_path):
    random = np.random.default_rng(0)
    pairs = PlattCalibrator().fit_pairs(random.normal(1, 1, 200), random.normal(0, 1, 200))
    assert run(watch_of(Model(pairs), log, tmp_path), range(1)) == [{}]
    assert log.kinds == ["drift/unwatched"]


def test_off_is_off_and_every_third_step_is_every_third(platt, log, tmp_path):
    assert run(watch_of(Model(platt), log, tmp_path, every=0), range(2)) == [{}, {}]
    rows = run(watch_of(Model(platt), log, tmp_path, every=3), range(7))
    assert ["reward/drift/rm/gap" in row for row in rows] == [True, False, False, True, False, False, True]
    assert rows[-1]["reward/drift/rm/labels"] == 7 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_labels": 3000}, "min_labels=3000: from 2"), ({"gap": 0.0}, "gap=0.0: must be positive"),
        ({"action": "panic"}, "choose one of warn, stop"), ({"every": 0, "refit_every": 5}, "needs reward.drift.every"),
        ({"refit_every": -1}, "cannot be negative"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DriftConfig(**options)


def test_a_refit_without_a_calibration_to_renew_is_refused():
    plain = RewardModelConfig(path="x")
    bounded = RewardModelConfig(path="x", shape="lower_bound", calibration="own", scores="own")
    for models in ({}, {"rm": plain}, {"rm": bounded}):
        with pytest.raises(ValueError, match="refit_every=5: needs a model with a calibration"):
            RewardConfig(models=models, drift=DriftConfig(refit_every=5))
    RewardConfig(
        models={"rm": RewardModelConfig(path="x", shape="probability", calibration="own")},
        drift=DriftConfig(refit_every=5),
    )
