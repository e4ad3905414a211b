"""vLLM's and OpenRLHF's shapes, checked against what the scorer itself says of each pair."""

from __future__ import annotations

import msgspec
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
    "another side": ({"queries": "a", "documents": "b", "truncation_side": "both"}, "truncation_side"),
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


# --- requests of the clients that people have ---


@pytest.mark.parametrize("more", [{}, {"return_pooled_hidden_states": True}])
@pytest.mark.parametrize("items", [["Sacramento"], ["Sacramento", "New York", "Los Angeles"]])
def test_sglang_s_requests_name_any_model(http, items, more):
    """As SGLang's documentation sends them: "model": "test", labels of a judge beside a classifier."""
    body = {
        "query": "Is this city in California?",
        "items": items,
        "label_token_ids": [9454, 2753],
        "model": "test",
    } | more
    answer = posted(http, "/v1/score", **body)
    assert answer["scores"] == [[fingerprint(body["query"], item)] for item in items]
    assert answer["model"] == "tests/hash-reward"


def test_one_model_can_be_asked_for_by_name(http):
    (listed,) = http.get("/v1/models").json()["data"]
    card = http.get(f"/v1/models/{listed['id']}")
    assert (card.status_code, card.json()) == (200, listed)
    error = http.get("/v1/models/some/other").json()["error"]
    assert (error["code"], error["type"]) == (404, "not_found")


def test_cohere_s_requests(http):
    texts = ["a", "b", "nan"]
    plain = posted(http, "/v2/rerank", query="q", documents=texts)["results"]
    assert posted(http, "/v2/rerank", query="q", documents=texts, priority=1)["results"] == plain
    objects = [{"text": text} for text in texts]
    assert posted(http, "/v1/rerank", query="q", documents=objects, return_documents=True)["results"] == plain
    bare = posted(http, "/v1/rerank", query="q", documents=objects, return_documents=False)["results"]
    assert bare == [entry | {"document": None} for entry in plain]


def test_equal_probabilities_are_ranked_by_their_logits(monkeypatch):
    scorer = HashScorer()
    monkeypatch.setattr(HashScorer, "logits", lambda self, query, item: np.float32([40 + len(item)]))
    with client(scorer) as http:
        results = posted(http, "/rerank", query="q", documents=["a", "aaa", "aa"])["results"]
    assert [entry["relevance_score"] for entry in results] == [1.0] * 3
    assert [entry["index"] for entry in results] == [1, 2, 0]


def test_classes_have_the_names_of_the_model():
    with client(HashScorer(msgspec.structs.replace(classifier(labels=3), labels=("bad", "fair", "good")))) as http:
        best = int(np.argmax([fingerprint("", "a", k) for k in range(3)]))
        assert posted(http, "/classify", input="a")["data"][0]["label"] == ("bad", "fair", "good")[best]


@pytest.mark.parametrize(("path", "body", "read"), [
    ("/v1/score", {"query": "q", "items": ["a", "", "b"]}, lambda a: list(zip(a["scores"], a["errors"], strict=True))),
    ("/score", {"queries": "q", "documents": ["a", "", "b"]}, lambda a: [(e["score"], e["error"]) for e in a["data"]]),
    ("/classify", {"input": ["a", "", "b"]}, lambda a: [(e["probs"], e["error"]) for e in a["data"]]),
    ("/get_reward", {"query": ["a", "", "b"]}, lambda a: list(zip(a["rewards"], a["errors"], strict=True))),
])  # fmt: skip
def test_an_item_that_cannot_be_scored_is_null_with_its_reason_and_the_others_are_scored(http, path, body, read):
    key = next(name for name, value in body.items() if isinstance(value, list))
    answer, alone = read(posted(http, path, **body)), read(posted(http, path, **body | {key: ["a", "b"]}))
    assert [answer[0], answer[2]] == alone
    assert answer[1] == (None, "the item is empty: it has no token of its own whose state could be scored")
    assert [value for value, _ in read(posted(http, path, **body | {key: [""]}))] == [None]
