"""Multi-item packing: the layout by lengths alone, and scores that equal each item's own."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.scoring import HFScorer, ScoringParams
from rlalign.scoring.hf import forward_pass
from rlalign.scoring.hf.forward_pass import Row, row_batch, split_by_budget, worthwhile_groups
from tests.reward_models import model_of, reference, scorer_of, tokenizer_of, words

PACKED = ["one_label", "three_labels", "process", "judge", "embedder"]


def laid_out(*rows):
    return row_batch(rows, pad_token_id=0, device=torch.device("cpu"))


def run_of(request_scorer, query, items, params=None):
    """The result, and how many tokens the model read for it."""
    request = request_scorer.prepare(query, items, params)
    return request_scorer.run([request])[0], request.num_tokens


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=0, atol=atol)


def params_for(kind):
    judge = {"label_token_ids": [40, 50], "min_label_mass": 0.0} if kind == "judge" else {}
    return ScoringParams(**judge)


@pytest.mark.parametrize(("query", "items", "positions", "segments"), [
    # SGLang's metadata for 14 tokens with delimiters at 7, 9, 11, 13 and for 13 with 4, 7, 10, less its delimiters
    (7, [1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7, 7, 7], [0] * 7 + [1, 2, 3]),
    (4, [2, 2, 2], [0, 1, 2, 3, 4, 5, 4, 5, 4, 5], [0] * 4 + [1, 1, 2, 2, 3, 3]),
    (0, [2, 1], [0, 1, 0], [1, 1, 2]),
    (3, [1], [0, 1, 2, 3], [0, 0, 0, 1]),
])  # fmt: skip
def test_every_item_continues_where_the_query_ends(query, items, positions, segments):
    batch = laid_out(Row(query=words(query, 1), items=[words(n, 2) for n in items]))
    assert batch.position_ids_BL[0].tolist() == positions
    assert batch.segment_BL[0].tolist() == segments


def test_rows_of_a_batch_are_split_each_by_its_own_lengths():
    batch = laid_out(Row(query=[5, 6], items=[[7, 8], [9]]), Row(query=[5], items=[[6, 7]]))
    assert batch.token_ids_BL.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]]
    assert batch.segment_BL.tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, -1, -1]]
    assert batch.attention_mask_BL.sum(1).tolist() == [5, 3]
    assert Row(query=[5, 6], items=[[7, 8], [9]]).spans == [(2, 4), (4, 5)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(1, 4), min_size=1, max_size=5)), min_size=1, max_size=3)
)
def test_a_token_sees_the_query_and_its_own_item_so_far(shapes):
    rows = [Row(query=[9] * query, items=[[9] * n for n in items]) for query, items in shapes]
    seen = laid_out(*rows).block_mask_B1LL()[:, 0]
    for row, mask_LL in zip(rows, seen, strict=True):
        for t in range(row.length):
            own = next(((s, e) for s, e in row.spans if s <= t < e), (0, 0))
            expected = {k for k in range(t + 1) if k < len(row.query) or own[0] <= k < own[1]}
            assert set(mask_LL[t].nonzero()[:, 0].tolist()) == expected
    assert bool(seen.any(-1).all())  # a row without any key would be NaN in some kernels


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.lists(st.integers(1, 9), max_size=12), st.integers(1, 40))
def test_rows_keep_to_the_budget_and_to_the_order(query, lengths, budget):
    groups = split_by_budget(query, lengths, budget)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or query + sum(lengths[i] for i in group) <= budget
    for left, right in pairwise(groups):
        assert query + sum(lengths[i] for i in left) + lengths[right[0]] > budget


def cost(query, item_lengths, groups, balance):
    """Of running the groups: dense attention within a row, causal attention (half of the pairs) for an item alone."""
    rows = [(query + sum(item_lengths[i] for i in group), len(group)) for group in groups]
    return sum(length * (balance + length * (1.0 if items > 1 else 0.5)) for length, items in rows)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 40), st.integers(1, 5000))
def test_rows_are_as_long_as_pays_off(query, item, count, balance):
    lengths = [item] * count
    chosen = worthwhile_groups(query, lengths, budget=10**9, balance=balance)
    assert [i for group in chosen for i in group] == list(range(count))
    of_size = [split_by_budget(query, lengths, query + size * item) for size in range(1, count + 1)]
    best = min(cost(query, lengths, groups, balance) for groups in of_size)
    assert cost(query, lengths, chosen, balance) <= 1.35 * best  # rows are whole items, and the last one may be short
    assert cost(query, lengths, chosen, balance) <= cost(query, lengths, of_size[0], balance)


@pytest.mark.parametrize(("query", "item", "balance"), [(512, 8, 3072.0), (64, 2, 20000.0), (2000, 10, 500.0)])
def test_rows_of_short_items_have_the_best_length(query, item, balance):
    lengths = [item] * 2000
    of_size = [split_by_budget(query, lengths, query + size * item) for size in range(1, 1000, 7)]
    best = min(cost(query, lengths, groups, balance) for groups in of_size)
    chosen = worthwhile_groups(query, lengths, budget=10**9, balance=balance)
    assert cost(query, lengths, chosen, balance) <= 1.03 * best


@pytest.mark.parametrize(
    ("query", "item", "packs"), [(512, 32, True), (320, 32, True), (128, 128, True), (32, 320, False)]
)
def test_items_much_longer_than_their_query_are_not_packed(query, item, packs):
    groups = worthwhile_groups(query, [item] * 32, budget=4096, balance=3072.0)
    assert (len(groups) < 32) == packs


def test_bad_rows_are_refused():
    for rows in ([], [Row(query=[1], items=[])], [Row(query=[1], items=[[2], []])]):
        with pytest.raises(ValueError, match="at least one"):
            laid_out(*rows)
    with pytest.raises(ValueError, match="item 1 is empty"):
        split_by_budget(3, [2, 0], 10)
    with pytest.raises(ValueError, match="budget must be at least 1"):
        split_by_budget(3, [2], 0)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_scores_are_those_of_items_alone(kind, count):
    query, items = words(23, 1), [words(1 + i * 5 % 17, i) for i in range(count)]
    packed, tokens = run_of(scorer_of(kind, "always"), query, items, params_for(kind))
    alone, more = run_of(scorer_of(kind, "never"), query, items, params_for(kind))
    for a, b in zip(packed.scores, alone.scores, strict=True):
        close(a, b)
    assert packed.prompt_tokens == alone.prompt_tokens == [23 + len(item) for item in items]
    assert (tokens, more) == (23 + sum(map(len, items)), 23 * count + sum(map(len, items)))


@pytest.mark.parametrize("kind", ["one_label", "gemma", "mistral"])
def test_packed_scores_are_transformers_own(kind):
    query, items = words(6, 1), [words(3, 2), words(10, 3), words(1, 4)]  # within the sliding window of 16
    scorer = scorer_of(kind)
    packed, tokens = run_of(scorer, query, items)
    for item, score in zip(items, packed.scores, strict=True):
        close(score, reference(kind, query + item).logits[0])
    # transformers 5.24 computes Gemma's attention eagerly, which takes no block mask: each item is then read with its own query
    assert scorer.info.packs or (kind == "gemma" and "'eager'" in scorer.info.packing_reason)
    assert tokens == (20 if scorer.info.packs else 32)


@pytest.mark.parametrize("kind", ["gemma", "mistral"])
def test_a_sequence_longer_than_the_sliding_window_is_not_packed(kind):
    query, items = words(14, 1), [words(3, 2), words(2, 3)]
    result, tokens = run_of(scorer_of(kind), query, items)
    for item, score in zip(items, result.scores, strict=True):
        close(score, reference(kind, query + item).logits[0])
    assert tokens == 33


@pytest.mark.parametrize(("kind", "reason"), [
    ("gpt2", "no rotary positions"), ("bloom", "no rotary positions"), ("jamba", "layers of type linear_attention"),
    ("bert", "attention is bidirectional"), ("xlmr", "attention is bidirectional"),
])  # fmt: skip
def test_architectures_where_packing_is_not_exact_are_refused_with_the_reason(kind, reason):
    assert not scorer_of(kind).info.packs
    with pytest.raises(ValueError, match=f"cannot be packed exactly: {reason}"):
        HFScorer.wrap(model_of(kind), tokenizer_of(kind), id=kind, packing="always")
    _, tokens = run_of(scorer_of(kind), words(5, 1), [[7], [8]])
    assert tokens == sum(map(len, scorer_of(kind).prepare(words(5, 1), [[7], [8]]).sequences))


@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
])  # fmt: skip
def test_positions_that_depend_on_the_length_are_refused(rope, monkeypatch):
    monkeypatch.setattr(model_of("one_label").config, "rope_parameters", rope)
    scorer = HFScorer.wrap(model_of("one_label"), None, id="long")
    assert f"of type {rope['rope_type']} depend on the length" in scorer.info.packing_reason


def test_a_model_that_ignores_the_block_mask_is_found_out_by_measuring(monkeypatch):
    blind = forward_pass.row_batch

    def leaky(rows, **where):
        batch = blind(rows, **where)
        batch.segment_BL.clamp_(max=1)  # every item one segment: items see each other
        return batch

    monkeypatch.setattr(forward_pass, "row_batch", leaky)
    scorer = HFScorer.wrap(model_of("one_label"), None, id="leaky")
    assert not scorer.info.packs and "measured: packed states differ" in scorer.info.packing_reason


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.lists(st.integers(1, 40), min_size=1, max_size=9)), min_size=1, max_size=4
    )
)
@pytest.mark.slow
def test_any_mixture_of_sizes_in_one_run_equals_every_item_alone(shapes):
    asked = [(words(q, q), [words(n, i) for i, n in enumerate(sizes)]) for q, sizes in shapes]
    packed, alone = scorer_of("one_label", "always"), scorer_of("one_label", "never")
    results = packed.run([packed.prepare(query, items) for query, items in asked])
    for (query, items), result in zip(asked, results, strict=True):
        expected = [alone.score(query, [item]).scores[0] for item in items]
        close(np.concatenate(result.scores), np.concatenate(expected))


def test_the_order_of_the_items_is_the_order_of_the_scores():
    query, items = words(8, 1), [words(n, n) for n in (5, 2, 9, 1)]
    forwards, backwards = (scorer_of("one_label").score(query, order).scores for order in (items, items[::-1]))
    close(np.concatenate(forwards), np.concatenate(backwards[::-1]))


def test_items_are_blind_to_each_other():
    query, item = words(8, 1), words(4, 2)
    one, other = (scorer_of("one_label").score(query, [neighbour, item]).scores[1] for neighbour in ([9], words(30, 3)))
    close(one, other)


def test_what_would_be_a_delimiter_elsewhere_is_a_token_like_any_other():
    query, items = words(8, 1), [[5, 2, 7], [2], [0, 2, 2]]  # <eos> and <pad> inside, alone and doubled
    packed, tokens = run_of(scorer_of("one_label"), query, items)
    for item, score in zip(items, packed.scores, strict=True):
        alone = model_of("one_label").model(input_ids=torch.tensor([query + item])).last_hidden_state[0, -1]
        close(score, model_of("one_label").score(alone).detach())
    assert tokens == 15


def test_an_empty_query_shares_nothing_and_equals_the_items_alone():
    items = [words(4, 1), words(2, 2)]
    result, _ = run_of(scorer_of("one_label"), [], items)
    for item, score in zip(items, result.scores, strict=True):
        close(score, reference("one_label", item).logits[0])


def test_a_token_budget_splits_the_items_and_changes_no_score():
    query, items = words(10, 1), [words(6, i) for i in range(9)]
    small = HFScorer.wrap(model_of("one_label"), None, id="small", max_pack_tokens=25)
    result, tokens = run_of(small, query, items)
    assert tokens == 5 * 10 + 9 * 6  # two items a row
    close(np.concatenate(result.scores), np.concatenate(scorer_of("one_label").score(query, items).scores))


def test_requests_of_different_queries_share_batches_but_not_scores():
    scorer = scorer_of("one_label")
    asked = [(words(5 + 7 * r, r), [words(1 + i, 10 * r + i) for i in range(1 + r)]) for r in range(6)]
    together = scorer.run([scorer.prepare(query, items) for query, items in asked])
    for (query, items), result in zip(asked, together, strict=True):
        for item, score in zip(items, result.scores, strict=True):
            close(score, reference("one_label", query + item).logits[0])


@pytest.mark.parametrize("query", ["", "Rate: "])
def test_text_scores_do_not_depend_on_packing(query):
    items = [" a", "b c", " d" * 20]
    packed, alone = (scorer_of("one_label", packing).score(query, items) for packing in ("always", "never"))
    close(np.concatenate(packed.scores), np.concatenate(alone.scores))


def test_an_item_before_its_query_cannot_share_it():
    params = ScoringParams(item_first=True)
    with pytest.raises(ValueError, match="an item before its query cannot share it"):
        scorer_of("one_label", "always").score([5, 6], [[7], [8]], params)
    result, tokens = run_of(scorer_of("one_label"), [5, 6], [[7], [8, 9]], params)
    close(result.scores[1], reference("one_label", [8, 9, 5, 6]).logits[0])
    assert tokens == 7
