"""rlalign doctor on a real engine: a good set-up passes, a bad one is named, and one problem hides no other."""

import json
import shutil

from rlalign import cli
from tests.engine.conftest import build_model


def doctor(tmp_path, *overrides):
    file = tmp_path / "doctor.json"
    code = cli.main(["doctor", "--json", str(file), f"output_dir={tmp_path / 'run'}", *overrides])
    return code, {check["name"]: check for check in json.loads(file.read_text())}


def test_a_good_set_up_passes_every_check(tmp_path, tied, capsys):
    code, checks = doctor(tmp_path, f"model.path={tied}", "model.dtype=float32")
    states = {c["state"] for name, c in checks.items() if name != "family"}  # unknown where the table has no row of it
    assert code == 0 and states == {"ok"} and checks["family"]["state"] != "problem"
    assert "24 tensors verified on 1 rank(s)" in checks["weights"]["found"]
    assert checks["body dtype"]["found"] == "float32" and checks["tied embeddings"]["found"] == "True"
    assert checks["tokenizer of both sides"]["found"].startswith("the same: ")
    assert "rollout float32 (cached), trainer float32" in checks["heads of both sides"]["found"]
    assert checks["head alone"]["found"].startswith("mean distance from the float64 head")
    assert {
        "clock",
        "head memory",
        "special tokens",
        "sampling is comparable",
        "prefix cache",
        "known issues",
    } <= checks.keys()
    assert " 0 problem" in capsys.readouterr().out


def test_a_wrong_model_is_a_problem_and_the_rest_is_still_looked_at(tmp_path):
    code, checks = doctor(tmp_path, f"model.path={tmp_path}")
    assert code == 1
    assert "is not a Hugging Face folder" in checks["engine"]["found"]
    assert checks["vllm plugin"]["state"] == checks["torch"]["state"] == "ok"


def test_a_mismatch_over_the_limit_and_a_missing_folder_are_named_with_a_remedy(tmp_path):
    model = build_model(tmp_path / "model", tied=False, logit_scale=8.0)
    code, checks = doctor(tmp_path, f"model.path={model}", "mismatch.k3_limit=1e-15")
    assert code == 1
    assert checks["mismatch at lag 0"]["state"] == "ok", "ordinary for this model, whatever the run's limit"
    limit = checks["limit of the run"]
    assert limit["state"] == "problem" and "it would stop the run at its first step" in limit["found"]
    assert limit["remedy"].startswith("mismatch.k3_limit=")
    code, checks = doctor(tmp_path, f"model.path={model}", f"weights.shared={tmp_path / 'nowhere'}")
    assert code == 1 and "does not exist" in checks["shared folder"]["found"]


def test_a_plugin_that_vllm_would_skip_is_found_before_the_run(tmp_path, untied, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    code, checks = doctor(tmp_path, f"model.path={untied}")
    assert code == 1
    assert "leaves out 'rlalign'" in checks["vllm plugin"]["found"] and checks["engine"]["state"] == "problem"


def test_what_the_checkpoint_claims_and_what_was_multiplied_are_said(tmp_path, untied):
    model = tmp_path / "model"
    shutil.copytree(untied, model)
    about = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(about | {"head_dtype": "float32"}))
    _, checks = doctor(tmp_path, f"model.path={model}", "head_dtype=model")
    claim = checks["head_dtype of the checkpoint"]
    assert (
        "config.json claims float32; both sides multiply in bfloat16" in claim["found"]
        and "head_dtype=float32" in claim["remedy"]
    )
    for name in ("logits of rank 0, probe", "logits of rank 0, sampled", "logits of the trainer"):
        assert checks[name]["state"] == "ok" and checks[name]["found"].startswith("bfloat16 ("), checks[name]


def test_a_bf16_model_that_only_rounds_is_no_problem_and_a_head_on_one_side_is(tmp_path, monkeypatch):
    """The body hides the head in the whole model's numbers; alone it is seen, with its side."""
    from rlalign.diagnose.doctor import live

    model = build_model(tmp_path / "model", tied=False, logit_scale=12.0)
    code, checks = doctor(tmp_path, f"model.path={model}", "mismatch.k3_limit=1")
    assert code == 0 and checks["mismatch at lag 0"]["state"] == checks["head alone"]["state"] == "ok"
    assert "rounding explains up to" in checks["mismatch at lag 0"]["found"]

    real = live.start_embedded

    def with_vllms_own_head(*arguments):
        engine = real(*arguments)
        engine.set_head("off")
        return engine

    monkeypatch.setattr(live, "start_embedded", with_vllms_own_head)
    code, checks = doctor(tmp_path, f"model.path={model}", "mismatch.k3_limit=1")
    assert code == 1 and checks["head alone"]["state"] == "problem"
    assert "the rollout's head is" in checks["head alone"]["found"] and "trainer's" not in checks["head alone"]["found"]
