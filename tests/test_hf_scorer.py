"""HFScorer against transformers: each architecture's scores are those of the model run on one sequence alone."""

import math

import numpy as np
import pytest
import torch

from rlalign.scoring import HFScorer, ScoringParams
from rlalign.scoring.params import PoolerDefaults
from tests.reward_models import ENCODERS, KINDS, model_of, reference, saved, scorer_of, tokenizer_of, words

QUERY, ITEMS = "What is 2 + 2? ", ["4", "twenty-two", "The sum is four, I think."]
DECODERS = ["one_label", "three_labels", "gemma", "mistral", "gpt2", "bloom", "jamba"]
PAIRS = ["bert", "xlmr"]
YES, NO = 40, 50


def encoded(kind, query, item):
    """One sequence as the tokenizer itself encodes it."""
    tokenizer = tokenizer_of(kind)
    if kind in ENCODERS:
        found = tokenizer(query, item) if query or kind in PAIRS else tokenizer(item)
        return found["input_ids"], found["token_type_ids"]
    return tokenizer(query)["input_ids"] + tokenizer(item, add_special_tokens=False)["input_ids"], None


def close(got, expected):
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query", [QUERY, ""])
@pytest.mark.parametrize("kind", [*DECODERS, "bert", "xlmr"])
def test_sequence_classifiers_give_the_model_s_own_raw_logits(kind, query):
    result = scorer_of(kind).score(query, ITEMS)
    for i, item in enumerate(ITEMS):
        ids, types = encoded(kind, query, item)
        close(result.scores[i], reference(kind, ids, types).logits[0])
        assert result.prompt_tokens[i] == len(ids)
    assert result.errors == [None] * 3 and result.calibration_id == "identity"
    assert all((a == b).all() for a, b in zip(result.scores, result.logits, strict=True))


@pytest.mark.parametrize("kind", ["one_label", "three_labels"])
def test_token_ids_are_read_as_they_are(kind):
    query, items = words(9, 1), [words(3, 2), words(7, 3)]
    result = scorer_of(kind).score(query, items)
    for item, score in zip(items, result.scores, strict=True):
        close(score, reference(kind, query + item).logits[0])


def test_a_cross_encoder_separates_the_token_ids_of_a_pair():
    query, item = words(5, 1), words(4, 2)
    ids = [1, *query, 2, *item, 2]
    close(
        scorer_of("bert").score(query, [item]).scores[0],
        reference("bert", ids, [0] * 7 + [1] * 5).logits[0],
    )


@pytest.mark.parametrize(("kind", "activate"), [
    ("one_label", torch.sigmoid), ("three_labels", lambda x: x.softmax(-1)), ("bert", torch.sigmoid),
])  # fmt: skip
def test_activation_mean_and_sigma_come_on_request_and_leave_the_logits(kind, activate):
    raw = scorer_of(kind).score(QUERY, ITEMS)
    asked = scorer_of(kind).score(QUERY, ITEMS, ScoringParams(use_activation=True, logit_sigma=2.0))
    for before, logits, score in zip(raw.logits, asked.logits, asked.scores, strict=True):
        close(logits, before)
        close(score, activate(torch.tensor(before, dtype=torch.float64) / 2.0))
    shifted = scorer_of(kind).score(QUERY, ITEMS, ScoringParams(logit_mean=0.5, logit_sigma=4.0))
    close(np.stack(shifted.scores), (np.stack(raw.scores) - 0.5) / 4.0)


@pytest.mark.parametrize(("problem", "expected"), [
    ("regression", lambda x: x), ("multi_label_classification", torch.sigmoid),
    ("single_label_classification", lambda x: x.softmax(-1)),
])  # fmt: skip
def test_the_activation_follows_the_problem_type(problem, expected, monkeypatch):
    monkeypatch.setattr(model_of("three_labels").config, "problem_type", problem)
    scorer = HFScorer.wrap(model_of("three_labels"), tokenizer_of("three_labels"), id="typed")
    result = scorer.score(QUERY, ITEMS, ScoringParams(use_activation=True))
    for logits, score in zip(result.logits, result.scores, strict=True):
        close(score, expected(torch.tensor(logits, dtype=torch.float64)))


