"""OpenRLHF's and SkyRL's released classes around a real vLLM: aligned by the adapters, with planted faults by name."""

import os

import pytest
import torch

from tests import skyrl_cpu, stack_cpu
from tests.engine.conftest import build_model

PROMPTS, ANSWERS, HEAT = ["12+3=", "4+5=", "7+8="], ["15", "9", "15"], 0.8
OWN = {"openrlhf": ("vllm_kl", "k1"), "skyrl": ("policy/rollout_train_logprobs_abs_diff_mean", "abs_mean")}


def of_openrlhf(folder, sizes):
    from rlalign.integrations import openrlhf

    openrlhf.switch_on()
    parts = stack_cpu.OpenRLHF(folder, **sizes)
    return parts, parts.actor


def of_skyrl(folder, sizes):
    parts = skyrl_cpu.SkyRL(folder, aligned=True, **sizes)
    return parts, parts.worker


@pytest.fixture(scope="module", params=["openrlhf", "skyrl"])
def run(request, tmp_path_factory):
    """(name, parts, who pushes, two steps), aligned."""
    name, before = request.param, dict(os.environ)
    folder = build_model(tmp_path_factory.mktemp("model") / "untied", tied=False)
    stack, build = {"openrlhf": (stack_cpu.stack, of_openrlhf), "skyrl": (skyrl_cpu.stack, of_skyrl)}[name]
    with stack(tmp_path_factory.mktemp(name)):
        parts, party = build(folder, {"prompts": 3, "group": 2, "tokens": 6, "temperature": HEAT})
        parts.push()
        steps = []
        for _ in range(2):
            steps.append(parts.step(PROMPTS, ANSWERS))
            parts.push()
        yield name, parts, party, steps
        parts.llm.llm_engine.engine_core.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "one float32 head on both sides, its vllm_kl is our k1, in its own log")
@pytest.mark.proves(
    "SkyRL worker and vLLM", "one float32 head on both sides, its own metric is our abs_mean, in its own log"
)
def test_a_step_is_compared_as_the_stack_compares_it(run):
    name, _, party, steps = run
    theirs, ours = OWN[name]
    for _, logged in steps:
        assert logged["mismatch/lag0/tokens"] > 0 and logged["mismatch/nonfinite"] == 0
        assert float(logged[theirs]) == pytest.approx(logged[f"mismatch/{ours}"], rel=1e-3, abs=1e-7)
    assert party.mirrored.status.calls >= 4  # scored and trained, twice
    assert party.engine.prove()[0]["multiplied"]["sampled"]["dtype"] == "float32"


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "a push that did not arrive ends its step by name")
@pytest.mark.proves("SkyRL worker and vLLM", "a push that did not arrive ends its step by name")
def test_stale_weights_are_named(run):
    _, parts, party, _ = run
    with torch.no_grad():
        for parameter in party.mirrored.inner.parameters():
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
@pytest.mark.proves("SkyRL worker and vLLM", "a head on one side only is named")
def test_a_one_sided_head_is_named(run):
    name, parts, party, _ = run
    worker = parts.llm.llm_engine.model_executor.driver_worker.worker
    mode = worker._rlalign_layer().mode.value
    worker.rlalign_set_head("off")
    with pytest.raises(RuntimeError, match="runs vLLM's own head"):
        party.engine.prove() if name == "openrlhf" else parts.push()
    worker.rlalign_set_head(mode)
    if name == "openrlhf":
        own, party.mirrored = party.mirrored, None
        with pytest.raises(RuntimeError, match="a head on one side only"):
            party.watching()
        party.mirrored = own
    else:
        head = party.mirrored.inner.get_output_embeddings()
        ours = vars(head).pop("forward")
        with pytest.raises(RuntimeError, match="forward was replaced after it was mirrored"):
            parts.push()
        head.forward = ours


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "raw logprobs and another temperature are refused before a step")
@pytest.mark.proves("SkyRL worker and vLLM", "raw logprobs and another temperature are refused before a step")
def test_logprobs_of_another_distribution_are_refused(run):
    name, parts, party, _ = run
    if name == "openrlhf":
        at, watching = (party.engine._identity[0], party.actor), party.watching
        other = "another temperature: tokens are sampled at 0.8, the trainer divides its"
    else:
        from rlalign.integrations import skyrl

        at = parts.cfg.generator.inference_engine.engine_init_kwargs, parts.cfg.trainer.algorithm
        other, watching = "another temperature", lambda: skyrl.configure(parts.cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(at[0], "logprobs_mode", "raw_logprobs")
        with pytest.raises(ValueError, match="raw against processed logprobs"):
            watching()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at[1], "temperature", 1.3)
        with pytest.raises(ValueError, match=other):
            watching()
