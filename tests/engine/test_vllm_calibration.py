"""Calibration that the engine serves itself: the calibrator's numbers, raw logits still there, and never twice."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.calibration.calibrators import (
    IdentityCalibrator,
    IsotonicCalibrator,
    PlattCalibrator,
    TemperatureCalibrator,
)
from rlalign.scoring import HFScorer, ScoringParams, VLLMScorer, with_calibration
from tests.engine.scoring_models import CONTEXT, save

QUERY, ITEMS = "What is 2 + 2? ", ["4", "5, I would say", "It is four. " * 6, "?", "22", "a b c"]


def labels_for(x, seed=0):
    """Right more often where the logit is high, in a way that a sigmoid alone does not say."""
    return (np.random.default_rng(seed).random(len(x)) < 1 / (1 + np.exp(-0.5 * (x - 0.4)))).astype(int)


@pytest.fixture(scope="module")
def fitted():
    x = np.random.default_rng(1).normal(0.0, 2.0, 400)
    temperature = TemperatureCalibrator().fit(np.column_stack([x, -x, 0 * x]), np.where(labels_for(x) == 1, 0, 1))
    return {"platt": PlattCalibrator().fit(x, labels_for(x)), "temperature": temperature}


@pytest.fixture(scope="module")
def engines(tmp_path_factory, fitted):
    """(plain transformers, engine with the calibration) of a kind and a calibrator."""
    kinds = {"platt": "one_label", "temperature": "three_labels", "bert": "bert", "identity": "one_label"}
    made = {}

    def of(name):
        if name not in made:
            folder = save(kinds[name], tmp_path_factory.mktemp(name))
            calibrator = IdentityCalibrator() if name == "identity" else fitted.get(name, fitted["platt"])
            served = VLLMScorer.start(
                folder, dtype="float32", max_model_len=CONTEXT, pooler_config=calibrator.to_vllm_pooler_config()
            )
            made[name] = HFScorer(folder, dtype="float32"), served, calibrator
        return made[name]

    yield of
    for _, served, _ in made.values():
        served.close()


@pytest.mark.parametrize("name", ["platt", "temperature", "bert"])
def test_the_engine_gives_what_the_calibrator_says(engines, name):
    """Three ways to the same probabilities: vLLM's own answer, VLLMScorer, and the calibrator on transformers' logits."""
    plain, served, calibrator = engines(name)
    raw = np.stack(plain.score(QUERY, ITEMS).logits)
    want = calibrator.transform(raw).reshape(raw.shape)
    result = served.score(QUERY, ITEMS)  # PoolerConfig says use_activation, and nobody says otherwise
    np.testing.assert_allclose(np.stack(result.scores), want, atol=1e-5)
    np.testing.assert_allclose(np.stack(result.logits), raw, atol=1e-5)
    assert np.abs(want - 1 / (1 + np.exp(-raw))).max() > 0.05  # it is not what an uncalibrated engine gives
    if name != "bert":  # vLLM's own classify knows no pairs
        prompts = [{"prompt_token_ids": [*s.shared, *s.own]} for s in served.prepare(QUERY, ITEMS).sequences]
        own = np.array([o.outputs.probs for o in served._llm.classify(prompts, use_tqdm=False)])
        np.testing.assert_allclose(own, want, atol=1e-5)


def test_what_a_request_can_still_ask_for(engines):
    plain, served, calibrator = engines("platt")
    raw = np.stack(plain.score(QUERY, ITEMS).logits)
    shifted = served.score(QUERY, ITEMS, ScoringParams(use_activation=False))
    np.testing.assert_allclose(np.stack(shifted.scores), calibrator.scale_ * (raw - calibrator.bias_), atol=1e-5)
    other = served.score(QUERY, ITEMS, ScoringParams(use_activation=False, logit_mean=0.0, logit_sigma=1.0))
    np.testing.assert_allclose(np.stack(other.scores), raw, atol=1e-5)
    states = served.score(QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=True))
    expected = plain.score(QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=True))
    for a, b in zip(states.pooled_hidden_states, expected.pooled_hidden_states, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["platt", "bert"])
def test_a_second_calibration_is_refused(engines, fitted, name):
    _, served, _ = engines(name)
    assert served.info.already_calibrated
    with pytest.raises(ValueError, match="already"):
        with_calibration(served, fitted["platt"])


def test_identity_changes_nothing(engines):
    """No mean, no sigma: the same bits as transformers' way to the same scores, and a calibrator may be attached."""
    plain, served, _ = engines("identity")
    assert not served.info.already_calibrated
    a, b = served.score(QUERY, ITEMS), plain.score(QUERY, ITEMS)
    np.testing.assert_allclose(np.stack(a.scores), np.stack(b.scores), atol=1e-5)
    assert all((x == y).all() for x, y in zip(a.scores, a.logits, strict=True))


def test_what_vllm_cannot_serve_is_for_the_client(engines, fitted):
    x = np.random.default_rng(2).normal(size=300)
    isotonic = IsotonicCalibrator().fit(x, labels_for(x, seed=3))
    with pytest.raises(TypeError, match="calibrate on the client"):
        isotonic.to_vllm_pooler_config()
    _, served, _ = engines("identity")
    result = with_calibration(served, isotonic).score(QUERY, ITEMS)
    want = isotonic.transform(np.concatenate(served.score(QUERY, ITEMS).logits))
    np.testing.assert_allclose(np.concatenate(result.scores), want, atol=1e-6)
    assert result.calibration_id == isotonic.calibration_id


def test_vllm_refuses_the_names_it_has_dropped(fitted):
    from vllm.config import PoolerConfig

    old = fitted["platt"].to_vllm_pooler_config("logit_bias, logit_scale")
    with pytest.raises((ValueError, TypeError), match="logit_bias"):
        PoolerConfig(task="classify", **old)
