"""TRL's released trainers with the real vLLM in this process, aligned: equal heads, proved weights, planted faults by name."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

import rlalign
from rlalign.integrations.trl_settings import require_settings, require_version
from tests.engine.trl_trainers import GROUP, STEPS, make, on_engine, trl_loaded


@pytest.fixture(scope="module")
def trl():
    with trl_loaded() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def policy():
    from rlalign.tiny_policy import cached_policy

    return cached_policy("untied")


@pytest.fixture(scope="module")
def trained(trl, policy, tmp_path_factory):
    """One run of an aligned trainer, of which the tests below look at one side each."""
    trainer = make(trl, policy, tmp_path_factory.mktemp("out"))
    trainer.train()
    yield trainer
    trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()


@pytest.mark.proves(
    "TRL GRPOTrainer, colocate", "one float32 head on both sides at every step, published weights read back"
)
def test_every_step_was_sampled_and_scored_by_one_head(trained):
    aligned = trained.alignment
    assert len(aligned.metrics) == STEPS and len(aligned.publish_seconds) == STEPS
    for found in aligned.metrics:
        assert found["mismatch/lag0/k3"] < 1e-3 and found["mismatch/nonfinite"] == 0
    assert len({found["mismatch/nll_rollout"] for found in aligned.metrics}) == STEPS
    (status,) = aligned.engine.prove()
    assert status["mode"] == "cached" and status["multiplied"]["sampled"]["dtype"] == "float32"
    assert aligned.mirrors[0].status.multiplied.dtype == "float32" and aligned.engine.policy_version == STEPS - 1


@pytest.mark.proves("TRL GRPOTrainer, colocate", "its sampling_logp_difference is our mean absolute log_ratio")
def test_trls_own_metric_agrees_with_ours(trained):
    logs = [log for log in trained.state.log_history if "reward" in log]
    for log, found in zip(logs, trained.alignment.metrics, strict=True):
        assert log["sampling/sampling_logp_difference/mean"] == pytest.approx(found["mismatch/abs_mean"], rel=1e-4)
        assert log["mismatch/lag0/k3"] == pytest.approx(found["mismatch/lag0/k3"], rel=1e-6)


def test_our_logprobs_are_those_of_trls_own_head_in_float32(trained):
    """Its fused head on the same float32 model, without autocast: only the rounding of the weight may differ."""
    aligned, model = trained.alignment, trained.model
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(ids)
    stock = type(trained)._get_per_token_logps_and_entropies
    with torch.no_grad(), torch.autocast("cpu", enabled=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained.accelerator, "autocast", lambda: torch.autocast("cpu", enabled=False))
        patch.setattr(
            model, "forward", getattr(model, "_original_forward", model.forward)
        )  # accelerate's is under autocast
        mine, entropy, _ = aligned.score(model, ids, attention, 6, compute_entropy=True)
        for each in aligned.mirrors:
            each.restore()
        theirs, their_entropy, _ = stock(trained, model, ids, attention, 6, compute_entropy=True)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, their_entropy, rtol=1e-4, atol=1e-4)
    aligned.mirrors[:] = [rlalign.mirror(model)]


@pytest.mark.proves("TRL GRPOTrainer, colocate", "stale weights are named and do not sample")
def test_stale_weights_are_named_before_they_sample(trained, monkeypatch):
    """A push that reaches nothing, as a renamed parameter or a wrong process group makes one; and an honest one."""
    aligned = trained.alignment
    trained.vllm_generation.sync_weights()
    with torch.no_grad():
        trained.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    monkeypatch.setattr(aligned, "_sync", aligned._verify)
    monkeypatch.setattr(aligned, "_stock_sync", lambda: None)
    with pytest.raises(
        RuntimeError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: the engine computes with something else"
    ):
        trained.vllm_generation.sync_weights()
    with pytest.raises(RuntimeError, match="must not generate"):
        trained._generate_and_score_completions([trained.train_dataset[0]] * GROUP)
    monkeypatch.undo()
    trained.vllm_generation.sync_weights()
    aligned.engine.require_sound()


@pytest.mark.proves(
    "TRL GRPOTrainer, colocate", "one-sided head, raw logprobs, another temperature, a penalty: each refused by name"
)
def test_other_faults_are_named_before_a_step(trl, trained):
    _, adapter = trl
    aligned = trained.alignment
    aligned.undo()
    assert "sync_weights" not in vars(trained.vllm_generation)
    llm = trained.vllm_generation.llm
    worker = llm.llm_engine.model_executor.driver_worker.worker

    def refused(kind, said, *changed):
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, value in changed:
                patch.setattr(owner, name, value)
            with pytest.raises(kind, match=said):
                adapter.align(trained)

    with on_engine(adapter):
        hotter = r"another temperature: tokens are sampled at 0\.9, .* by 1\.3"
        refused(ValueError, hotter, (trained, "temperature", 1.3))
        model_config = worker.vllm_config.model_config
        refused(ValueError, "raw against processed logprobs", (model_config, "logprobs_mode", "raw_logprobs"))
        refused(ValueError, r"repetition_penalty=1\.2", (trained.vllm_generation, "repetition_penalty", 1.2))
        worker.rlalign_set_head("off")
        refused(RuntimeError, "runs vLLM's own head .*RLALIGN_HEAD=float32")
        worker.rlalign_set_head("cached")
    refused(RuntimeError, "has sampled in")


@pytest.mark.proves("TRL RLOOTrainer, colocate", "one float32 head on both sides at every step, policy and reference")
def test_rloo_is_compared_though_it_asks_for_no_logprobs(trl, trained, policy, tmp_path):
    """The engine's logprobs are what its loss divides by; TRL itself never looks at them."""
    trained.alignment.undo()
    with on_engine(trl[1], trained.vllm_generation.llm):
        trainer = make(trl, policy, tmp_path, kind="RLOO", max_steps=2, beta=0.05)
    trainer.train()
    aligned = trainer.alignment
    assert len(aligned.mirrors) == 2  # the reference has a model of its own
    for found in aligned.metrics:
        assert found["mismatch/lag0/k3"] < 1e-3 and found["mismatch/nonfinite"] == 0 and found["mismatch/tokens"] > 16
    assert len({found["mismatch/nll_rollout"] for found in aligned.metrics}) == 2 == len(aligned.publish_seconds)
    assert {"mismatch/lag0/k3", "publish/seconds"} <= trainer.state.log_history[0].keys()
    aligned.undo()
    assert trainer.vllm_generation.logprobs is None