@pytest.mark.parametrize("kind", ["process", "bert_tagger"])
def test_token_classifiers_give_a_row_for_every_token(kind):
    result = scorer_of(kind).score(QUERY, ITEMS)
    for item, score in zip(ITEMS, result.scores, strict=True):
        ids, types = encoded(kind, QUERY, item)
        close(score, reference(kind, ids, types).logits[0])
        assert len(score) == len(ids)
    soft = scorer_of(kind).score(QUERY, ITEMS, ScoringParams(use_activation=True))
    close(soft.scores[1], torch.tensor(result.logits[1], dtype=torch.float64).softmax(-1))


def step_scorer(kind, **pooler):
    pooler = PoolerDefaults(token_pooling="STEP", **pooler)
    return HFScorer.wrap(model_of(kind), tokenizer_of(kind), id=kind, pooler=pooler)


def test_step_pooling_keeps_the_rows_of_the_tag_and_the_columns_asked_for():
    tag = 7
    query, items = words(5, 1, low=10), [[11, tag, 12, 13, tag], [14, tag], [15, 16]]
    result = step_scorer("process", step_tag_id=tag, returned_token_ids=(1,)).score(query, items)
    for item, score in list(zip(items, result.scores, strict=True))[:2]:
        rows = [t for t, token in enumerate(query + item) if token == tag]
        close(score, reference("process", query + item).logits[0, rows][:, [1]])
    assert result.scores[2] is None and "step_tag_id=7" in result.errors[2]
    other = step_scorer("process", step_tag_id=tag).score(query, items[:1], ScoringParams(step_tag_id=12))
    assert len(other.scores[0]) == 1


def test_a_causal_lm_can_be_a_step_model_over_two_of_its_tokens():
    tag, good, bad = 7, 30, 31
    scorer = step_scorer("judge", step_tag_id=tag, returned_token_ids=(good, bad))
    item = [11, tag, 12, tag]
    result = scorer.score([20, 21], [item], ScoringParams(task="token_classify", use_activation=True))
    logits = reference("judge", [20, 21, *item]).logits[0, [3, 5]][:, [good, bad]]
    close(result.logits[0], logits)
    close(result.scores[0], logits.double().softmax(-1))


@pytest.mark.parametrize("kind", ["judge", "capped_judge", "scaled_judge"])
def test_a_judge_gives_label_probabilities_and_their_mass(kind):
    params = ScoringParams(label_token_ids=[YES, NO], min_label_mass=0.0, return_token_logprobs=True)
    result = scorer_of(kind).score(QUERY, ITEMS, params)
    for i, item in enumerate(ITEMS):
        logprobs = reference(kind, encoded(kind, QUERY, item)[0]).logits[0, -1].double().log_softmax(-1)[[YES, NO]]
        close(result.logits[i], logprobs)
        close(result.token_logprobs[i], logprobs)
        close(result.scores[i], logprobs.exp() / logprobs.exp().sum())
        assert result.label_mass[i] == pytest.approx(float(logprobs.exp().sum()), rel=1e-4)


def test_temperature_divides_the_judge_s_log_odds():
    base = {"label_token_ids": [YES, NO], "min_label_mass": 0.0}
    one, two = (scorer_of("judge").score(QUERY, ITEMS, ScoringParams(temperature=t, **base)) for t in (1.0, 2.0))
    for sharp, soft in zip(one.scores, two.scores, strict=True):
        assert math.log(soft[0] / soft[1]) == pytest.approx(math.log(sharp[0] / sharp[1]) / 2.0, abs=1e-4)


def test_labels_among_the_whole_vocabulary_do_not_add_up_to_one():
    params = ScoringParams(label_token_ids=[YES], full_vocabulary=True, min_label_mass=0.0)
    result = scorer_of("judge").score(QUERY, ITEMS, params)
    close(np.concatenate(result.scores), np.exp(np.concatenate(result.logits)))
    assert result.token_logprobs is None


def test_each_item_may_have_labels_of_its_own():
    labels = [[YES, NO], [60, 61], [NO, YES]]
    result = scorer_of("judge").score(QUERY, ITEMS, ScoringParams(label_token_ids=labels, min_label_mass=0.0))
    for i, pair in enumerate(labels):
        alone = scorer_of("judge").score(QUERY, ITEMS[i], ScoringParams(label_token_ids=pair, min_label_mass=0.0))
        close(result.scores[i], alone.scores[0])


def test_a_judge_that_means_neither_label_gives_no_reward():
    result = scorer_of("judge").score(QUERY, ITEMS, ScoringParams(label_token_ids=[YES, NO]))
    assert max(result.label_mass) < 0.5
    assert result.errors == ["low_label_mass"] * 3 and result.rewards(0) == [None] * 3
    assert all(score is not None for score in result.scores)  # kept, to look at


