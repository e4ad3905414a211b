"""Same inputs, same outputs as TRL's released GRPO trainer: its own methods and statements run on our numbers."""

import math
from types import MethodType, SimpleNamespace

import pytest
import torch

from rlalign import mismatch
from rlalign.integrations.trl_settings import correction_of
from rlalign.objective import corrections, losses, presets
from tests.peers import statement, without_transport

pytestmark = pytest.mark.engine  # importing TRL's trainer takes seconds


@pytest.fixture(scope="module")
def trainer_class():
    with without_transport():
        from trl.trainer.grpo_trainer import GRPOTrainer
    return GRPOTrainer


def batch(seed=0, B=6, L=24, noise=0.2):
    g = torch.Generator().manual_seed(seed)
    rollout = -2.0 * torch.rand(B, L, generator=g)
    old = rollout + noise * torch.randn(B, L, generator=g)
    mask = torch.arange(L) < torch.randint(5, L + 1, (B, 1), generator=g)
    return old, rollout, mask


def importance_ratio(trainer_class, old, rollout, mask, mode, high, low=None):
    """What the released trainer computes for vllm_importance_sampling_mode; [B, T] or [B, 1]."""
    trainer = SimpleNamespace(
        use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=high, vllm_importance_sampling_clip_min=low,
    )  # fmt: skip
    names = {
        "self": trainer, "old_per_token_logps": old, "sampling_per_token_logps": rollout,
        "completion_mask": mask.long(), "tool_mask": None, "torch": torch, "math": math,
    }  # fmt: skip
    code = statement(trainer_class._generate_and_score_completions, "vllm_importance_sampling_correction", _WEIGHTS)
    exec(code, names)
    return names["vllm_importance_sampling_ratio"]


_WEIGHTS = 1  # the first such statement decides whether to score at all


@pytest.mark.proves("TRL vllm_importance_sampling_mode", "its four modes equal rlalign.correct")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("two_sided", [False, True])
def test_the_four_vllm_modes(trainer_class, seed, mode, two_sided):
    old, rollout, mask = batch(seed)
    low, high = (0.8, 1.3) if mode.startswith("token") else (0.35, 1.5)
    low = low if two_sided else None
    theirs = importance_ratio(trainer_class, old, rollout, mask, mode, high, low).expand_as(old)
    settings = {"correction": True, "mode": mode, "clip_min": low, "clip_max": high}
    args = SimpleNamespace(**{f"vllm_importance_sampling_{name}": value for name, value in settings.items()})
    ours = corrections.correct(old, rollout, mask, **correction_of(args))
    torch.testing.assert_close(ours.weights[mask], theirs[mask], rtol=1e-5, atol=1e-7)
    if mode.endswith("mask"):  # a zero ratio there is a rejection here
        assert torch.equal(ours.keep, mask & (theirs > 0)) and 0 < ours.keep.sum() < mask.sum()


def test_a_correction_that_is_off_or_unknown():
    assert correction_of(SimpleNamespace(vllm_importance_sampling_correction=False)) is None
    unknown = {"correction": True, "mode": "token_drop", "clip_min": None, "clip_max": 2.0}
    with pytest.raises(ValueError, match="vllm_importance_sampling_mode='token_drop'; known are token_truncate"):
        correction_of(SimpleNamespace(**{f"vllm_importance_sampling_{name}": value for name, value in unknown.items()}))


def test_a_missing_sampling_logprob_differs(trainer_class):
    """Theirs trains the token with ratio 1; ours drops it and counts it, since nothing is known of it."""
    old, rollout, mask = batch(0)
    rollout[0, 2] = math.nan
    assert importance_ratio(trainer_class, old, rollout, mask, "token_truncate", 2.0)[0, 2] == 1.0
    ours = presets.tis(old, rollout, mask)
    assert not ours.keep[0, 2] and mismatch.compare(old, rollout, mask)["nonfinite"] == 1


