"""Adaptive temperature: files, pooled rewards, streams, and every bad input by name."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import kendalltau

from rlalign.calibration.adaptive import AdaptiveTemperature, ClassBatch, Objective, TokenBatch, Training, token_batches
from rlalign.calibration.calibrators import (
    CalibrationMismatchError,
    ModelIdentity,
    NotFittedError,
    TemperatureCalibrator,
)
from tests.test_adaptive import D, V, batch, projection

MODEL = ModelIdentity(id="org/policy", revision="4f1c", head_dtype="float32")
QUICK = Training(epochs=3, least_steps=1)


@pytest.fixture(scope="module")
def fitted() -> AdaptiveTemperature:
    return AdaptiveTemperature(head="mlp", training=QUICK).fit([batch(i) for i in range(6)], validation=[batch(9)])


def pooled(n: int, seed: int = 0, k: int = 2) -> ClassBatch:
    """Labels drawn at T = exp(1.5 h0)."""
    g = torch.Generator().manual_seed(seed)
    hidden, logits = torch.randn(n, D, generator=g), 3 * torch.randn(n, k, generator=g)
    labels = torch.multinomial((logits / torch.exp(1.5 * hidden[:, :1])).softmax(1), 1, generator=g)[:, 0]
    return ClassBatch(hidden=hidden, logits=logits, labels=labels)


# files


def test_law_a_loaded_calibrator_gives_the_same_bits(fitted, tmp_path):
    path = tmp_path / "policy.ats.json"
    fitted.save(path, model=MODEL)
    loaded = AdaptiveTemperature.load(path, expect_model=MODEL)
    tokens = batch(50)
    assert torch.equal(loaded.temperature_of(tokens), fitted.temperature_of(tokens))
    assert loaded.calibration_id == fitted.calibration_id
    assert loaded.diagnostics_ == fitted.diagnostics_ and loaded.model_ == MODEL
    assert loaded.objective == fitted.objective and loaded.training == fitted.training
    loaded.save(tmp_path / "again.json")  # keeps the model it was loaded with
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("policy.ats.json", "again.json"))
    assert first["params"].pop("weights") != second["params"].pop("weights")
    assert first["params"] == second["params"] and first["model"] == second["model"]


def test_saving_again_leaves_one_file_of_weights(fitted, tmp_path):
    path = tmp_path / "p.json"
    fitted.save(path)
    other = AdaptiveTemperature(head="linear", training=QUICK).fit([batch(1)])
    other.save(path)
    assert len(list(tmp_path.iterdir())) == 2
    assert AdaptiveTemperature.load(path).calibration_id == other.calibration_id != fitted.calibration_id


def test_files_that_are_not_what_was_saved_are_refused(fitted, tmp_path):
    path = tmp_path / "p.json"
    fitted.save(path, model=MODEL)
    (weights,) = tmp_path.glob("*.safetensors")
    with pytest.raises(CalibrationMismatchError, match="another model"):
        AdaptiveTemperature.load(path, expect_model=ModelIdentity(id="org/other"))
    with pytest.raises(ValueError, match="adaptive_temperature"):
        TemperatureCalibrator.load(path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\x01")
    for strict in (True, False):  # bytes of weights are never taken on trust
        with pytest.raises(CalibrationMismatchError, match="not the weights"):
            AdaptiveTemperature.load(path, strict=strict)
    weights.unlink()
    with pytest.raises(CalibrationMismatchError, match="copy both files"):
        AdaptiveTemperature.load(path)
    path.write_text(path.read_text().replace('"token"', '"sequence"'))
    with pytest.raises(CalibrationMismatchError, match="digest"):
        AdaptiveTemperature.load(path)
    TemperatureCalibrator().fit([0.0, 1, 2, -1] * 20, [0, 1, 1, 0, 1, 0, 1, 0] * 10).save(path)
    with pytest.raises(ValueError, match="temperature"):
        AdaptiveTemperature.load(path)


# pooled hidden states


def test_two_classes_are_a_scalar_reward():
    rows = pooled(400)
    margin_N = rows.logits[:, 1] - rows.logits[:, 0]
    scalar = ClassBatch.of_rewards(margin_N + 0.7, rows.hidden, rows.labels, bias=0.7)
    a, b = (AdaptiveTemperature(head="linear", training=QUICK).fit([each]) for each in (rows, scalar))
    torch.testing.assert_close(a.temperature_of(rows), b.temperature_of(scalar), rtol=1e-3, atol=1e-4)
    p_N = b.transform(margin_N, rows.hidden)
    wanted_N = expit(margin_N.double().numpy() / b.temperature_of(scalar).double().numpy())
    np.testing.assert_allclose(p_N.numpy(), wanted_N, rtol=1e-4, atol=1e-6)


def test_reordered_rewards_are_reported():
    rows = pooled(600, seed=3)
    calibrator = AdaptiveTemperature(head="linear", training=Training(epochs=60, least_steps=1)).fit([rows])
    before = (rows.logits[:, 1] - rows.logits[:, 0]).numpy()
    after = calibrator.transform(torch.tensor(before), rows.hidden).numpy()
    tau = kendalltau(before, after).statistic
    assert calibrator.diagnostics_.kendall_tau == pytest.approx(tau, abs=1e-3)
    assert 0.2 < tau < 0.98
    one = AdaptiveTemperature(head="constant", training=QUICK).fit([rows])
    assert one.diagnostics_.kendall_tau == pytest.approx(1.0)
    assert AdaptiveTemperature(head="linear", training=QUICK).fit([pooled(50, k=3)]).diagnostics_.kendall_tau is None


@pytest.mark.slow
def test_multi_class_rewards_keep_their_argmax_and_become_calibrated():
    fit, held, fresh = pooled(3000, 1, k=4), pooled(600, 2, k=4), pooled(3000, 3, k=4)
    calibrator = AdaptiveTemperature(head="linear", training=Training(epochs=100, least_steps=1)).fit(
        [fit], validation=[held]
    )
    p_NK = calibrator.transform(fresh.logits, fresh.hidden)
    assert torch.equal(p_NK.argmax(1), fresh.logits.argmax(1))
    nll = -p_NK.double().log().gather(1, fresh.labels[:, None]).mean()
    best = TemperatureCalibrator().fit(fit.logits, fit.labels).transform(fresh.logits)
    assert float(nll) < 0.92 * -np.log(best[np.arange(len(best)), fresh.labels.numpy()]).mean()
    np.testing.assert_allclose(
        calibrator.confidence(fresh).top_N.numpy(),
        softmax(fresh.logits.double().numpy() / calibrator.temperature_of(fresh).double().numpy()[:, None], 1).max(1),
        rtol=1e-4,
    )


# streams and sequences


class Stream:
    """Batches that exist only while they are used."""

    def __init__(self, n: int) -> None:
        self.n, self.made, self.shrinks = n, 0, False

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> TokenBatch:
        self.made += 1
        return batch(i, b=2 if self.shrinks and self.made > 12 else 4)


def test_a_stream_and_a_list_give_the_same_calibration():
    stream = Stream(5)
    streamed = AdaptiveTemperature(head="linear", training=QUICK).fit(stream)
    assert (
        streamed.calibration_id
        == AdaptiveTemperature(head="linear", training=QUICK).fit([batch(i) for i in range(5)]).calibration_id
    )
    assert stream.made > 5


def test_a_stream_that_changes_is_a_broken_contract():
    stream = Stream(5)
    stream.shrinks = True
    with pytest.raises(RuntimeError, match="same batch every time"):
        AdaptiveTemperature(head="linear", training=QUICK).fit(stream)


def test_level_sequence_has_one_temperature_a_sequence():
    calibrator = AdaptiveTemperature(head="linear", level="sequence", training=QUICK).fit([batch(i) for i in range(6)])
    good = batch(40)
    mask = good.mask.clone()
    mask[0, :4], mask[1, :6], mask[:, 7] = False, False, True  # completions that start at different places
    tokens = TokenBatch(hidden=good.hidden, token_ids=good.token_ids, mask=mask, projection=good.projection)
    per_token = AdaptiveTemperature(head="linear", training=QUICK)
    per_token.head_ = calibrator.head_
    expected = tokens.per_sequence(per_token.temperature_of(tokens))
    for mine, each in zip(tokens.per_sequence(calibrator.temperature_of(tokens)), expected, strict=True):
        assert bool((mine == each[0]).all())
    with pytest.raises(ValueError, match="temperature_of"):
        calibrator.temperatures(tokens.hidden)


def test_a_failed_fit_leaves_what_was_there():
    calibrator = AdaptiveTemperature(head="linear", training=QUICK).fit([batch(0)])
    before = calibrator.calibration_id
    with pytest.raises(RuntimeError, match="learning_rate"):
        calibrator.training = Training(learning_rate=1e30)
        calibrator.fit([batch(0)])
    assert calibrator.calibration_id == before


# bad input


def changed(**fields) -> TokenBatch:
    good = batch(0)
    return TokenBatch(**{"hidden": good.hidden, "token_ids": good.token_ids, "mask": good.mask,
                         "projection": good.projection} | fields)  # fmt: skip


NAN = batch(0).hidden.clone()
NAN[3, 8, 2] = math.nan  # after the last scored token: it would still poison a gradient


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": torch.zeros(4, 8, D)}, "expected hidden"),
        ({"mask": torch.zeros(4, 9, dtype=torch.bool)}, "keeps none"),
        ({"mask": torch.ones(4, 9, dtype=torch.bool)}, "token 0"),
        ({"mask": torch.ones(4, 9)}, "bool"),
        ({"token_ids": torch.full((4, 9), V)}, "vocabulary"),
        ({"token_ids": torch.full((4, 9), -100)}, "vocabulary"),
        ({"hidden": NAN}, "not finite"),
    ],
)
def test_bad_token_batches(fields, message):
    with pytest.raises(ValueError, match=message):
        changed(**fields)


@pytest.mark.parametrize(
    ("hidden", "logits", "labels", "message"),
    [
        (torch.zeros(3, D), torch.zeros(3, 1), torch.zeros(3).long(), "one logit"),
        (torch.zeros(3, D), torch.zeros(3, 2), torch.tensor([0, 1, 2]), "classes 0..1"),
        (torch.zeros(3, D), torch.zeros(2, 2), torch.zeros(3).long(), "expected hidden"),
        (torch.zeros(0, D), torch.zeros(0, 2), torch.zeros(0).long(), "N > 0"),
        (torch.zeros(3, D), torch.full((3, 2), math.inf), torch.zeros(3).long(), "logits: 3 of 3"),
    ],
)
def test_bad_class_batches(hidden, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        ClassBatch(hidden=hidden, logits=logits, labels=labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveTemperature(head="tree"), "constant, linear"),
        (lambda: AdaptiveTemperature(bounds=(2.0, 3.0)), "range"),
        (lambda: AdaptiveTemperature(bounds=(0.1, math.inf)), "range"),
        (lambda: AdaptiveTemperature(level="word"), "level"),
        (lambda: Objective(loss="hinge"), "top_label"),
        (lambda: Objective(alpha=1.0), "alpha"),
        (lambda: Training(epochs=0), "epochs"),
        (lambda: AdaptiveTemperature().fit([]), "no batches"),
        (lambda: AdaptiveTemperature(head="transformer", num_heads=3).fit([batch(0)]), "num_heads"),
        (lambda: AdaptiveTemperature(head="transformer", num_heads=4).fit([pooled(9)]), "whole sequences"),
        (lambda: projection(vocab_size=1), "at least 2"),
        (lambda: token_batches([torch.zeros(3, D)], [[1, 2, 3]], [3], projection()), "sequence 0"),
        (lambda: token_batches([torch.zeros(2, D)], [[1, 2, 3]], [1], projection()), "sequence 0"),
        (
            lambda: (
                AdaptiveTemperature(head="linear", training=QUICK).fit([batch(0)]).temperatures(torch.zeros(1, 2, 9))
            ),
            "states of 16",
        ),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_works_before_a_fit(tmp_path):
    calibrator = AdaptiveTemperature()
    for use in (lambda: calibrator.temperatures(torch.zeros(1, 2, D)), lambda: calibrator.confidence(batch(0)),
                lambda: calibrator.save(tmp_path / "a.json"), lambda: calibrator.calibration_id):  # fmt: skip
        with pytest.raises(NotFittedError):
            use()
    assert not list(tmp_path.iterdir())
