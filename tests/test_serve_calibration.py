"""The calibration of a running server: put, hot swapped, refused for another model, and watched through labels."""

from __future__ import annotations

import json
import threading
from collections import Counter

import httpx
import numpy as np
import pytest
from scipy.special import expit

from rlalign.calibration.calibrators import Calibrator, ModelIdentity, PlattCalibrator, TemperatureCalibrator
from tests.reward_serving import HashScorer, classifier, client, fingerprint, judge, serving

MODEL = ModelIdentity(id="tests/hash-reward", head_dtype="float32")
BODY = {"query": "q", "items": ["a", "b", "nan"]}
LOGITS = [fingerprint("q", "a"), fingerprint("q", "b")]


def document(folder, *, slope: float = 1.5, model: ModelIdentity = MODEL, calibrator: Calibrator | None = None) -> dict:
    """A calibration file's content, fitted on labels that follow sigmoid(slope * logit - 0.5)."""
    if calibrator is None:
        random = np.random.default_rng(0)
        logits = random.normal(0, 2, 2000)
        calibrator = PlattCalibrator().fit(logits, random.random(2000) < expit(slope * logits - 0.5))
    calibrator.save(folder / "calib.json", model=model)
    return json.loads((folder / "calib.json").read_text())


def transformed(folder, content: dict, logits: list[float]) -> list[float]:
    (folder / "check.json").write_text(json.dumps(content))
    return Calibrator.load(folder / "check.json").transform(logits).tolist()


def test_put_calibrates_every_dialect_and_get_gives_it_back(tmp_path):
    content = document(tmp_path)
    expected = pytest.approx(transformed(tmp_path, content, LOGITS), rel=1e-6)
    with client(HashScorer()) as http:
        assert http.get("/v1/calibration").json() == {"calibration_id": "identity", "calibration": None}
        answer = http.put("/v1/calibration", json=content)
        assert answer.status_code == 200, answer.text
        assert http.get("/v1/calibration").json() == answer.json()
        assert answer.json()["calibration"] == content
        name = answer.json()["calibration_id"]
        assert name.startswith("platt-")

        scored = http.post("/v1/score", json=BODY).json()
        assert [row[0] for row in scored["scores"][:2]] == expected
        assert scored["logits"][:2] == [[logit] for logit in LOGITS]
        assert (scored["scores"][2], scored["logits"][2]) == (None, None)
        pairs = http.post("/score", json={"queries": "q", "documents": ["a", "b"]}).json()
        assert [entry["score"] for entry in pairs["data"]] == expected
        ranked = http.post("/rerank", json={"query": "q", "documents": ["a", "b"]}).json()
        assert sorted(r["relevance_score"] for r in ranked["results"]) == pytest.approx(
            sorted(expected.expected), rel=1e-6
        )
        rewarded = http.post("/get_reward", json={"query": ["a"]}).json()
        logit = fingerprint("", "a")
        assert rewarded["rewards"] == pytest.approx(transformed(tmp_path, content, [logit]), rel=1e-6)
        assert rewarded["extra_logs"]["logits"] == [logit]
        assert {a["calibration_id"] for a in (scored, pairs, ranked, rewarded)} == {name}
        assert http.get("/v1/models").json()["data"][0]["calibration_id"] == name
        assert f'rlalign_calibration_info{{calibration_id="{name}"}} 1.0' in http.get("/metrics").text


def test_a_request_can_have_raw_scores_or_its_own_activation(tmp_path):
    with client(HashScorer(), document(tmp_path)) as http:
        raw = http.post("/v1/score", json=BODY | {"calibrate": False}).json()
        assert (raw["scores"][:2], raw["calibration_id"]) == ([[logit] for logit in LOGITS], "identity")
        squashed = http.post("/v1/score", json=BODY | {"use_activation": True}).json()
        assert [row[0] for row in squashed["scores"][:2]] == pytest.approx(expit(LOGITS).tolist(), rel=1e-6)
        assert squashed["calibration_id"] == "identity"
        plain = http.post("/score", json={"queries": "q", "documents": "a", "use_activation": False}).json()
        assert (plain["data"][0]["score"], plain["calibration_id"]) == (LOGITS[0], "identity")
        both = http.post("/v1/score", json=BODY | {"calibrate": True, "use_activation": True})
        assert both.status_code == 400


def test_a_judge_is_calibrated_by_the_log_odds_of_its_two_labels(tmp_path):
    content = document(tmp_path)
    scorer = HashScorer(judge())
    with client(scorer, content) as http:
        ask = {"query": "q", "items": ["a"], "label_token_ids": [7, 9], "min_label_mass": 0}
        yes, no = scorer.logprobs("q", "a", [7, 9])
        answer = http.post("/v1/score", json=ask).json()
        assert answer["scores"][0] == pytest.approx(transformed(tmp_path, content, [yes - no]), rel=1e-6)
        three = http.post("/v1/score", json=ask | {"label_token_ids": [7, 8, 9]})
        assert (three.status_code, "exactly two" in three.json()["error"]["message"]) == (400, True)
        flagged = http.post("/v1/score", json=ask | {"min_label_mass": 0.999}).json()
        assert flagged["errors"] == ["low_label_mass"]
        assert flagged["scores"] == answer["scores"]


