"""Where the mismatch sits: labels, deciles, token classes, worst tokens, version lags."""

import math

import pytest
import torch

from rlalign import mismatch
from rlalign.mismatch.breakdown import (
    TOKEN_CLASSES,
    by_label,
    deciles,
    nonfinite_tokens,
    token_classes,
    token_lags,
    worst_tokens,
)


def batch():
    g = torch.Generator().manual_seed(0)
    rollout = -torch.rand(6, 20, generator=g)
    return rollout + 0.2 * torch.randn(6, 20, generator=g), rollout, torch.rand(6, 20, generator=g) < 0.8


def test_each_label_equals_comparing_its_tokens_alone():
    old, rollout, mask = batch()
    label = torch.arange(20) % 4
    rows = by_label(old, rollout, mask, label[None])
    for value, row in rows.items():
        alone = mismatch.compare(old, rollout, mask & (label == value))
        assert row == pytest.approx({n: alone[n] for n in ("tokens", "k1", "k2", "k3", "abs_mean")})
    assert sum(r["tokens"] for r in rows.values()) == mask.sum()


def test_deciles_hold_a_tenth_each_in_order_and_ignore_what_is_masked():
    values = torch.randperm(100, generator=torch.Generator().manual_seed(1)).float().reshape(4, 25)
    mask = torch.ones(4, 25, dtype=torch.bool)
    assert torch.equal(deciles(values, mask), (values // 10).long())
    mask[0] = False
    values[0] = math.nan
    label = deciles(values, mask)
    assert label[mask].bincount().max() <= 8 and label[mask].max() == 9
    values[1, 0] = math.nan
    with pytest.raises(ValueError, match="1 masked values are NaN"):
        deciles(values, mask)


def test_equal_values_share_a_decile():
    assert deciles(torch.ones(1, 50), torch.ones(1, 50, dtype=torch.bool)).unique().tolist() == [0]


def test_token_classes_by_text_and_id():
    vocabulary = ["the", " 42", "7", " ", "<|im_end|>", "<|pad|>", "4a", ""]
    label = token_classes(torch.arange(8)[None], tokens=vocabulary, eos_ids=[4], special_ids=[4, 5])
    names = [TOKEN_CLASSES[i] for i in label[0].tolist()]
    assert names == ["other", "digits", "digits", "space", "eos", "special", "other", "other"]


def test_worst_tokens_come_with_place_id_and_both_logprobs():
    old, rollout = torch.zeros(2, 4), torch.zeros(2, 4)
    old[1, 2], old[0, 3], old[0, 1], rollout[1, 1] = -3.0, 2.0, 9.0, math.nan
    mask = torch.tensor([[False, False, True, True], [False, True, True, True]])
    ids = torch.arange(8).reshape(2, 4)
    found = worst_tokens(old, rollout, mask, count=2, token_ids_BL=ids)
    assert [(t.sequence, t.position, t.token_id, t.old_logprob, t.log_ratio) for t in found] == [
        (1, 2, 6, -3.0, -3.0),
        (0, 3, 3, 2.0, 2.0),
    ]
    assert len(worst_tokens(old, rollout, mask, count=99)) == 4
    broken = nonfinite_tokens(old, rollout, mask, token_ids_BL=ids)
    assert [(t.sequence, t.position, t.token_id) for t in broken] == [(1, 1, 5)] and math.isnan(
        broken[0].rollout_logprob
    )


def test_lags_are_counted_from_the_trainers_version_inside_the_mask_only():
    version = torch.tensor([[-1, 7, 8, 9], [-1, -1, 9, 5]])
    mask = torch.tensor([[False, True, True, True], [False, False, True, False]])
    assert token_lags(version, mask, version=9).tolist() == [[0, 2, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "held, match", [(-1, "no usable version.*: -1"), (10, "no usable version.*: 10, with the trainer at 9")]
)
def test_a_token_of_an_unknown_or_future_version_is_refused(held, match):
    with pytest.raises(ValueError, match=match):
        token_lags(torch.tensor([[0, held]]), torch.tensor([[False, True]]), version=9)
