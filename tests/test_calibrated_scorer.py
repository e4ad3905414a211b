"""with_calibration: probabilities of the calibrator, one id a result, a swap that is atomic, nothing calibrated twice."""

import asyncio
import threading

import msgspec
import numpy as np
import pytest

from rlalign.calibration.calibrators import (
    CalibrationMismatchError,
    CalibrationWarning,
    IdentityCalibrator,
    ModelIdentity,
    PlattCalibrator,
    TemperatureCalibrator,
)
from rlalign.scoring import ScoringParams, with_calibration
from rlalign.scoring.calibrated import calibrated
from tests.reward_models import scorer_of

QUERY, ITEMS = "What is 2 + 2? ", ["4", "twenty-two", "The sum is four, I think."]


def platt(scale, intercept):
    calibrator = PlattCalibrator()
    calibrator._restore({"scale": scale, "intercept": intercept})
    return calibrator


def temperature(value, classes):
    calibrator = TemperatureCalibrator()
    calibrator._restore({"temperature": value, "num_classes": classes})
    return calibrator


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_scores_are_the_calibrator_s_and_logits_stay_raw():
    raw = scorer_of("one_label").score(QUERY, ITEMS)
    scorer = with_calibration(scorer_of("one_label"), platt(0.7, -0.3))
    result = scorer.score(QUERY, ITEMS)
    np.testing.assert_array_equal(result.logits, raw.logits)
    np.testing.assert_allclose(result.scores, sigmoid(0.7 * np.array(raw.logits) - 0.3), rtol=1e-6)
    assert result.calibration_id == scorer.calibrator.calibration_id == scorer.info.calibration_id
    assert result.rewards() == [float(p[0]) for p in result.scores]


def test_a_request_may_ask_for_raw_scores():
    scorer = with_calibration(scorer_of("one_label"), platt(0.7, -0.3))
    for params in (ScoringParams(calibrate=False), ScoringParams(calibrate=False, use_activation=True)):
        result = scorer.score(QUERY, ITEMS, params)
        plain = scorer_of("one_label").score(QUERY, ITEMS, msgspec.structs.replace(params, calibrate=None))
        np.testing.assert_array_equal(result.scores, plain.scores)
        assert result.calibration_id == "identity"


def test_several_labels_and_the_rows_of_token_models_keep_their_shape():
    three = with_calibration(scorer_of("three_labels"), temperature(2.0, 3)).score(QUERY, ITEMS)
    halved = np.exp(np.array(three.logits, np.float64) / 2.0)
    np.testing.assert_allclose(three.scores, halved / halved.sum(-1, keepdims=True), rtol=1e-5)
    steps = with_calibration(scorer_of("process"), temperature(2.0, 2)).score(QUERY, ITEMS)
    assert [s.shape for s in steps.scores] == [s.shape for s in steps.logits]
    np.testing.assert_allclose(steps.scores[0].sum(-1), 1.0, rtol=1e-6)


def test_a_judge_is_calibrated_on_its_log_odds():
    params = ScoringParams(label_token_ids=[40, 50], min_label_mass=0.0)
    result = with_calibration(scorer_of("judge"), platt(0.7, -0.3)).score(QUERY, ITEMS, params)
    for logits, score in zip(result.logits, result.scores, strict=True):
        np.testing.assert_allclose(score, [sigmoid(0.7 * (logits[0] - logits[1]) - 0.3)], rtol=1e-5)
    assert result.rewards() == [float(p[0]) for p in result.scores]


def test_hidden_states_and_errors_come_through():
    scorer = with_calibration(scorer_of("one_label"), platt(1.0, 0.0))
    result = scorer.score(QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=True))
    assert len(result.pooled_hidden_states) == 3 and result.prompt_tokens[0] > 0


