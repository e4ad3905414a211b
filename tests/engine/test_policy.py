"""The trainer's update in real DeepSpeed against a plain loop: same gradients for any micro-batch size and ZeRO stage."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign import corrections, objective
from rlalign.config import AlgoConfig, TrainerConfig
from rlalign.types import LogprobSpec, Rollout, TrainBatch, collate

STEPS, LR = 3, 1e-3


@pytest.fixture(scope="module")
def batch():
    """Twelve sequences of different lengths, three groups."""
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for i in range(12):
        length = int(torch.randint(5, 14, (1,), generator=generator))
        rollouts.append(
            Rollout(
                token_ids=torch.randint(3, 280, (length,), generator=generator).tolist(),
                loss_mask=[False] * 2 + [True] * (length - 2),
                rollout_logprobs=[0.0] * 2 + [-3.0] * (length - 2),
                prompt_id=i // 4,
                group_id=i // 4,
                finish_reason="stop",
                version_spans=[(2, length, 0)],
            )
        )
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec())


@pytest.fixture(scope="module")
def advantages(batch):
    return torch.randn(12, 1, generator=torch.Generator().manual_seed(1)).expand(batch.token_ids_BL.shape)


@pytest.fixture(scope="module")
def plain(untied, batch, advantages):
    """The written objective in a plain torch loop: gradient norms, and how far every weight moved."""
    network = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    before = flat(network.named_parameters())
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for _ in range(STEPS):
        logits = network(batch.token_ids_BL, attention_mask=batch.attention_mask_BL).logits.double().log_softmax(-1)
        new = logits[:, :-1].gather(-1, batch.token_ids_BL[:, 1:, None])[..., 0]
        mask, a = batch.loss_mask_BL[:, 1:], advantages[:, 1:].double()
        ratio = (new - new.detach()).exp()
        per_token = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        optimizer.zero_grad()
        (per_token[mask].sum() / mask.sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)))
        optimizer.step()
    return norms, flat(network.named_parameters()) - before


def flat(named):
    return torch.cat([p.detach().float().flatten() for _, p in named])


def trained(folder, batch, advantages, *, dtype, zero_stage, micro_batch_size):
    from rlalign.trainer.policy import Policy

    config = TrainerConfig(zero_stage=zero_stage, micro_batch_size=micro_batch_size)
    policy = Policy(folder, config, AlgoConfig(lr=LR), dtype=dtype, head_dtype="float32", temperature=1.0, seed=0)
    before, norms = flat(policy.named_weights()), []
    loss = partial(objective.policy_loss, algo=AlgoConfig(), max_tokens=12)
    for _ in range(STEPS):
        old, _ = policy.score(batch)
        correction = corrections.identity(old, old, batch.loss_mask_BL)
        whole = TrainBatch(
            rollouts=batch,
            old_logprobs_BL=old,
            advantages_BL=advantages,
            correction=correction,
            num_tokens=int(correction.keep.sum()),
            num_sequences=12,
        )
        policy.forward_backward(whole, loss)
        norms.append(policy.optim_step().get("grad_norm"))
    moved = flat(policy.named_weights()) - before
    assert policy.version == STEPS
    return policy, norms, moved


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("micro_batch_size", [1, 5, 12])
def test_float32_updates_equal_the_plain_loop(untied, batch, advantages, plain, zero_stage, micro_batch_size):
    norms, moved = plain
    given = {"dtype": "float32", "zero_stage": zero_stage, "micro_batch_size": micro_batch_size}
    policy, found, mine = trained(untied, batch, advantages, **given)
    policy.close()
    if zero_stage:  # stage 0 clips by the norm without telling it
        assert found == pytest.approx(norms, rel=1e-4)
    # Adam turns the last bits of vanishing gradients into whole steps, so single weights may differ; their mean may not.
    assert float((mine - moved).abs().mean()) < 1e-3 * float(moved.abs().mean())


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_bfloat16_bodies_train_an_fp32_master(untied, batch, advantages, plain, zero_stage):
    """The published bf16 weights are the rounded master, and the master moved as far as the float32 loop's weights."""
    from deepspeed.utils import safe_get_full_fp32_param

    given = {"dtype": "bfloat16", "zero_stage": zero_stage, "micro_batch_size": 5}
    policy, norms, _ = trained(untied, batch, advantages, **given)
    masters = [safe_get_full_fp32_param(p) for p in policy.network.parameters()]
    start = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    moved = torch.cat([m.flatten() for m in masters]) - flat(start.named_parameters())
    for master, (_, weight) in zip(masters, policy.named_weights(), strict=True):
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), weight.detach())
    policy.close()
    assert norms == pytest.approx(plain[0], rel=0.05)
    assert float(moved.abs().mean()) == pytest.approx(float(plain[1].abs().mean()), rel=0.05)
