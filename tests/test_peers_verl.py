"""Same inputs, same outputs as verl's released package, for every metric, correction and loss both have.

Where the two disagree by definition, a test here shows by how much and why; docs/metrics.md and docs/losses.md list it.
"""

import math

import pytest
import torch

from rlalign import mismatch
from rlalign.config import KlPenaltyConfig
from rlalign.objective import advantages, corrections, losses, presets, reference_kl
from tests.peers import without_transport

pytestmark = pytest.mark.engine  # importing verl takes seconds


@pytest.fixture(scope="module")
def verl():
    with without_transport():
        import verl.trainer.ppo.core_algos as algos
        import verl.trainer.ppo.rollout_corr_helper as corr
        import verl.utils.debug.metrics as debug
        from verl.workers.config import ActorConfig
    return {"corr": corr, "algos": algos, "debug": debug, "ActorConfig": ActorConfig}


def batch(seed=0, B=6, L=30, noise=0.15):
    g = torch.Generator().manual_seed(seed)
    rollout = -2.0 * torch.rand(B, L, generator=g)
    old = rollout + noise * torch.randn(B, L, generator=g)
    mask = torch.arange(L) < torch.randint(5, L + 1, (B, 1), generator=g)
    return old, rollout, mask


SAME = {
    "training_ppl": "ppl_old", "training_log_ppl": "log_ppl_old", "kl": "k1", "k3_kl": "k3",
    "rollout_ppl": "ppl_rollout", "rollout_log_ppl": "log_ppl_rollout",
    "log_ppl_diff": "log_ppl_diff", "log_ppl_abs_diff": "log_ppl_abs_diff",
    "log_ppl_diff_max": "log_ppl_diff_max", "log_ppl_diff_min": "log_ppl_diff_min", "ppl_ratio": "ppl_ratio",
    "chi2_token": "chi2_token", "chi2_seq": "chi2_seq_product",
}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_off_policy_metrics(verl, seed):
    old, rollout, mask = batch(seed)
    theirs = verl["corr"].compute_offpolicy_metrics(old, rollout, mask)
    ours = mismatch.compare(old, rollout, mask)
    assert theirs.keys() == SAME.keys()
    for name, key in SAME.items():
        assert ours[key] == pytest.approx(theirs[name], rel=2e-4, abs=2e-6), name


def test_the_clamp_at_20_is_the_only_difference_in_chi2(verl):
    old, rollout, mask = torch.full((1, 100), -0.5), torch.full((1, 100), -0.75), torch.ones(1, 100, dtype=torch.bool)
    theirs = verl["corr"].compute_offpolicy_metrics(old, rollout, mask)["chi2_seq"]
    assert theirs == pytest.approx(math.exp(40), rel=1e-5)
    assert mismatch.compare(old, rollout, mask)["chi2_seq_product"] == pytest.approx(math.exp(50), rel=1e-4)


def test_probability_metrics(verl):
    from types import SimpleNamespace

    old, rollout, mask = batch(1)
    given = {"rollout_log_probs": rollout, "old_log_probs": old, "response_mask": mask, "responses": old}
    theirs = verl["debug"].calculate_debug_metrics(SimpleNamespace(batch=given))
    ours = mismatch.compare(old, rollout, mask)
    n = ours["tokens"]
    assert ours["prob_abs_mean"] == pytest.approx(theirs["training/rollout_probs_diff_mean"], rel=1e-5)
    assert ours["prob_abs_max"] == pytest.approx(theirs["training/rollout_probs_diff_max"], rel=1e-5)
    assert ours["pearson_prob"] == pytest.approx(theirs["training/rollout_actor_probs_pearson_corr"], rel=1e-5)
    unbiased = theirs["training/rollout_probs_diff_std"]  # theirs divides by n - 1, ours by n
    assert ours["prob_abs_std"] == pytest.approx(unbiased * math.sqrt((n - 1) / n), rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalize", [False, True])
def test_truncated_weights(verl, level, normalize):
    old, rollout, mask = batch(2)
    theirs, _ = verl["corr"].compute_rollout_correction_weights(old - rollout, mask.float(), level, 1.1, normalize)
    ours = corrections.correct(old, rollout, mask, level=level, mode="truncate", high=1.1, normalize=normalize)
    if level == "sequence" and normalize:  # theirs has the mean over sequences, ours over tokens: one factor apart
        factor = theirs[mask] / ours.weights[mask]
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))
        assert factor[0] != pytest.approx(1.0, abs=1e-4)
    else:
        torch.testing.assert_close(ours.weights, theirs, rtol=2e-5, atol=1e-7)


def test_icepop_weights_agree_and_the_mask_does_not(verl):
    old, rollout, mask = batch(3, noise=0.6)
    theirs, metrics = verl["corr"].compute_rollout_correction_weights(old - rollout, mask.float(), "token", "0.5_2.0")
    ours = presets.icepop(old, rollout, mask, low=0.5, high=2.0)
    torch.testing.assert_close(ours.weights, theirs, rtol=2e-5, atol=1e-7)
    described = corrections.describe(ours, old, rollout, mask)
    assert (
        described["masked_share"] == pytest.approx(metrics["rollout_is_oob_ratio"]) and described["masked_share"] > 0.1
    )
    assert described["ess"] == pytest.approx(metrics["rollout_is_eff_sample_size"], rel=1e-5)


REJECT = {
    "token_k1": ("k1", "token"), "token_k2": ("k2", "token"), "token_k3": ("k3", "token"),
    "seq_sum_k1": ("k1", "sum"), "seq_sum_k2": ("k2", "sum"), "seq_sum_k3": ("k3", "sum"),
    "seq_mean_k1": ("k1", "mean"), "seq_mean_k2": ("k2", "mean"), "seq_mean_k3": ("k3", "mean"),
    "seq_max_k2": ("k2", "max"), "seq_max_k3": ("k3", "max"),
}  # fmt: skip
LIMITS = {"token": (0.9, 1.15), "sum": (0.5, 1.5), "mean": (0.98, 1.01), "max": (None, None)}


@pytest.mark.parametrize("option", REJECT)
@pytest.mark.parametrize("seed", range(3))
def test_rejections(verl, option, seed):
    old, rollout, mask = batch(seed)
    assert REJECT.keys() == verl["corr"].SUPPORTED_ROLLOUT_RS_OPTIONS
    estimator, aggregate = REJECT[option]
    if estimator == "k1":
        low, high = LIMITS[aggregate]
        theirs, metrics = verl["corr"].compute_rollout_rejection_mask(
            old - rollout, mask.float(), option, f"{low}_{high}"
        )
        low, high = math.log(low), math.log(high)
    else:
        low, high = None, {"token": 0.01, "sum": 0.2, "mean": 0.0115, "max": 0.06}[aggregate]
        theirs, metrics = verl["corr"].compute_rollout_rejection_mask(old - rollout, mask.float(), option, str(high))
    ours = corrections.reject(old, rollout, mask, estimator=estimator, aggregate=aggregate, low=low, high=high)
    assert torch.equal(ours.keep, theirs.bool())
    described = corrections.describe(ours, old, rollout, mask)
    assert described["masked_share"] == pytest.approx(metrics[f"rollout_rs_{option}_masked_fraction"], abs=1e-6)


def test_every_rejection_option_rejects_something_and_keeps_something(verl):
    """Otherwise the comparison above would prove nothing."""
    shares = []
    for option, (estimator, aggregate) in REJECT.items():
        low, high = LIMITS[aggregate]
        bounds = {"low": math.log(low), "high": math.log(high)} if estimator == "k1" else {
            "high": {"token": 0.01, "sum": 0.2, "mean": 0.0115, "max": 0.06}[aggregate]}  # fmt: skip
        for seed in range(3):
            given = batch(seed)
            c = corrections.reject(*given, estimator=estimator, aggregate=aggregate, **bounds)
            shares.append((option, float(c.keep.sum() / given[2].sum())))
    for option in REJECT:
        assert any(0 < share < 1 for name, share in shares if name == option), option


