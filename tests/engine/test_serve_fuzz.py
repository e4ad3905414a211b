"""Whatever a client sends: an answer in one of the documented forms, never 500, never NaN, never another client's problem."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from scipy.special import expit

from rlalign.calibration.calibrators import IsotonicCalibrator, ModelIdentity, PlattCalibrator
from tests.reward_fuzz import hostile_requests
from tests.reward_serving import HashScorer, client, fingerprint

EXPECTED = {200, 400, 404, 405, 409, 413, 415}


def calibration(folder, calibrator) -> dict:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, 500)
    calibrator.fit(logits, random.random(500) < expit(logits)).save(
        folder / "c.json", model=ModelIdentity(id="tests/hash-reward")
    )
    return json.loads((folder / "c.json").read_text())


def strict(text: str) -> dict:
    """JSON without the words that JSON does not have."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} was serialised")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(("calibrator", "seed"), [(PlattCalibrator, 1), (IsotonicCalibrator, 2)])
def test_hostile_requests(tmp_path, calibrator, seed):
    statuses: Counter[int] = Counter()
    document = calibration(tmp_path, calibrator())
    with client(HashScorer(), request_timeout_s=10, max_items=64, max_body_bytes=50_000) as http:
        for hostile in hostile_requests(500, calibration=document, seed=seed):
            headers = {} if hostile.content_type is None else {"Content-Type": hostile.content_type}
            answer = http.request(hostile.method, hostile.path, content=hostile.body, headers=headers)
            assert answer.status_code in EXPECTED, (hostile, answer.text)
            statuses[answer.status_code] += 1
            if hostile.method == "HEAD":
                continue
            found = strict(answer.text)
            if answer.status_code != 200:
                assert set(found["error"]) == {"message", "type", "param", "code"}, hostile
                assert "/tmp" not in answer.text, hostile
        scored = http.post("/v1/score", json={"query": "q", "items": ["a"], "calibrate": False}).json()
        assert scored["scores"] == [[fingerprint("q", "a")]]
        assert http.get("/health").json()["queued_requests"] == 0
    assert statuses[200] > 50  # the mutations do not all break the request
    assert statuses[400] > 150
