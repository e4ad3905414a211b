"""Which version sampled a token, and with how old keys: from the wire form's spans to the padded batch."""

import json
from array import array
from dataclasses import asdict, replace

import pytest
import torch

from rlalign.rollout.engine.surface import kv_spans
from rlalign.types import UNKNOWN_VERSION, KeptSets, LogprobSpec, Rollout, Routes, collate


def rollout(spans, kv=(), prompt=2, length=7) -> Rollout:
    return Rollout(
        token_ids=list(range(length)),
        loss_mask=[False] * prompt + [True] * (length - prompt),
        rollout_logprobs=[0.0] * prompt + [-1.0] * (length - prompt),
        prompt_id=0,
        group_id=0,
        finish_reason="stop",
        version_spans=list(spans),
        kv_spans=list(kv),
    )


def batch_of(*rollouts):
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec())


def test_every_token_carries_the_version_that_sampled_it():
    batch = batch_of(rollout([(2, 4, 7), (4, 7, 8)]), rollout([(1, 3, 9)], prompt=1, length=3))
    assert batch.policy_version_BL.tolist() == [[-1, -1, 7, 7, 8, 8, 8], [-1, 9, 9, -1, -1, -1, -1]]


def test_an_update_in_flight_leaves_the_older_keys_behind():
    """Tokens 2 and 3 come from version 7; the keys of position 3 are computed when 8 samples token 4; later ones by 8 too."""
    spans = [(2, 4, 7), (4, 7, 8)]
    assert kv_spans(spans) == [(0, 3, 7), (3, 6, 8)]
    batch = batch_of(rollout(spans, kv_spans(spans)))
    assert batch.kv_version_BL.tolist() == [[-1, -1, 7, 7, 7, 7, 7]]
    recomputed = batch_of(rollout(spans, [(0, 6, 8)]))
    assert recomputed.kv_version_BL.tolist() == [[-1, -1, 8, 8, 8, 8, 8]]


def test_keys_computed_again_are_as_new_as_the_token():
    again = replace(rollout([(2, 4, 7), (4, 7, 8)]), kv_recomputed=True)
    assert batch_of(again).kv_version_BL.tolist() == [[-1, -1, 7, 7, 8, 8, 8]]


def test_one_unknown_key_makes_the_age_unknown():
    batch = batch_of(rollout([(2, 7, 3)]), rollout([(2, 7, 3)], [(1, 6, 3)]), rollout([(2, 7, 3)], [(0, 4, 3)]))
    unknown = [UNKNOWN_VERSION] * 7
    assert batch.kv_version_BL.tolist() == [unknown, unknown, [-1, -1, 3, 3, 3, -1, -1]]


@pytest.mark.parametrize("spans", [[(2, 4, 0), (3, 7, 1)], [(2, 9, 0)], [(3, 3, 0)], [(2, 7, -2)]])
def test_spans_that_overlap_leave_the_sequence_are_empty_or_of_no_version_are_refused(spans):
    for kinds in ((spans,), ([(2, 7, 0)], spans)):
        with pytest.raises(ValueError, match=r"sequence 1: version span .* overlaps the one before or leaves 0\.\.7"):
            batch_of(rollout([(2, 7, 0)]), rollout(*kinds))


def test_sets_and_routes_of_another_batch_are_refused():
    batch = batch_of(rollout([(2, 7, 0)]), rollout([(2, 7, 0)]))
    empty = KeptSets(ids_E=torch.zeros(0, dtype=torch.int32), count_BL=torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"sets of \(2, 6\) positions, expected those of token_ids_BL, \(2, 7\)"):
        replace(batch, kept=empty)
    for counts in ([3, 3, 3], [8, 1]):
        experts = torch.zeros(sum(counts), 2, 1, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"expected 2 with at most 7; the routes belong to another batch"):
            replace(batch, routes=Routes(experts_ELK=experts, count_B=torch.tensor(counts)))


def test_a_sampled_token_without_a_version_is_refused():
    with pytest.raises(
        ValueError, match="1 sampled tokens are in no version span, the first at sequence 0, position 6"
    ):
        batch_of(rollout([(2, 6, 0)]))


SETTINGS = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {40: 5.0},
    "bad_words": ["no"],
    "allowed_token_ids": [3, 1],
    "min_tokens": 4,
    "structured_outputs": {"regex": "a+"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_that_touches_a_logprob_is_part_of_its_convention(name):
    plain = LogprobSpec.of_sampling({}, processed=True)
    assert plain == LogprobSpec()
    shaped = LogprobSpec.of_sampling({name: SETTINGS[name], "temperature": None}, processed=True)
    assert shaped.unrepeatable == ("structured" if name == "structured_outputs" else name,)
    with pytest.raises(ValueError, match=shaped.unrepeatable[0]):
        shaped.require_equal(plain, what="comparing")
    with pytest.raises(ValueError, match="not repeated by the trainer"):
        shaped.require_repeatable(what="scoring")
    raw = LogprobSpec.of_sampling({name: SETTINGS[name]}, processed=False)
    raw.require_repeatable(what="raw logprobs are those of the plain softmax")
    assert LogprobSpec(**json.loads(json.dumps(asdict(shaped)))) == shaped


def test_a_spec_says_its_support():
    assert LogprobSpec().support == "the whole vocabulary"
    assert LogprobSpec(top_p=0.9, top_k=50, vocab_size=100).support == "top_p 0.9, top_k 50 of ids below 100"
    assert LogprobSpec(top_p=0.9, processed=False).support == "the whole vocabulary"
    assert LogprobSpec.of_sampling({"top_k": -1}, processed=True) == LogprobSpec()


def test_captured_sets_reach_the_tokens_they_belong_to():
    captured = replace(rollout([(2, 7, 0)]), kept_ids=array("i", [4, 2, 9, 3]), kept_counts=array("q", [2, 0, 1, 1, 0]))
    batch = batch_of(rollout([(1, 3, 0)], prompt=1, length=3), captured)
    assert batch.kept.count_BL.tolist() == [[0] * 7, [0, 0, 2, 0, 1, 1, 0]]
    assert batch.rows(slice(1, 2), 5).kept.ids_E.tolist() == [4, 2, 9]
    assert batch_of(rollout([(2, 7, 0)])).kept is None
    with pytest.raises(ValueError, match="one entry per sampled token"):
        replace(captured, kept_counts=array("q", [2, 2]))
