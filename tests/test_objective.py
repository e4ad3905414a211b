"""Every configured correction and loss is the library's own function with the configured arguments."""

import pytest
import torch

from rlalign.config import LOSSES, PRESETS, AlgoConfig, CorrectionConfig
from rlalign.objective import choice, corrections, losses, presets
from rlalign.types import LogprobSpec, Rollout, TrainBatch, collate


@pytest.fixture
def case():
    """Eight sequences with a visible mismatch and one token whose rollout logprob is not finite."""
    generator = torch.Generator().manual_seed(0)
    values = (-torch.rand(8, 6, generator=generator) * 3).tolist()
    rollouts = [
        Rollout(
            token_ids=[1, 2, *range(3, 9)],
            loss_mask=[False] * 2 + [True] * 6,
            rollout_logprobs=[0.0, 0.0, *row],
            prompt_id=i // 4,
            group_id=i // 4,
            finish_reason="stop",
            version_spans=[(2, 8, 0)],
        )
        for i, row in enumerate(values)
    ]
    rollouts[3].rollout_logprobs[4] = -float("inf")
    batch = collate(rollouts, pad_token_id=0, spec=LogprobSpec())
    old = batch.rollout_logprobs_BL + 0.4 * torch.randn(8, 8, generator=generator)
    old = torch.where(batch.loss_mask_BL, old.nan_to_num(neginf=-2.0), 0.0)
    advantages = torch.randn(8, 1, generator=generator).expand(8, 8)
    return batch, old, advantages


def same(a, b):
    return torch.equal(a.weights, b.weights) and torch.equal(a.keep, b.keep)


def test_no_correction_is_weights_of_one_on_finite_tokens(case):
    batch, old, advantages = case
    found = choice.correct(old, batch, advantages, AlgoConfig())
    assert same(found, corrections.identity(old, batch.rollout_logprobs_BL, batch.loss_mask_BL))
    assert found.weights[found.keep].eq(1.0).all() and int(found.keep.sum()) == 8 * 6 - 1


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_reachable_by_name(case, name):
    batch, old, advantages = case
    algo = AlgoConfig(correction=CorrectionConfig(preset=name))
    extra = (advantages,) if name in ("opsm", "dppo_tv", "m2po") else ()
    direct = getattr(presets, name)(old, batch.rollout_logprobs_BL, batch.loss_mask_BL, *extra)
    assert same(choice.correct(old, batch, advantages, algo), direct)


@pytest.mark.parametrize("name", [n for n, bounds in PRESETS.items() if "high" in bounds])
def test_bounds_reach_the_presets_that_take_them(case, name):
    batch, old, advantages = case
    wide = choice.correct(old, batch, advantages, AlgoConfig(correction=CorrectionConfig(preset=name)))
    tight_config = CorrectionConfig(preset=name, high=1.0001, low=0.9999 if "low" in PRESETS[name] else None)
    if name == "dppo_tv":
        tight_config = CorrectionConfig(preset=name, high=1e-6, low=1e-6)
    tight = choice.correct(old, batch, advantages, AlgoConfig(correction=tight_config))
    assert not same(wide, tight) or name == "geo_mask"


def test_level_and_mode_are_the_general_form(case):
    batch, old, advantages = case
    chosen = CorrectionConfig(level="geometric", mode="clip", low=0.9, high=1.1, veto=1e-3, normalize=True)
    direct = corrections.correct(
        old, batch.rollout_logprobs_BL, batch.loss_mask_BL, level="geometric", mode="clip", low=0.9, high=1.1, veto=1e-3,
        normalize=True,
    )  # fmt: skip
    assert same(choice.correct(old, batch, advantages, AlgoConfig(correction=chosen)), direct)


FUNCTIONS = {name: getattr(losses, f"{name}_loss") for name in LOSSES}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_reachable_and_adds_up_over_micro_batches(case, name):
    batch, old, advantages = case
    correction = corrections.identity(old, batch.rollout_logprobs_BL, batch.loss_mask_BL)
    whole = TrainBatch(
        rollouts=batch,
        old_logprobs_BL=old,
        advantages_BL=advantages,
        correction=correction,
        num_tokens=int(correction.keep.sum()),
        num_sequences=8,
    )
    logprobs = (old + 0.01).requires_grad_()
    algo = AlgoConfig(loss=name)
    loss, metrics = choice.policy_loss(logprobs, whole, algo=algo, max_tokens=6)
    counts = {"num_tokens": whole.num_tokens} if name in ("grpo", "dapo", "cispo", "ppo") else {"num_sequences": 8}
    if name == "dr_grpo":
        counts["max_tokens"] = 6
    direct, _ = FUNCTIONS[name](logprobs, old, advantages, correction, **counts)
    assert torch.equal(loss, direct)
    parts = [
        choice.policy_loss(logprobs[rows], whole.rows(rows), algo=algo, max_tokens=6)
        for rows in (slice(0, 3), slice(3, 8))
    ]
    assert torch.allclose(sum(part for part, _ in parts), loss, atol=1e-6)
    for key, value in metrics.items():
        assert float(sum(m[key] for _, m in parts)) == pytest.approx(float(value), abs=1e-5)
