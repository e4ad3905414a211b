"""Laws of the losses: hand cases, masks, shards, gradients of the written formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.objective import corrections, losses
from rlalign.types import Correction

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)

LOSSES = {
    "grpo": lambda a, n, s: losses.grpo_loss(*a[:4], num_tokens=n, ref_logprobs_BL=a[4], kl_coef=0.1),
    "grpo_sequence": lambda a, n, s: losses.grpo_sequence_loss(
        *a[:4], num_sequences=s, ref_logprobs_BL=a[4], kl_coef=0.1
    ),
    "dr_grpo": lambda a, n, s: losses.dr_grpo_loss(
        *a[:4], num_sequences=s, max_tokens=50, ref_logprobs_BL=a[4], kl_coef=0.1
    ),
    "dapo": lambda a, n, s: losses.dapo_loss(*a[:4], num_tokens=n),
    "ppo": lambda a, n, s: losses.ppo_loss(*a[:4], num_tokens=n, dual_clip=1.3),
    "gspo": lambda a, n, s: losses.gspo_loss(*a[:4], num_sequences=s, clip_low=0.05, clip_high=0.05),
    "cispo": lambda a, n, s: losses.cispo_loss(*a[:4], num_tokens=n, clip_low=0.3, clip_high=0.2),
}
every = pytest.mark.parametrize("name", LOSSES)


def inputs(seed, B=5, L=8):
    """logprobs, old, advantages, correction, ref; everything not kept is NaN."""
    g = torch.Generator().manual_seed(seed)
    old = -2.0 * torch.rand(B, L, generator=g, dtype=torch.float64)
    new, ref = (old + 0.3 * torch.randn(B, L, generator=g, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(B, 1, generator=g, dtype=torch.float64).repeat(1, L)
    keep = torch.rand(B, L, generator=g) < 0.7
    keep[:, 1] = True
    weights = (0.5 + torch.rand(B, L, generator=g)) * keep
    hidden = [x.masked_fill(~keep, math.nan) for x in (new, old, advantages, ref)]
    return hidden[0].requires_grad_(), hidden[1], hidden[2], Correction(weights=weights, keep=keep), hidden[3]


def counts(keep):
    return int(keep.sum()), int(keep.any(-1).sum())


@every
@quick
@given(seeds)
def test_nan_outside_keep_reaches_neither_loss_nor_gradient(name, seed):
    a = inputs(seed)
    loss, metrics = LOSSES[name](a, *counts(a[3].keep))
    (gradient,) = torch.autograd.grad(loss, a[0])
    assert loss.isfinite() and all(m.isfinite() and not m.requires_grad for m in metrics.values())
    assert gradient.isfinite().all() and not gradient[~a[3].keep].any()
    # GSPO's narrow clip can take all five sequences at once (6 of 1000 seeds): exactly then nothing is left to learn from.
    all_clipped = name == "gspo" and float(metrics["clipped_low"] + metrics["clipped_high"]) > 1 - 1e-6
    assert bool(gradient.any()) != all_clipped


@every
@quick
@given(seeds)
def test_shards_add_up_to_the_whole(name, seed):
    a = inputs(seed)
    n, s = counts(a[3].keep)
    whole, metrics = LOSSES[name](a, n, s)
    total, sums = 0.0, dict.fromkeys(metrics, 0.0)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        c = Correction(weights=a[3].weights[rows], keep=a[3].keep[rows])
        part, some = LOSSES[name]((a[0][rows], a[1][rows], a[2][rows], c, a[4][rows]), n, s)
        total = total + part
        sums = {k: sums[k] + some[k] for k in sums}
    torch.testing.assert_close(total, whole)
    for k in metrics:
        torch.testing.assert_close(sums[k], metrics[k].to(sums[k].dtype))
    for g, h in zip(torch.autograd.grad(total, a[0]), torch.autograd.grad(whole, a[0]), strict=True):
        torch.testing.assert_close(g, h)


@every
@quick
@given(seeds)
def test_order_and_padding_do_not_matter(name, seed):
    a = inputs(seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    moved = [torch.nn.functional.pad(x[order], (1, 2), value=math.nan) for x in (a[0], a[1], a[2], a[4])]
    c = Correction(
        weights=torch.nn.functional.pad(a[3].weights[order], (1, 2)),
        keep=torch.nn.functional.pad(a[3].keep[order], (1, 2)),
    )
    n, s = counts(a[3].keep)
    torch.testing.assert_close(LOSSES[name]((*moved[:3], c, moved[3]), n, s)[0], LOSSES[name](a, n, s)[0])


def written(name, new, old, adv, w, ref, T, n, s):
    """One kept token's term, written out plainly; T: kept tokens of its sequence."""
    r = (new - old).exp()
    k3 = (ref - new).exp() - 1 - (ref - new)
    clip = lambda lo, hi: r.clamp(1 - lo, 1 + hi)  # noqa: E731
    surrogate = -torch.minimum(r * adv, clip(0.2, 0.2) * adv) * w
    if name == "grpo":
        return (surrogate + 0.1 * k3) / n
    if name == "grpo_sequence":
        return (surrogate + 0.1 * k3) / T / s
    if name == "dr_grpo":
        return (surrogate + 0.1 * k3) / (50 * s)
    if name == "dapo":
        return -torch.minimum(r * adv, clip(0.2, 0.28) * adv) * w / n
    if name == "cispo":
        return -clip(0.3, 0.2).detach() * adv * new * w / n
    worst = torch.maximum(-r * adv, -clip(0.2, 0.2) * adv)
    return (torch.minimum(worst, -1.3 * adv) if adv < 0 else worst) * w / n


