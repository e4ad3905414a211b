"""Sampling over top-p, top-k and min-p: at lag 0 the ratio is 1 once the trainer renormalises over the same sets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from rlalign import mismatch
from rlalign.config import AlgoConfig, RolloutConfig, TrainerConfig
from rlalign.logprobs.truncation import Truncation, kept_mask
from rlalign.mismatch.causes import Evidence, likely_causes
from rlalign.objective import choice, corrections
from rlalign.rollout.engine.completions import UnknownIds
from rlalign.rollout.engine.surface import spec_of
from rlalign.run.step import scored
from rlalign.tiny_policy.tokenizer import byte_tokenizer
from rlalign.types import TrainBatch, collate
from tests.engine.conftest import ROLLOUT, sample, start
from tests.engine.updates import start_policy

CASES = {
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 50},
    "min_p": {"min_p": 0.05},
    "top_p top_k": {"top_p": 0.9, "top_k": 50},
    "min_p top_k": {"min_p": 0.02, "top_k": 20},
    "all": {"top_p": 0.8, "top_k": 30, "min_p": 0.01},
}
UNKNOWN = UnknownIds.of(byte_tokenizer(256), 288)
FLOOR = 1e-9  # k3 of float32 bodies with float32 heads on both sides


@pytest.fixture(scope="module")
def sides(untied):
    """A float32 engine whose sampling each test sets, and the trainer in DeepSpeed, packed."""
    engine = start(untied, dtype="float32", rollout=replace(ROLLOUT, temperature=0.7, top_p=0.9, bar_unknown_ids=True))
    assert engine.spec.vocab_size == UNKNOWN.first
    policy = start_policy(untied, TrainerConfig(pack_tokens=300), dtype="float32", temperature=0.7)
    yield engine, policy
    policy.close()
    engine.close()


def batch_of(engine, *, barred_from=0, **settings):
    engine.config = RolloutConfig(**{**vars(ROLLOUT), "temperature": 0.7, "top_p": 1.0, **settings})
    engine.spec = spec_of(engine.config, "float32", vocab_size=barred_from)
    return collate(sample(engine), pad_token_id=0, spec=engine.spec)


def measured(old_BL, batch):
    lag_B = torch.zeros(len(batch), dtype=torch.int64)
    found = mismatch.compare(old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL, lag_B=lag_B, positions=False)
    return {f"mismatch/{name}": value for name, value in found.items()}


@pytest.mark.parametrize("capture_ids", [128, 0], ids=["captured", "recomputed"])
@pytest.mark.parametrize("name", CASES)
def test_the_ratio_is_one_at_lag_0(sides, name, capture_ids):
    engine, policy = sides
    batch, old_BL, entropy_BL, metrics = scored(policy, batch_of(engine, capture_ids=capture_ids, **CASES[name]))
    seen = measured(old_BL, batch)
    assert seen["mismatch/lag0/k3"] < FLOOR and seen["mismatch/nonfinite"] == 0
    assert metrics["support/outside"] <= 0.01 and metrics["support/too_large"] == 0
    assert metrics["support/captured"] == (1.0 if capture_ids else 0.0)
    if capture_ids:
        assert metrics["support/differ"] <= 0.01 and metrics["support/differ_mass"] < 1e-3
    most = batch.kept.count_BL.double().clamp(min=1).log()
    assert bool((entropy_BL[batch.loss_mask_BL] <= most[batch.loss_mask_BL] + 1e-5).all())


@pytest.mark.parametrize("name", CASES)
def test_without_the_sets_the_bias_is_the_log_of_the_kept_mass(sides, name):
    engine, policy = sides
    batch = batch_of(engine, **CASES[name])
    metrics = scored(policy, batch)[3]
    plain = replace(batch, spec=batch.spec.untruncated(), kept=None)
    seen = measured(policy.score(plain)[0], plain)
    assert metrics["support/log_mass"] < -0.01
    assert seen["mismatch/lag0/k1"] == pytest.approx(-metrics["support/log_mass"], rel=1e-3)
    first = likely_causes(seen, Evidence(truncated=True, processed=True))[0]
    assert first.name == "truncation" and "kept mass of" in first.why
    with pytest.raises(ValueError, match="kept sets are not known"):
        policy.score(replace(batch, kept=None))


def test_the_update_is_over_the_sets_too(sides):
    """Ratios of the loss's own pass are 1 before the first step, and the gradient leaves no id outside a set."""
    engine, policy = sides
    batch, old_BL, *_ = scored(policy, batch_of(engine, top_p=0.9, top_k=50))
    seen = {}

    def loss(logprobs_BL, rows):
        mask_BL = rows.rollouts.loss_mask_BL
        apart = (logprobs_BL.detach().cpu() - rows.old_logprobs_BL)[mask_BL].abs().max()
        seen["apart"] = max(seen.get("apart", 0.0), float(apart))
        return 0.0 * logprobs_BL.sum(), {}

    correction = corrections.identity(old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL)
    tokens = int(correction.keep.sum())
    whole = TrainBatch(
        rollouts=batch, old_logprobs_BL=old_BL, advantages_BL=torch.ones_like(old_BL), correction=correction,
        num_tokens=tokens, num_sequences=len(batch),
    )  # fmt: skip
    policy.forward_backward(whole, loss)
    assert seen["apart"] < 1e-4


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}], ids=["plain", "top_p"])
def test_ids_that_no_text_has_are_barred_on_both_sides(sides, settings):
    engine, policy = sides
    free, barred = batch_of(engine, **settings), batch_of(engine, barred_from=UNKNOWN.first, **settings)
    strange = [int((b.token_ids_BL[b.loss_mask_BL] >= UNKNOWN.first).sum()) for b in (free, barred)]
    assert strange[0] > 0 and strange[1] == 0
    with pytest.raises(ValueError, match="vocab_size: 0 against"):
        free.spec.require_equal(barred.spec, what="comparing")
    barred, old_BL, *_ = scored(policy, barred)
    assert measured(old_BL, barred)["mismatch/lag0/k3"] < FLOOR
    plain = replace(barred, spec=replace(barred.spec, vocab_size=0).untruncated(), kept=None)
    assert measured(policy.score(plain)[0], plain)["mismatch/lag0/k1"] > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_our_sets_are_those_of_vllms_own_code(name):
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    truncation, rows = Truncation(**CASES[name]), 64
    logits = (3.0 * torch.randn(rows, 500, generator=torch.Generator().manual_seed(1))).round(decimals=1)  # with ties
    theirs = logits.clone()
    min_p = object.__new__(MinPLogitsProcessor)
    min_p.min_p_count, min_p.min_p = (rows if truncation.min_p else 0), torch.full((rows, 1), truncation.min_p)
    theirs = min_p.apply(theirs)
    k = torch.full((rows,), truncation.top_k, dtype=torch.int32) if truncation.top_k else None
    p = torch.full((rows,), truncation.top_p) if truncation.top_p < 1.0 else None
    theirs = apply_top_k_top_p_pytorch(theirs, k, p, allow_cpu_sync=True) > -torch.inf
    assert torch.equal(kept_mask(logits, truncation), theirs) and 1 < theirs.sum(1).float().mean() < 250


def test_an_update_is_taken_back_bit_for_bit(sides, tmp_path):
    engine, policy = sides
    batch, old_BL, *_ = scored(policy, batch_of(engine, top_p=0.9))
    before = [weight.detach().clone() for _, weight in policy.named_weights()]
    policy.save_state(tmp_path)
    correction = corrections.identity(old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL)
    whole = TrainBatch(
        rollouts=batch, old_logprobs_BL=old_BL, advantages_BL=torch.ones_like(old_BL), correction=correction,
        num_tokens=int(correction.keep.sum()), num_sequences=len(batch),
    )  # fmt: skip
    policy.forward_backward(whole, partial(choice.policy_loss, algo=AlgoConfig(), max_tokens=12))
    policy.optim_step()
    moved = [weight.detach() for _, weight in policy.named_weights()]
    assert not all(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    policy.load_state(tmp_path)
    after = [weight.detach() for _, weight in policy.named_weights()]
    assert policy.version == 0 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(policy.score(batch)[0], old_BL)
