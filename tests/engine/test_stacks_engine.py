"""OpenRLHF's released actors around a real vLLM: aligned by the adapter, with planted faults by name."""

import os

import pytest
import torch

from tests import stack_cpu
from tests.engine.conftest import build_model

PROMPTS, ANSWERS, HEAT = ["12+3=", "4+5=", "7+8="], ["15", "9", "15"], 0.8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(parts, two steps of them, their vLLM), aligned."""
    before, folder = dict(os.environ), build_model(tmp_path_factory.mktemp("model") / "untied", tied=False)
    with stack_cpu.stack(tmp_path_factory.mktemp("openrlhf")):
        from rlalign.integrations import openrlhf

        openrlhf.switch_on()
        parts = stack_cpu.OpenRLHF(folder, prompts=3, group=2, tokens=6, temperature=HEAT)
        llm = parts.engines[0].actor.llm.llm
        parts.push()
        steps = []
        for _ in range(2):
            steps.append(parts.step(PROMPTS, ANSWERS))
            parts.push()
        yield parts, steps, llm
        llm.llm_engine.engine_core.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "one float32 head on both sides, its vllm_kl is our k1, in its own log")
def test_a_step_is_compared_as_openrlhf_compares_it(run):
    parts, steps, _ = run
    for _, logged in steps:
        assert logged["mismatch/lag0/tokens"] > 0 and logged["mismatch/nonfinite"] == 0
        assert float(logged["vllm_kl"]) == pytest.approx(logged["mismatch/k1"], rel=1e-3, abs=1e-7)
    assert parts.actor.mirrored.status.calls >= 4  # scored and trained, twice
    assert parts.actor.engine.prove()[0]["multiplied"]["sampled"]["dtype"] == "float32"


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "a push that did not arrive ends its step by name")
def test_stale_weights_are_named(run):
    parts, _, _ = run
    with torch.no_grad():
        for parameter in parts.actor.mirrored.inner.parameters():
            parameter.mul_(1.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack_cpu.Batching, "reload", lambda self, weights: list(weights))
        with pytest.raises(
            RuntimeError, match="the engine does not compute with the trainer's: .*: the engine computes with"
        ):
            parts.push()
    parts.push()


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "a head on one side only is named")
def test_a_one_sided_head_is_named(run):
    parts, _, llm = run
    worker = llm.llm_engine.model_executor.driver_worker.worker
    mode = worker._rlalign_layer().mode.value
    worker.rlalign_set_head("off")
    with pytest.raises(RuntimeError, match="runs vLLM's own head"):
        parts.actor.engine.prove()
    worker.rlalign_set_head(mode)
    own, parts.actor.mirrored = parts.actor.mirrored, None
    with pytest.raises(RuntimeError, match="a head on one side only"):
        parts.actor.watching()
    parts.actor.mirrored = own


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "raw logprobs and another temperature are refused before a step")
def test_logprobs_of_another_distribution_are_refused(run):
    parts, _, _ = run
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(parts.actor.engine._identity[0], "logprobs_mode", "raw_logprobs")
        with pytest.raises(ValueError, match="raw against processed logprobs"):
            parts.actor.watching()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.actor.actor, "temperature", 1.3)
        with pytest.raises(ValueError, match="another temperature: tokens are sampled at 0.8, the trainer divides its"):
            parts.actor.watching()
