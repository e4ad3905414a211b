"""TRL's released GRPOTrainer with the real vLLM in this process, aligned: equal heads, proved weights, planted faults by name."""

import json
import os
import sys
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer

import rlalign
from tests.peers import without_transport

STEPS, PROMPTS, GROUP, TOKENS = 3, 4, 4, 6


ROWS = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(1, 9) for b in range(1, 9)]


def rows(kind):
    """The prompts as what TRL takes for a datasets.Dataset here: the real one, or the placeholder of tests.peers."""
    if hasattr(kind, "from_list"):
        return kind.from_list(ROWS)
    indexed = {"__len__": lambda self: len(ROWS), "__getitem__": lambda self, index: ROWS[index]}
    return type("Rows", (kind, Dataset), indexed)()


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """TRL, its adapter, and a maker of trainers on the demo's policy."""
    with pytest.MonkeyPatch.context() as patch:
        before = dict(os.environ)
        for name, value in {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        with without_transport():
            import trl as package
            import trl.trainer.grpo_trainer  # lazily loaded otherwise, outside

            from rlalign.integrations import trl as adapter
        yield package, adapter
        for name in set(os.environ) - set(before):  # what TRL leaves there for vLLM's process group
            os.environ.pop(name)


def make(trl, folder, output, vllm=MappingProxyType({"enforce_eager": True}), **changes):
    package, adapter = trl
    options = {
        "output_dir": str(output), "use_cpu": True, "bf16": True, "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": False, "per_device_train_batch_size": PROMPTS * GROUP, "num_generations": GROUP,
        "max_completion_length": TOKENS, "temperature": 0.9, "learning_rate": 1e-3, "max_steps": STEPS, "beta": 0.0,
        "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
        "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64, "vllm_gpu_memory_utilization": 0.3,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def reward(completions, answer, **_):
        return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]

    return adapter.AlignedGRPOTrainer(
        model=str(folder), reward_funcs=reward, args=package.GRPOConfig(**(options | changes)),
        train_dataset=rows(package.trainer.grpo_trainer.Dataset),
        processing_class=tokenizer, rlalign_vllm=vllm,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(trl, tmp_path_factory):
    """One run of an aligned trainer, of which the tests below look at one side each."""
    from rlalign.tiny_policy import cached_policy

    trainer = make(trl, cached_policy("untied"), tmp_path_factory.mktemp("out"))
    trainer.train()
    yield trainer
    trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()


def test_every_step_was_sampled_and_scored_by_one_head(trained):
    aligned = trained.alignment
    assert len(aligned.metrics) == STEPS and len(aligned.publish_seconds) == STEPS
    for found in aligned.metrics:
        assert found["mismatch/lag0/k3"] < 1e-3 and found["mismatch/nonfinite"] == 0
    assert len({found["mismatch/nll_rollout"] for found in aligned.metrics}) == STEPS
    (status,) = aligned.engine.prove()
    assert status["mode"] == "cached" and status["multiplied"]["sampled"]["dtype"] == "float32"
    assert aligned.mirrors[0].status.multiplied.dtype == "float32" and aligned.engine.policy_version == STEPS - 1


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


def test_other_faults_are_named_before_a_step(trl, trained):
    _, adapter = trl
    aligned = trained.alignment
    aligned.undo()
    assert "sync_weights" not in vars(trained.vllm_generation)
    again = {"after_generation": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "attach", lambda llm, **given: rlalign.attach(llm, **given, **again))
        patch.setattr(trained, "temperature", 1.3)
        with pytest.raises(ValueError, match=r"another temperature: tokens are sampled at 0\.9, .* by 1\.3"):
            adapter.align(trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "attach", lambda llm, **given: rlalign.attach(llm, **given, **again))
        worker = trained.vllm_generation.llm.llm_engine.model_executor.driver_worker.worker
        patch.setattr(worker.vllm_config.model_config, "logprobs_mode", "raw_logprobs")
        with pytest.raises(ValueError, match="raw against processed logprobs"):
            adapter.align(trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "attach", lambda llm, **given: rlalign.attach(llm, **given, **again))
        worker.rlalign_set_head("off")
        with pytest.raises(RuntimeError, match="runs vLLM's own head .*RLALIGN_HEAD=float32"):
            adapter.align(trained)
        worker.rlalign_set_head("cached")
        patch.setattr(trained.vllm_generation, "repetition_penalty", 1.2)
        with pytest.raises(ValueError, match=r"repetition_penalty=1\.2"):
            adapter.align(trained)
    with pytest.raises(RuntimeError, match="has sampled in"):
        adapter.align(trained)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"vllm_generation": None}, "use_vllm=False: there is no second engine"),
        ({"vllm_generation": SimpleNamespace(mode="server", tensor_parallel_size=1)}, 'vllm_mode="server"'),
        (
            {"vllm_generation": SimpleNamespace(mode="colocate", tensor_parallel_size=2)},
            "vllm_tensor_parallel_size > 1",
        ),
        ({"vllm_importance_sampling_correction": False}, "nothing recomputes the logprobs to compare; leave it True"),
        ({"_is_vlm": True}, "a model with images"),
        (
            {"args": SimpleNamespace(cast_lm_head_to_fp32=True)},
            "TRL's own float32 head, on one side only; leave it False",
        ),
    ],
)
def test_settings_that_leave_the_sides_apart_are_refused(trl, changes, said):
    _, adapter = trl
    plain = {
        "args": SimpleNamespace(cast_lm_head_to_fp32=False), "vllm_importance_sampling_correction": True, "_is_vlm": False,
        "vllm_generation": SimpleNamespace(mode="colocate", tensor_parallel_size=1),
    }  # fmt: skip
    adapter._require_settings(SimpleNamespace(**plain))
    with pytest.raises(ValueError, match=said):
        adapter._require_settings(SimpleNamespace(**(plain | changes)))


def test_what_trl_sets_itself_cannot_be_set_twice(trl):
    _, adapter = trl
    with adapter.building_with({"seed": 3}), pytest.raises(ValueError, match="TRL sets seed of vllm.LLM itself"):
        adapter.vllm_generation.LLM(model="x", seed=0)


def test_an_untested_version_is_refused_with_a_way_round(trl, monkeypatch):
    _, adapter = trl
    adapter.require_version("1.16.3")
    with pytest.raises(
        RuntimeError, match=r"TRL 1\.17\.0 was not tried.*RLALIGN_ALLOW_UNTESTED_TRL=1.*rlalign\.mirror"
    ):
        adapter.require_version("1.17.0")
    monkeypatch.setenv("RLALIGN_ALLOW_UNTESTED_TRL", "1")
    adapter.require_version("1.17.0")


def test_importing_rlalign_imports_no_peer():
    import subprocess

    code = "import json, sys, rlalign.loops; print(json.dumps([n for n in ('trl', 'verl', 'ray') if n in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []
