"""Every preset against a case worked by hand: ordinary, single token, all rejected, one sequence, huge ratios."""

import math

import pytest
import torch

from rlalign.objective import presets
from rlalign.objective.corrections import identity

ONES = torch.ones(1, 1, dtype=torch.bool)


def ratios(rows, prob=1.0):
    """old and rollout logprobs with these ratios, rollout probability `prob`."""
    rho = torch.tensor(rows)
    rollout = torch.full_like(rho, math.log(prob))
    return rho.log() + rollout, rollout, torch.ones_like(rho, dtype=torch.bool)


def weights(c):
    """Weights, with None where rejected."""
    rows = zip(c.weights.tolist(), c.keep.tolist(), strict=True)
    return [[round(w, 5) if k else None for w, k in zip(ws, ks, strict=True)] for ws, ks in rows]


def test_tis():
    assert weights(presets.tis(*ratios([[0.1, 1.0, 2.0, 7.0]]))) == [[0.1, 1.0, 2.0, 2.0]]


def test_icepop():
    assert weights(presets.icepop(*ratios([[0.49, 0.51, 1.0, 4.99, 5.01]]))) == [[None, 0.51, 1.0, 4.99, None]]


def test_mis():
    assert weights(presets.mis(*ratios([[1.5, 1.2], [1.5, 1.5]]))) == [[1.8, 1.8], [None, None]]


def test_seq_tis():
    assert weights(presets.seq_tis(*ratios([[1.5, 1.2], [1.5, 1.5], [0.5, 0.5]]))) == [[1.8] * 2, [2.0] * 2, [0.25] * 2]


def test_geo_mask():
    """sqrt(1.001 * 1.0008) < 1.001 stays, whatever the length; 1.002 leaves, 0.998 too."""
    c = presets.geo_mask(*ratios([[1.001, 1.0008], [1.002, 1.002], [0.998, 0.998], [2.0, 0.5]]))
    assert weights(c) == [[1.0, 1.0], [None, None], [None, None], [1.0, 1.0]]


def test_veto():
    assert weights(presets.veto(*ratios([[1.0, 2e-4], [1.0, 5e-5], [1e4, 1.0]]))) == [[1.0] * 2, [None] * 2, [1.0] * 2]


def test_opsm():
    """mean(rollout - old) = log(10/9)/2 = 0.0527 in every row; masked only for A < 0, and only over delta."""
    given = ratios([[0.9, 1.0]] * 3)
    advantages = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]])
    assert weights(presets.opsm(*given, advantages, delta=0.05)) == [[1.0] * 2, [1.0] * 2, [None] * 2]
    assert presets.opsm(*given, advantages, delta=0.06).keep.all()
    raised = ratios([[2.0, 2.0]])  # old above rollout: k1 negative, nothing to mask
    assert presets.opsm(*raised, -torch.ones(1, 2)).keep.all()


def test_dppo_tv():
    """q = 0.4: p = 0.64 rose by 0.24, p = 0.16 fell by 0.24, p = 0.44 moved by 0.04."""
    given = ratios([[1.6, 0.4, 1.1]] * 2, prob=0.4)
    advantages = torch.tensor([[1.0] * 3, [-1.0] * 3])
    assert weights(presets.dppo_tv(*given, advantages)) == [[None, 0.4, 1.1], [1.6, None, 1.1]]
    assert weights(presets.dppo_tv(*given, advantages, truncate=1.5))[1] == [1.5, None, 1.1]


def test_m2po():
    """d^2 = 0.01, 0.04, 0.09, 1: means of the smallest k are 0.01, 0.025, 0.0467, 0.285."""
    given = ratios([[math.exp(0.1), math.exp(-0.2), math.exp(0.3), math.exp(-1.0)]])
    assert weights(presets.m2po_all(*given, threshold=0.04)) == [[1.0, 1.0, None, None]]
    assert weights(presets.m2po_all(*given, threshold=0.05)) == [[1.0, 1.0, 1.0, None]]
    assert weights(presets.m2po_all(*given, threshold=1.0)) == [[1.0] * 4]
    assert weights(presets.m2po_all(*given, threshold=0.001)) == [[None] * 4]


