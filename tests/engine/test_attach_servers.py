"""Servers that another stack has started: TRL's vllm_mode="server" aligned without NCCL, and the doctor from outside."""

import json
import re

import pytest
import torch

from rlalign import cli
from rlalign.rollout.attached import attach
from tests.engine.conftest import build_model, perturbed
from tests.engine.trl_trainers import make, on_engine, trl_loaded


@pytest.fixture(scope="module")
def trl():
    with trl_loaded() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(trl, two_servers, tmp_path_factory):
    """A trainer after three steps with a server, both sides in float32: nothing but a stale weight or a head could part them."""
    _, adapter = trl
    server = {"vllm_mode": "server", "vllm_server_base_url": two_servers.urls[0], "bf16": False}
    with on_engine(adapter), pytest.MonkeyPatch.context() as patch:
        # without a CUDA device TRL's own push ends here
        with pytest.raises((NotImplementedError, RuntimeError), match="weight-transfer engine"):
            make(trl, two_servers.launch.model, tmp_path_factory.mktemp("stock"), aligned=False, **server)
        patch.setenv("RLALIGN_HEAD", "float32")
        trainer = make(trl, two_servers.launch.model, tmp_path_factory.mktemp("aligned"), **server)
        trainer.train()
    yield trainer
    trainer.alignment.undo()


@pytest.mark.proves("TRL GRPOTrainer, server", "lag-0 k3 below 1e-9 in float32, published over HTTP without NCCL")
def test_a_server_is_published_to_and_compared_with(served, two_servers):
    aligned = served.alignment
    assert aligned.engine.engines == [two_servers.urls[0]] and len(aligned.metrics) == 3
    for found in aligned.metrics:
        assert found["mismatch/lag0/k3"] < 1e-9 and found["mismatch/nonfinite"] == 0
    assert len({found["mismatch/nll_rollout"] for found in aligned.metrics}) == 3
    (status,) = aligned.engine.prove()
    assert status["policy_version"] == 2
    for log, found in zip(served.state.log_history, aligned.metrics, strict=False):
        assert log["sampling/sampling_logp_difference/mean"] == pytest.approx(found["mismatch/abs_mean"], abs=1e-7)


@pytest.mark.proves("TRL GRPOTrainer, server", "stale weights are named, and the server is not sampled from")
def test_a_push_that_did_not_arrive_is_named(served, monkeypatch):
    aligned = served.alignment
    with torch.no_grad():
        served.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    monkeypatch.setattr(aligned, "_sync", aligned._verify)
    monkeypatch.setattr(aligned, "_stock_sync", lambda: None)
    with pytest.raises(RuntimeError, match=r"up_proj\.weight: the engine computes with something else"):
        served.vllm_generation.sync_weights()
    with pytest.raises(RuntimeError, match="must not generate"):
        served._generate_and_score_completions([served.train_dataset[0]] * 4)
    monkeypatch.undo()
    served.vllm_generation.sync_weights()
    aligned.engine.require_sound()


@pytest.mark.proves(
    "TRL GRPOTrainer, server", "one-sided head, raw logprobs, another temperature, a penalty: each refused by name"
)
def test_other_faults_of_a_server_are_named_before_a_step(trl, served):
    _, adapter = trl
    engine = served.alignment.engine
    (mode,) = {status["mode"] for status in engine.status()}
    served.alignment.undo()

    def refused(kind, said, *changed):
        with on_engine(adapter), pytest.MonkeyPatch.context() as patch:
            for owner, name, value in changed:
                patch.setattr(owner, name, value)
            with pytest.raises(kind, match=said):
                adapter.align(served)

    def raw(url, **given):
        found = attach(url, **given, after_generation=True, take_over=True)
        found._identity[0]["logprobs_mode"] = "raw_logprobs"
        return found

    hotter = r"another temperature: tokens are sampled at 0\.9, .* by 1\.3"
    refused(ValueError, hotter, (served, "temperature", 1.3))
    refused(ValueError, r"repetition_penalty=1\.2", (served.vllm_generation, "repetition_penalty", 1.2))
    refused(ValueError, "raw against processed logprobs", (adapter, "attach", raw))
    other = attach(served.vllm_generation.vllm_client.base_url, after_generation=True)
    other.ask("rlalign_set_head", "off")
    refused(RuntimeError, "runs vLLM's own head .*RLALIGN_HEAD=float32")
    other.ask("rlalign_set_head", mode)
    other.detach()


@pytest.mark.proves("vLLM serve", "doctor --engine URL: head, settings, weights and agreement from outside")
def test_the_doctor_looks_at_a_server_from_outside(two_servers, untied, tmp_path):
    """All is well for the folder that it serves; another folder, and another head than it runs, are named."""
    url, file = two_servers.urls[1], tmp_path / "doctor.json"

    def doctor(model, *overrides):
        code = cli.main(["doctor", "--engine", url, "--model", str(model), "--json", str(file), *overrides])
        return code, {check["name"]: check for check in json.loads(file.read_text())}

    served = perturbed(untied, seed=0, dtype=torch.float32, size=0.0)
    engine = attach(url, after_generation=True, take_over=True)
    engine.publish(served.named_parameters(), 0)
    engine.detach()
    code, checks = doctor(untied)
    assert code == 0 and {c["state"] for name, c in checks.items() if name != "family"} == {"ok"}, checks
    assert {
        "weights",
        "head alone",
        "mismatch at lag 0",
        "logprobs mode",
        "tokenizer.json of both sides",
    } <= checks.keys()
    assert "head of rank 0" in checks and checks["body dtype"]["found"] == "float32"
    code, checks = doctor(build_model(tmp_path / "other", tied=True, seed=1))
    assert code == 1 and checks["config.json of both sides"]["state"] == "problem"
    assert "the engine computes with something else" in checks["weights"]["found"]
    assert checks["mismatch at lag 0"]["state"] == "problem" and checks["head of rank 0"]["state"] == "ok"
    code, checks = doctor(untied, "head_dtype=model")
    assert code == 1 and checks["engine"]["state"] == "problem"


def test_what_is_no_engine_is_said(capsys, tmp_path, untied):
    for target, said in (
        ("localhost:8000", "localhost cannot be imported here"),
        ("nothing", "give the address of a `vllm serve`"),
        ("rlalign.exits:missing", "has no missing"),
        ("http://127.0.0.1:9", "Connection refused|All connection attempts failed"),
    ):
        code = cli.main(["doctor", "--engine", target, "--model", str(untied)])
        assert code == 1 and re.search(f"problem  engine .*({said})", capsys.readouterr().out)
    assert cli.main(["doctor", "--engine", "http://127.0.0.1:9"]) == 2
    assert "say with --model DIR" in capsys.readouterr().err
