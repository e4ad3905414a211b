"""HTTPScorer against small real servers: every dialect gives the model's own logits, in the order of the items."""

from __future__ import annotations

import asyncio
import math
from functools import cache

import numpy as np
import pytest

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.scoring import HTTPScorer, ScoringParams, with_calibration
from rlalign.scoring.http import KnownLogits
from tests import http_servers
from tests.http_servers import Server, codes, logit, sigmoid

QUERY, ITEMS = "2 + 2 = ", ["4", "5, or so", "four", "?", "22", "a"]
DIALECTS = {
    "vllm": http_servers.vllm(),
    "sglang": http_servers.sglang(),
    "tei": http_servers.tei(),
    "infinity": http_servers.infinity,
    "openrlhf": http_servers.openrlhf,
}


def want(query=QUERY, items=ITEMS) -> list[float]:
    return [logit(codes(query + item)) for item in items]


def rewards(result) -> list[float]:
    assert result.errors == [None] * len(result)
    return result.rewards()


@pytest.fixture
def serve():
    """Start servers and scorers; all are closed at the end."""
    opened = []

    def start(answer, dialect="auto", **options):
        server = Server(answer)
        server.__enter__()
        opened.append(server)
        scorer = HTTPScorer(server.url, dialect, **{"timeout": 5.0} | options)
        opened.insert(0, scorer)
        return scorer, server

    yield start
    for one in opened:
        one.close() if isinstance(one, HTTPScorer) else one.__exit__()


@pytest.mark.parametrize("name", DIALECTS)
def test_raw_logits_in_order_and_the_dialect_is_found(serve, name):
    scorer, _ = serve(DIALECTS[name])
    assert scorer.dialect == name
    assert rewards(scorer.score(QUERY, ITEMS)) == pytest.approx(want(), abs=1e-6)
    assert rewards(scorer.score("", ["alone"])) == pytest.approx(want("", ["alone"]), abs=1e-6)
    assert len(scorer.score(QUERY, [])) == 0


@pytest.mark.parametrize("name", ["vllm", "sglang", "tei", "infinity"])
def test_the_activation_is_the_servers_own(serve, name):
    scorer, _ = serve(DIALECTS[name])
    result = scorer.score(QUERY, ITEMS, ScoringParams(use_activation=True))
    assert rewards(result) == pytest.approx([sigmoid(x) for x in want()], abs=1e-6)
    assert np.concatenate(result.logits).tolist() == pytest.approx(want(), abs=1e-6)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_token_ids_are_sent_as_they_are(serve, name):
    scorer, server = serve(DIALECTS[name])
    assert rewards(scorer.score([5, 6], [[7], [8, 9]])) == pytest.approx([logit([5, 6, 7]), logit([5, 6, 8, 9])])
    before = server.scored()
    with pytest.raises(ValueError, match="65 tokens with its query, but rm reads at most 64"):
        scorer.score([5] * 60, [[7], [8] * 5])
    with pytest.raises(ValueError, match="item 1 is empty"):
        scorer.score([5], [[7], []])
    assert server.scored() == before


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_token_ids_are_cut_here(serve, name):
    scorer, _ = serve(DIALECTS[name])
    result = scorer.score([5, 6], [[7, 8, 9], [10]], ScoringParams(truncate_prompt_tokens=3, max_tokens_per_item=2))
    assert rewards(result) == pytest.approx([logit([6, 7, 8]), logit([5, 6, 10])])
    assert result.prompt_tokens == [3, 3] and result.truncated == [True, False]


@pytest.mark.parametrize("name", ["tei", "infinity", "openrlhf"])
def test_text_servers_refuse_token_ids(serve, name):
    scorer, server = serve(DIALECTS[name])
    before = server.scored()
    with pytest.raises(ValueError, match="reads text here, got token ids"):
        scorer.score([5, 6], [[7]])
    assert server.scored() == before


