"""vLLM's and OpenRLHF's shapes, checked against what the scorer itself says of each pair."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, softmax

from tests.reward_serving import HashScorer, classifier, client, fingerprint, judge


@pytest.fixture(scope="module")
def http():
    with client(HashScorer()) as c:
        yield c


def posted(c, path: str, **body) -> dict:
    response = c.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(c, path: str, **body) -> str:
    response = c.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


SPELLINGS = [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
PAIRINGS = {
    "1:1": ("q", "a", [("q", "a")]),
    "1:N": ("q", ["a", "b", "c"], [("q", "a"), ("q", "b"), ("q", "c")]),
    "N:N": (["q", "r"], ["a", "b"], [("q", "a"), ("r", "b")]),
    "ids": ([1, 2], [[3], [4, 5]], [([1, 2], [3]), ([1, 2], [4, 5])]),
}


@pytest.mark.parametrize(("first", "second"), SPELLINGS)
@pytest.mark.parametrize(("left", "right", "pairs"), PAIRINGS.values(), ids=PAIRINGS.keys())
def test_score_pairs_under_four_spellings(http, first, second, left, right, pairs):
    logits = [fingerprint(*pair) for pair in pairs]
    for activation, expected in ((None, expit(logits)), (True, expit(logits)), (False, logits)):
        answer = posted(http, "/score", **{first: left, second: right, "use_activation": activation})
        assert [entry["index"] for entry in answer["data"]] == list(range(len(pairs)))
        np.testing.assert_allclose([entry["score"] for entry in answer["data"]], expected, rtol=1e-6)
    assert (answer["object"], answer["data"][0]["object"], answer["model"]) == ("list", "score", "tests/hash-reward")
    assert answer["usage"]["prompt_tokens"] == sum(len(q) + len(d) for q, d in pairs)


SCORE_BAD = {
    "N:M": ({"queries": ["a", "b"], "documents": ["a", "b", "c"]}, "1:1, 1:N or N:N; got 2:3"),
    "N:1": ({"queries": ["a", "b"], "documents": "a"}, "1:1, 1:N or N:N; got 2:1"),
    "no side": ({"queries": "a"}, "give exactly one of"),
    "mixed names": ({"queries": "a", "data_2": "b"}, "give exactly one of"),
    "both names": ({"queries": "a", "documents": "b", "text_1": "a", "text_2": "b"}, "give exactly one of"),
    "empty": ({"queries": "a", "documents": []}, "at least one text"),
    "right truncation": ({"queries": "a", "documents": "b", "truncation_side": "right"}, "truncation_side"),
    "both": ({"queries": "a", "documents": "b", "use_activation": False, "calibrate": True}, "asks for logits"),
    "judge labels": ({"queries": "a", "documents": "b", "label_token_ids": [1, 2]}, "not a generative judge"),
}


@pytest.mark.parametrize(("body", "says"), SCORE_BAD.values(), ids=SCORE_BAD.keys())
def test_score_refuses(http, body, says):
    assert says in refused(http, "/score", **body)


def test_rerank_sorts_and_cuts(http):
    documents = [f"document {i}" for i in range(7)]
    expected = sorted(range(7), key=lambda i: -fingerprint("q", documents[i]))
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        for top_n, count in ((0, 7), (3, 3), (50, 7)):
            results = posted(http, path, query="q", documents=documents, top_n=top_n)["results"]
            assert [entry["index"] for entry in results] == expected[:count]
            assert [entry["document"]["text"] for entry in results] == [documents[i] for i in expected[:count]]
            assert [entry["relevance_score"] for entry in results] == pytest.approx(
                [expit(fingerprint("q", documents[i])) for i in expected[:count]]
            )


def test_a_failed_document_comes_last_with_its_reason(http):
    results = posted(http, "/rerank", query="q", documents=["nan", "a", "b"])["results"]
    assert results[2]["index"] == 0
    assert results[2]["relevance_score"] is None
    assert "not_finite" in results[2]["error"]
    assert [entry["error"] for entry in results[:2]] == [None, None]


def test_classify_gives_the_distribution_of_each_text():
    scorer = HashScorer(classifier(labels=3))
    with client(scorer) as http:
        for given, texts in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])):
            empty = "" if isinstance(texts[0], str) else []
            expected = np.array([[fingerprint(empty, text, k) for k in range(3)] for text in texts])
            data = posted(http, "/classify", input=given)["data"]
            np.testing.assert_allclose([entry["probs"] for entry in data], softmax(expected, axis=1), rtol=1e-6)
            assert [entry["label"] for entry in data] == [f"LABEL_{k}" for k in expected.argmax(1)]
            assert [entry["num_classes"] for entry in data] == [3] * len(texts)
            raw = posted(http, "/classify", input=given, use_activation=False)["data"]
            np.testing.assert_allclose([entry["probs"] for entry in raw], expected, rtol=1e-6)
        before = len(scorer.batches)
        for path, body in (("/score", {"queries": "q", "documents": "a"}), ("/rerank", {"query": "q", "documents": "a"}),
                           ("/get_reward", {"query": ["a"]})):  # fmt: skip
            assert "returns one number" in refused(http, path, **body)
        assert len(scorer.batches) == before


def test_rewards_are_raw_logits_in_the_shape_that_openrlhf_reads(http):
    texts = ["prompt and response", "another"]
    answer = posted(http, "/get_reward", query=texts, prompts=["prompt", "another"], labels=["4", None])
    logits = [fingerprint("", text) for text in texts]
    assert answer["rewards"] == answer["scores"] == answer["extra_logs"]["logits"] == logits
    assert answer["errors"] == [None, None]


def test_a_reward_that_is_not_a_number_is_null_and_never_zero(http):
    answer = posted(http, "/get_reward", query=["fine", "nan"])
    assert answer["rewards"] == [fingerprint("", "fine"), None]
    assert "not_finite" in answer["errors"][1]


def test_openrlhf_lists_must_match(http):
    assert "prompts: 1 entries for 2" in refused(http, "/get_reward", query=["a", "b"], prompts=["a"])
    assert "query" in refused(http, "/get_reward", prompts=["a"])


def test_a_judge_scores_with_its_first_label():
    scorer = HashScorer(judge())
    with client(scorer) as http:
        expected = [softmax(scorer.logprobs("q", text, [7, 9]))[0] for text in ("a", "b")]
        answer = posted(http, "/score", queries="q", documents=["a", "b"], label_token_ids=[7, 9])
        kept = [e if entry["error"] is None else None for e, entry in zip(expected, answer["data"], strict=True)]
        assert [entry["score"] for entry in answer["data"]] == pytest.approx(kept)
        assert "label_token_ids" in refused(http, "/score", queries="q", documents="a")
        assert "is a probability" in refused(
            http, "/score", queries="q", documents="a", label_token_ids=[7, 9], use_activation=False
        )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", {"query": "q", "items": ["a"]}),
        ("/score", {"queries": "q", "documents": "a"}),
        ("/rerank", {"query": "q", "documents": ["a"]}),
        ("/classify", {"input": "a"}),
    ],
)
def test_another_model_is_not_found_and_ours_is(http, path, body):
    for name in ("tests/hash-reward",):
        assert http.post(path, json=body | {"model": name}).status_code == 200
    error = http.post(path, json=body | {"model": "some/other"}).json()["error"]
    assert (error["code"], error["type"], error["param"]) == (404, "not_found", "model")
