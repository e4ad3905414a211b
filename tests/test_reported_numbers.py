"""Inputs on which a loss, an advantage, a correction or a metric once gave a wrong number; the right one by hand or in float64."""

import math

import pytest
import torch

from rlalign import mismatch
from rlalign.mismatch import breakdown
from rlalign.objective import advantages, corrections, losses, presets, reference_kl
from rlalign.types import Correction

BOOL = torch.ones(3, 3, dtype=torch.bool)


def kept(keep, weights=None):
    keep = torch.tensor(keep)
    return Correction(weights=keep.float() if weights is None else torch.tensor(weights), keep=keep)


def rows(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def test_value_loss_refuses_what_would_broadcast():
    values = torch.arange(3.0)[:, None]
    with pytest.raises(ValueError, match=r"values \(3, 1\).*returns \(3,\)"):
        losses.value_loss(values, values, torch.arange(3.0), torch.ones(3, 1, dtype=torch.bool), num_tokens=3)
    mask = torch.ones(3, 1, dtype=torch.bool)
    loss, _ = losses.value_loss(values, values, torch.arange(3.0)[:, None], mask, num_tokens=3)
    assert loss == 0.0


X, WRONG = torch.zeros(3, 3), torch.zeros(3, 1)
EVERY = {
    "grpo": lambda x, m: losses.grpo_loss(X, x, X, Correction(weights=X, keep=m), num_tokens=1),
    "grpo reference": lambda x, m: losses.grpo_loss(
        X, X, X, Correction(weights=X, keep=m), num_tokens=1, ref_logprobs_BL=x, kl_coef=0.1
    ),
    "gspo": lambda x, m: losses.gspo_loss(X, X, x, Correction(weights=X, keep=m), num_sequences=1),
    "cispo": lambda x, m: losses.cispo_loss(X, X, X, Correction(weights=x, keep=m), num_tokens=1),
    "gae": lambda x, m: advantages.gae(X, x, m),
    "token_rewards": lambda x, m: advantages.token_rewards(torch.zeros(3), m, x),
    "explained": lambda x, m: advantages.explained(X, x, m),
    "whiten": lambda x, m: advantages.whiten(x, m),
    "correct": lambda x, m: corrections.correct(X, x, m, level="token", mode="truncate", high=2.0),
    "compose": lambda x, m: corrections.compose(
        Correction(weights=X, keep=m), Correction(weights=x, keep=x.bool()), Correction(weights=X, keep=m)
    ),
    "restrict": lambda x, m: corrections.restrict(
        Correction(weights=X, keep=BOOL), m, Correction(weights=x, keep=x.bool())
    ),
    "opsm": lambda x, m: presets.opsm(X, X, m, x),
    "dppo_tv": lambda x, m: presets.dppo_tv(X, X, m, x),
    "m2po": lambda x, m: presets.m2po(X, X, m, x),
    "reference_kl": lambda x, m: reference_kl.per_token(X, x, m, "k1"),
    "compare": lambda x, m: mismatch.compare(X, x, m),
    "deciles": lambda x, m: breakdown.deciles(x, m),
    "token_lags": lambda x, m: breakdown.token_lags(x.long(), m, version=1),
    "worst_tokens": lambda x, m: breakdown.worst_tokens(X, x, m),
}


@pytest.mark.parametrize("name", EVERY)
def test_tensors_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match="one shape"):
        EVERY[name](WRONG, BOOL)


@pytest.mark.parametrize("name", EVERY)
def test_masks_of_integers_are_refused(name):
    with pytest.raises(ValueError, match="must be bool, got torch.int64"):
        EVERY[name](X, BOOL.long())


