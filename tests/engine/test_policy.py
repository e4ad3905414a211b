"""The trainer's update in real DeepSpeed against a plain loop: same gradients for any micro-batch size and ZeRO stage."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlalign.config import TrainerConfig
from tests.engine.updates import LR, flat, plain_loop, start_policy, train


@pytest.fixture(scope="module")
def plain(untied):
    return plain_loop(untied)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 5, 12])
def test_float32_updates_equal_the_plain_loop(untied, plain, zero_stage, micro_batch_size):
    norms, moved = plain
    config = TrainerConfig(zero_stage=zero_stage, micro_batch_size=micro_batch_size)
    policy = start_policy(untied, config, dtype="float32")
    found = train(policy)
    policy.close()
    if zero_stage:  # stage 0 clips by the norm without telling it
        assert found["norms"] == pytest.approx(norms, rel=1e-4)
    # Adam turns the last bits of vanishing gradients into whole steps, so single weights may differ; their mean may not.
    assert float((found["moved"] - moved).abs().mean()) < 1e-3 * float(moved.abs().mean())


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_bodies_train_an_fp32_master(untied, plain, zero_stage):
    """The published bf16 weights are the rounded master, and the master moved as far as the float32 loop's weights."""
    from deepspeed.utils import safe_get_full_fp32_param

    policy = start_policy(untied, TrainerConfig(zero_stage=zero_stage, micro_batch_size=5), dtype="bfloat16")
    found = train(policy)
    masters = [safe_get_full_fp32_param(p) for p in policy.network.parameters()]
    start = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    moved = torch.cat([m.flatten() for m in masters]) - flat(start.named_parameters())
    for master, (_, weight) in zip(masters, policy.named_weights(), strict=True):
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), weight.detach())
    policy.close()
    assert found["norms"] == pytest.approx(plain[0], rel=0.05)
    assert float(moved.abs().mean()) == pytest.approx(float(plain[1].abs().mean()), rel=0.05)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_learning_rate_that_was_changed_counts_after_a_resume(untied, tmp_path, zero_stage):
    """DeepSpeed brings the saved run's back with the optimizer, and the accepted change would change nothing."""
    config = TrainerConfig(zero_stage=zero_stage, micro_batch_size=12)
    first = start_policy(untied, config, dtype="float32")
    train(first)
    first.save_state(tmp_path)
    slower = start_policy(untied, config, dtype="float32", lr=LR / 10)
    slower.load_state(tmp_path)
    first.version = slower.version = 0
    moved = [float(train(policy)["moved"].abs().mean()) for policy in (first, slower)]
    first.close(), slower.close()
    assert moved[1] == pytest.approx(moved[0] / 10, rel=0.3)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """The projections to query, key and value have biases, as Qwen2's."""
    folder = tmp_path_factory.mktemp("biased")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=288, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("folder", ["untied", "biased"])
def test_zero_3_scores_with_the_bits_of_zero_1(folder, request, monkeypatch):
    """zero.Init rounds rotary frequencies to bf16, and DeepSpeed's linear rounds a layer with a bias twice: k3 to vLLM rises."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # as in a process that never saw zero.Init
    logprobs = []
    for stage in (1, 3):
        policy = start_policy(
            request.getfixturevalue(folder), TrainerConfig(zero_stage=stage, micro_batch_size=12), dtype="bfloat16"
        )
        kept = [b for n, b in policy.network.named_buffers() if n.endswith("inv_freq")]
        assert kept and all(b.dtype == torch.float32 for b in kept)
        logprobs.append(train(policy)["logprobs"])
        policy.close()
    assert torch.equal(*logprobs)
