"""What HFScorer does with every kind of input: the rows of the behaviour table, and independence of the batch."""

import numpy as np
import pytest
import torch

from rlalign.scoring import HFScorer, ScoringParams
from rlalign.scoring.hf import forward_pass
from tests.reward_models import KINDS, model_of, reference, scorer_of, tokenizer_of, words

QUERY, ITEMS = "What is 2 + 2? ", ["4", "twenty-two", "The sum is four, I think."]


def close(got, expected):
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=0, atol=1e-5)


@pytest.fixture
def no_computation(monkeypatch):
    """Any forward pass fails."""

    def used(*args, **kwargs):
        raise AssertionError("the model was run")

    for kind in KINDS:
        scorer_of(kind)
    monkeypatch.setattr(forward_pass, "row_batch", used)


def test_no_items_give_an_empty_result_without_a_call(no_computation):
    result = scorer_of("one_label").score(QUERY, [])
    assert len(result) == 0 and result.scores == [] and result.rewards() == []
    assert (
        scorer_of("one_label").score(QUERY, [], ScoringParams(return_pooled_hidden_states=True)).pooled_hidden_states
        == []
    )


def test_a_bare_string_or_list_of_ids_is_one_item():
    scorer = scorer_of("one_label")
    close(scorer.score(QUERY, ITEMS[1]).scores, scorer.score(QUERY, [ITEMS[1]]).scores)
    close(scorer.score([5, 6], [7, 8]).scores, scorer.score([5, 6], [[7, 8]]).scores)


@pytest.mark.parametrize("kind", ["one_label", "judge", "bert"])
def test_an_empty_query_scores_the_item_alone(kind):
    params = (
        ScoringParams(label_token_ids=[40, 50], min_label_mass=0.0)
        if kind == "judge"
        else ScoringParams(alone=kind == "bert")
    )
    found = tokenizer_of(kind)(ITEMS[1])
    logits = reference(kind, found["input_ids"], found["token_type_ids"] if kind == "bert" else None).logits[0]
    expected = logits[-1].log_softmax(-1)[[40, 50]] if kind == "judge" else logits
    close(scorer_of(kind).score("", ITEMS[1], params).logits[0], expected)


@pytest.mark.parametrize(("query", "items", "says"), [
    (QUERY, None, "items must be provided"),
    (None, ITEMS, "query must be provided"),
    (QUERY, ["4", ""], "item 1 is empty"),
    ([5, 6], [[7], []], "item 1 is empty"),
    (QUERY, [[5, 6]], "Invalid combination of query/items types"),
    ([5, 6], ["4"], "Invalid combination of query/items types"),
    (QUERY, ["4", [5]], "Invalid combination of query/items types"),
    ([5, 6], [[7, -1]], "item 0: -1 at position 1 is not a token id from 0 to 267"),
    ([5, 6], [[7], [268]], "item 1: 268 at position 0"),
    ([5, True], [[7]], "query: True at position 1"),
    ([5, 6.0], [[7]], "query: 6.0 at position 1"),
])  # fmt: skip
def test_bad_inputs_are_refused_before_any_computation(query, items, says, no_computation):
    with pytest.raises(ValueError, match=says):
        scorer_of("one_label").score(query, items)


@pytest.mark.parametrize(("kind", "params", "says"), [
    ("judge", ScoringParams(), "label_token_ids"),
    ("judge", ScoringParams(label_token_ids=[1, 2, 3, 268]), "268 is not an id"),
    ("judge", ScoringParams(label_token_ids=[[1, 2]] * 2), "2 lists for 3 items"),
    ("one_label", ScoringParams(return_token_logprobs=True), "return_token_logprobs"),
    ("one_label", ScoringParams(temperature=2.0), "temperature"),
    ("one_label", ScoringParams(task="generative"), "supports classify"),
    ("process", ScoringParams(return_pooled_hidden_states=True), "return_pooled_hidden_states"),
])  # fmt: skip
def test_bad_parameters_are_refused_before_any_computation(kind, params, says, no_computation):
    with pytest.raises(ValueError, match=says):
        scorer_of(kind).score(QUERY, ITEMS, params)


def test_one_reward_an_item_needs_to_know_the_label():
    result = scorer_of("three_labels").score(QUERY, ITEMS)
    with pytest.raises(ValueError, match="say which one with label_index"):
        result.rewards()
    close(result.rewards(label_index=2), [logits[2] for logits in result.scores])
    assert len(scorer_of("one_label").score(QUERY, ITEMS).rewards()) == 3


@pytest.mark.parametrize("kind", ["one_label", "jamba", "bert", "xlmr", "gpt2", "process", "bert_embedder"])
@pytest.mark.slow
def test_an_item_s_score_does_not_depend_on_what_else_is_in_the_batch(kind):
    items = [("word " * n).strip() for n in (1, 9, 3, 14, 2, 6, 1, 11)]
    together = scorer_of(kind, "never").score(QUERY, items)
    one_by_one = [scorer_of(kind, "never").score(QUERY, item).scores[0] for item in items]
    small = HFScorer.wrap(model_of(kind), tokenizer_of(kind), id="small", packing="never", max_batch_tokens=1)
    for batched, alone, tight in zip(together.scores, one_by_one, small.score(QUERY, items).scores, strict=True):
        close(batched, alone)
        close(tight, alone)


