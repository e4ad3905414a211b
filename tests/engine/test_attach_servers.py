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


@pytest.mark.proves("TRL GRPOTrainer, server", "lag-0 k3 below 1e-9 in float32, published over HTTP without NCCL")
def test_a_server_is_published_to_and_compared_with(trl, two_servers, tmp_path):
    """Both sides compute in float32 here, so that nothing but a stale weight or another head could part them."""
    _, adapter = trl
    server = {"vllm_mode": "server", "vllm_server_base_url": two_servers.urls[0]}
    with on_engine(adapter), pytest.MonkeyPatch.context() as patch:
        # without a CUDA device TRL's own push ends here
        with pytest.raises((NotImplementedError, RuntimeError), match="weight-transfer engine"):
            make(trl, two_servers.launch.model, tmp_path, aligned=False, bf16=False, **server)
        patch.setenv("RLALIGN_HEAD", "float32")
        trainer = make(trl, two_servers.launch.model, tmp_path, bf16=False, **server)
        trainer.train()
    aligned = trainer.alignment
    assert aligned.engine.engines == [two_servers.urls[0]] and len(aligned.metrics) == 3
    for found in aligned.metrics:
        assert found["mismatch/lag0/k3"] < 1e-9 and found["mismatch/nonfinite"] == 0
    assert len({found["mismatch/nll_rollout"] for found in aligned.metrics}) == 3
    (status,) = aligned.engine.prove()
    assert status["policy_version"] == 2
    for log, found in zip(trainer.state.log_history, aligned.metrics, strict=False):
        assert log["sampling/sampling_logp_difference/mean"] == pytest.approx(found["mismatch/abs_mean"], abs=1e-7)
    aligned.undo()


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
