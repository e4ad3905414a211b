"""Corrections on a distribution small enough to write out: what they estimate is computed, not sampled."""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.objective import corrections, presets

P = torch.tensor([0.50, 0.30, 0.15, 0.05], dtype=torch.float64)  # trainer
Q = torch.tensor([0.55, 0.20, 0.24, 0.01], dtype=torch.float64)  # rollout
F = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
GIVEN = (P.log()[None], Q.log()[None], torch.ones(1, 4, dtype=torch.bool))
CALLS = {
    "tis": presets.tis,
    "icepop": presets.icepop,
    "kpop": presets.kpop,
    "ess_tis": presets.ess_tis,
    "seq_free": lambda *g: corrections.correct(*g, level="token", mode="truncate", high=math.inf),
}


def expected(c) -> float:
    """E_rollout[w f 1(kept)], over every outcome."""
    return float((Q * c.weights[0].double() * c.keep[0] * F).sum())


@pytest.mark.parametrize("name", CALLS)
def test_a_weight_is_the_ratio_or_the_bias_is_what_the_bound_took(name: str) -> None:
    c = CALLS[name](*GIVEN)
    lost = (P - Q * c.weights[0].double() * c.keep[0]) * F  # of each outcome, what is missing from E_p[f]
    assert expected(c) == pytest.approx(float((P * F).sum() - lost.sum()), abs=1e-6)
    assert bool((lost.abs() < 1e-6).any())
    if name == "seq_free":
        assert expected(c) == pytest.approx(float((P * F).sum()), abs=1e-6)


def test_on_policy_as_one_has_the_bias_it_states_and_no_variance() -> None:
    whole = torch.ones(1, 4, dtype=torch.bool)
    usable = corrections.identity(*GIVEN).keep
    one = corrections.on_policy_as_one(presets.icepop(*GIVEN), whole, usable)
    assert one.keep.all() and bool((one.weights == 1.0).all())
    rho = P / Q
    bias = expected(one) - float((P * F).sum())
    assert bias == pytest.approx(float((Q * (1 - rho) * F).sum()), abs=1e-9)
    mean = float((Q * F).sum())
    chi2, spread = float((Q * (rho - 1).square()).sum()), math.sqrt(float((Q * (F - mean).square()).sum()))
    assert abs(bias) <= math.sqrt(chi2) * spread
    half = torch.tensor([[True, False, True, False]])
    mixed, plain = corrections.on_policy_as_one(presets.tis(*GIVEN), half, usable), presets.tis(*GIVEN)
    assert torch.equal(mixed.weights[~half], plain.weights[~half]) and bool((mixed.weights[half] == 1.0).all())
    broken = torch.where(half, torch.nan, GIVEN[0])
    lost = corrections.identity(broken, *GIVEN[1:]).keep
    assert not corrections.on_policy_as_one(presets.tis(broken, *GIVEN[1:]), whole, lost).keep[half].any()


@pytest.mark.parametrize("target", [0.3, 0.7, 0.9, 0.99])
def test_the_bound_is_the_largest_with_that_effective_sample_size(target: float) -> None:
    g = torch.Generator().manual_seed(3)
    old = -4 - 3 * torch.rand(5, 40, generator=g)
    rollout, mask = old + 0.8 * torch.randn(5, 40, generator=g), torch.rand(5, 40, generator=g) < 0.8
    ratio = (old - rollout)[mask].double().exp()

    def ess(bound: float) -> float:
        w = ratio.clamp(max=bound)
        return float(w.sum() ** 2 / w.square().sum() / len(w))

    bound = corrections.bound_for_ess(old, rollout, mask, target=target)
    if ess(math.inf) >= target:
        assert bound == math.inf
    else:
        assert ess(bound) == pytest.approx(target, abs=1e-9) and ess(bound * 1.001) < target


def test_bounds_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="must lie in"):
        corrections.bound_for_ess(*GIVEN, target=1.5)
    assert math.isnan(corrections.bound_for_ess(*GIVEN[:2], torch.zeros(1, 4, dtype=torch.bool), target=0.9))
    with pytest.raises(ValueError, match="positive"):
        presets.kpop(*GIVEN, threshold=0.0)


@pytest.mark.parametrize("name", CALLS)
def test_every_preset_tells_what_lay_outside_and_what_it_left_there(name: str) -> None:
    given = (torch.tensor([[-1.0, -1.0, -1.0, -4.0]]), torch.tensor([[-1.0, -4.0, -1.1, -1.0]]), GIVEN[2])
    c = CALLS[name](*given)
    seen = corrections.describe(c, *given)
    outside = torch.tensor([False, True, False, True])
    assert seen["outside_raw"] == 0.5
    assert seen["outside_kept"] == pytest.approx(float((outside & c.keep[0]).sum() / c.keep.sum()))
