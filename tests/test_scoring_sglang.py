"""SGLang's published behaviours of pooled hidden states and multi-item scoring (sgl-project/sglang#22427), each as a law of ours.

The names are those of its tests: 8 of the pooler, 17 of the engine; the 3 over HTTP are with the server's. Where its pooler scans
for a delimiter, ours goes by lengths, and the test says what becomes of the case.
"""

import numpy as np
import pytest
import torch

from rlalign.scoring import ScoringParams
from rlalign.scoring.hf import forward_pass
from tests.reward_models import model_of, reference, scorer_of, words

QUERY = "Is this city in California? "
ITEMS = ["Sacramento", "New York", "Los Angeles"]
MANY = [*ITEMS, "Austin", "Miami", "Denver", "Olympia"]
ASK = ScoringParams(return_pooled_hidden_states=True)
SINGLE, MULTI = "never", "always"


def score(items=ITEMS, params=None, packing=SINGLE, kind="three_labels", query=QUERY):
    return scorer_of(kind, packing).score(query, items, params)


def same(left, right):
    torch.testing.assert_close(torch.stack(list(left)), torch.stack(list(right)), rtol=0, atol=1e-5)


def last_state(query, item, kind="three_labels"):
    """Before the head, by transformers: the last token's final hidden state of the sequence alone."""
    with torch.no_grad():
        return model_of(kind).model(input_ids=torch.tensor([[*query, *item]])).last_hidden_state[0, -1]


class TestScoreAndPool:
    QUERY, ITEMS = words(3, 1), [words(2, 2), words(1, 3)]

    def test_mis_batched_splits_per_request(self):
        scorer = scorer_of("three_labels", MULTI)
        asked = [(self.QUERY, self.ITEMS), (words(2, 4), [words(1, 5)])]
        results = scorer.run([scorer.prepare(query, items, ASK) for query, items in asked])
        assert [len(result) for result in results] == [2, 1]
        for (query, items), result in zip(asked, results, strict=True):
            same(result.pooled_hidden_states, [last_state(query, item) for item in items])

    def test_mis_extracts_positions_before_delimiter(self):
        """There is no delimiter: an item is read at its own last token."""
        found = score(self.ITEMS, ASK, MULTI, query=self.QUERY).pooled_hidden_states
        same(found, [last_state(self.QUERY, item) for item in self.ITEMS])

    def test_mis_falls_back_when_no_delimiters_in_input(self):
        """Lengths always say where items end, so packing needs nothing in the input and never falls back."""
        scorer = scorer_of("three_labels", MULTI)
        request = scorer.prepare(self.QUERY, self.ITEMS)
        assert [len(row.items) for row in request.rows] == [2]

    def test_mis_falls_back_when_not_prefill_only(self):
        """Where items cannot share the query, each is an ordinary sequence of its own, with the same scores."""
        first = ScoringParams(item_first=True)
        found = score(self.ITEMS, first, "auto", query=self.QUERY)
        for item, logits in zip(self.ITEMS, found.scores, strict=True):
            np.testing.assert_allclose(logits, reference("three_labels", item + self.QUERY).logits[0], atol=1e-5)

    def test_mis_ignores_delimiter_at_position_zero(self):
        """An empty query is the first item at position zero: no row is read before it and none is lost."""
        found = score(self.ITEMS, ASK, MULTI, query=[]).pooled_hidden_states
        same(found, [last_state([], item) for item in self.ITEMS])

    def test_mis_returns_per_request_list(self):
        found = score(self.ITEMS, None, MULTI, query=self.QUERY).scores
        assert isinstance(found, list) and all(logits.shape == (3,) for logits in found)
        assert not np.allclose(found[0], found[1])

    def test_single_item_returns_scores(self):
        found = score(self.ITEMS[0], query=self.QUERY)
        np.testing.assert_allclose(
            found.scores, reference("three_labels", self.QUERY + self.ITEMS[0]).logits, atol=1e-5
        )

    def test_single_item_scores_match_manual_computation(self):
        found = score([self.ITEMS[0]], ASK, query=self.QUERY)
        weight_KD = model_of("three_labels").score.weight.detach()
        by_hand = last_state(self.QUERY, self.ITEMS[0]) @ weight_KD.T
        np.testing.assert_allclose(found.scores[0], by_hand, atol=1e-5)
        np.testing.assert_allclose(found.scores[0], found.pooled_hidden_states[0] @ weight_KD.T, atol=1e-5)


