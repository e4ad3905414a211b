"""Laws of correct, reject and compose."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.objective import corrections
from rlalign.objective.corrections import (
    AGGREGATES,
    ESTIMATORS,
    LEVELS,
    MODES,
    compose,
    correct,
    describe,
    identity,
    reject,
)

seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=20, deadline=None)
BOUNDS = {"truncate": {"high": 1.2}, "clip": {"low": 0.8, "high": 1.2}, "mask": {"low": 0.8, "high": 1.2}}
EVERY = [(level, mode) for level in LEVELS for mode in MODES]
NARROW = {
    "k1": (-0.2, 0.2),
    "k2": (None, 0.02),
    "k3": (None, 0.02),
    "ratio": (0.8, 1.2),
    "abs_prob": (None, 0.05),
    "binary_kl": (None, 0.02),
}


def batch(seed, B=4, L=10):
    g = torch.Generator().manual_seed(seed)
    rollout = -2.0 * torch.rand(B, L, generator=g)
    old = rollout + 0.3 * torch.randn(B, L, generator=g)
    mask = torch.rand(B, L, generator=g) < 0.7
    mask[:, 0], mask[:, 1] = False, True
    return old, rollout, mask


def every_correction(old, rollout, mask):
    for level, mode in EVERY:
        yield correct(old, rollout, mask, level=level, mode=mode, **BOUNDS[mode])
    for estimator in ESTIMATORS:
        low, high = NARROW[estimator]
        for aggregate in AGGREGATES:
            yield reject(old, rollout, mask, estimator=estimator, aggregate=aggregate, low=low, high=high)


def same(a, b):
    return torch.equal(a.weights, b.weights) and torch.equal(a.keep, b.keep)


@quick
@given(seeds)
def test_equal_policies_get_weight_one_and_lose_nothing(seed):
    old, _, mask = batch(seed)
    for estimator in ESTIMATORS:
        high = 1.0 if estimator == "ratio" else 0.0
        for aggregate in ("token", "mean", "max"):
            c = reject(old, old, mask, estimator=estimator, aggregate=aggregate, high=high)
            assert same(c, identity(old, old, mask))
    for level, mode in EVERY:
        assert same(correct(old, old, mask, level=level, mode=mode, **BOUNDS[mode]), identity(old, old, mask))


@quick
@given(seeds)
def test_keep_is_inside_the_mask_and_weights_are_finite_and_zero_outside(seed):
    old, rollout, mask = batch(seed)
    old[0, 1], rollout[1, 1], rollout[2, 1] = math.nan, -math.inf, math.inf
    garbage = torch.full_like(old, math.nan)
    for c in every_correction(old.where(mask, garbage), rollout.where(mask, garbage), mask):
        assert not (c.keep & ~mask).any() and not c.keep[:3, 1].any()
        assert c.weights.isfinite().all() and not c.weights[~c.keep].any()
        assert c.weights.dtype == torch.float32 and not c.weights.requires_grad


@quick
@given(seeds)
def test_padding_and_order_do_not_matter(seed):
    old, rollout, mask = batch(seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    moved = [torch.nn.functional.pad(x[order], (1, 4)) for x in (old, rollout, mask)]
    for c, m in zip(every_correction(old, rollout, mask), every_correction(*moved), strict=True):
        assert torch.equal(m.keep[:, 1:11], c.keep[order])
        torch.testing.assert_close(m.weights[:, 1:11], c.weights[order], rtol=1e-6, atol=0)


@quick
@given(seeds)
def test_an_infinite_bound_is_plain_importance_sampling(seed):
    old, rollout, mask = batch(seed)
    d = (old.double() - rollout.double()) * mask
    plain = {
        "token": d,
        "sequence": d.sum(-1, keepdim=True).expand_as(d),
        "geometric": (d.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)).expand_as(d),
    }
    for level, log_weight in plain.items():
        for mode in MODES:
            c = correct(old, rollout, mask, level=level, mode=mode, high=math.inf)
            assert torch.equal(c.keep, mask)
            torch.testing.assert_close(c.weights[mask].double(), log_weight.exp()[mask], rtol=1e-6, atol=0)


@quick
@given(seeds)
def test_segments_are_sequences_of_their_own(seed):
    """Splitting a row at its gaps and taking the geometric level gives the segment level."""
    old, rollout, mask = batch(seed, B=1, L=16)
    c = correct(old, rollout, mask, level="segment", mode="clip", low=0.9, high=1.1)
    runs = (mask[0] & ~torch.nn.functional.pad(mask[0], (1, 0))[:-1]).cumsum(0)
    for run in range(1, int(runs.max()) + 1):
        part = mask & (runs == run)
        alone = correct(old, rollout, part, level="geometric", mode="clip", low=0.9, high=1.1)
        torch.testing.assert_close(c.weights[part], alone.weights[part], rtol=1e-6, atol=0)


@quick
@given(seeds)
def test_composition_commutes_and_feeding_keep_forward_is_the_ordered_form(seed):
    old, rollout, mask = batch(seed)
    weights = correct(old, rollout, mask, level="token", mode="truncate", high=1.1)
    near = reject(old, rollout, mask, estimator="k2", aggregate="token", high=0.05)
    geo = reject(old, rollout, mask, estimator="k1", aggregate="mean", low=-0.1, high=0.1)
    assert same(compose(weights, near, geo), compose(geo, weights, near))
    assert torch.equal(compose(weights, near, geo).keep, mask & near.keep & geo.keep)
    after = reject(old, rollout, near.keep, estimator="k1", aggregate="mean", low=-0.1, high=0.1)
    d = ((rollout.double() - old.double()) * near.keep).sum(-1) / near.keep.sum(-1).clamp(min=1)
    assert torch.equal(after.keep.any(-1), (d.abs() <= 0.1) & near.keep.any(-1))


def test_two_weighted_corrections_do_not_compose():
    old, rollout, mask = batch(0)
    tis = correct(old, rollout, mask, level="token", mode="truncate", high=2.0)
    with pytest.raises(ValueError, match="twice"):
        compose(tis, correct(old, rollout, mask, level="sequence", mode="truncate", high=2.0))
    with pytest.raises(ValueError, match="at least one"):
        compose()


def test_normalised_weights_have_mean_one_over_kept_tokens():
    old, rollout, mask = batch(1)
    c = correct(old, rollout, mask, level="token", mode="mask", low=0.7, high=1.3, normalize=True)
    raw = correct(old, rollout, mask, level="token", mode="mask", low=0.7, high=1.3)
    assert float(c.weights[c.keep].mean()) == pytest.approx(1.0, rel=1e-6)
    ratio = c.weights[c.keep] / raw.weights[c.keep]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_veto_takes_the_whole_sequence_on_raw_ratios():
    rollout = torch.zeros(2, 4)
    old = torch.tensor([[0.0, 0.0, -9.3, 0.0], [0.0, 0.0, -9.2, 0.0]])  # log 1e-4 = -9.2103
    mask = torch.ones(2, 4, dtype=torch.bool)
    c = correct(old, rollout, mask, level="token", mode="clip", low=0.5, high=2.0, veto=1e-4)
    assert not c.keep[0].any() and c.keep[1].all()
    assert c.weights[1].tolist() == [1.0, 1.0, 0.5, 1.0]


@pytest.mark.parametrize("d", [80.0, -80.0, 500.0, -500.0])
@pytest.mark.parametrize("level, mode", EVERY)
def test_huge_ratios_give_finite_weights(d, level, mode):
    old, rollout = torch.full((1, 3), d), torch.zeros(1, 3)
    mask = torch.ones(1, 3, dtype=torch.bool)
    bounded = correct(old, rollout, mask, level=level, mode=mode, **BOUNDS[mode])
    plain = correct(old, rollout, mask, level=level, mode=mode, high=math.inf)
    assert bounded.weights.isfinite().all() and plain.weights.isfinite().all() and plain.keep.all()
    expected = {"truncate": min(1.2, math.exp(min(d, 1))), "clip": 1.2 if d > 0 else 0.8, "mask": 0.0}[mode]
    assert bounded.weights[0].tolist() == pytest.approx([expected] * 3, rel=1e-6)
    assert bool(bounded.keep.all()) == (mode != "mask")


def test_describe_by_hand():
    rollout = torch.zeros(2, 3)
    old = torch.log(torch.tensor([[1.0, 3.0, 0.5], [10.0, 10.0, 10.0]]))
    mask = torch.tensor([[True, True, True], [True, True, False]])
    c = correct(old, rollout, mask, level="token", mode="mask", low=0.4, high=5.0)
    seen = describe(c, old, rollout, mask)
    k3 = [0.0, 2 - math.log(3), -0.5 + math.log(2)]
    assert seen["masked_share"] == 2 / 5 and seen["seq_masked_share"] == 1 / 2
    assert seen["weight_mean"] == pytest.approx(1.5) and (seen["weight_min"], seen["weight_max"]) == pytest.approx(
        (0.5, 3)
    )
    assert seen["ess"] == pytest.approx(4.5**2 / 10.25 / 5) and seen["ess_kept"] == pytest.approx(4.5**2 / 10.25 / 3)
    assert seen["k3_kept"] == pytest.approx(sum(k3) / 3, rel=1e-5)
    assert seen["k3_rejected"] == pytest.approx(9 - math.log(10), rel=1e-5)
    assert seen["changed_share"] == 0.0
    tis = correct(old, rollout, mask, level="token", mode="truncate", high=2.0)
    assert describe(tis, old, rollout, mask)["changed_share"] == 3 / 5


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"level": "seq", "mode": "mask", "high": 2.0}, "level must be one of token, sequence"),
        ({"level": "token", "mode": "cap", "high": 2.0}, "mode must be one of"),
        ({"level": "token", "mode": "truncate"}, "math.inf"),
        ({"level": "token", "mode": "truncate", "high": 2.0, "low": 0.5}, "use clip"),
        ({"level": "token", "mode": "mask"}, "needs low, high or both"),
        ({"level": "token", "mode": "clip", "low": 3.0, "high": 2.0}, "low <= high"),
        ({"level": "token", "mode": "mask", "high": 2.0, "veto": 2.0}, "veto"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        correct(*batch(2), **settings)


def test_rejections_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="without a bound"):
        reject(*batch(3), estimator="k3", aggregate="mean")
    with pytest.raises(ValueError, match="must not exceed"):
        reject(*batch(3), estimator="k1", aggregate="mean", low=1.0, high=-1.0)
    with pytest.raises(ValueError, match="estimator must be one of"):
        reject(*batch(3), estimator="kl", aggregate="mean", high=1.0)
    assert corrections.AGGREGATES == ("token", "sum", "mean", "max")


@pytest.mark.parametrize("level", LEVELS)
def test_veto_reads_token_ratios_at_every_level(level):
    """A product far below the veto without one bad token stays; one bad token in a harmless product leaves."""
    rollout = torch.zeros(2, 4)
    old = torch.tensor([[-5.0, -5.0, -5.0, -5.0], [-10.0, 10.0, 0.0, 0.0]])
    c = correct(old, rollout, torch.ones(2, 4, dtype=torch.bool), level=level, mode="clip", high=2.0, veto=1e-4)
    assert c.keep[0].all() and not c.keep[1].any()


@pytest.mark.parametrize("level, weight", [("sequence", 4.0), ("geometric", 2.0), ("segment", 2.0)])
def test_a_broken_token_is_in_neither_the_sum_nor_the_count_of_its_sequence(level, weight):
    rollout = torch.tensor([[0.0, math.nan, 0.0]])
    old = torch.full((1, 3), math.log(2.0))
    mask = torch.ones(1, 3, dtype=torch.bool)
    c = correct(old, rollout, mask, level=level, mode="truncate", high=math.inf)
    assert c.weights[0].tolist() == pytest.approx([weight, 0.0, weight])
    assert c.keep.tolist() == [[True, False, True]]
    mean = reject(old, rollout, mask, estimator="k1", aggregate="mean", low=-0.7, high=0.0)
    assert torch.equal(mean.keep, c.keep)