# Weights are float32: terms of order one that cancel leave its rounding behind.
FLOAT32 = 3e-7


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "gspo"])
@quick
@given(seeds)
def test_loss_and_gradient_equal_the_written_formula(name, seed):
    new, old, adv, c, ref = inputs(seed, B=3, L=5)
    n, s = counts(c.keep)
    loss, _ = LOSSES[name]((new, old, adv, c, ref), n, s)
    expected = sum(
        written(name, new[b, t], old[b, t], adv[b, t], c.weights[b, t].double(), ref[b, t], int(c.keep[b].sum()), n, s)
        for b, t in c.keep.nonzero().tolist()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=FLOAT32)
    mine, theirs = (torch.autograd.grad(x, new)[0] for x in (loss, expected))
    torch.testing.assert_close(mine[c.keep], theirs[c.keep], rtol=1e-6, atol=1e-9)


@quick
@given(seeds)
def test_gspo_equals_the_published_objective_with_unit_weights(seed):
    """-mean_i min(s_i A_i, clip(s_i) A_i) with s_i = exp(mean d), differentiated as written."""
    new, old, adv, c, ref = inputs(seed)
    c = Correction(weights=c.keep.float(), keep=c.keep)
    loss, _ = LOSSES["gspo"]((new, old, adv, c, ref), *counts(c.keep))
    terms = []
    for b in range(5):
        ratio = (new[b][c.keep[b]] - old[b][c.keep[b]]).mean().exp()
        a = adv[b][c.keep[b]][0]
        terms.append(-torch.minimum(ratio * a, ratio.clamp(0.95, 1.05) * a))
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=FLOAT32)
    mine, theirs = (torch.autograd.grad(x, new)[0] for x in (loss, expected))
    torch.testing.assert_close(mine[c.keep], theirs[c.keep], rtol=1e-5, atol=1e-9)


def one(new, old=0.0, adv=1.0, weight=1.0):
    keep = torch.ones(1, 1, dtype=torch.bool)
    tensors = [torch.tensor([[float(x)]]) for x in (new, old, adv, weight)]
    return tensors[0].requires_grad_(), tensors[1], tensors[2], Correction(weights=tensors[3], keep=keep)