@pytest.mark.parametrize("kind", ["one_label", "three_labels"])
class TestPooledHiddenStatesEngine:
    def test_phs_count_matches_items(self, kind):
        for count in (1, 2, 7):
            assert len(score(MANY[:count], ASK, kind=kind).pooled_hidden_states) == count

    def test_phs_deterministic(self, kind):
        first, again = (score(params=ASK, kind=kind).pooled_hidden_states for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_phs_none_when_not_requested(self, kind):
        assert score(kind=kind).pooled_hidden_states is None

    def test_phs_on_cpu(self, kind):
        for state in score(params=ASK, kind=kind).pooled_hidden_states:
            assert isinstance(state, torch.Tensor) and state.device.type == "cpu" and not state.is_inference()

    def test_phs_returned_when_requested(self, kind):
        assert all(bool(state.abs().sum() > 0) for state in score(params=ASK, kind=kind).pooled_hidden_states)

    def test_phs_shape_is_consistent(self, kind):
        hidden_size = model_of(kind).config.hidden_size
        assert {tuple(state.shape) for state in score(MANY, ASK, kind=kind).pooled_hidden_states} == {(hidden_size,)}

    def test_phs_with_tokenized_inputs(self, kind):
        query, items = words(9, 1), [words(3, 2), words(5, 3)]
        found = score(items, ASK, kind=kind, query=query).pooled_hidden_states
        same(found, [last_state(query, item, kind) for item in items])

    def test_scores_unaffected_by_phs_flag(self, kind):
        with_states, without = (score(params=params, kind=kind).scores for params in (ASK, None))
        assert all(np.array_equal(a, b) for a, b in zip(with_states, without, strict=True))


class TestPooledHiddenStatesMISEngine:
    def test_mis_many_items(self):
        found = score(MANY, ASK, MULTI)
        same(found.pooled_hidden_states, score(MANY, ASK, SINGLE).pooled_hidden_states)
        assert len(found.scores) == len(MANY)

    def test_mis_phs_are_tensors_on_cpu(self):
        states = score(params=ASK, packing=MULTI).pooled_hidden_states
        assert all(isinstance(state, torch.Tensor) and state.device.type == "cpu" for state in states)
        assert len({state.untyped_storage().data_ptr() for state in states}) == len(
            states
        )  # none keeps its batch alive

    def test_mis_phs_count_matches_items(self):
        for count in (2, 3, 7):
            assert len(score(MANY[:count], ASK, MULTI).pooled_hidden_states) == count

    def test_mis_phs_different_items_different_hs(self):
        first, second, _ = score(params=ASK, packing=MULTI).pooled_hidden_states
        assert float((first - second).norm() / first.norm()) > 0.1

    def test_mis_phs_none_when_not_requested(self):
        assert score(packing=MULTI).pooled_hidden_states is None

    def test_mis_scores_unaffected_by_phs_flag(self):
        with_states, without = (score(params=params, packing=MULTI).scores for params in (ASK, None))
        assert all(np.array_equal(a, b) for a, b in zip(with_states, without, strict=True))

    def test_mis_single_item(self):
        alone, packed = (score(ITEMS[:1], ASK, packing) for packing in (SINGLE, MULTI))
        same(packed.pooled_hidden_states, alone.pooled_hidden_states)
        np.testing.assert_allclose(packed.scores, alone.scores, atol=1e-5)


class TestPooledHiddenStatesCausalLMRejection:
    PARAMS = ScoringParams(label_token_ids=[40, 50], min_label_mass=0.0)

    def test_causal_lm_rejects_phs(self, monkeypatch):
        scorer = scorer_of("judge")
        monkeypatch.setattr(forward_pass, "row_batch", None)  # any computation would fail on it
        with pytest.raises(ValueError, match="CausalLM"):
            scorer.score(QUERY, ITEMS, ScoringParams(return_pooled_hidden_states=True, label_token_ids=[40, 50]))

    def test_causal_lm_without_phs_still_works(self):
        found = score(params=self.PARAMS, kind="judge")
        assert found.errors == [None] * 3 and found.pooled_hidden_states is None
        assert all(float(p.sum()) == pytest.approx(1.0, abs=1e-6) for p in found.scores)


@pytest.mark.parametrize("kind", ["bert", "xlmr"])
def test_cross_encoders_without_a_state_before_the_head_say_so_before_any_computation(kind, monkeypatch):
    scorer = scorer_of(kind)
    monkeypatch.setattr(forward_pass, "row_batch", None)
    with pytest.raises(ValueError, match="CrossEncodingPooler"):
        scorer.score(QUERY, ITEMS, ASK)