@pytest.mark.parametrize(
    ("name", "params", "why"),
    [
        ("openrlhf", ScoringParams(use_activation=True), "no word for use_activation"),
        ("infinity", ScoringParams(truncate_prompt_tokens=5), "no word for truncate_prompt_tokens"),
        ("tei", ScoringParams(max_tokens_per_item=5), "no word for max_tokens_per_item"),
        ("vllm", ScoringParams(return_pooled_hidden_states=True), "VLLMScorer does"),
        ("vllm", ScoringParams(task="generative", label_token_ids=[1, 2]), "the model supports classify"),
        ("vllm", ScoringParams(max_tokens_per_item=2), "no word for max_tokens_per_item"),
        ("sglang", ScoringParams(truncate_prompt_tokens=9), "no word for truncate_prompt_tokens"),
        ("sglang", ScoringParams(step_tag_id=3), "not a parameter of this task"),
        ("tei", ScoringParams(truncate_prompt_tokens=5), "the server cuts to 64 tokens or not at all"),
    ],
)
def test_what_a_server_cannot_do_is_refused_before_anything_is_sent(serve, name, params, why):
    scorer, server = serve(DIALECTS[name])
    before = server.scored()
    with pytest.raises(ValueError, match=why):
        scorer.score(QUERY, ITEMS, params)
    assert server.scored() == before


def test_many_labels_come_back_in_the_order_of_the_head(serve):
    labels = ("good", "bad", "ugly")
    scorer, _ = serve(http_servers.tei(labels=labels, reranker=False))
    result = scorer.score(QUERY, ITEMS)
    assert scorer.info.activation == "softmax"
    assert np.stack(result.logits) == pytest.approx(np.array(want())[:, None] + [0.0, 0.5, 1.0], abs=1e-5)
    with pytest.raises(ValueError, match="label_index"):
        result.rewards()


def test_a_reranker_reads_the_pair_the_other_way_round_if_asked(serve):
    scorer, _ = serve(DIALECTS["tei"])
    result = scorer.score(QUERY, ["4"], ScoringParams(item_first=True))
    assert rewards(result) == pytest.approx([logit(codes("4" + QUERY))], abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "ids"),
    [(http_servers.vllm_judge, True), (http_servers.sglang(generative=True), False)],
    ids=["vllm", "sglang"],
)
def test_a_judges_labels(serve, answer, ids):
    """Log-probabilities of all labels, although vLLM returns one label's probability a call."""
    scorer, _ = serve(answer)
    query, items = ([1, 2], [[3], [4]]) if ids else ("is it good? ", ["yes", "no"])
    params = ScoringParams(label_token_ids=[[1, 2, 4], [6, 8]], return_token_logprobs=True)
    result = scorer.score(query, items, params)
    p = [[1 / 3, 1 / 4, 1 / 6], [1 / 8, 1 / 10]]
    assert result.label_mass == pytest.approx([sum(row) for row in p], abs=1e-6)
    assert result.errors == [None, "low_label_mass"]
    for logits, scores, row in zip(result.logits, result.scores, p, strict=True):
        assert logits.tolist() == pytest.approx(np.log(row), abs=1e-6)
        assert scores.tolist() == pytest.approx(np.array(row) / sum(row), abs=1e-6)


def test_a_judge_on_vllm_needs_token_ids(serve):
    scorer, server = serve(http_servers.vllm_judge)
    before = server.scored()
    with pytest.raises(ValueError, match="cuts text that is too long without saying so"):
        scorer.score("is it good? ", ["yes"], ScoringParams(label_token_ids=[1, 2]))
    assert server.scored() == before


def test_hidden_states_beside_the_scores(serve):
    scorer, _ = serve(http_servers.sglang())
    plain, full = (scorer.score(QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=x)) for x in (False, True))
    assert plain.pooled_hidden_states is None
    assert full.logits == plain.logits
    for state, x in zip(full.pooled_hidden_states, want(), strict=True):
        assert state.tolist() == pytest.approx([x, -x, 1.0], abs=1e-6)
    blind, server = serve(http_servers.sglang(hidden=False))  # SGLang's silent null, on models that do not capture them
    before = server.scored()
    with pytest.raises(ValueError, match="the server returned none when it was asked for one"):
        blind.score(QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=True))
    assert server.scored() == before