def actor(verl, **settings):
    info = {
        "dp_size": 1,
        "batch_num_tokens": None,
        "global_batch_size": None,
        "loss_scale_factor": settings.pop("scale", None),
    }
    return verl["ActorConfig"](strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, global_batch_info=info, **settings)


def policy_inputs(seed=4):
    old, rollout, mask = batch(seed)
    g = torch.Generator().manual_seed(99)
    current = (old + 0.3 * torch.randn(old.shape, generator=g)).requires_grad_()
    adv = torch.randn(old.shape[0], 1, generator=g).expand_as(old)
    return current, old, adv, presets.tis(old, rollout, mask, high=1.1), mask


def loss_cases(verl):
    n, s = "num_tokens", "num_sequences"
    algos = verl["algos"]
    return {
        "dapo": (algos.compute_policy_loss_vanilla, {"clip_ratio_c": 1e9}, "token-mean", 0.28,
                 lambda a, c: losses.dapo_loss(*a, num_tokens=c[n])),
        "grpo, token mean": (algos.compute_policy_loss_vanilla, {"clip_ratio_c": 1e9}, "token-mean", 0.2,
                             lambda a, c: losses.grpo_loss(*a, num_tokens=c[n])),
        "grpo, published": (algos.compute_policy_loss_vanilla, {"clip_ratio_c": 1e9}, "seq-mean-token-mean", 0.2,
                            lambda a, c: losses.grpo_sequence_loss(*a, num_sequences=c[s])),
        "dr. grpo": (algos.compute_policy_loss_vanilla, {"clip_ratio_c": 1e9, "scale": 64},
                     "seq-mean-token-sum-norm", 0.2,
                     lambda a, c: losses.dr_grpo_loss(*a, num_sequences=c[s], max_tokens=64)),
        "ppo, dual clip": (algos.compute_policy_loss_vanilla, {"clip_ratio_c": 1.5}, "token-mean", 0.2,
                           lambda a, c: losses.ppo_loss(*a, num_tokens=c[n], dual_clip=1.5)),
        "gspo": (algos.compute_policy_loss_gspo, {}, "seq-mean-token-mean", 0.03,
                 lambda a, c: losses.gspo_loss(*a, num_sequences=c[s], clip_low=0.2, clip_high=0.03)),
        "cispo": (algos.compute_policy_loss_cispo, {}, "token-mean", 0.2,
                  lambda a, c: losses.cispo_loss(*a, num_tokens=c[n], clip_low=0.2, clip_high=0.2)),
    }  # fmt: skip


CASES = ("dapo", "grpo, token mean", "grpo, published", "dr. grpo", "ppo, dual clip", "gspo", "cispo")


@pytest.mark.parametrize("case", CASES)
def test_losses_and_their_gradients(verl, case):
    function, settings, aggregation, high, ours = loss_cases(verl)[case]
    current, old, adv, correction, mask = policy_inputs()
    config = actor(verl, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=high, **settings)
    theirs, _ = function(old, current, adv, mask.float(), aggregation, config, correction.weights)
    (their_gradient,) = torch.autograd.grad(theirs, current)
    counts = {"num_tokens": int(mask.sum()), "num_sequences": len(mask)}
    loss, _ = ours((current, old, adv, correction), counts)
    (gradient,) = torch.autograd.grad(loss, current)
    assert loss.item() == pytest.approx(theirs.item(), rel=2e-5)
    torch.testing.assert_close(gradient, their_gradient, rtol=2e-5, atol=1e-8)


def test_loss_cases_are_all_covered(verl):
    assert tuple(loss_cases(verl)) == CASES