def test_explained_of_an_integer_mask_indexed_rows():
    values, returns = rows([0.5, 1.0, 2.0]), rows([1.0, 1.0, 3.0])
    inside = advantages.explained(values, returns, rows([True, True, True], dtype=torch.bool))
    error, spread = torch.tensor([0.5, 0.0, 1.0]), torch.tensor([1.0, 1.0, 3.0])
    assert inside["explained_variance"] == pytest.approx(1 - float(error.var() / spread.var()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_logprobs_are_clipped_at_the_bounds_that_were_given(dtype):
    new, old = rows([-1.0 + 2**-9], dtype=torch.float64), rows([-1.0], dtype=torch.float64)
    if dtype == torch.bfloat16:  # 2^-9 next to 1 is not a bfloat16: put the difference where both are
        new, old = rows([-(2.0**-9)], dtype=torch.float64), rows([-(2.0**-8)], dtype=torch.float64)
    new, old = new.to(dtype).requires_grad_(), old.to(dtype)
    loss, metrics = losses.gspo_loss(new, old, rows([1.0], dtype=dtype), kept([[True]]), num_sequences=1)
    loss.backward()
    assert float(loss) == pytest.approx(-1.0004, abs=1e-7) and float(new.grad) == 0.0
    assert float(metrics["clipped_high"]) == 1.0
    new = rows([-0.8125], dtype=dtype).requires_grad_()
    loss, metrics = losses.grpo_loss(
        new, rows([-1.0], dtype=dtype), rows([1.0], dtype=dtype), kept([[True]]), num_tokens=1
    )
    assert float(metrics["clipped_high"]) == 1.0 and float(loss) == pytest.approx(-1.2)


def test_a_rejected_weight_of_infinity_is_not_multiplied():
    correction = kept([[False, True]], weights=[[math.inf, 1.0]])
    given = (torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), correction)
    assert float(losses.grpo_loss(*given, num_tokens=1)[0]) == -1.0
    assert float(losses.ppo_loss(*given, num_tokens=1)[0]) == -1.0
    assert float(losses.gspo_loss(*given, num_sequences=1)[0]) == -1.0
    assert float(losses.cispo_loss(*given, num_tokens=1)[0]) == 0.0
    assert corrections.normalized(correction).weights.tolist() == [[0.0, 1.0]]


def test_a_barred_logit_has_no_part_in_the_entropy():
    from rlalign.logprobs import from_logits

    logits = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]]], requires_grad=True)
    _, entropy = from_logits(logits, torch.tensor([[0, 1]]))
    entropy.sum().backward()
    assert float(entropy[0, 1]) == pytest.approx(math.log(2)) and bool(logits.grad.isfinite().all())


def test_m2po_counts_only_what_a_clip_could_meet():
    d = rows([-1.0, 0.05, -0.05, 0.02])
    old, rollout, mask = d - 2.0, torch.full_like(d, -2.0), torch.ones_like(d, dtype=torch.bool)
    quadrant = (0.05**2 + 0.02**2) / 2
    assert presets.m2po(old, rollout, mask, torch.ones_like(d)).keep.all()
    assert quadrant == pytest.approx(0.00145)
    assert presets.m2po(old, rollout, mask, torch.ones_like(d), threshold=0.001).keep.tolist() == [
        [True, False, True, True]
    ]
    assert presets.m2po(old, rollout, mask, -torch.ones_like(d)).keep.tolist() == [[False, True, True, True]]
    assert presets.m2po_all(old, rollout, mask).keep.tolist() == [[False, True, True, True]]


def test_gspo_beyond_the_limit_goes_on_with_the_limits_weight():
    new = rows([-1.0]).requires_grad_()
    loss, _ = losses.gspo_loss(new, rows([-31.0]), rows([-1.0]), kept([[True]]), num_sequences=1)
    loss.backward()
    assert float(new.grad) == pytest.approx(math.exp(losses.LOG_RATIO_LIMIT), rel=1e-6)


def test_gae_refuses_a_reward_that_would_be_lost():
    mask = rows([True, False, True, False], dtype=torch.bool)
    values = torch.full((1, 4), 0.5)
    with pytest.raises(ValueError, match=r"reward 1 of sequence 0 lies at position 3, outside the loss mask"):
        advantages.gae(rows([0.0, 0.0, 0.0, 1.0]), values, mask)
    earned = advantages.token_rewards(torch.ones(1), mask)
    assert advantages.gae(earned, values, mask, gamma=1.0, lam=0.5)[0].tolist() == [[0.25, 0.0, 0.5, 0.0]]
    padded = rows([0.0, math.nan, 1.0, math.nan])
    assert advantages.gae(padded, values, mask, lam=0.5)[0].tolist() == [[0.25, 0.0, 0.5, 0.0]]


def test_rounding_among_rewards_is_no_signal():
    group = torch.zeros(4, dtype=torch.int64)
    assert not advantages.group_relative([100.0, 100.0, 100.0, 100.0000076], group).any()
    assert advantages.group_relative([100.0, 100.0, 100.0, 100.01], group).any()
    assert advantages.group_relative([1e-9, 2e-9, 1e-9, 1e-9], group).any()  # small is not rounding


def test_old_reference_advantages_and_weights_are_constants():
    x = rows([-1.0, -2.0]).requires_grad_()
    correction = Correction(weights=x.exp() / x.detach().exp(), keep=torch.ones(1, 2, dtype=torch.bool))
    loss, _ = losses.grpo_loss(x, x, rows([1.0, 1.0]), correction, num_tokens=2)
    loss.backward()
    assert x.grad.tolist() == [[-0.5, -0.5]]
    new, ref = rows([math.log(0.9)]).requires_grad_(), rows([math.log(0.5)]).requires_grad_()
    value = rows([0.3]).requires_grad_()
    loss, _ = losses.grpo_loss(new, new, value, kept([[True]]), num_tokens=1, ref_logprobs_BL=ref, kl_coef=1.0)
    loss.backward()
    assert ref.grad is None and value.grad is None
    values = rows([1.0]).requires_grad_()
    losses.value_loss(values, values, values, kept([[True]]).keep, num_tokens=1)[0].backward()
    assert values.grad.tolist() == [[0.0]]