class Metrics(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


def test_logged_metrics(trainer_class):
    old, rollout, mask = batch(1)
    metrics = Metrics()
    helpers = trainer_class._generate_and_score_completions.__globals__
    names = dict(helpers) | {
        "self": SimpleNamespace(
            use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode="token_truncate",
            accelerator=SimpleNamespace(gather=lambda x: x.reshape(-1)), _metrics={"train": metrics},
        ),
        "old_per_token_logps": old, "sampling_per_token_logps": rollout, "completion_mask": mask.long(),
        "tool_mask": None, "mode": "train", "device": old.device, "sequence_level_is": False,
        "vllm_importance_sampling_ratio": importance_ratio(trainer_class, old, rollout, mask, "token_truncate", 1.3),
    }  # fmt: skip
    exec(statement(trainer_class._generate_and_score_completions, "vllm_importance_sampling_correction", 2), names)
    theirs = {name: values[0] for name, values in metrics.items()}
    ours = mismatch.compare(old, rollout, mask)
    after = corrections.describe(presets.tis(old, rollout, mask, high=1.3), old, rollout, mask)
    assert ours["abs_mean"] == pytest.approx(theirs["sampling/sampling_logp_difference/mean"], rel=1e-5)
    assert ours["abs_max"] == pytest.approx(theirs["sampling/sampling_logp_difference/max"], rel=1e-5)
    for name in ("min", "mean", "max"):
        assert after[f"weight_{name}"] == pytest.approx(theirs[f"sampling/importance_sampling_ratio/{name}"], rel=1e-5)
    assert (
        theirs["sampling/importance_sampling_ratio/max"] <= 1.3 + 1e-6 < ours["ratio_max"]
    )  # theirs hides what it cut


@pytest.mark.parametrize("seed", range(3))
def test_off_policy_sequence_mask(trainer_class, seed):
    old, rollout, mask = batch(seed)
    adv = torch.tensor([1.0, -1.0, -1.0, -1.0, 0.0, -2.0])[:, None]
    theirs = trainer_class.get_off_policy_mask(adv, old, rollout, mask.float(), 0.005)
    ours = presets.opsm(old, rollout, mask, adv.expand_as(old), delta=0.005)
    assert torch.equal(ours.keep, mask & theirs.bool())


LOSSES = {
    "grpo": ("token", lambda a, c: losses.grpo_sequence_loss(*a, num_sequences=c["s"], **c["kl"])),
    "bnpo": ("token", lambda a, c: losses.grpo_loss(*a, num_tokens=c["n"], **c["kl"])),
    "dapo": ("token", lambda a, c: losses.grpo_loss(*a, num_tokens=c["n"], **c["kl"])),
    "dr_grpo": ("token", lambda a, c: losses.dr_grpo_loss(*a, num_sequences=c["s"], max_tokens=40, **c["kl"])),
    "cispo": ("token", lambda a, c: losses.cispo_loss(*a, num_tokens=c["n"], clip_low=1.0, clip_high=0.2)),
    "gspo": ("sequence", lambda a, c: losses.gspo_loss(*a, num_sequences=c["s"], clip_low=0.2, clip_high=0.2)),
}


def their_loss(trainer_class, kind, level, current, old, adv, weights, mask, ref, beta):
    """GRPOTrainer._compute_loss on given log-probabilities: the model call is the only part replaced."""
    one = SimpleNamespace(
        gather=lambda x: x.reshape(-1), num_processes=1, reduce=lambda x, reduction: x, sync_gradients=True
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (current, torch.zeros_like(current.detach()), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=level, beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type="grpo" if kind == "gspo" else kind, epsilon_low=0.2, epsilon_high=1.2 if kind == "cispo" else 0.2,
        use_vllm=True, vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1,
        max_completion_length=40, accelerator=one, model=SimpleNamespace(training=True), _metrics={"train": Metrics()},
        _entropy_bonus_enabled=False,
    )  # fmt: skip
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.long(), "advantages": adv,
        "old_per_token_logps": old, "importance_sampling_ratio": weights, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return MethodType(trainer_class._compute_loss, trainer)(None, inputs)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_losses_and_their_gradients(trainer_class, kind, beta):
    level, function = LOSSES[kind]
    if beta and kind in ("cispo", "gspo"):
        beta = 0.0  # neither has a reference term here
    old, rollout, mask = batch(4)
    g = torch.Generator().manual_seed(7)
    current = (old + 0.3 * torch.randn(old.shape, generator=g)).requires_grad_()
    ref = old + 0.1 * torch.randn(old.shape, generator=g)
    adv = torch.randn(len(old), generator=g)
    # GSPO's two gradient forms agree where a sequence's tokens share their weight
    c = presets.seq_tis(old, rollout, mask) if kind == "gspo" else presets.tis(old, rollout, mask, high=1.1)
    theirs = their_loss(trainer_class, kind, level, current, old, adv, c.weights, mask, ref, beta)
    (their_gradient,) = torch.autograd.grad(theirs, current)
    kl = {"ref_logprobs_BL": ref, "kl_coef": beta} if beta else {}
    counts = {"n": int(mask.sum()), "s": len(mask), "kl": kl}
    loss, _ = function((current, old, adv[:, None].expand_as(old), c), counts)
    (gradient,) = torch.autograd.grad(loss, current)
    assert loss.item() == pytest.approx(theirs.item(), rel=2e-5)
    torch.testing.assert_close(gradient, their_gradient, rtol=2e-5, atol=1e-8)


def test_gspo_gradients_differ_where_weights_vary_inside_a_sequence(trainer_class):
    """Theirs spreads each token's weight over the sequence; ours (GSPO-token, as verl) keeps it on its token."""
    old, rollout, mask = batch(4)
    current = (old + 0.1).requires_grad_()
    adv = torch.ones(len(old))
    c = presets.tis(old, rollout, mask, high=1.1)
    theirs = their_loss(trainer_class, "gspo", "sequence", current, old, adv, c.weights, mask, old, 0.0)
    (their_gradient,) = torch.autograd.grad(theirs, current)
    loss, _ = losses.gspo_loss(current, old, adv[:, None].expand_as(old), c, num_sequences=len(mask), clip_high=0.2)
    (gradient,) = torch.autograd.grad(loss, current)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(gradient.sum(-1), their_gradient.sum(-1), rtol=1e-5, atol=1e-8)
    assert their_gradient[0][mask[0]].std() < 1e-7 < gradient[0][mask[0]].std()