def test_dppo_tv_mask_and_gradient(verl):
    """Theirs is -A sg(rho) logp on kept tokens: `dppo_tv` weights in a loss whose own ratio is 1."""
    old, rollout, mask = batch(5, noise=0.5)
    adv = torch.randn(len(old), 1, generator=torch.Generator().manual_seed(3)).expand_as(old)
    current = old.clone().requires_grad_()
    config = actor(verl, clip_ratio=0.1, clip_ratio_low=0.1, clip_ratio_high=0.1, clip_ratio_c=2.0)
    theirs, metrics = verl["algos"].compute_policy_loss_dppo_tv(
        rollout, current, adv, mask.float(), "token-mean", config
    )
    (their_gradient,) = torch.autograd.grad(theirs, current)
    c = presets.dppo_tv(old, rollout, mask, adv, low=0.1, high=0.1, truncate=2.0)
    loss, _ = losses.cispo_loss(current, old, adv, c, num_tokens=int(mask.sum()))
    (gradient,) = torch.autograd.grad(loss, current)
    torch.testing.assert_close(gradient, their_gradient, rtol=2e-5, atol=1e-8)
    masked = corrections.describe(c, old, rollout, mask)["masked_share"]
    assert masked == pytest.approx(metrics["actor/pg_clipfrac"], abs=1e-6) and masked > 0.05


def test_value_loss(verl):
    g = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 4, 7, generator=g)
    mask = torch.rand(4, 7, generator=g) < 0.7
    theirs, clipped = verl["algos"].compute_value_loss(values, returns, old, mask.float(), 0.2)
    loss, metrics = losses.value_loss(values, old, returns, mask, num_tokens=int(mask.sum()), clip=0.2)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert float(metrics["value_clipped"]) == pytest.approx(float(clipped), rel=1e-5)


def test_gae_and_whitening(verl):
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 9, generator=g)
    mask = torch.ones(4, 9)
    mask[1, 3:5], mask[2, 6:] = 0, 0
    rewards, values = rewards * mask, values * mask
    theirs, returns = verl["algos"].compute_gae_advantage_return(rewards, values, mask, 0.9, 0.95)
    a, r = advantages.gae(rewards, values, mask.bool(), gamma=0.9, lam=0.95)
    inside = mask.bool()
    torch.testing.assert_close(r[inside], returns[inside], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages.whiten(a, inside)[inside], theirs[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_penalty_on_the_reward(verl, estimator):
    old, ref, mask = batch(0)
    theirs = verl["algos"].kl_penalty(old, ref, estimator)
    torch.testing.assert_close(
        reference_kl.per_token(old, ref, mask, estimator)[mask], theirs[mask], rtol=1e-4, atol=1e-6
    )


def test_the_adaptive_kl_coefficient(verl):
    config = KlPenaltyConfig(coef=0.2, target=3.0, horizon=500)
    ours, theirs = reference_kl.KlController(config), verl["algos"].AdaptiveKLController(0.2, 3.0, 500)
    for measured in (1.0, 2.9, 3.2, 40.0, -1.0):
        ours.update(measured, 64)
        theirs.update(measured, 64)
        assert ours.coef == pytest.approx(float(theirs.value), rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_group_relative(verl, normalize):
    g = torch.Generator().manual_seed(0)
    rewards, group = torch.rand(8, generator=g), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    theirs, _ = verl["algos"].compute_grpo_outcome_advantage(
        rewards[:, None].clone(), torch.ones(8, 1), group.numpy(), norm_adv_by_std_in_grpo=normalize
    )
    ours = advantages.group_relative(rewards, group, normalize_std=normalize)
    torch.testing.assert_close(ours, theirs[:, 0], rtol=1e-5, atol=1e-6)


def test_a_group_of_one_differs(verl):
    """Theirs keeps the raw reward as the advantage; ours is 0, since one sample has nothing to be compared with."""
    theirs, _ = verl["algos"].compute_grpo_outcome_advantage(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1).numpy())
    assert float(theirs) == pytest.approx(1.0, rel=1e-5)
    assert float(advantages.group_relative(torch.ones(1), torch.zeros(1, dtype=torch.long))) == 0.0
