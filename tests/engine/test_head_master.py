"""head_dtype=master: both sides project with the optimizer's unrounded lm_head, and never with one of another step."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.config import AlgoConfig, TrainerConfig, load
from rlalign.head import projection
from rlalign.trainer.policy import Policy
from rlalign.weights import MASTER_WEIGHT, publish
from tests.engine.conftest import sample, start
from tests.engine.test_train import lively, small_run

__all__ = ["lively"]  # a fixture


@pytest.fixture(params=["untied", "tied"])
def folder(request):
    return request.getfixturevalue(request.param)


def policy_of(folder, *, head_dtype="master", zero_stage=1):
    config = TrainerConfig(zero_stage=zero_stage)
    return Policy(folder, config, AlgoConfig(lr=1e-4), dtype="bfloat16", head_dtype=head_dtype, temperature=1.0, seed=0)


def trained(folder, **options):
    """A policy after one optimizer step whose update is smaller than bf16 can hold."""
    policy = policy_of(folder, **options)
    tokens = torch.randint(5, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    loss = policy.network(tokens, labels=tokens).loss
    policy._engine.set_gradient_accumulation_boundary(True)
    policy._engine.backward(loss)
    policy.optim_step()
    return policy


def engine_logits(engine, hidden, folder):
    save_file({"hidden_ND": hidden}, folder / "hidden.safetensors")
    return load_file(engine.head_logits(folder / "hidden.safetensors", batch=16))["logits_NV"]


def test_both_sides_project_with_the_optimizers_weight(folder, tmp_path):
    policy, engine = trained(folder), start(folder, head_dtype="master")
    master, weight = policy.head.master_VD, policy.network.get_output_embeddings().weight.detach()
    lost = (master - weight.float()).abs()
    assert torch.equal(master.bfloat16(), weight) and lost.max() > 0, "nothing was rounded away: this shows nothing"
    report = publish(policy.named_weights(), policy.version, receiver=engine, shared=tmp_path)
    assert report.tensors == len(list(policy.network.parameters())) + 1

    hidden = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = engine_logits(engine, hidden, tmp_path)
    assert (ours - projection.project(hidden, master)).abs().max() < 1e-5
    with torch.no_grad():
        theirs = policy.network.get_output_embeddings()(hidden)
    assert (ours - theirs).abs().max() < 1e-5
    rounded = projection.project(hidden, weight)
    assert (ours - rounded).abs().max() > 20 * (ours - theirs).abs().max(), "the rounding of the weight is invisible"

    rollouts = sample(engine)
    (status,) = engine.status()
    assert status["mode"] == "master" and status["masters_loaded"] >= 1 and status["copies"] is False
    assert status["cache_bytes"] == 4 * 320 * 128
    assert {r.policy_version for r in rollouts} == {1}
    policy.close()  # before the engine, which destroys the process group
    engine.close()


def test_a_publish_without_its_master_is_refused(untied, tmp_path):
    policy, engine = trained(untied), start(untied, head_dtype="master")
    sample(engine)  # at the start the checkpoint's weight is its own master
    weights = dict(policy.named_weights())
    master = weights.pop(MASTER_WEIGHT)
    with pytest.raises(RuntimeError, match="head_dtype=master, but the trainer sent no unrounded lm_head"):
        publish(weights.items(), 1, receiver=engine, shared=tmp_path)
    with pytest.raises(RuntimeError, match="it is not the engine's lm_head.weight; publish both from the same"):
        publish([*weights.items(), (MASTER_WEIGHT, master * 1.1)], 1, receiver=engine, shared=tmp_path)
    with pytest.raises(RuntimeError, match="refuses to run: publishing policy version 1 failed"):
        sample(engine)
    publish(policy.named_weights(), 1, receiver=engine, shared=tmp_path)
    sample(engine)

    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(untied)})  # behind the publisher's back
    assert worker.get_model().lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="has changed and no unrounded weight came with it"):
        sample(engine)
    policy.close()  # before the engine, which destroys the process group
    engine.close()


def test_gradients_still_reach_the_weight(folder):
    """Projecting with the master must not cut the lm_head out of the graph: same gradient as with the rounded weight."""
    gradients = {}
    for head_dtype in ("master", "float32"):
        policy = policy_of(folder, head_dtype=head_dtype)
        hidden = torch.randn(6, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
        lm_head = policy.network.get_output_embeddings()
        (gradients[head_dtype],) = torch.autograd.grad(lm_head(hidden).square().sum(), lm_head.weight)
        policy.close()
    assert gradients["master"].dtype == torch.bfloat16
    scale = gradients["float32"].float().abs().max()
    assert (gradients["master"].float() - gradients["float32"].float()).abs().max() < 0.02 * scale


@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_a_run_with_the_master_head_stays_aligned(untied, tmp_path, zero_stage, lively):
    options = ("head_dtype=master", f"trainer.zero_stage={zero_stage}", "algo.lr=1e-3")
    summary = small_run(untied, tmp_path / "run", *options)
    assert summary["head"]["mode"] == "master" and summary["head"]["dtype"] == "master"
    assert summary["mismatch"]["lag0"]["k3_max"] < 1e-2


def test_the_master_of_a_float32_body_is_refused_as_meaningless():
    base = {"model": {"path": "x"}, "task": {"name": "y"}, "head_dtype": "master"}
    with pytest.raises(ValueError, match=r"head_dtype=master with model.dtype=float32"):
        load(base | {"model": {"path": "x", "dtype": "float32"}})
    with pytest.raises(ValueError, match=r"rollout.head_mode=native"):
        load(base | {"rollout": {"head_mode": "native"}})
    assert load(base).head_dtype.value == "master"


def test_a_trainer_that_keeps_no_master_says_so(untied, monkeypatch):
    from rlalign.trainer import policy

    monkeypatch.setattr(policy, "safe_get_full_fp32_param", lambda weight: None)
    with pytest.raises(RuntimeError, match="keeps no fp32 master of lm_head.weight"):
        policy_of(untied)