CALLS = {
    "tis": lambda g, a: presets.tis(*g),
    "icepop": lambda g, a: presets.icepop(*g),
    "mis": lambda g, a: presets.mis(*g),
    "seq_tis": lambda g, a: presets.seq_tis(*g),
    "geo_mask": lambda g, a: presets.geo_mask(*g),
    "veto": lambda g, a: presets.veto(*g),
    "opsm": lambda g, a: presets.opsm(*g, a),
    "dppo_tv": lambda g, a: presets.dppo_tv(*g, a),
    "m2po_all": lambda g, a: presets.m2po_all(*g),
    "kpop": lambda g, a: presets.kpop(*g),
    "ess_tis": lambda g, a: presets.ess_tis(*g),
}
# what a token of log-ratio +80, then -80, gets: a weight, or None for rejected (A = -1)
UP = {"tis": 2.0, "icepop": None, "mis": None, "seq_tis": 2.0, "geo_mask": None, "veto": 1.0, "opsm": 1.0,
      "dppo_tv": math.exp(80), "m2po_all": None, "kpop": None, "ess_tis": math.exp(80)}  # fmt: skip
DOWN = {"tis": math.exp(-80), "icepop": None, "mis": math.exp(-80), "seq_tis": math.exp(-80), "geo_mask": None,
        "veto": None, "opsm": None, "dppo_tv": None, "m2po_all": None, "kpop": None, "ess_tis": math.exp(-80)}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_single_token(name):
    given = ratios([[1.0]])
    c = CALLS[name](given, -torch.ones(1, 1))
    assert torch.equal(c.keep, ONES) and c.weights.tolist() == [[1.0]]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("d, expected", [(80.0, UP), (-80.0, DOWN)])
def test_one_token_of_a_huge_ratio(name, d, expected):
    old, rollout = (torch.tensor([[-0.5 + d]]), torch.tensor([[-0.5]])) if d < 0 else (
        torch.tensor([[-0.5]]), torch.tensor([[-0.5 - d]]))  # fmt: skip
    c = CALLS[name]((old, rollout, ONES), -torch.ones(1, 1))
    assert c.weights.isfinite().all()
    assert bool(c.keep[0, 0]) == (expected[name] is not None)
    assert float(c.weights) == pytest.approx(expected[name] or 0.0, rel=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_float32_overflow_is_bounded(name):
    given = (torch.tensor([[-0.5]]), torch.tensor([[-200.0]]), ONES)
    assert CALLS[name](given, torch.zeros(1, 1)).weights.isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_nothing_usable_is_nothing_kept(name):
    given = (torch.full((2, 3), math.nan), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    c = CALLS[name](given, -torch.ones(2, 3))
    assert not c.keep.any() and not c.weights.any()
    assert torch.equal(c.keep, identity(*given).keep)


def test_kpop():
    """p = 0.9, q = 0.7 (ratio 1.29) is 0.15 nats and leaves; p = 3e-4, q = 1e-4 (ratio 3) is far below 0.1 and stays."""
    old = torch.tensor([[0.9, 3e-4, 0.5]]).log()
    rollout = torch.tensor([[0.7, 1e-4, 0.5]]).log()
    c = presets.kpop(old, rollout, torch.ones(1, 3, dtype=torch.bool))
    assert weights(c) == [[None, 3.0, 1.0]]
    p, q = 0.9, 0.7
    both = [a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in ((p, q), (q, p))]
    given = (old[:, :1], rollout[:, :1], ONES)
    assert presets.kpop(*given, threshold=max(both) + 1e-6).keep.all()
    assert not presets.kpop(*given, threshold=max(both) - 1e-6).keep.any()


def test_ess_tis_has_the_effective_sample_size_it_was_asked_for():
    old, rollout, mask = ratios([[0.2, 0.5, 1.0, 1.5, 3.0, 9.0]])
    for target in (0.6, 0.8, 0.95):
        w = presets.ess_tis(old, rollout, mask, threshold=target).weights.double()
        assert float(w.sum() ** 2 / w.square().sum() / 6) == pytest.approx(target, abs=1e-6)
        assert torch.equal(w[w < w.max()], (old - rollout).double().exp().float().double()[w < w.max()])
    assert weights(presets.ess_tis(old, rollout, mask, threshold=0.05)) == [[0.2, 0.5, 1.0, 1.5, 3.0, 9.0]]
    assert weights(presets.ess_tis(*ratios([[2.0, 2.0]]), threshold=1.0)) == [[2.0, 2.0]]