@pytest.mark.proves(
    "TRL GRPOTrainer with PEFT", "LoRA merged in float32 for the push, 16-bit base weights stay bit for bit"
)
def test_an_adapter_is_merged_beside_the_base_weights(trl, trained, policy, tmp_path):
    """TRL merges into 16-bit weights and takes out again what it can; here their bits stay, and the engine has the merged ones."""
    trained.alignment.undo()
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    with on_engine(trl[1], trained.vllm_generation.llm):
        trainer = make(trl, policy, tmp_path, peft_config=lora, dtype="bfloat16", max_steps=2, beta=0.05)
    aligned, model = trainer.alignment, trainer.model
    base = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" not in name}
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    trainer.train()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
    assert any(not torch.equal(after[name], tensor) for name, tensor in adapters.items())
    assert len(aligned.mirrors) == 1 and all(found["mismatch/lag0/k3"] < 1e-2 for found in aligned.metrics)
    aligned.engine.publish(aligned.mirrors[0].named_weights(), 2)
    named = model.get_base_model().named_parameters()
    unmerged = [(name.replace(".base_layer", ""), p) for name, p in named if ".lora_" not in name]
    with pytest.raises(RuntimeError, match="does not compute with the trainer's"):
        aligned.engine.verify(unmerged, hold=False)
    aligned.undo()
    with pytest.raises(ValueError, match='weights="verify" with PEFT: TRL merges and unmerges in place'):
        require_settings(trainer, weights="verify")


