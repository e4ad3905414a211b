"""token_logprobs(mode="exact_mirror") gives the bits that the real engine's sampler returned for the same hidden states."""

import pytest
import torch

from rlalign.config import RolloutConfig
from rlalign.logprobs import token_logprobs
from tests.engine.conftest import start, worker_of

ROLLOUT = RolloutConfig(max_tokens=6, max_model_len=64, max_num_seqs=64, enforce_eager=True, temperature=0.7)


@pytest.fixture(scope="module")
def engine(untied):
    engine = start(untied, rollout=ROLLOUT)
    yield engine
    engine.close()


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_equal_to_the_bit_at_every_decode_step(engine, rows, monkeypatch):
    runner = worker_of(engine._llm).model_runner
    layer, steps = worker_of(engine._llm)._rlalign_layer(), []
    hook = layer.register_forward_hook(
        lambda module, args, kwargs, logits: steps.append([kwargs.get("hidden_states", args[-1]).clone()]),
        with_kwargs=True,
    )
    sampler = type(runner.sampler)
    forward = sampler.forward

    def recorded(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        steps[-1] += [output.sampled_token_ids[:, 0].clone(), output.logprobs_tensors.logprobs[:, 0].clone()]
        return output

    monkeypatch.setattr(sampler, "forward", recorded)
    try:
        rollouts = engine.generate([[1, 40, 41]], prompt_ids=[0], samples=rows, seed=5)
    finally:
        hook.remove()
    weight_VD = worker_of(engine._llm)._rlalign_named_head()[1].weight
    steps = [
        step for step in steps if len(step) == 3
    ]  # at the first generation the live head is asked for its dtype too
    assert max(len(hidden_ND) for hidden_ND, _, _ in steps) == rows
    returned = []
    for hidden_ND, tokens_N, logprobs_N in steps:
        pair_BLD = torch.stack([hidden_ND, torch.zeros_like(hidden_ND)], dim=1)
        ids_BL = torch.stack([torch.zeros_like(tokens_N), tokens_N], dim=1).long()
        mirrored_BL = token_logprobs(
            pair_BLD, weight_VD, ids_BL, temperature=0.7, mode="exact_mirror", vocab_size=layer.org_vocab_size
        )  # vLLM's shard of the weight has padding rows
        assert torch.equal(mirrored_BL[:, 1], logprobs_N)
        returned += logprobs_N.tolist()
    told = [x for r in rollouts for x, sampled in zip(r.rollout_logprobs, r.loss_mask, strict=True) if sampled]
    assert sorted(told) == sorted(returned), "what was compared is what the engine returned"
