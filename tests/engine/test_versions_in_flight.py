"""Weights that change while a request runs: which version sampled a token, and which computed the keys it attends to."""

from pathlib import Path

import pytest
import torch
import vllm
from transformers import AutoModelForCausalLM, DynamicCache

from rlalign.rollout.engine.completions import rollout_of
from rlalign.rollout.versions import has_output_spans
from rlalign.weights import publish
from tests.engine.conftest import perturbed, start

PROMPT = [1, 40, 41, 42, 43]
SWITCH = 5  # tokens sampled before the update


def sampled_across_an_update(engine, new_model, shared: Path):
    """With its keys and values kept across the publish."""
    core, engine.reset_prefix_cache = engine._llm.llm_engine, lambda: None
    core.add_request("in-flight", {"prompt_token_ids": PROMPT}, engine._sampling(1, seed=5))
    outputs, steps = [], 0
    while core.has_unfinished_requests():
        outputs += core.step()
        steps += 1
        if steps == SWITCH:
            publish(new_model.named_parameters(), 1, receiver=engine, shared=shared)
    return rollout_of(PROMPT, outputs[-1].outputs[0], prompt_id=0, group_id=0, version=None)


@torch.no_grad()
def logprobs_with_cache_of(old, new, token_ids: list[int], boundary: int) -> torch.Tensor:
    """Logprobs [L - boundary] of the tokens after `boundary` by `new`, over keys that `old` computed before it."""
    ids = torch.tensor([token_ids])
    cache = DynamicCache()
    old(ids[:, :boundary], past_key_values=cache, use_cache=True)
    logits = new(ids[:, boundary:-1], past_key_values=cache, use_cache=True).logits.float()
    return logits.log_softmax(-1)[0].gather(-1, ids[0, boundary + 1 :, None])[:, 0]


@pytest.mark.skipif(not has_output_spans(vllm.__version__), reason="vLLM reports spans from 0.32 on")
def test_spans_name_the_sampling_version_and_the_version_behind_the_keys(untied, tmp_path):
    old = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32).eval()
    new = perturbed(untied, seed=1, dtype=torch.float32).eval()
    engine = start(untied, dtype="float32")
    try:
        rollout = sampled_across_an_update(engine, new, tmp_path)
    finally:
        engine.close()
    start_of_response, end = len(PROMPT), len(rollout.token_ids)
    (first, switch, _), (_, _, _) = rollout.version_spans
    assert [version for *_, version in rollout.version_spans] == [0, 1]
    assert (first, switch) == (start_of_response, start_of_response + SWITCH)
    assert rollout.kv_spans == [(0, switch - 1, 0), (switch - 1, end - 1, 1)]

    sampled = torch.tensor(rollout.rollout_logprobs[switch:])
    as_said = logprobs_with_cache_of(old, new, rollout.token_ids, boundary=switch - 1)
    assert (as_said - sampled).abs().max() < 1e-4
    for wrong in (switch - 2, switch):  # one position fewer, one more
        other = logprobs_with_cache_of(old, new, rollout.token_ids, boundary=wrong)
        count = min(len(other), len(sampled))
        assert (other[-count:] - sampled[-count:]).abs().max() > 1e-3