def test_classes_are_calibrated_by_temperature(tmp_path):
    random = np.random.default_rng(1)
    logits = random.normal(0, 3, (500, 3))
    labels = (logits + random.gumbel(0, 2, (500, 3))).argmax(1)
    content = document(tmp_path, calibrator=TemperatureCalibrator().fit(logits, labels))
    with client(HashScorer(classifier(labels=3)), content) as http:
        answer = http.post("/v1/score", json={"query": "q", "items": ["a"]}).json()
        rows = np.array([[fingerprint("q", "a", k) for k in range(3)]])
        np.testing.assert_allclose(answer["scores"], transformed(tmp_path, content, rows), rtol=1e-6)
        drift = http.get("/v1/calibration/drift")
        assert (drift.status_code, drift.json()["error"]["type"]) == (409, "drift_not_watched")


OTHERS = {
    "another model": {"model": ModelIdentity(id="some/other", head_dtype="float32")},
    "another head": {"model": ModelIdentity(id="tests/hash-reward", head_dtype="bfloat16")},
    "another number of labels": {"model": ModelIdentity(id="tests/hash-reward", num_labels=7)},
    "no model": {"model": ModelIdentity()},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS.keys())
def test_a_calibration_of_something_else_is_refused_and_the_old_one_stays(tmp_path, changes):
    with client(HashScorer(), document(tmp_path)) as http:
        before = http.get("/v1/calibration").json()
        answer = http.put("/v1/calibration", json=document(tmp_path, slope=3.0, **changes))
        assert (answer.status_code, answer.json()["error"]["type"]) == (409, "calibration_mismatch")
        assert http.get("/v1/calibration").json() == before


def test_a_model_can_be_calibrated_under_the_name_it_is_served_by(tmp_path):
    content = document(tmp_path, model=ModelIdentity(id="mine"))
    with client(HashScorer(), model_name="mine") as http:
        assert http.put("/v1/calibration", json=content).status_code == 200
    with client(HashScorer(), model_name="yours") as http:
        assert http.put("/v1/calibration", json=content).status_code == 409


def test_one_logit_calibrators_do_not_fit_models_with_classes_nor_engines_that_calibrate(tmp_path):
    for info in (classifier(labels=3), classifier(already_calibrated=True)):
        with client(HashScorer(info)) as http:
            assert http.put("/v1/calibration", json=document(tmp_path)).status_code == 409


def test_documents_that_were_edited_or_are_none(tmp_path):
    content = document(tmp_path)
    edited = content | {"params": content["params"] | {"scale": 2.0}}
    with client(HashScorer()) as http:
        assert http.put("/v1/calibration", json=edited).status_code == 409
        assert "digest" in http.put("/v1/calibration", json=edited).json()["error"]["message"]
        for broken in (
            {},
            {"format": "rlalign-calibration"},
            {"format": "rlalign-calibration", "format_version": 99},
            content | {"method": "pickle"},
        ):
            answer = http.put("/v1/calibration", json=broken)
            assert answer.status_code in (400, 409), answer.text
            assert "/tmp" not in answer.text
        assert http.put("/v1/calibration", json=[content]).status_code == 400
        assert http.get("/v1/calibration").json()["calibration_id"] == "identity"


@pytest.mark.slow
def test_hot_swaps_under_load_every_answer_is_of_one_calibration(tmp_path):
    """Clients score while two calibrations alternate: an answer's scores are all those of the id it carries."""
    contents = [document(tmp_path, slope=slope) for slope in (0.5, 3.0)]
    items = [f"item {i}" for i in range(20)]
    logits = [fingerprint("q", item) for item in items]
    seen: Counter[str] = Counter()
    wrong: list[dict] = []
    with serving(HashScorer(seconds=0.001)) as url:
        expected = {}
        for content in contents:
            name = httpx.put(f"{url}/v1/calibration", json=content).json()["calibration_id"]
            expected[name] = transformed(tmp_path, content, logits)
        stop = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=url) as http:
                while not stop.is_set():
                    answer = http.post("/v1/score", json={"query": "q", "items": items}).json()
                    name = answer["calibration_id"]
                    seen[name] += 1
                    if not np.allclose([row[0] for row in answer["scores"]], expected[name], rtol=1e-6):
                        wrong.append(answer)

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for asker in askers:
            asker.start()
        with httpx.Client(base_url=url) as http:
            for i in range(20):
                name = http.put("/v1/calibration", json=contents[i % 2]).json()["calibration_id"]
                assert http.post("/v1/score", json={"query": "q", "items": ["a"]}).json()["calibration_id"] == name
        stop.set()
        for asker in askers:
            asker.join()
    assert not wrong
    assert set(seen) == set(expected)


