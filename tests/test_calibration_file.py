"""Calibration files give back the same bits, refuse what they were not made for, and export what others can apply."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax

from rlalign.calibration.calibrators import (
    BetaCalibrator,
    CalibrationMismatchError,
    CalibrationWarning,
    Calibrator,
    IdentityCalibrator,
    IsotonicCalibrator,
    ModelIdentity,
    PlattCalibrator,
    TemperatureCalibrator,
    calibration_file,
)

EVERY = [PlattCalibrator, TemperatureCalibrator, IsotonicCalibrator, BetaCalibrator, IdentityCalibrator]
MODEL = ModelIdentity(
    id="org/reward-model",
    revision="4f1c",
    template_sha256="ab" * 32,
    dtype="bfloat16",
    head_dtype="float32",
    num_labels=1,
)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(share their|rows; below|separates):rlalign.calibration.calibrators.CalibrationWarning"
)


def fitted(kind=PlattCalibrator, seed=0, **options):
    random = np.random.default_rng(seed)
    x = random.normal(2, 3, 120)
    return kind(**options).fit(x, random.random(120) < expit(0.6 * (x - 1)))


@pytest.mark.parametrize("kind", EVERY)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_law_a_loaded_calibrator_is_the_same(kind, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "rm.calib.json"
    saved = fitted(kind, seed)
    saved.save(path, model=MODEL)
    loaded = Calibrator.load(path, expect_model=MODEL)
    x = np.random.default_rng(seed + 1).normal(0, 10, 200)
    assert type(loaded) is kind
    assert saved.transform(x).tobytes() == loaded.transform(x).tobytes()
    assert loaded.calibration_id == saved.calibration_id
    assert loaded.diagnostics_ == saved.diagnostics_
    assert loaded.model_ == MODEL
    again = path.with_name("again.json")
    loaded.save(again)  # keeps the model it was loaded with
    assert again.read_bytes() == path.read_bytes()


def test_options_and_pairs_survive(tmp_path):
    saved = PlattCalibrator(smooth_targets=False, allow_negative_scale=True).fit_pairs(np.arange(60.0), [20.0] * 60)
    saved.save(tmp_path / "c.json")
    loaded = PlattCalibrator.load(tmp_path / "c.json")
    assert (loaded.smooth_targets, loaded.allow_negative_scale) == (False, True)
    assert loaded.diagnostics_.pairs and loaded.bias_ == 0.0
    random = np.random.default_rng(0)
    x = random.normal(0, 2, (80, 3))
    TemperatureCalibrator(bounds=(0.2, 5)).fit(x, (x + random.gumbel(size=x.shape)).argmax(1)).save(tmp_path / "t.json")
    temperature = TemperatureCalibrator.load(tmp_path / "t.json")
    assert temperature.bounds == (0.2, 5) and temperature.num_classes_ == 3
    IsotonicCalibrator(out_of_bounds="raise").fit([0.0, 2] * 30, [0, 1] * 30).save(tmp_path / "i.json")
    with pytest.raises(ValueError, match="outside"):
        Calibrator.load(tmp_path / "i.json").transform([9.0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "org/other"),
        ("revision", "9e00"),
        ("template_sha256", "cd" * 32),
        ("dtype", "float16"),
        ("head_dtype", "bfloat16"),
        ("num_labels", 2),
    ],
)
def test_another_model_is_refused(tmp_path, field, value):
    path = tmp_path / "c.json"
    fitted().save(path, model=MODEL)
    other = ModelIdentity(**{field: value})
    with pytest.raises(
        CalibrationMismatchError, match=f"{field}: file has {getattr(MODEL, field)!r}, expected {value!r}"
    ):
        PlattCalibrator.load(path, expect_model=other)
    with pytest.warns(CalibrationWarning, match=field):
        loaded = PlattCalibrator.load(path, expect_model=other, strict=False)
    assert loaded.calibration_id == fitted().calibration_id


def test_an_unbound_file_is_refused_by_who_checks(tmp_path):
    fitted().save(tmp_path / "c.json")
    with pytest.raises(CalibrationMismatchError, match="id: file has None, expected 'org/reward-model'"):
        Calibrator.load(tmp_path / "c.json", expect_model=ModelIdentity(id="org/reward-model"))
    assert Calibrator.load(tmp_path / "c.json").model_ == ModelIdentity()


def test_what_the_expectation_leaves_open_is_not_compared(tmp_path):
    fitted().save(tmp_path / "c.json", model=MODEL)
    loaded = Calibrator.load(tmp_path / "c.json", expect_model=ModelIdentity(id=MODEL.id, head_dtype="float32"))
    assert loaded.model_ == MODEL


def test_a_refit_is_bound_to_nothing(tmp_path):
    fitted().save(tmp_path / "c.json", model=MODEL)
    loaded = PlattCalibrator.load(tmp_path / "c.json")
    assert loaded.fit(np.arange(60.0), [0, 1] * 30).model_ == ModelIdentity()


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["params"].update(scale=c["params"]["scale"] + 1e-15),
        lambda c: c["model"].update(id="org/other"),
        lambda c: c["fit"].update(n=10_000),
        lambda c: c.pop("digest"),
    ],
)
def test_an_edited_file_is_refused(tmp_path, change):
    path = tmp_path / "c.json"
    fitted().save(path, model=MODEL)
    edited(path, change)
    with pytest.raises(CalibrationMismatchError, match="digest does not fit"):
        Calibrator.load(path)
    with pytest.warns(CalibrationWarning, match="digest does not fit"):
        Calibrator.load(path, strict=False)


def test_a_later_format_is_refused(tmp_path):
    path = tmp_path / "c.json"
    fitted().save(path)
    edited(path, lambda c: c.update(format_version=2))
    with pytest.raises(CalibrationMismatchError, match="format_version 2, this rlalign reads 1"):
        Calibrator.load(path)
    with pytest.warns(CalibrationWarning) as said:
        Calibrator.load(path, strict=False)
    assert "format_version 2" in str(said[0].message) and "digest" in str(said[1].message)
    fitted().save(path)
    edited(path, lambda c: c.update(params={"slope": 1.0}))
    with (
        pytest.warns(CalibrationWarning, match="digest"),
        pytest.raises(CalibrationMismatchError, match="does not know"),
    ):
        Calibrator.load(path, strict=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a calibration file"),
        ('{"format": "x"}', "not a calibration file"),
    ],
)
def test_what_is_not_a_calibration_file(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Calibrator.load(tmp_path / "c.json")
    with pytest.raises(ValueError, match="no such calibration file"):
        Calibrator.load(tmp_path / "absent.json")


def test_a_file_of_another_kind(tmp_path):
    fitted(IsotonicCalibrator).save(tmp_path / "c.json")
    with pytest.raises(ValueError, match="method 'isotonic', expected platt"):
        PlattCalibrator.load(tmp_path / "c.json")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    fitted().save(path)
    before = path.read_bytes()
    monkeypatch.setattr(calibration_file.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fitted(seed=1).save(path)
    assert path.read_bytes() == before


X = np.linspace(-8, 8, 33)


@pytest.mark.parametrize("kind", [PlattCalibrator, TemperatureCalibrator])
def test_exports_are_the_same_function(kind):
    calibrator = fitted(kind)
    pooler = calibrator.to_vllm_pooler_config()
    assert pooler.pop("use_activation") is True and set(pooler) == {"logit_mean", "logit_sigma"}
    np.testing.assert_allclose(
        expit((X - pooler["logit_mean"]) / pooler["logit_sigma"]), calibrator.transform(X), atol=1e-15
    )
    early = calibrator.to_vllm_pooler_config("logit_bias, logit_scale")
    np.testing.assert_allclose(
        expit(early["logit_scale"] * (X - early["logit_bias"])), calibrator.transform(X), atol=1e-15
    )
    openrlhf = calibrator.to_openrlhf()
    np.testing.assert_allclose(expit((X - openrlhf["mean"]) / openrlhf["std"]), calibrator.transform(X), atol=1e-15)
    with pytest.raises(ValueError, match="fields: expected one of"):
        calibrator.to_vllm_pooler_config("scale")


def test_a_softmax_temperature_exports_without_a_mean_that_acts():
    random = np.random.default_rng(0)
    x = random.normal(0, 3, (200, 4))
    calibrator = TemperatureCalibrator().fit(x, (x / 2 + random.gumbel(size=x.shape)).argmax(1))
    pooler = calibrator.to_vllm_pooler_config()
    assert pooler["logit_mean"] == 0.0
    np.testing.assert_allclose(softmax(x / pooler["logit_sigma"], axis=1), calibrator.transform(x), atol=1e-14)


@pytest.mark.parametrize("kind", [IsotonicCalibrator, BetaCalibrator])
def test_curves_cannot_be_exported(kind):
    for export in (fitted(kind).to_vllm_pooler_config, fitted(kind).to_openrlhf):
        with pytest.raises(TypeError, match="not affine"):
            export()


def test_identity_turns_vllms_activation_off():
    assert IdentityCalibrator().to_vllm_pooler_config() == {"use_activation": False}
    assert IdentityCalibrator().to_openrlhf() == {"mean": 0.0, "std": 1.0}


@pytest.mark.engine
@pytest.mark.parametrize("kind", [PlattCalibrator, TemperatureCalibrator, IdentityCalibrator])
def test_vllms_own_head_gives_the_same_scores(kind):
    """The released pooler head, configured by the export, on the logits themselves."""
    from types import SimpleNamespace

    import torch
    from vllm.config.pooler import PoolerConfig
    from vllm.model_executor.layers.pooler.seqwise.heads import ClassifierPoolerHead

    calibrator = fitted(kind)
    config = PoolerConfig(**calibrator.to_vllm_pooler_config())
    head = ClassifierPoolerHead(
        logit_mean=config.logit_mean, logit_sigma=config.logit_sigma, head_dtype=torch.float32, activation=torch.sigmoid
    )
    requests = [SimpleNamespace(use_activation=config.use_activation)] * len(X)
    scores = head(torch.tensor(X)[:, None], SimpleNamespace(pooling_params=requests))
    np.testing.assert_allclose(
        scores[:, 0].numpy(), calibrator.transform(X), atol=3e-7 if kind is not IdentityCalibrator else 0
    )


def test_strict_false_is_silent_when_all_is_well(tmp_path):
    fitted().save(tmp_path / "c.json", model=MODEL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Calibrator.load(tmp_path / "c.json", expect_model=MODEL, strict=False)