def test_several_requests_at_once_each_get_their_own_answers(serve):
    scorer, _ = serve(DIALECTS["tei"])  # its batch is 3 items, so requests are cut
    queries = [f"{i} + {i} = " for i in range(40)]
    requests = [scorer.prepare(query, ITEMS) for query in queries]
    expected = [pytest.approx(want(query), abs=1e-6) for query in queries]
    assert [rewards(result) for result in scorer.run([*requests, requests[0]])] == [*expected, expected[0]]

    async def together():
        return await asyncio.gather(*(scorer.ascore(query, ITEMS) for query in queries))

    assert [rewards(result) for result in asyncio.run(together())] == expected


def test_the_key_goes_with_every_request(serve):
    scorer, server = serve(DIALECTS["vllm"], api_key="secret")
    scorer.score(QUERY, ITEMS)
    assert {headers.get("Authorization") for _, _, headers in server.seen} == {"Bearer secret"}


# --- calibration on the other side ---


@cache
def platt():
    x = np.linspace(-2, 2, 200)
    return PlattCalibrator().fit(x, (x + np.sin(37 * x) > 0.3).astype(float))


def test_a_server_that_says_it_calibrates_is_not_calibrated_again(serve):
    scorer, _ = serve(http_servers.vllm(mean=0.5, sigma=2.0, development=True))
    assert scorer.info.already_calibrated
    result = scorer.score(QUERY, ITEMS, ScoringParams(use_activation=True))
    assert rewards(result) == pytest.approx([sigmoid((x - 0.5) / 2) for x in want()], abs=1e-6)
    assert np.concatenate(result.logits).tolist() == pytest.approx(want(), abs=1e-6)
    with pytest.raises(ValueError, match="already"):
        with_calibration(scorer, platt())
    with pytest.raises(ValueError, match="the server says logit_mean=0.5"):
        serve(http_servers.vllm(mean=0.5, sigma=2.0, development=True), server_calibrated=False)


def test_without_proof_a_calibrator_is_refused(serve):
    """vLLM shows its PoolerConfig in development mode only."""
    scorer, _ = serve(DIALECTS["vllm"])
    with pytest.raises(ValueError, match="already"):
        with_calibration(scorer, platt())
    stated, _ = serve(DIALECTS["vllm"], server_calibrated=False)
    found = with_calibration(stated, platt()).score(QUERY, ITEMS)
    assert rewards(found) == pytest.approx(platt().transform(want()).tolist(), abs=1e-6)
    assert found.calibration_id == platt().calibration_id


def test_known_logits_are_proof(serve):
    known = KnownLogits(query=QUERY, items=ITEMS[:3], logits=want()[:3])
    scorer, _ = serve(DIALECTS["vllm"], known_logits=known)
    assert not scorer.info.already_calibrated
    for nothing in (KnownLogits(query="", items=[], logits=[]), KnownLogits(query="", items=["a"], logits=[0.0])):
        with pytest.raises(ValueError, match="prove nothing"):
            serve(DIALECTS["vllm"], known_logits=nothing)
    with pytest.raises(ValueError, match="6 items for 5 logits"):
        serve(DIALECTS["vllm"], known_logits=KnownLogits(query=QUERY, items=ITEMS, logits=want()[:5]))
    with pytest.raises(ValueError, match="known_logits item 0 is .*, the server gives"):
        serve(http_servers.vllm(mean=0.5, sigma=2.0), known_logits=known)


def test_raw_scores_that_are_not_raw_are_noticed(serve):
    def squashed(path, sent):  # applies a sigmoid of its own, then vLLM's
        status, content = DIALECTS["vllm"](path, sent)
        for entry in content.get("data", []) if path == "/pooling" and status == 200 else []:
            entry["data"] = [math.tanh(entry["data"][0])]
        return status, content

    with pytest.raises(RuntimeError, match="its raw scores are not logits"):
        serve(squashed)