def test_labels_by_id_and_by_logit_feed_the_drift_report(tmp_path):
    random = np.random.default_rng(2)
    with client(HashScorer(), document(tmp_path), drift_window=500, drift_min_labels=50) as http:
        empty = http.get("/v1/calibration/drift").json()
        assert empty["state"] == "insufficient_data"
        items = [f"item {i}" for i in range(300)]
        answer = http.post("/v1/score", json={"query": "q", "items": items, "policy_version": 3}).json()
        truth = [int(random.random() < expit(1.5 * row[0] - 0.5)) for row in answer["logits"]]
        labels = [{"id": f"{answer['id']}/{i}", "label": y} for i, y in enumerate(truth)]
        assert http.post("/v1/labels", json={"labels": labels}).json() == {
            "accepted": 300, "duplicates": 0, "revised": 0, "unknown": [],
        }  # fmt: skip
        report = http.get("/v1/calibration/drift").json()
        assert report["state"] == "ok", report
        assert report["calibration_id"] == answer["calibration_id"]

        again = {
            "labels": [labels[0], {"id": labels[1]["id"], "label": 1 - truth[1]}, {"id": "score-unknown/0", "label": 1}]
        }
        assert http.post("/v1/labels", json=again).json() == {
            "accepted": 0, "duplicates": 1, "revised": 1, "unknown": ["score-unknown/0"],
        }  # fmt: skip
        inverted = [
            {"logit": row[0], "label": 1 - y, "weight": 2.0, "policy_version": 4}
            for row, y in zip(answer["logits"], truth, strict=True)
        ]
        assert http.post("/v1/labels", json={"labels": inverted}).json()["accepted"] == 300
        assert http.get("/v1/calibration/drift").json()["state"] == "drift"
        assert 'rlalign_labels_total{outcome="accepted"} 600.0' in http.get("/metrics").text


def test_a_failed_item_cannot_be_labelled(tmp_path):
    with client(HashScorer(), document(tmp_path)) as http:
        answer = http.post("/v1/score", json=BODY).json()
        labels = {"labels": [{"id": f"{answer['id']}/{i}", "label": 1} for i in range(3)]}
        assert http.post("/v1/labels", json=labels).json()["unknown"] == [f"{answer['id']}/2"]


def test_a_score_from_before_a_swap_is_not_judged_by_the_calibration_after_it(tmp_path):
    gate = threading.Event()
    answers: list[dict] = []
    with serving(HashScorer(release=gate)) as url, httpx.Client(base_url=url) as http:
        first = http.put("/v1/calibration", json=document(tmp_path)).json()["calibration_id"]
        body = {"query": "q", "items": ["a"]}
        asking = threading.Thread(target=lambda: answers.append(http.post("/v1/score", json=body, timeout=30).json()))
        asking.start()
        while not http.get("/health").json()["batch_seconds"]:
            pass
        second = http.put("/v1/calibration", json=document(tmp_path, slope=3.0)).json()["calibration_id"]
        gate.set()
        asking.join()
        assert (answers[0]["calibration_id"], second != first) == (first, True)
        labels = {"labels": [{"id": f"{answers[0]['id']}/0", "label": 1}]}
        assert http.post("/v1/labels", json=labels).json()["unknown"] == [f"{answers[0]['id']}/0"]


BAD_LABELS = {
    "neither": {"label": 1},
    "both": {"id": "score-1/0", "logit": 0.5, "label": 1},
    "no label": {"logit": 0.5},
    "a half": {"logit": 0.5, "label": 0.5},
    "boolean": {"logit": 0.5, "label": True},
    "negative weight": {"logit": 0.5, "label": 1, "weight": -1},
    "version beside an id": {"id": "score-1/0", "label": 1, "policy_version": 3},
    "more": {"logit": 0.5, "label": 1, "surprise": 1},
    "all weights zero": {"logit": 0.5, "label": 1, "weight": 0},
}


@pytest.mark.parametrize("label", BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_bad_labels(tmp_path, label):
    with client(HashScorer(), document(tmp_path)) as http:
        answer = http.post("/v1/labels", json={"labels": [label]})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request"), answer.text


def test_labels_and_drift_without_a_calibration():
    with client(HashScorer()) as http:
        for answer in (http.post("/v1/labels", json={"labels": []}), http.get("/v1/calibration/drift")):
            assert (answer.status_code, answer.json()["error"]["type"]) == (409, "drift_not_watched")
