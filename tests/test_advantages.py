"""Group-relative advantages and GAE against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.objective.advantages import gae, group_relative, token_rewards, whiten

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@quick
@given(seeds, st.booleans())
def test_group_relative_equals_a_loop_in_any_order(seed, normalize):
    g = torch.Generator().manual_seed(seed)
    rewards, group = torch.rand(12, generator=g), torch.randint(0, 4, (12,), generator=g) * 17 - 3
    got = group_relative(rewards, group, normalize_std=normalize)
    for value in group.unique():
        x = rewards[group == value].double()
        expected = (x - x.mean()) / (x.std() + 1e-6 if normalize else 1.0) if len(x) > 1 else torch.zeros(1)
        torch.testing.assert_close(got[group == value], expected.float(), rtol=1e-5, atol=1e-6)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 7))
@quick
def test_identical_rewards_give_exactly_zero(reward, n):
    assert not group_relative(torch.full((n,), reward), torch.zeros(n, dtype=torch.long)).any()


def test_missing_rewards_are_left_out_of_the_statistics():
    group = torch.tensor([0, 0, 0, 1, 1])
    got = group_relative([1.0, None, 0.0, None, 5.0], group)
    assert got.tolist() == pytest.approx([math.sqrt(0.5), 0.0, -math.sqrt(0.5), 0.0, 0.0], rel=1e-5)
    with_nan = torch.tensor([1.0, math.nan, 0.0, math.nan, 5.0])
    assert torch.equal(group_relative(with_nan, group), got)


def test_bad_rewards_are_refused():
    with pytest.raises(ValueError, match="infinite"):
        group_relative(torch.tensor([math.inf, 1.0]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        group_relative(torch.ones(3), torch.zeros(2, dtype=torch.long))


@quick
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_definition_on_the_masked_steps(seed, gamma, lam):
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(3, 8, generator=g), torch.randn(3, 8, generator=g)
    mask = torch.rand(3, 8, generator=g) < 0.7
    garbage = torch.full_like(values, math.nan)
    advantages, returns = gae(rewards.where(mask, garbage), values.where(mask, garbage), mask, gamma=gamma, lam=lam)
    assert not advantages[~mask].any() and not returns[~mask].any()
    for b in range(3):
        r, v = rewards[b][mask[b]].double().tolist(), [*values[b][mask[b]].double().tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]
        assert advantages[b][mask[b]].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_whiten_gives_mean_zero_and_unit_variance():
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * 3 + 2
    mask = torch.arange(9) < torch.tensor([[9], [3], [0], [5]])
    white = whiten(x, mask)
    assert float(white[mask].mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(white[mask].std()) == pytest.approx(1.0, rel=1e-5) and not white[~mask].any()
    with pytest.raises(ValueError, match="two masked tokens"):
        whiten(x, torch.zeros_like(mask))


def test_rewards_earned_in_turns_stay_where_they_were_earned_and_add_up():
    mask_BL = torch.tensor([[False, True, True, False, True, True], [False, True, True, False, False, False]])
    earned_BL = torch.zeros(2, 6)
    earned_BL[0, 2], earned_BL[0, 5] = 3.0, 5.0
    found_BL = token_rewards(torch.tensor([10.0, 1.0]), mask_BL, earned_BL=earned_BL)
    assert found_BL.tolist() == [[0.0, 0.0, 3.0, 0.0, 0.0, 7.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    values_BL = torch.zeros(2, 6)
    returns_BL = gae(found_BL, values_BL, mask_BL, gamma=1.0, lam=1.0)[1]
    assert returns_BL[0, mask_BL[0]].tolist() == [10.0, 10.0, 7.0, 7.0], (
        "a later turn earns nothing for an earlier one's reward"
    )
    assert torch.equal(
        token_rewards(torch.tensor([10.0, 1.0]), mask_BL, earned_BL=torch.zeros(2, 6)),
        token_rewards(torch.tensor([10.0, 1.0]), mask_BL),
    )