def test_nothing_is_calibrated_twice():
    once = with_calibration(scorer_of("one_label"), platt(1.0, 0.0))
    with pytest.raises(ValueError, match="attached already; replace it with swap"):
        with_calibration(once, platt(2.0, 0.0))
    with pytest.raises(ValueError, match="were calibrated by platt-.* already"):
        calibrated(once.score(QUERY, ITEMS), platt(2.0, 0.0), generative=False)
    with pytest.raises(ValueError, match="ask for one of the two"):
        once.score(QUERY, ITEMS, ScoringParams(use_activation=True))


def test_scores_that_a_server_has_calibrated_are_refused(monkeypatch):
    served = scorer_of("one_label")
    monkeypatch.setattr(served, "info", msgspec.structs.replace(served.info, already_calibrated=True))
    with pytest.raises(ValueError, match="the server shifts and scales its scores already"):
        with_calibration(served, platt(1.0, 0.0))


def test_a_calibrator_of_another_shape_is_found_when_it_is_attached():
    with pytest.raises(ValueError, match="the calibrator cannot read 3 logits an item"):
        with_calibration(scorer_of("three_labels"), platt(1.0, 0.0))
    scorer = with_calibration(scorer_of("one_label"), platt(1.0, 0.0))
    before = scorer.calibrator
    with pytest.raises(ValueError, match="cannot read 1 logits"):
        scorer.swap(temperature(2.0, 3))
    assert scorer.calibrator is before


def test_a_calibrator_of_another_model_is_refused():
    other, own = platt(1.0, 0.0), platt(1.0, 0.0)
    other.model_ = ModelIdentity(id="tiny/other", head_dtype="bfloat16")
    own.model_ = ModelIdentity(id="tiny/one_label", head_dtype="float32", num_labels=1)
    with pytest.raises(CalibrationMismatchError, match="id: .*'tiny/other'.*'tiny/one_label'.*head_dtype"):
        with_calibration(scorer_of("one_label"), other)
    with pytest.warns(CalibrationWarning, match="fitted on another model"):
        with_calibration(scorer_of("one_label"), other, strict=False)
    with_calibration(scorer_of("one_label"), own)


def test_identity_leaves_the_logits_and_says_so():
    result = with_calibration(scorer_of("one_label"), IdentityCalibrator()).score(QUERY, ITEMS)
    np.testing.assert_allclose(result.scores, result.logits, rtol=1e-6)
    assert result.calibration_id == "identity"


def test_a_run_finishes_with_the_calibrator_that_it_began_with(monkeypatch):
    steep, flat = platt(3.0, 0.0), platt(0.1, 1.0)
    scorer = with_calibration(scorer_of("one_label"), steep)
    run = scorer.scorer.run
    monkeypatch.setattr(scorer.scorer, "run", lambda requests: scorer.swap(flat) or run(requests))
    results = scorer.run([scorer.prepare(QUERY, [item]) for item in ITEMS])
    assert {result.calibration_id for result in results} == {steep.calibration_id}
    for result in results:
        np.testing.assert_allclose(result.scores, sigmoid(3.0 * np.array(result.logits)), rtol=1e-6)
    assert scorer.info.calibration_id == flat.calibration_id


@pytest.mark.slow
def test_every_result_of_a_swap_under_load_carries_the_one_calibrator_that_made_it():
    steep, flat = platt(3.0, 0.0), platt(0.1, 1.0)
    scorer = with_calibration(scorer_of("one_label"), steep)
    stop = threading.Event()

    def swapping():
        while not stop.is_set():
            scorer.swap(flat)
            scorer.swap(steep)

    async def load():
        return await asyncio.gather(*(scorer.ascore(QUERY, ITEMS) for _ in range(120)))

    swapper = threading.Thread(target=swapping)
    swapper.start()
    try:
        results = asyncio.run(load())
    finally:
        stop.set()
        swapper.join()
    by_id = {calibrator.calibration_id: calibrator for calibrator in (steep, flat)}
    assert {result.calibration_id for result in results} == set(
        by_id
    )  # both were seen, so the swap did happen under load
    for result in results:
        expected = by_id[result.calibration_id].transform(np.concatenate(result.logits))
        np.testing.assert_allclose(np.concatenate(result.scores), expected, rtol=1e-6)