@pytest.mark.parametrize(
    "ratio, adv, weight, loss, gradient",
    [
        (1.0, 2.0, 1.0, -2.0, -2.0),
        (1.5, 2.0, 1.0, -2.4, 0.0),  # clipped above
        (1.5, -2.0, 1.0, 3.0, 3.0),  # a bad token made likelier keeps its gradient
        (0.5, -2.0, 1.0, 1.6, 0.0),  # clipped below
        (0.5, 2.0, 1.0, -1.0, -1.0),
        (1.0, 2.0, 0.25, -0.5, -0.5),
        (1.0, 2.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, adv, weight, loss, gradient):
    a = one(math.log(ratio), adv=adv, weight=weight)
    value, metrics = losses.grpo_loss(*a, num_tokens=1)
    assert value.item() == pytest.approx(loss)
    assert torch.autograd.grad(value, a[0])[0].item() == pytest.approx(gradient, abs=1e-7)
    assert metrics["ratio"].item() == pytest.approx(ratio)
    assert metrics["clipped_high"].item() == float(ratio > 1.2 and adv > 0)
    assert metrics["clipped_low"].item() == float(ratio < 0.8 and adv < 0)


def test_dual_clip_bounds_what_a_bad_token_can_cost():
    value, metrics = losses.ppo_loss(*one(math.log(50.0), adv=-2.0), num_tokens=1)
    assert value.item() == pytest.approx(6.0) and metrics["dual_clipped"].item() == 1.0
    plain, _ = losses.ppo_loss(*one(math.log(50.0), adv=-2.0), num_tokens=1, dual_clip=math.inf)
    assert plain.item() == pytest.approx(100.0, rel=1e-5)


def test_cispo_keeps_a_gradient_where_the_clip_of_grpo_has_none():
    a = one(math.log(1.5))
    (clipped,) = torch.autograd.grad(losses.grpo_loss(*a, num_tokens=1)[0], a[0])
    (kept,) = torch.autograd.grad(losses.cispo_loss(*a, num_tokens=1, clip_high=0.2)[0], a[0])
    assert clipped.item() == 0.0 and kept.item() == pytest.approx(-1.2)


@every
@pytest.mark.parametrize("d", [80.0, -80.0, 300.0, -300.0])
def test_huge_log_ratios_stay_finite(name, d):
    new, old, adv, c = one(d - 1.0, old=-1.0, adv=-1.0)
    loss, _ = LOSSES[name]((new, old, adv, c, old), 1, 1)
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.isfinite() and gradient.isfinite().all()


@every
def test_a_shard_with_nothing_kept_is_zero_with_a_zero_gradient(name):
    new = torch.full((2, 3), math.nan, requires_grad=True)
    nan = torch.full((2, 3), math.nan)
    c = Correction(weights=torch.zeros(2, 3), keep=torch.zeros(2, 3, dtype=torch.bool))
    loss, _ = LOSSES[name]((new, nan, nan, c, nan), 10, 2)
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.item() == 0.0 and not gradient.any()


def test_rejection_leaves_the_denominator_through_keep():
    """Half the tokens rejected. Counted over keep: the loss of the other half alone; over the mask: half of that."""
    old = torch.zeros(1, 4)
    mask = torch.ones(1, 4, dtype=torch.bool)
    rollout = torch.tensor([[0.0, 0.0, -3.0, -3.0]])
    c = corrections.reject(old, rollout, mask, estimator="k2", aggregate="token", high=1.0)
    adv = torch.ones(1, 4)
    assert losses.grpo_loss(old, old, adv, c, num_tokens=int(c.keep.sum()))[0].item() == -1.0
    assert losses.grpo_loss(old, old, adv, c, num_tokens=int(mask.sum()))[0].item() == -0.5


def test_value_loss_by_hand():
    values, old, returns = (
        torch.tensor([[1.0, 1.0, 9.0]]),
        torch.tensor([[0.0, 1.0, math.nan]]),
        torch.tensor([[2.0, 0.0, 1.0]]),
    )
    keep = torch.tensor([[True, True, False]])
    loss, metrics = losses.value_loss(values, old, returns, keep, num_tokens=2, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * (1.8**2 + 1.0) / 2) and metrics["value_clipped"].item() == 0.5
    plain, _ = losses.value_loss(values, old, returns, keep, num_tokens=2, clip=math.inf)
    assert plain.item() == pytest.approx(0.5)


def test_settings_that_mean_nothing_are_refused():
    a = one(0.0)
    with pytest.raises(ValueError, match="denominator"):
        losses.grpo_loss(*a, num_tokens=0)
    with pytest.raises(ValueError, match="ref_logprobs_BL"):
        losses.grpo_loss(*a, num_tokens=1, kl_coef=0.1)
    with pytest.raises(ValueError, match="clip_low"):
        losses.grpo_loss(*a, num_tokens=1, clip_low=2.0)
    with pytest.raises(ValueError, match="one shape"):
        losses.grpo_loss(a[0], a[1][0], *a[2:], num_tokens=1)
    with pytest.raises(ValueError, match="dual_clip"):
        losses.ppo_loss(*a, num_tokens=1, dual_clip=0.5)
    with pytest.raises(ValueError, match="max_tokens"):
        losses.dr_grpo_loss(*a, num_sequences=1, max_tokens=0)