@pytest.mark.parametrize(("kind", "pooling", "rows"), [
    ("embedder", None, slice(-1, None)), ("embedder", "MEAN", slice(None)), ("embedder", "CLS", slice(0, 1)),
    ("bert_embedder", None, slice(0, 1)), ("bert_embedder", "MEAN", slice(None)),
])  # fmt: skip
def test_embeddings_pool_the_states_and_have_unit_length(kind, pooling, rows):
    scorer = HFScorer.wrap(
        model_of(kind), tokenizer_of(kind), id=kind, pooler=PoolerDefaults(pooling=pooling) if pooling else None
    )
    result, plain = (scorer.score("", ITEMS, ScoringParams(use_activation=use)) for use in (None, False))
    for i, item in enumerate(ITEMS):
        ids, types = encoded(kind, "", item)
        state = reference(kind, ids, types).last_hidden_state[0, rows].double().mean(0)
        close(plain.scores[i], state)
        close(result.scores[i], state / state.norm())
    assert result.logits == [None] * 3


def test_matryoshka_embeddings_are_cut_before_they_are_normalised():
    whole = scorer_of("embedder").score("", ITEMS, ScoringParams(use_activation=False))
    cut = scorer_of("embedder").score("", ITEMS, ScoringParams(dimensions=8))
    for long, short in zip(whole.scores, cut.scores, strict=True):
        close(short, long[:8] / np.linalg.norm(long[:8]))


def test_token_embeddings_are_the_states_of_every_token():
    result = scorer_of("embedder").score("", ITEMS, ScoringParams(task="token_embed", use_activation=False))
    ids, _ = encoded("embedder", "", ITEMS[2])
    close(result.scores[2], reference("embedder", ids).last_hidden_state[0])


def test_a_scorer_from_a_folder_is_the_one_from_memory(tmp_path):
    folder = saved("three_labels", tmp_path / "rm")
    loaded, wrapped = HFScorer(folder), scorer_of("three_labels")
    close(np.stack(loaded.score(QUERY, ITEMS).scores), np.stack(wrapped.score(QUERY, ITEMS).scores))
    assert loaded.info.id == folder and loaded.info.num_labels == 3 and loaded.info.head_dtype == "float32"


def test_a_sentence_transformers_folder_states_its_pooling(tmp_path):
    import json

    folder = saved("embedder", tmp_path / "emb")
    (tmp_path / "emb/1_Pooling").mkdir()
    (tmp_path / "emb/1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (tmp_path / "emb/modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling"}]))
    scorer = HFScorer(folder)
    assert (scorer.info.pooler.pooling, scorer.info.pooler.use_activation) == ("MEAN", False)
    ids, _ = encoded("embedder", "", ITEMS[0])
    close(scorer.score("", ITEMS[0]).scores[0], reference("embedder", ids).last_hidden_state[0].mean(0))


def test_the_head_of_a_bf16_model_is_multiplied_in_float32(tmp_path):
    scorer = HFScorer(saved("one_label", tmp_path / "rm"), dtype="bfloat16")
    result = scorer.score(QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=True))
    weight = model_of("one_label").score.weight.detach().bfloat16()
    for score, state in zip(result.scores, result.pooled_hidden_states, strict=True):
        close(score, state.double() @ weight.double().T)
        assert not np.array_equal(score, torch.tensor(score).bfloat16().float().numpy())
    assert (scorer.info.dtype, scorer.info.head_dtype) == ("bfloat16", "float32")


def test_a_model_that_cannot_score_is_refused(tmp_path):
    import transformers

    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is not a model that can score"):
        HFScorer(tmp_path)


def test_logits_transformed_in_an_unknown_way_are_refused(monkeypatch):
    model = model_of("judge")
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 3.0 * torch.nn.functional.linear(x, model.lm_head.weight))
    with pytest.raises(ValueError, match="differ from its lm_head's"):
        HFScorer.wrap(model, tokenizer_of("judge"), id="scaled")


def test_every_kind_says_what_it_is():
    for kind in KINDS:
        info = scorer_of(kind).info
        assert info.packs == (info.packing_reason == "") and info.exposes_hidden_states == (kind in DECODERS)
        assert info.exposes_hidden_states or info.hidden_states_reason
        assert info.causal == (kind not in ENCODERS)