def test_the_unbiased_kl_gradient_is_that_of_the_kl():
    """Two tokens, pi = .9 and .1, reference .5: enumerated with the policy's own probabilities."""

    def gradient(kind):
        logit = torch.tensor(math.log(9.0), dtype=torch.float64, requires_grad=True)
        both = torch.stack([torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)])[:, None]
        probs = both.detach().exp()
        total = 0.0
        for i in range(2):
            one = kept([[True]])
            zero = torch.zeros(1, 1, dtype=torch.float64)
            ref = torch.full_like(zero, math.log(0.5))
            loss, _ = losses.grpo_loss(
                both[i : i + 1], both[i : i + 1].detach(), zero, one, num_tokens=1, ref_logprobs_BL=ref, kl_coef=1.0,
                kl_gradient=kind,
            )  # fmt: skip
            total = total + probs[i, 0] * loss
        total.backward()
        return float(logit.grad), float(total)

    kl = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert gradient("k3") == (pytest.approx(0.4, abs=1e-6), pytest.approx(kl))
    assert gradient("unbiased") == (pytest.approx(0.1978, abs=1e-4), pytest.approx(kl))
    with pytest.raises(ValueError, match="k3"):
        gradient("k4")


@pytest.mark.parametrize("loss", ["grpo_loss", "gspo_loss", "cispo_loss", "ppo_loss"])
def test_padded_lengths_do_not_compile_again(loss, compiling):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    count = {"num_sequences": 2} if loss == "gspo_loss" else {"num_tokens": 4}
    function = torch.compile(getattr(losses, loss), backend=counter)
    for length in range(5, 25):
        x, mask = torch.zeros(2, length), torch.ones(2, length, dtype=torch.bool)
        function(x, x - 0.1, x + 1.0, Correction(weights=mask.float(), keep=mask), **count)
    assert counter.frame_count <= 2


def test_an_empty_batch_rejects_nothing():
    empty, mask = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)
    for aggregate in corrections.AGGREGATES:
        assert corrections.reject(empty, empty, mask, estimator="k1", aggregate=aggregate, high=1.0).keep.shape == (
            2,
            0,
        )


def test_every_key_exists_for_every_lag():
    g = torch.Generator().manual_seed(0)
    old, rollout = -torch.rand(4, 30, generator=g), -torch.rand(4, 30, generator=g)
    mask, group = torch.ones(4, 30, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    whole = mismatch.compare(old, rollout, mask, group_B=group)
    lags = torch.tensor([0, 0, 1, 1])
    by_lag = mismatch.compare(old, rollout, mask, lag_B=lags, group_B=group)
    assert {f"lag{lag}/{name}" for lag in (0, 1) for name in whole} <= by_lag.keys()
    alone = mismatch.compare(old[:2], rollout[:2], mask[:2], group_B=group[:2])
    assert all(by_lag[f"lag0/{name}"] == pytest.approx(value, nan_ok=True) for name, value in alone.items())
    with pytest.raises(ValueError, match="integers"):
        mismatch.compare(old, rollout, mask, lag_B=torch.tensor([0.5, 0.0, 0.5, 0.0]))


def test_a_sampling_logprob_above_zero_is_broken():
    old, rollout = rows([-0.1, -0.2, -0.3]), rows([1.0, -0.2, 1e-6])
    mask = torch.ones(1, 3, dtype=torch.bool)
    metrics = mismatch.compare(old, rollout, mask)
    assert (metrics["tokens"], metrics["nonfinite"], metrics["nonfinite_rollout"]) == (2.0, 1.0, 1.0)
    assert corrections.identity(old, rollout, mask).keep.tolist() == [[False, True, True]]
    assert [t.position for t in breakdown.nonfinite_tokens(old, rollout, mask)] == [0]


def test_a_tensor_spread_over_ranks_is_refused_by_name(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    if own := not dist.is_initialized():  # else that of an engine in this process, of one rank too
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = distribute_tensor(torch.zeros(2, 3), init_device_mesh("cpu", (1,)))
        mask = torch.ones(2, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match="old is a DTensor"):
            mismatch.compare(x, torch.zeros(2, 3), mask)
        with pytest.raises(ValueError, match="weights is a DTensor"):
            corrections.normalized(Correction(weights=x, keep=mask))
    finally:
        if own:
            dist.destroy_process_group()
