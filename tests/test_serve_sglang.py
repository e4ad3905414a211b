"""POST /v1/score over real transformers models: SGLang's published behaviours, and every row of its table of refusals."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from rlalign.calibration.calibrators import ModelIdentity, PlattCalibrator
from rlalign.scoring.hf import HFScorer
from rlalign.scoring.http import HTTPScorer
from rlalign.scoring.params import ScoringParams
from rlalign.tiny_policy.tokenizer import byte_tokenizer
from tests.reward_serving import client, serving

LABELS = 4
SCORED = {"query": "Rate each:", "items": ["Good", "Bad", "Neither of them"]}


def save(model, folder) -> str:
    model.save_pretrained(folder)
    byte_tokenizer(512).save_pretrained(folder)
    return str(folder)


def qwen(**changes) -> Qwen3Config:
    tokenizer = byte_tokenizer(512)
    return Qwen3Config(
        vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=288, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    models = {
        "classifier": Qwen3ForSequenceClassification(qwen(num_labels=LABELS)),
        "reward": Qwen3ForSequenceClassification(qwen(num_labels=1)),
        "judge": Qwen3ForCausalLM(qwen()),
        "bert": BertForSequenceClassification(bert),
    }
    return {name: save(model, tmp_path_factory.mktemp(name)) for name, model in models.items()}


@pytest.fixture(scope="module")
def http(folders):
    with client(HFScorer(folders["classifier"])) as c:
        yield c


@pytest.fixture(scope="module")
def judge(folders):
    with client(HFScorer(folders["judge"])) as c:
        yield c


def scored(c, **changes) -> dict:
    response = c.post("/v1/score", json=SCORED | changes)
    assert response.status_code == 200, response.text
    return response.json()


def test_scores_are_the_heads_logits_as_transformers_computes_them(http, folders):
    model = Qwen3ForSequenceClassification.from_pretrained(folders["classifier"], dtype=torch.float64)
    tokenizer = byte_tokenizer(512)
    ids = [tokenizer.encode(SCORED["query"] + item) for item in SCORED["items"]]
    with torch.no_grad():
        expected = [model(torch.tensor([row])).logits[0].tolist() for row in ids]
    answer = scored(http)
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-5)
    assert answer["logits"] == answer["scores"]
    assert answer["object"] == "scoring"
    assert answer["calibration_id"] == "identity"
    assert answer["errors"] == [None, None, None]
    tokens = sum(map(len, ids))
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"]) == (tokens, tokens)


def test_hidden_states_are_lists_of_floats_one_an_item(http):
    states = scored(http, return_pooled_hidden_states=True)["pooled_hidden_states"]
    assert [len(state) for state in states] == [32] * 3
    assert all(isinstance(value, float) for state in states for value in state)
    assert len({tuple(state) for state in states}) == 3


def test_hidden_states_are_null_when_not_asked_for(http):
    assert scored(http)["pooled_hidden_states"] is None
    assert scored(http, return_pooled_hidden_states=False)["pooled_hidden_states"] is None


@pytest.mark.parametrize("count", [1, 3, 4, 5, 10])
def test_as_many_hidden_states_as_items(http, count):
    items = [f"Item {i}" for i in range(count)]
    answer = scored(http, items=items, return_pooled_hidden_states=True)
    assert len(answer["pooled_hidden_states"]) == len(answer["scores"]) == count


def test_hidden_states_are_those_before_the_head(http, folders):
    head = Qwen3ForSequenceClassification.from_pretrained(folders["classifier"]).score.weight.detach().double().numpy()
    answer = scored(http, return_pooled_hidden_states=True)
    np.testing.assert_allclose(np.array(answer["pooled_hidden_states"]) @ head.T, answer["scores"], atol=1e-5)


def test_scores_do_not_depend_on_the_flag_and_equal_requests_give_equal_answers(http):
    plain, first, second = (scored(http, return_pooled_hidden_states=flag) for flag in (False, True, True))
    assert plain["scores"] == first["scores"] == second["scores"]
    assert first["pooled_hidden_states"] == second["pooled_hidden_states"]


def test_base64_holds_the_same_float32_numbers(http):
    lists = scored(http, return_pooled_hidden_states=True)["pooled_hidden_states"]
    packed = scored(http, return_pooled_hidden_states=True, encoding_format="base64")["pooled_hidden_states"]
    decoded = [np.frombuffer(base64.b64decode(state), dtype="<f4").tolist() for state in packed]
    assert decoded == lists


def test_token_ids_score_as_the_text_they_stand_for(http):
    tokenizer = byte_tokenizer(512)
    query = tokenizer.encode(SCORED["query"])
    items = [tokenizer.encode(item, add_special_tokens=False) for item in SCORED["items"]]
    by_ids = scored(http, query=query, items=items, return_pooled_hidden_states=True)
    by_text = scored(http, return_pooled_hidden_states=True)
    np.testing.assert_allclose(by_ids["scores"], by_text["scores"], atol=1e-5)
    np.testing.assert_allclose(by_ids["pooled_hidden_states"], by_text["pooled_hidden_states"], atol=1e-5)


def test_order_of_items_is_the_order_of_scores(http):
    items = SCORED["items"]
    forward, backward = scored(http)["scores"], scored(http, items=items[::-1])["scores"]
    np.testing.assert_allclose(forward, backward[::-1], atol=1e-5)


def test_softmax_is_float64_with_temperature(http):
    logits = np.array(scored(http)["logits"])
    for temperature in (1.0, 0.5, 3.0):
        weights = np.exp(logits / temperature)
        answer = scored(http, apply_softmax=True, temperature=temperature)
        np.testing.assert_allclose(answer["scores"], weights / weights.sum(1, keepdims=True), rtol=1e-9)
        assert answer["logits"] == logits.tolist()


def test_label_token_ids_have_no_effect_on_a_classifier(http):
    assert scored(http, label_token_ids=[9454, 2753])["scores"] == scored(http)["scores"]


def test_no_items_no_scores(http):
    answer = scored(http, items=[])
    assert (answer["scores"], answer["errors"], answer["usage"]["prompt_tokens"]) == ([], [], 0)


def test_one_text_is_one_item(http):
    assert scored(http, items="Good")["scores"] == scored(http, items=["Good"])["scores"]


def test_judge_gives_label_probabilities_over_the_vocabulary_or_among_the_labels(judge, folders):
    labels = [60, 70]
    model = Qwen3ForCausalLM.from_pretrained(folders["judge"], dtype=torch.float64)
    tokenizer = byte_tokenizer(512)
    rows = [torch.tensor([tokenizer.encode(SCORED["query"] + item)]) for item in SCORED["items"]]
    with torch.no_grad():
        logits = torch.cat([model(row).logits[:, -1] for row in rows])
    absolute = logits.softmax(-1)[:, labels].numpy()
    answer = scored(judge, label_token_ids=labels, return_token_logprobs=True)
    np.testing.assert_allclose(answer["scores"], absolute, rtol=1e-4)
    np.testing.assert_allclose(answer["label_mass"], absolute.sum(1), rtol=1e-4)
    np.testing.assert_allclose(answer["token_logprobs"], np.log(absolute), atol=1e-4)
    among = scored(judge, label_token_ids=labels, apply_softmax=True, temperature=2.0, min_label_mass=0)
    np.testing.assert_allclose(among["scores"], (logits[:, labels] / 2).softmax(-1).numpy(), rtol=1e-4)
    assert among["pooled_hidden_states"] is None


def test_renormalised_answers_of_a_judge_that_says_something_else_are_flagged(judge):
    answer = scored(judge, label_token_ids=[60, 70], apply_softmax=True)
    assert max(answer["label_mass"]) < 0.5
    assert answer["errors"] == ["low_label_mass"] * 3
    assert scored(judge, label_token_ids=[60, 70], apply_softmax=True, min_label_mass=0)["errors"] == [None] * 3


def refused(c, **changes) -> str:
    response = c.post("/v1/score", json=SCORED | changes)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, 400, "invalid_request"), response.text
    return error["message"]


def test_hidden_states_of_a_causal_lm_are_refused_by_name(judge):
    assert "CausalLM" in refused(judge, label_token_ids=[1, 2], return_pooled_hidden_states=True)


def test_hidden_states_of_a_cross_encoder_are_refused_by_name(folders):
    with client(HFScorer(folders["bert"])) as c:
        assert "CrossEncodingPooler" in refused(c, return_pooled_hidden_states=True)
        assert len(scored(c)["scores"]) == 3


def test_embeddings_are_neither_calibrated_nor_softmaxed(judge):
    answer = scored(judge, task="embed")
    assert [len(row) for row in answer["scores"]] == [32] * 3
    assert [np.linalg.norm(row) for row in answer["scores"]] == pytest.approx([1.0] * 3)
    assert answer["logits"] == [None] * 3
    assert "has no labels" in refused(judge, task="embed", apply_softmax=True)
    assert "calibrated" in refused(judge, task="embed", calibrate=True)


def test_a_calibration_in_force_leaves_embeddings_alone(folders, tmp_path):
    platt = PlattCalibrator().fit([-3.0, -1.0, 0.5, 2.0] * 20, [0, 0, 1, 1, 0, 1, 0, 1] * 10)
    platt.save(tmp_path / "c.json", model=ModelIdentity(id=folders["judge"]))
    with client(HFScorer(folders["judge"]), json.loads((tmp_path / "c.json").read_text())) as c:
        embedded = scored(c, task="embed")
        assert (embedded["errors"], embedded["calibration_id"]) == ([None] * 3, "identity")
        judged = scored(c, label_token_ids=[60, 70], min_label_mass=0)
        assert judged["calibration_id"] == platt.calibration_id


def test_our_client_gets_what_the_scorer_gives_in_process(folders):
    for name, params in (("reward", None), ("judge", ScoringParams(label_token_ids=[60, 70], min_label_mass=0))):
        scorer = HFScorer(folders[name])
        with serving(scorer) as url:
            there = HTTPScorer(url, "sglang").score(SCORED["query"], SCORED["items"], params)
        here = scorer.score(SCORED["query"], SCORED["items"], params)
        np.testing.assert_allclose(there.scores, here.scores, atol=1e-5)
        np.testing.assert_allclose(there.logits, here.logits, atol=1e-5)


def test_the_softmax_of_one_label_is_refused(folders):
    with client(HFScorer(folders["reward"])) as c:
        assert "always 1.0" in refused(c, apply_softmax=True)


BAD_LABELS = {
    "absent": None, "empty": [], "negative": [-1, 2], "boolean": [True, 2], "fraction": [1.5, 2], "twice": [5, 5],
    "outside": [5, 100_000], "an empty item": [[1, 2], [], [1, 2]], "too few lists": [[1, 2], [1, 2]],
}  # fmt: skip


@pytest.mark.parametrize("labels", BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_bad_labels_of_a_judge(judge, labels):
    assert "label_token_ids" in refused(judge, label_token_ids=labels)


BAD = {
    "items null": ({"items": None}, "items must be provided"),
    "text with ids": ({"items": [[1, 2]]}, "Invalid combination of query/items types"),
    "ids with text": ({"query": [1, 2]}, "Invalid combination of query/items types"),
    "mixed items": ({"items": ["a", [1]]}, "Invalid combination of query/items types"),
    "id outside": ({"query": [1], "items": [[1, 288]]}, "288"),
    "negative id": ({"query": [1], "items": [[-1]]}, "greater than or equal to 0"),
    "boolean id": ({"query": [1], "items": [[True]]}, "integer"),
    "token logprobs": ({"return_token_logprobs": True}, "return_token_logprobs"),
    "temperature alone": ({"temperature": 2.0}, "apply_softmax"),
    "temperature 0": ({"temperature": 0, "apply_softmax": True}, "greater than 0"),
    "temperature below 0": ({"temperature": -1.0, "apply_softmax": True}, "greater than 0"),
    "setwise": ({"score_extraction_token": "<x>"}, "not supported"),
    "embedding overrides": ({"embed_override_token_id": 3}, "not supported"),
    "unknown field": ({"apply_sofmax": True}, "apply_sofmax: unknown field"),
    "calibrate without": ({"calibrate": True}, "no calibration is in force"),
    "wrong type": ({"items": 7}, "items"),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD.keys())
def test_what_is_refused(http, changes, says):
    assert says in refused(http, **changes)


@pytest.mark.parametrize(("item", "says"), [("", "the item is empty"), ("x" * 600, "reads at most 512")])
def test_an_item_that_cannot_be_read_is_null_with_its_reason(http, item, says):
    answer = scored(http, items=[SCORED["items"][0], item, SCORED["items"][1]])
    assert answer["errors"][0] is answer["errors"][2] is None and says in answer["errors"][1]
    assert answer["scores"][1] is answer["logits"][1] is None
    assert [answer["scores"][i] for i in (0, 2)] == scored(http, items=SCORED["items"][:2])["scores"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_know(http, number):
    body = json.dumps(SCORED | {"apply_softmax": True})[:-1] + f', "temperature": {number}}}'
    response = http.post("/v1/score", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


def test_every_wrong_parameter_is_named_at_once(judge):
    message = refused(
        judge, label_token_ids=[1, 2], return_pooled_hidden_states=True, step_tag_id=3, max_tokens_per_item=0
    )
    assert "return_pooled_hidden_states" in message
    assert "max_tokens_per_item" in message
