"""When a server fails, the items have reasons and no numbers; what is retried, what is not, and how long it may take."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from rlalign.scoring import HTTPScorer, ScoringParams
from rlalign.scoring.http import RequestFailed, transport
from tests import http_servers
from tests.http_servers import Server, body, codes, drip, hang_up, logit, silence, status

QUERY, ITEMS = "2 + 2 = ", ["4", "5", "four"]
WANT = [logit(codes(QUERY + item)) for item in ITEMS]
OK = pytest.approx(WANT, abs=1e-6)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.01)


@pytest.fixture(params=["sync", "async"])
def score(request):
    """Both ways in behave the same."""
    if request.param == "sync":
        return lambda scorer, *given: scorer.score(*given)
    return lambda scorer, *given: asyncio.run(scorer.ascore(*given))


@pytest.fixture
def connect():
    """A scorer and its server; `script` is what scoring requests get from now on."""
    opened = []

    def start(*script, answer=None, dialect="auto", **options):
        server = Server(answer or http_servers.vllm()).__enter__()
        opened.append(server)
        scorer = HTTPScorer(server.url, dialect, **{"timeout": 5.0} | options)
        opened.insert(0, scorer)
        server.script += script
        return scorer, server

    yield start
    for one in opened:
        one.close() if isinstance(one, HTTPScorer) else one.__exit__()


@pytest.mark.parametrize("busy", [status(503), status(500), status(429), status(429, **{"Retry-After": "0"})])
def test_overload_is_retried(connect, score, busy):
    scorer, server = connect(busy, busy)
    before = server.scored()
    assert score(scorer, QUERY, ITEMS).rewards() == OK
    assert server.scored() == before + 3


def test_retries_end(connect, score):
    scorer, server = connect(*[status(503)] * 10, retries=2)
    before = server.scored()
    result = score(scorer, QUERY, ITEMS)
    assert server.scored() == before + 3
    assert result.rewards() == [None] * 3 and result.scores == result.logits == [None] * 3
    assert all("HTTP 503: busy (gave up after 3 tries" in error for error in result.errors)


@pytest.mark.parametrize(
    ("misbehave", "reason"),
    [
        (status(401, {"detail": "no key"}), "HTTP 401: no key"),
        (status(302, {}, Location="/elsewhere"), "HTTP 302"),
        (status(404, b"<html>proxy</html>"), "HTTP 404: <html>proxy</html>"),
        (body(b"<html>welcome</html>"), "the answer is not JSON: '<html>welcome</html>'"),
        (body(b""), "the answer is not JSON"),
        (body(3.0), "the answer is 3.0, not an object or a list"),
        (body({"data": None}), "the answer has no list at data"),
        (body({"data": [{"index": 0, "data": [1.0]}] * 3}), "belongs to none of the 3 items"),
        (body({"data": [{"index": 7, "data": [1.0]}]}), "belongs to none of the 3 items"),
        (hang_up, "the connection broke"),
    ],
)
def test_other_failures_are_final(connect, score, misbehave, reason):
    scorer, server = connect(misbehave)
    before = server.scored()
    result = score(scorer, QUERY, ITEMS)
    assert server.scored() == before + 1
    assert result.rewards() == [None] * 3
    assert all(reason in error for error in result.errors)
    assert score(scorer, QUERY, ITEMS).rewards() == OK


@pytest.mark.parametrize("code", [400, 413, 422])
def test_an_item_that_the_server_refuses_costs_itself_only(connect, score, code):
    def answer(path, sent):
        if path == "/pooling" and any(len(codes(text)) > 12 for text in sent["input"] if isinstance(text, str)):
            return code, {"error": {"message": "prompt too long", "code": code}}
        return http_servers.vllm()(path, sent)

    scorer, server = connect(answer=answer)
    before = server.scored()
    result = score(scorer, QUERY, ["4", "x" * 20, "four"])
    assert result.rewards() == [pytest.approx(WANT[0], abs=1e-6), None, pytest.approx(WANT[2], abs=1e-6)]
    assert f"HTTP {code}: prompt too long" in result.errors[1]
    assert server.scored() == before + 4


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([float("nan")], "not finite"),
        ([float("inf")], "not finite"),
        (None, "returned no score"),
        ("0.5", "not numbers"),
        ([True], "not numbers"),
        ([None], "not numbers"),
        ([], "an empty list"),
        ([[1.0]], "shape"),
    ],
)
def test_an_item_without_a_number_is_an_error_and_the_others_are_not(connect, score, value, reason):
    data = [{"index": 0, "data": [WANT[0]]}, {"index": 1, "data": value}, {"index": 2, "data": [WANT[2]]}]
    scorer, _ = connect(body({"data": data}))
    result = score(scorer, QUERY, ITEMS)
    assert result.rewards() == pytest.approx([WANT[0], None, WANT[2]], abs=1e-6)
    assert result.errors[0] is result.errors[2] is None and reason in result.errors[1]


def test_a_short_list(connect, score):
    """By index it is clear who is missing; in a bare list it is not, so nobody gets a number."""
    scorer, _ = connect(body({"data": [{"index": 2, "data": [WANT[2]]}]}))
    result = score(scorer, QUERY, ITEMS)
    assert result.rewards() == [None, None, pytest.approx(WANT[2], abs=1e-6)]
    scorer, _ = connect(body({"scores": [[1.0], [2.0]]}), answer=http_servers.sglang())
    assert score(scorer, QUERY, ITEMS).errors == ["server: the answer has 2 scores for 3 items"] * 3


def test_a_hidden_state_that_is_missing_takes_its_score_with_it(connect, score):
    answer = {"scores": [[1.0], [2.0], [3.0]], "pooled_hidden_states": [[1.0], None, [float("nan")]]}
    scorer, _ = connect(body(answer), answer=http_servers.sglang())
    result = score(scorer, QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=True))
    assert result.rewards() == [1.0, None, None]
    assert [state is None for state in result.pooled_hidden_states] == [False, True, True]
    assert all("no pooled hidden state" in error for error in result.errors[1:])


@pytest.mark.parametrize("late", [silence(1.0), drip], ids=["silent", "dripping"])
def test_a_late_answer_is_no_answer(connect, score, late):
    """A server that sends a byte now and then never lets a read time out; the deadline is on the whole."""
    scorer, server = connect(late, timeout=0.3)
    before, started = server.scored(), time.monotonic()
    result = score(scorer, QUERY, ITEMS)
    assert time.monotonic() - started < 0.9
    assert result.errors == ["server: no answer within 0.3 s"] * 3
    assert server.scored() == before + 1


def test_the_deadline_is_over_all_tries(connect, score):
    """A server that asks for a longer pause than there is time is not asked again."""
    scorer, server = connect(*[status(429, **{"Retry-After": "100"})] * 3, timeout=1.0)
    before, started = server.scored(), time.monotonic()
    result = score(scorer, QUERY, ITEMS)
    assert time.monotonic() - started < 0.9
    assert server.scored() == before + 1
    assert all("deadline 1 s" in error for error in result.errors)


def test_nobody_listens(connect, score):
    scorer, server = connect(retries=1)
    server.__exit__()
    result = score(scorer, QUERY, ITEMS)
    assert all("no connection to the server" in e and "gave up after 2 tries" in e for e in result.errors)
    with pytest.raises(RequestFailed, match="no connection to the server"):
        HTTPScorer(server.url, retries=0)


def test_a_killed_server_gives_errors_and_never_a_number():
    """kill -9 with answers under way."""
    code = (
        "import os, time; from tests.http_servers import *; answer, seen = vllm(), []\n"
        "def dying(path, sent):\n"
        "    seen.append(path)\n"
        "    if len(seen) > 100: os.kill(os.getpid(), 9)\n"
        "    return answer(path, sent)\n"
        "print(Server(dying).__enter__().url, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            scorer = HTTPScorer(process.stdout.readline().strip(), retries=0, timeout=5.0)
            requests = [scorer.prepare(f"{i} = ", ["a", "b"]) for i in range(200)]
            results = asyncio.run(scorer.arun(requests))
        finally:
            process.kill()
    assert process.returncode == -9
    answered = [i for i, result in enumerate(results) if result.errors == [None, None]]
    assert 0 < len(answered) < len(results)
    for i, result in enumerate(results):
        if i in answered:
            assert result.rewards() == pytest.approx([logit(codes(f"{i} = {item}")) for item in "ab"], abs=1e-6)
        else:
            assert result.rewards() == [None, None] and all("connection" in error for error in result.errors)


def test_a_reward_function_gives_none_for_what_failed(connect):
    data = [{"index": 0, "data": [WANT[0]]}, {"index": 1, "data": None}, {"index": 2, "data": [WANT[2]]}]
    scorer, _ = connect(body({"data": data}))
    reward = scorer.as_reward_func()
    assert asyncio.run(reward([QUERY] * 3, ITEMS)) == pytest.approx([WANT[0], None, WANT[2]], abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "options", "why"),
    [
        (lambda path, sent: (404, {}), {}, "speaks none of"),
        (http_servers.vllm(), {"model": "other"}, "model 'other' is not served here; the server has rm"),
        (http_servers.vllm(), {"timeout": 0.0}, "timeout: expected a positive number"),
        (http_servers.vllm(), {"retries": -1}, "retries: expected 0 or more"),
        (http_servers.vllm(), {"dialect": "llama.cpp"}, "dialect: expected auto or one of"),
        (http_servers.openrlhf, {"dialect": "vllm"}, "HTTP 404"),
    ],
)
def test_connecting_says_what_is_wrong(connect, answer, options, why):
    with pytest.raises((ValueError, RequestFailed), match=why):
        connect(answer=answer, **options)


def test_a_server_of_two_kinds_has_to_be_named(connect):
    def both(path, sent):
        return http_servers.tei()(path, sent) if path == "/info" else http_servers.vllm()(path, sent)

    with pytest.raises(ValueError, match=r"more than one of tei, vllm.*choose one with dialect="):
        connect(answer=both)
    assert connect(answer=both, dialect="vllm")[0].dialect == "vllm"
