"""verl's actor and vLLM with verl's worker extension, in this process: equal heads, verified pushes, planted faults by name."""

import os

import pytest
import torch

from tests import verl_cpu
from tests.engine.conftest import build_model

HEAT, STEPS = 0.8, 3
PROMPTS = [[1, 40, 41, 42], [1, 60], [1, 70, 71]]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """One run of verl's parts, aligned: everything float32, so that nothing but a wrong head or weight could part the sides."""
    before = dict(os.environ)
    folder = build_model(tmp_path_factory.mktemp("model") / "untied", tied=False)
    with verl_cpu.platform():
        import rlalign.integrations.verl  # noqa: F401 (switches itself on)

        settings = {"mixed_precision": {"param_dtype": "fp32"}}
        actor = verl_cpu.worker(folder, strategy="fsdp2", model={"use_remove_padding": True}, engine=settings)
        llm = verl_cpu.vllm_engine(folder, dtype="float32")
        yield folder, actor, verl_cpu.rollout(folder, llm)
        llm.llm_engine.engine_core.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def steps(stack):
    """(metrics, rows) of every step, and the weights' version that sampled it."""
    _, actor, rollout = stack
    rollout.server_handle.llm.collective_rpc("rlalign_status")  # which lets the head look at its next call
    found = []
    for step in range(STEPS):
        verl_cpu.push(rollout, actor, step)
        rows = verl_cpu.sampled(rollout, PROMPTS, group=4, tokens=6, seed=step)
        _, old_BL, rollout_BL, mask_BL = verl_cpu.compared(actor, rows, HEAT)
        told = {"sampled": [rollout.server_handle.global_steps] * len(rows), "global_steps": step + 1}
        found.append((verl_cpu.debug_metrics(old_BL, rollout_BL, mask_BL, **told), rows))
        advantages_BL = torch.randn(len(rows), 1, generator=torch.Generator().manual_seed(step)).expand_as(old_BL)
        verl_cpu.update(actor, rows, HEAT, old_BL, advantages_BL)
    return found


@pytest.mark.proves(
    "verl actor and vLLM", "one float32 head on both sides: lag-0 k3 below 1e-9 in float32 at every step"
)
def test_every_step_was_sampled_and_scored_by_one_head(stack, steps):
    _, actor, rollout = stack
    for metrics, _ in steps:
        assert metrics["mismatch/lag0/k3"] < 1e-9 and metrics["mismatch/nonfinite"] == 0
        assert metrics["training/rollout_probs_diff_valid"] == 1 and metrics["training/rollout_probs_diff_max"] < 1e-4
    assert len({metrics["mismatch/k3"] for metrics, _ in steps}) == STEPS
    assert actor.engine.mirror.status.multiplied.dtype == "float32"
    (status,) = rollout.server_handle.llm.collective_rpc("rlalign_status")
    assert status["mode"] != "off" and status["multiplied"]["sampled"]["dtype"] == "float32"


@pytest.mark.proves(
    "verl ServerAdapter", "a push that did not arrive, and a rollout without the head, end verl's step by name"
)
def test_what_a_push_left_behind_is_named(stack, steps):
    """verl drops what its workers answer; here they raise."""
    _, actor, rollout = stack
    stock = type(rollout).__mro__[1].update_weights
    with torch.no_grad():
        for parameter in actor.engine.module.parameters():
            parameter.mul_(1.01)
    with pytest.MonkeyPatch.context() as patch:

        async def nothing(self, weights, *args, **kwargs):
            async for _ in weights:
                pass

        patch.setattr(type(rollout).__mro__[1], "update_weights", nothing)
        with pytest.raises(
            Exception, match="rank 0 does not compute with what the trainer does: .*: the engine computes with"
        ):
            verl_cpu.push(rollout, actor, STEPS)
    assert type(rollout).__mro__[1].update_weights is stock
    verl_cpu.push(rollout, actor, STEPS)
    worker = rollout.server_handle.llm.llm_engine.model_executor.driver_worker.worker
    mode = worker._rlalign_layer().mode.value
    worker.rlalign_set_head("off")
    with pytest.raises(Exception, match="runs vLLM's own head: RLALIGN_HEAD did not reach the process"):
        verl_cpu.push(rollout, actor, STEPS + 1)
    worker.rlalign_set_head(mode)
