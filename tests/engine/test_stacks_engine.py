"""OpenRLHF's and SkyRL's released actors around a real vLLM: aligned by their adapters, with planted faults by name."""

import os

import pytest
import torch

from tests import stack_cpu
from tests.engine.conftest import build_model

PROMPTS, ANSWERS, HEAT = ["12+3=", "4+5=", "7+8="], ["15", "9", "15"], 0.8
SIZES = {"prompts": 3, "group": 2, "tokens": 6, "temperature": HEAT}
NAMES = ("openrlhf", "skyrl")


@pytest.fixture(scope="module", params=NAMES)
def run(request, tmp_path_factory):
    """(name, parts, two steps) of one stack, aligned."""
    before, folder = dict(os.environ), build_model(tmp_path_factory.mktemp("model") / "untied", tied=False)
    with stack_cpu.stack(request.param, tmp_path_factory.mktemp(request.param)):
        if request.param == "openrlhf":
            from rlalign.integrations import openrlhf

            openrlhf.switch_on()
            parts = stack_cpu.OpenRLHF(folder, **SIZES)
            llm = parts.engines[0].actor.llm.llm
        else:
            parts = stack_cpu.SkyRL(folder, aligned=True, **SIZES)
            llm = parts.llm
        parts.push()
        steps = []
        for _ in range(2):
            steps.append(parts.step(PROMPTS, ANSWERS))
            parts.push()
        yield request.param, parts, steps, llm
        llm.llm_engine.engine_core.shutdown()
    os.environ.clear()
    os.environ.update(before)


def policy(parts):
    """The actor that trains, and attached."""
    return parts.actor if hasattr(parts, "actor") else parts.worker


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "one float32 head on both sides, its vllm_kl is our k1, in its own log")
@pytest.mark.proves(
    "SkyRL worker and vLLM", "one float32 head on both sides, its abs_diff_mean is ours, in its own log"
)
def test_a_step_is_compared_as_the_stack_compares_it(run):
    name, parts, steps, _ = run
    for _, logged in steps:
        assert logged["mismatch/lag0/tokens"] > 0 and logged["mismatch/nonfinite"] == 0
        ours, theirs = {
            "openrlhf": ("k1", "vllm_kl"),
            "skyrl": ("abs_mean", "policy/rollout_train_logprobs_abs_diff_mean"),
        }[name]
        assert float(logged[theirs]) == pytest.approx(logged[f"mismatch/{ours}"], rel=1e-3, abs=1e-7)
    assert policy(parts).mirrored.status.multiplied.dtype == "float32"
    assert policy(parts).engine.prove()[0]["multiplied"]["sampled"]["dtype"] == "float32"


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "a push that did not arrive ends its step by name")
@pytest.mark.proves("SkyRL worker and vLLM", "a push that did not arrive ends its step by name")
def test_stale_weights_are_named(run):
    _, parts, _, _ = run
    with torch.no_grad():
        for parameter in policy(parts).mirrored.inner.parameters():
            parameter.mul_(1.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack_cpu.Batching, "reload", lambda self, weights: list(weights))
        with pytest.raises(
            RuntimeError, match="the engine does not compute with the trainer's: .*: the engine computes with"
        ):
            parts.push()
    parts.push()


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "a head on one side only is named as it attaches")
@pytest.mark.proves("SkyRL worker and vLLM", "a head on one side only is named as it attaches")
def test_a_one_sided_head_is_named(run):
    name, parts, _, llm = run
    worker, attached = llm.llm_engine.model_executor.driver_worker.worker, policy(parts).engine
    mode = worker._rlalign_layer().mode.value
    worker.rlalign_set_head("off")
    with pytest.raises(RuntimeError, match="runs vLLM's own head"):
        attached.prove()
    worker.rlalign_set_head(mode)
    if name == "openrlhf":  # whose actor holds both sides
        own, parts.actor.mirrored = parts.actor.mirrored, None
        with pytest.raises(RuntimeError, match="a head on one side only"):
            parts.actor.watching()
        parts.actor.mirrored = own


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF actor and vLLM", "raw logprobs and another temperature are refused before a step")
@pytest.mark.proves("SkyRL worker and vLLM", "raw logprobs and another temperature are refused before a step")
def test_logprobs_of_another_distribution_are_refused(run):
    name, parts, _, _ = run
    with pytest.MonkeyPatch.context() as patch:
        if name == "openrlhf":
            watch = parts.actor.watching
            patch.setitem(parts.actor.engine._identity[0], "logprobs_mode", "raw_logprobs")
        else:
            from rlalign.integrations import skyrl

            def watch():
                return skyrl.configure(parts.cfg)

            patch.setitem(parts.cfg.generator.inference_engine.engine_init_kwargs, "logprobs_mode", "raw_logprobs")
        with pytest.raises(ValueError, match="raw against processed logprobs"):
            watch()
    with pytest.MonkeyPatch.context() as patch:
        at, attribute = (
            (parts.actor.actor, "temperature") if name == "openrlhf" else (parts.cfg.trainer.algorithm, "temperature")
        )
        patch.setattr(at, attribute, 1.3)
        with pytest.raises(
            ValueError, match="another temperature: tokens are sampled at 0.8, the trainer divides its logits by 1.3"
        ):
            watch()
