"""What keeps the server alive: sizes, keys, queues, deadlines, departures, faults; and the one shape of every error."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from rlalign.serve import ServerSettings, create_app
from tests.reward_serving import HashScorer, classifier, client, fingerprint, serving

BODY = {"query": "q", "items": ["a"]}


def error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(found) == {"message", "type", "param", "code"}
    assert found["code"] == status
    return found


def test_every_kind_of_error_has_the_one_shape():
    with client(HashScorer(), max_items=3, max_body_bytes=10_000) as http:
        assert error(http.get("/nowhere"), 404)["type"] == "not_found"
        response = http.get("/v1/score")
        assert error(response, 405)["type"] == "method_not_allowed"
        assert response.headers["allow"] == "POST"
        assert http.delete("/v1/calibration").headers["allow"] == "GET, PUT"
        assert error(http.post("/v1/score", content=json.dumps(BODY)), 415)["type"] == "unsupported_media_type"
        typed = {"headers": {"Content-Type": "application/json"}}
        for broken in (b"", b"{", b"\xff\xfe", b"[" * 9000, b"1" * 9000, b'{"query": "a", "items": "\xff"}'):
            assert error(http.post("/v1/score", content=broken, **typed), 400)["type"] == "invalid_request"
        assert error(http.post("/v1/score", json=[1]), 400)["type"] == "invalid_request"
        assert error(http.post("/v1/score", json=BODY | {"items": ["a"] * 4}), 413)["type"] == "too_large"
        assert error(http.post("/v1/score", json=BODY | {"query": "x" * 10_000}), 413)["type"] == "too_large"
        surrogate = b'{"query": "\\ud800", "items": ["\\udfff"], "model": "\\ud800"}'
        assert http.post("/v1/score", content=surrogate, **typed).status_code in (400, 404)


def test_a_body_without_a_length_is_cut_off_as_well():
    def endless():
        for _ in range(100):
            yield b"x" * 1000

    with serving(HashScorer(), max_body_bytes=10_000) as url:
        response = httpx.post(f"{url}/v1/score", content=endless(), headers={"Content-Type": "application/json"})
        assert error(response, 413)["type"] == "too_large"


def test_a_fault_in_the_model_costs_only_the_request_that_caused_it():
    gate = threading.Event()
    scorer = HashScorer(release=gate)
    with serving(scorer) as url, httpx.Client(base_url=url, timeout=30) as http:
        bodies = [BODY | {"items": [f"item {i}" if i != 3 else "poison"]} for i in range(8)]
        answers = in_parallel(http, [{"query": "q", "items": ["first"]}, *bodies], gate)[1:]
        for i, (answer, body) in enumerate(zip(answers, bodies, strict=True)):
            if i == 3:
                found = error(answer, 500)
                assert "ZeroDivisionError" not in found["message"]
            else:
                assert answer.json()["scores"] == [[fingerprint("q", body["items"][0])]]
        assert max(scorer.batches) > 1


def in_parallel(http: httpx.Client, bodies: list[dict], gate: threading.Event) -> list[httpx.Response]:
    """Post the first, then the others while the model is busy with it; open the gate when all of them wait."""
    answers: list[httpx.Response | None] = [None] * len(bodies)

    def post(i: int) -> None:
        answers[i] = http.post("/v1/score", json=bodies[i])

    threads = [threading.Thread(target=post, args=(i,)) for i in range(len(bodies))]
    threads[0].start()
    wait_for(lambda: http.get("/health").json()["batch_seconds"] > 0)
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: http.get("/health").json()["queued_requests"] >= len(bodies) - 1)
    gate.set()
    for thread in threads:
        thread.join()
    return answers


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_what_waits_is_run_together_within_the_token_budget():
    gate = threading.Event()
    scorer = HashScorer(release=gate)
    with serving(scorer, max_batch_tokens=30) as url, httpx.Client(base_url=url, timeout=30) as http:
        bodies = [{"query": "q" * 9, "items": [str(i)]} for i in range(7)]  # 10 tokens each
        answers = in_parallel(http, bodies, gate)
        assert [a.json()["scores"] for a in answers] == [[[fingerprint("q" * 9, str(i))]] for i in range(7)]
        assert scorer.batches == [1, 3, 3]


def test_a_request_larger_than_the_budget_runs_alone():
    scorer = HashScorer()
    with client(scorer, max_batch_tokens=5) as http:
        assert http.post("/v1/score", json={"query": "q" * 50, "items": ["a"]}).status_code == 200


def test_a_full_queue_says_when_to_come_back():
    gate = threading.Event()
    with (
        serving(HashScorer(release=gate), max_requests=2) as url,
        httpx.Client(base_url=url, timeout=30) as http,
    ):
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(http.post("/v1/score", json=BODY))) for _ in range(2)]
        threads[0].start()
        wait_for(lambda: http.get("/health").json()["batch_seconds"] > 0)
        threads[1].start()
        wait_for(lambda: http.get("/health").json()["queued_requests"] == 1)
        response = http.post("/v1/score", json=BODY)
        assert error(response, 429)["type"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        gate.set()
        for thread in threads:
            thread.join()
        assert [a.status_code for a in answers] == [200, 200]
        assert http.post("/v1/score", json=BODY).status_code == 200


def test_waiting_tokens_are_bounded_too():
    gate = threading.Event()
    with (
        serving(HashScorer(release=gate), max_queued_tokens=100) as url,
        httpx.Client(base_url=url, timeout=30) as http,
    ):
        big = {"query": "q" * 59, "items": ["a"]}
        threads = [threading.Thread(target=http.post, args=("/v1/score",), kwargs={"json": big}) for _ in range(2)]
        threads[0].start()
        wait_for(lambda: http.get("/health").json()["batch_seconds"] > 0)
        threads[1].start()
        wait_for(lambda: http.get("/health").json()["queued_tokens"] == 60)
        assert "60 tokens wait already" in error(http.post("/v1/score", json=big), 429)["message"]
        assert error(http.post("/v1/score", json={"query": "q" * 100, "items": ["a"]}), 413)["type"] == "too_large"
        gate.set()
        for thread in threads:
            thread.join()


def test_deadline_gives_504_and_the_place_in_the_queue_is_free_again():
    gate = threading.Event()
    with (
        serving(HashScorer(release=gate), request_timeout_s=0.3) as url,
        httpx.Client(base_url=url, timeout=30) as http,
    ):
        threading.Thread(target=http.post, args=("/v1/score",), kwargs={"json": BODY}).start()
        wait_for(lambda: http.get("/health").json()["batch_seconds"] > 0)
        assert error(http.post("/v1/score", json=BODY), 504)["type"] == "timeout"
        wait_for(lambda: http.get("/health").status_code == 503)
        health = http.get("/health").json()
        assert (health["status"], health["queued_requests"], health["queued_tokens"]) == ("stuck", 0, 0)
        gate.set()
        wait_for(lambda: http.get("/health").status_code == 200)
        assert http.post("/v1/score", json=BODY).json()["scores"] == [[fingerprint("q", "a")]]


def test_a_client_that_leaves_is_not_computed_for():
    gate = threading.Event()
    scorer = HashScorer(release=gate)
    with serving(scorer) as url, httpx.Client(base_url=url, timeout=30) as http:
        first = threading.Thread(target=http.post, args=("/v1/score",), kwargs={"json": BODY})
        first.start()
        wait_for(lambda: http.get("/health").json()["batch_seconds"] > 0)
        body = json.dumps(BODY).encode()
        head = f"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as leaving:
            leaving.sendall(head.encode() + body)
            wait_for(lambda: http.get("/health").json()["queued_requests"] == 1)
        wait_for(lambda: http.get("/health").json()["queued_requests"] == 0)
        gate.set()
        first.join()
        assert http.post("/v1/score", json=BODY).status_code == 200
        assert scorer.batches == [1, 1]
        assert 'status="499"' in http.get("/metrics").text


class MiscountingScorer(HashScorer):
    """Loses a result, or an item of one, or gives one too many."""

    def run(self, requests):
        results = super().run(requests)
        if any("lost result" in r.items for r in requests):
            return results[:-1]
        if any("one more" in r.items for r in requests):
            return [*results, results[0]]
        return [
            self._answer(self.prepare(r.query, r.items[:-1])) if "lost item" in r.items else a
            for r, a in zip(requests, results, strict=True)
        ]


@pytest.mark.parametrize("items", [["lost result"], ["a", "lost item"], ["one more"]])
def test_a_scorer_that_miscounts_gives_no_answer_at_all(items):
    with client(MiscountingScorer()) as http:
        error(http.post("/v1/score", json={"query": "q", "items": items}), 500)
        assert http.post("/v1/score", json=BODY).json()["scores"] == [[fingerprint("q", "a")]]


def test_a_key_is_asked_of_every_path_but_health_and_the_documentation():
    with client(HashScorer(), api_key="correct horse", host="0.0.0.0") as http:
        assert [http.get(path).status_code for path in ("/health", "/docs", "/openapi.json")] == [200] * 3
        right = {"Authorization": "Bearer correct horse"}
        for path in ("/v1/models", "/metrics", "/v1/calibration", "/nowhere"):
            response = http.get(path)
            assert error(response, 401)["type"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"
            assert http.get(path, headers=right).status_code in (200, 404)
        for wrong in (
            "Bearer wrong",
            "correct horse",
            "Basic correct horse",
            "Bearer ",
            "Bearer correct horse battery",
        ):
            error(http.post("/v1/score", json=BODY, headers={"Authorization": wrong}), 401)
        assert http.post("/v1/score", json=BODY, headers=right).status_code == 200


def test_a_scorer_that_calibrates_by_itself_is_refused():
    with pytest.raises(ValueError, match="the server calibrates"):
        create_app(HashScorer(classifier(calibration_id="platt-1")), ServerSettings())


def test_models_says_what_a_client_must_know_before_it_trusts_a_score():
    with client(HashScorer(classifier(labels=2)), model_name="mine") as http:
        (card,) = http.get("/v1/models").json()["data"]
        assert (card["id"], card["root"], card["max_model_len"]) == ("mine", "tests/hash-reward", 4096)
        assert (card["info"]["head_dtype"], card["info"]["already_calibrated"], card["info"]["num_labels"]) == (
            "float32",
            False,
            2,
        )
        assert http.post("/v1/score", json=BODY | {"model": "mine"}).json()["model"] == "mine"


def test_metrics_count_what_happened_and_take_no_label_from_a_client():
    with client(HashScorer()) as http:
        http.post("/v1/score", json={"query": "q", "items": ["a", "b", "nan"]})
        http.get("/some/made/up/path")
        text = http.get("/metrics").text
    for line in (
        'rlalign_requests_total{path="/v1/score",status="200"} 1.0', "rlalign_items_total 2.0", "rlalign_failed_items_total 1.0",
        "rlalign_batch_requests_count 1.0", 'rlalign_requests_total{path="unmatched",status="404"} 1.0',
        "rlalign_queued_requests 0.0", 'rlalign_calibration_info{calibration_id="identity"} 1.0',
    ):  # fmt: skip
        assert line in text.splitlines()
    assert "made/up" not in text


def test_answers_go_to_who_asked():
    """Many requests at once through batches of different sizes: every answer is checked against its own question."""

    async def ask(http: httpx.AsyncClient, i: int) -> bool:
        items = [f"item {i}.{k}" for k in range(1 + i % 4)]
        answer = await http.post("/v1/score", json={"query": f"query {i}", "items": items})
        return answer.json()["scores"] == [[fingerprint(f"query {i}", item)] for item in items]

    async def ask_all(url: str) -> list[bool]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            return await asyncio.gather(*(ask(http, i) for i in range(80)))

    scorer = HashScorer(seconds=0.002)
    with serving(scorer, max_batch_tokens=200) as url:
        assert all(asyncio.run(ask_all(url)))
    assert len(set(scorer.batches)) > 1