def test_a_forward_pass_keeps_to_the_token_budget_and_to_similar_lengths(monkeypatch):
    scorer = HFScorer.wrap(model_of("one_label"), None, id="small", packing="never", max_batch_tokens=60)
    batches, lay_out = [], forward_pass.row_batch
    monkeypatch.setattr(
        forward_pass, "row_batch", lambda rows, **at: batches.append([r.length for r in rows]) or lay_out(rows, **at)
    )
    items = [words(n, n) for n in (3, 25, 4, 26, 70, 5, 24, 3)]
    scorer.score([9], items)
    assert sorted(batches) == [[4, 4, 5, 6], [25, 26], [27], [71]]
    assert all(len(lengths) == 1 or len(lengths) * max(lengths) <= 60 for lengths in batches)


def test_the_tokenizer_s_padding_side_and_pad_token_do_not_matter():
    scores = []
    for side in ("left", "right"):
        tokenizer = tokenizer_of("one_label")
        tokenizer.padding_side = side
        scores.append(HFScorer.wrap(model_of("one_label"), tokenizer, id=side).score(QUERY, ITEMS).scores)
    close(*scores)
    ends_in_pad = [*words(4, 1), 0]
    state = model_of("one_label").model(input_ids=torch.tensor([ends_in_pad])).last_hidden_state[0, -1]
    close(scorer_of("one_label").score([], [ends_in_pad]).scores[0], model_of("one_label").score(state).detach())


def test_a_score_that_is_not_finite_is_an_error_and_no_reward(monkeypatch):
    model = model_of("one_label")
    before = model.model.embed_tokens.weight.data.clone()
    try:
        model.model.embed_tokens.weight.data[9] = float("nan")
        result = HFScorer.wrap(model, None, id="broken", packing="never").score([5], [[6], [9], [7]])
    finally:
        model.model.embed_tokens.weight.data.copy_(before)
    assert result.scores[1] is None and "not finite" in result.errors[1]
    assert result.rewards()[1] is None and None not in (result.rewards()[0], result.rewards()[2])


def too_long(kind):
    limit = scorer_of(kind).info.max_length
    return limit, words(limit // 2, 1), [words(4, 2), words(limit, 3)]


@pytest.mark.parametrize("kind", ["gpt2", "bert", "xlmr"])
def test_too_long_an_input_is_an_error_unless_truncation_was_asked_for(kind):
    limit, query, items = too_long(kind)
    with pytest.raises(ValueError, match=f"item 1: .* reads at most {limit}"):
        scorer_of(kind).score(query, items)
    result = scorer_of(kind).score(query, items, ScoringParams(truncate_prompt_tokens=-1))
    assert result.truncated == [False, True] and result.prompt_tokens[1] == limit


def test_truncation_keeps_the_last_tokens():
    query, items = words(6, 1), [words(3, 2), words(9, 3)]
    for keep in (1, 4, 8, 14, 15, 20):
        result = scorer_of("one_label").score(query, items, ScoringParams(truncate_prompt_tokens=keep))
        for item, score in zip(items, result.scores, strict=True):
            close(score, reference("one_label", (query + item)[-keep:]).logits[0])
        assert result.truncated == [keep < 9, keep < 15]


def test_truncation_keeps_the_special_tokens_of_text():
    ids = tokenizer_of("one_label")(QUERY + ITEMS[2])["input_ids"]
    result = scorer_of("one_label").score(QUERY, ITEMS[2], ScoringParams(truncate_prompt_tokens=6))
    close(result.scores[0], reference("one_label", [ids[0], *ids[-5:]]).logits[0])
    with pytest.raises(ValueError, match="leaves no room beside the model's 3 special tokens"):
        scorer_of("bert").score(QUERY, ITEMS, ScoringParams(truncate_prompt_tokens=3))


@pytest.mark.parametrize("keep", [5, 12, 13, 20, 30, 40])
def test_a_pair_is_cut_as_its_tokenizer_would_cut_the_longer_part_first(keep):
    tokenizer = tokenizer_of("bert")
    tokenizer.truncation_side = "left"
    for query, item in ((QUERY, ITEMS[2]), (ITEMS[2], QUERY), (QUERY, "4"), ("4", ITEMS[2])):
        expected = tokenizer(query, item, truncation="longest_first", max_length=keep)
        request = scorer_of("bert").prepare(query, item, ScoringParams(truncate_prompt_tokens=keep))
        tokens = [*request.sequences[0].shared, *request.sequences[0].own]
        assert (tokens, list(request.sequences[0].type_ids)) == (expected["input_ids"], expected["token_type_ids"])


def test_items_can_be_cut_to_their_first_tokens():
    query, items = words(6, 1), [words(3, 2), words(9, 3)]
    result = scorer_of("one_label").score(query, items, ScoringParams(max_tokens_per_item=4))
    close(result.scores[1], reference("one_label", query + items[1][:4]).logits[0])
    assert result.truncated == [False, True] and result.prompt_tokens == [9, 10]


def test_text_needs_a_tokenizer_and_a_cross_encoder_needs_it_always():
    with pytest.raises(ValueError, match="no tokenizer was found beside the model; pass token ids"):
        HFScorer.wrap(model_of("one_label"), None, id="bare").score(QUERY, ITEMS)
    with pytest.raises(ValueError, match="a cross-encoder needs its tokenizer"):
        HFScorer.wrap(model_of("bert"), None, id="bare")


def test_ascore_gives_the_same_scores_to_many_at_once():
    import asyncio

    async def two():
        return await asyncio.gather(*(scorer_of("one_label").ascore(QUERY, item) for item in ITEMS))

    close([r.scores[0] for r in asyncio.run(two())], scorer_of("one_label").score(QUERY, ITEMS).scores)