@pytest.mark.proves("TRL cast_lm_head_to_fp32", "the same numbers by the mirror with head_dtype=master")
@pytest.mark.parametrize("head_dtype", ["float32", "master"])
def test_trls_float32_head_gives_way_to_the_engines_product(trl, policy, tmp_path, head_dtype):
    """cast_lm_head_to_fp32 on a bf16 model: the same float32 weight; "master" multiplies it as it is, to the same numbers."""
    _, adapter = trl
    stock = make(trl, policy, tmp_path, aligned=False, use_vllm=False, dtype="bfloat16", cast_lm_head_to_fp32=True)
    model, g = stock.model, torch.Generator().manual_seed(0)
    assert model.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        model.lm_head.weight.add_(
            torch.randn(model.lm_head.weight.shape, generator=g) * 1e-3
        )  # no bf16 number any more
    ids = torch.randint(5, 60, (3, 14), generator=g)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, -8:] = True
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        theirs, their_entropy, _ = stock._get_per_token_logps_and_entropies(
            model, *inputs.values(), 8, compute_entropy=True
        )
        with pytest.raises(ValueError, match="the forward of its lm_head was replaced"):
            rlalign.mirror(model, head_dtype=head_dtype)
        put_back = adapter._take_head_out(model)
        with rlalign.mirror(model, head_dtype=head_dtype) as mirrored:
            mine, entropy = mirrored.token_logprobs(inputs, mask, temperature=stock.temperature)
        put_back()
        again, *_ = stock._get_per_token_logps_and_entropies(model, *inputs.values(), 8)
    assert torch.equal(again, theirs)
    apart = (mine[:, -8:] - theirs).abs().max()
    if head_dtype == "master":
        assert apart < 2e-5 and (entropy[:, -8:] - their_entropy).abs().max() < 2e-5
    else:  # what the engine holds of a float32 head: its rounded weight
        assert 1e-5 < apart < 0.1


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"vllm_generation": None}, "use_vllm=False: there is no second engine"),
        (
            {"vllm_generation": SimpleNamespace(mode="server"), "accelerator": SimpleNamespace(num_processes=2)},
            'vllm_mode="server" with several trainer processes',
        ),
        (
            {"vllm_generation": SimpleNamespace(mode="colocate", tensor_parallel_size=2)},
            "vllm_tensor_parallel_size > 1",
        ),
        ({"args": SimpleNamespace(vllm_importance_sampling_correction=False)}, "nothing recomputes the logprobs"),
        ({"_is_vlm": True}, "a model with images"),
    ],
)
def test_settings_that_leave_the_sides_apart_are_refused(changes, said):
    plain = {
        "args": SimpleNamespace(vllm_importance_sampling_correction=True), "_is_vlm": False, "model": torch.nn.Identity(),
        "vllm_generation": SimpleNamespace(mode="colocate", tensor_parallel_size=1),
    }  # fmt: skip
    require_settings(SimpleNamespace(**plain), weights="publish")
    require_settings(
        SimpleNamespace(**(plain | {"args": SimpleNamespace()})), weights="verify"
    )  # RLOO has no such setting
    with pytest.raises(ValueError, match=said):
        require_settings(SimpleNamespace(**(plain | changes)), weights="publish")
    with pytest.raises(ValueError, match=r"weights='push': \"publish\" \(read back\)"):
        require_settings(SimpleNamespace(**plain), weights="push")


def test_what_trl_sets_itself_cannot_be_set_twice(trl):
    _, adapter = trl
    with adapter.building_with({"seed": 3}), pytest.raises(ValueError, match="TRL sets seed of vllm.LLM itself"):
        adapter.vllm_generation.LLM(model="x", seed=0)


def test_an_untested_version_is_refused_with_a_way_round(monkeypatch):
    require_version("1.16.3")
    with pytest.raises(
        RuntimeError, match=r"TRL 1\.17\.0 was not tried.*RLALIGN_ALLOW_UNTESTED_TRL=1.*rlalign\.mirror"
    ):
        require_version("1.17.0")
    monkeypatch.setenv("RLALIGN_ALLOW_UNTESTED_TRL", "1")
    require_version("1.17.0")
