"""Which version sampled a token, and with how old keys: from the wire form's spans to the padded batch."""

from dataclasses import replace

import pytest

from rlalign.rollout.engine.embedded import kv_spans
from rlalign.types import UNKNOWN_VERSION, LogprobSpec, Rollout, collate


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


@pytest.mark.parametrize("spans", [[(2, 4, 0), (3, 7, 1)], [(2, 9, 0)], [(3, 3, 0)]])
def test_spans_that_overlap_leave_the_sequence_or_are_empty_are_refused(spans):
    with pytest.raises(ValueError, match=r"overlaps the one before or leaves 0\.\.7"):
        batch_of(rollout(spans))


def test_a_sampled_token_without_a_version_is_refused():
    with pytest.raises(
        ValueError, match="1 sampled tokens are in no version span, the first at sequence 0, position 6"
    ):
        batch_of(rollout([(2, 6, 0)]))
