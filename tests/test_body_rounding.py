"""The bar that a model's own rounding sets: measured against a float32 copy, and the network afterwards as it was."""

import copy

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlalign.diagnose import body_rounding
from rlalign.diagnose.both_sides import trainer_scores
from rlalign.types import LogprobSpec, RolloutBatch


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def batch():
    ids_BL = torch.randint(0, 128, (3, 17), generator=torch.Generator().manual_seed(1))
    mask_BL = torch.ones(3, 17, dtype=torch.bool)
    mask_BL[:, :4] = False
    version_BL = torch.zeros(3, 17, dtype=torch.long).masked_fill(~mask_BL, -1)
    return RolloutBatch(
        token_ids_BL=ids_BL, attention_mask_BL=torch.ones_like(mask_BL), loss_mask_BL=mask_BL,
        rollout_logprobs_BL=torch.zeros(3, 17), policy_version_BL=version_BL, kv_version_BL=version_BL,
        prompt_id_B=torch.arange(3), group_id_B=torch.arange(3), spec=LogprobSpec(head_dtype="float32"),
    )  # fmt: skip


def score(network):
    return lambda few: trainer_scores(network, few, "float32", temperature=1.0)[0]


def test_it_is_the_distance_to_a_float32_copy(network, batch):
    own_BL = score(network)(batch)
    wide_BL = score(copy.deepcopy(network).float())(batch)
    chosen = batch.loss_mask_BL
    found = body_rounding.measure(network, batch, own_BL, wide_BL, score(network))
    log_ratio = (own_BL - wide_BL)[chosen].double()
    assert found["rounding_abs_mean"] == pytest.approx(float(log_ratio.abs().mean()), rel=1e-4)
    assert found["rounding_abs_mean"] > 1e-3, "a bf16 body of this scale rounds visibly"
    assert found["rollout_rounding_abs_mean"] < 1e-5, "a rollout that is the float32 copy is no distance from it"


def test_the_network_is_bit_for_bit_as_it_was_even_after_an_error(network, batch):
    before = {name: p.clone() for name, p in network.named_parameters()}
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    with pytest.raises(RuntimeError, match="in between"), body_rounding.in_float32(network):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        raise RuntimeError("in between")
    assert all(torch.equal(p, before[n]) and p.dtype == torch.bfloat16 for n, p in network.named_parameters())
    assert all(torch.equal(b, buffers[n]) for n, b in network.named_buffers())
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight, "still tied"


def test_two_engines_that_round_on_their_own_pass_and_a_fault_does_not(network, batch):
    own_BL = score(network)(batch)
    rounding = body_rounding.measure(network, batch, own_BL, own_BL, score(network))
    noise_BL = torch.randn(own_BL.shape, generator=torch.Generator().manual_seed(2)) * rounding["rounding_abs_mean"]
    for shift_BL, fine in ((noise_BL, True), (8 * noise_BL, False)):
        log_ratio = shift_BL[batch.loss_mask_BL].double()
        measured = {"k3": float((log_ratio.exp() - 1 - log_ratio).mean()), "abs_mean": float(log_ratio.abs().mean())}
        rollout = {"rollout_rounding_abs_mean": measured["abs_mean"]}
        assert (body_rounding.over(measured | rounding | rollout) == "") is fine


def test_a_float32_body_has_a_bar_that_bf16_anywhere_passes(network, batch):
    wide = copy.deepcopy(network).float()
    own_BL = score(wide)(batch)
    found = body_rounding.measure(wide, batch, own_BL, own_BL, score(wide))
    assert body_rounding.over(found | {"k3": 1e-11, "abs_mean": 1e-6}) == ""
    assert "more than rounding explains" in body_rounding.over(found | {"k3": 1e-6, "abs_mean": 1e-3})
