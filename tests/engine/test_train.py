"""The main job with real parts: it learns, it measures, and however it ends the run directory stays readable."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rlalign.config import compose, load
from rlalign.run.train import train
from tests.engine.conftest import build_model

SMALL = ["rollout.prompts_per_step=4", "rollout.group_size=4", "task.train_size=32", "task.eval_size=8", "tracking=off"]


def small_run(folder, directory, *overrides, steps=2):
    options = [f"model.path={folder}", f"output_dir={directory}", f"steps={steps}", *SMALL, *overrides]
    return train(load(compose("demo", options)))


@pytest.fixture
def lively(monkeypatch):
    """A reward that is another for almost any two completions, so that a random model's weights really move on every host."""
    from rlalign.tasks import Task

    monkeypatch.setattr(Task, "reward", lambda self, prompt, completion: sum(completion.encode()) % 97 / 96)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo as the README starts it, from an installed command in an empty folder."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "rlalign.cli", "train", "--config-name", "demo", "tracking.wandb=offline"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "demo", done.stdout


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_demo_learns(demo):
    summary = json.loads((demo[0] / "summary.json").read_text())
    assert summary["reward_last"] - summary["reward_first"] >= 0.15
    assert summary["eval_last"] > summary["eval_first"]


def test_the_demo_keeps_the_engines_together(demo):
    summary, rows = json.loads((demo[0] / "summary.json").read_text()), rows_of(demo[0])
    assert summary["mismatch"]["lag0"]["k3"] < 1e-3
    assert all(row["mismatch/lag0/k3"] < 1e-3 for row in rows)
    assert [row["publish/version"] for row in rows] == list(range(1, 41))
    assert [row["rollout/policy_version"] for row in rows] == list(range(40))
    assert summary["head"]["mode"] == "cached" and summary["head"]["ranks"] == 1


def test_the_summary_has_what_was_promised(demo):
    summary = json.loads((demo[0] / "summary.json").read_text())
    promised = {"steps", "reward_first", "reward_last", "eval_first", "eval_last", "tokens", "seconds", "tokens_per_s"}
    assert promised | {"engine", "head", "mismatch", "publishes", "rebuilds"} <= summary.keys()
    assert {"k1", "k3", "abs_mean", "abs_max", "p99", "pearson", "ess"} <= summary["mismatch"]["lag0"].keys()
    assert summary["steps"] == 40 and summary["publishes"] == 40
    assert summary["engine"]["name"] == "vllm"


def test_the_demo_logs_what_the_dashboard_plots(demo):
    from rlalign.report.charts import keys, tables

    (store,) = (demo[0] / "wandb").glob("offline-run-*")
    tool = [sys.executable.replace("python", "wandb"), "leet", "inspect", "--json", store]
    records = [json.loads(line) for line in subprocess.run(tool, capture_output=True, check=True).stdout.splitlines()]
    logged = {key for record in records if record["type"] == "history" for key in record["history"]["item"]}
    assert keys() - logged == {"mismatch/excess/k3", "staleness/k3"}  # no floor was measured, and nothing was stale
    assert {f"{name}._type" for name in tables()} <= logged
    assert any(record["type"] == "stats" for record in records)


def test_the_timeline_of_the_demo_is_that_of_its_clocks(demo):
    from rlalign.tracking.record import read_run
    from rlalign.tracking.timeline import utilisation

    run, length = read_run(demo[0]), {}
    for span in run.timeline:
        length[span.step, span.phase] = length.get((span.step, span.phase), 0.0) + span.end - span.start
    for row in rows_of(demo[0]):
        for phase in ("rollout", "reward", "score", "train", "publish"):
            assert length[row["step"], phase] == pytest.approx(row[f"time/{phase}_s"], abs=3e-4)
    assert {span.step for span in run.timeline if span.phase == "eval"} == {0, 10, 20, 30, 39}
    busy = utilisation(run.timeline)
    assert busy.generating > 0.1 and busy.training > 0.1 and busy.both == 0.0
    assert "Utilisation" in (demo[0] / "report.html").read_text()


def test_the_run_directory_is_complete(demo):
    import pyarrow.parquet as pq

    directory, printed = demo
    tokens = pq.read_table(directory / "tokens" / "step-000000.parquet").to_pydict()
    assert {"step", "sequence", "position", "token_id", "token", "rollout_logprob", "old_logprob"} <= tokens.keys()
    assert len(tokens["token"]) == rows_of(directory)[0]["rollout/tokens"]
    assert "report.html" in printed
    html = (directory / "report.html").read_text()
    assert "<html" in html and 'src="http' not in html and 'href="http' not in html


def test_float32_bodies_agree_to_a_billionth(tmp_path, untied, lively):
    summary = small_run(untied, tmp_path / "run", "model.dtype=float32", "algo.lr=1e-3", steps=3)
    assert summary["mismatch"]["lag0"]["k3"] < 1e-9
    assert summary["mismatch"]["lag0"]["k3_max"] < 1e-9


def test_a_tied_model_stays_in_step_over_many_publishes(tmp_path, tied, lively):
    """The case in which vLLM's own head goes stale: k3 would climb with every update."""
    summary = small_run(tied, tmp_path / "run", "model.dtype=float32", "algo.lr=1e-3", steps=8)
    assert summary["mismatch"]["lag0"]["k3_max"] < 1e-9
    assert summary["repaired"] == 8


def test_one_setting_switches_both_heads_and_the_report_shows_the_difference(tmp_path, lively):
    from rlalign.report import write_report

    folder = build_model(tmp_path / "checkpoint", tied=False, logit_scale=8.0)
    errors = {}
    for head_dtype in ("float32", "model"):
        options = (f"head_dtype={head_dtype}", "mismatch.head_every=1", f"name={head_dtype}")
        small_run(folder, tmp_path / head_dtype, *options)
        errors[head_dtype] = rows_of(tmp_path / head_dtype)[-1]
    assert errors["float32"]["head_isolated/abs_mean"] <= errors["model"]["head_isolated/abs_mean"]
    assert errors["float32"]["head_isolated/rollout_error"] < 1e-3 * errors["model"]["head_isolated/rollout_error"]
    page = write_report([tmp_path / "float32", tmp_path / "model"], tmp_path / "ab.html").read_text()
    assert "float32" in page and "model" in page


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(tmp_path, untied, monkeypatch):
    from rlalign.objective import choice

    real = choice.policy_loss

    def poisoned(logprobs_BL, *args, **kwargs):
        return real(logprobs_BL * torch.nan, *args, **kwargs)

    monkeypatch.setattr(choice, "policy_loss", poisoned)
    with pytest.raises(RuntimeError, match="the loss is nan.*No gradient was applied and no weights were published"):
        small_run(untied, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert (tmp_path / "run" / "report.html").exists()


def test_a_gate_that_stops_keeps_what_stopped_it(tmp_path, untied, lively):
    from rlalign.run.parties import MismatchLimitError

    with pytest.raises(MismatchLimitError, match="step 0: mismatch k3"):
        small_run(untied, tmp_path / "run", "mismatch.k3_limit=1e-12", "tracking.tokens_every=0")
    (row,) = rows_of(tmp_path / "run")
    assert row["mismatch/lag0/k3"] > 1e-12 and "train/lr" not in row
    assert (tmp_path / "run" / "tokens" / "step-000000.parquet").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_frozen_run_stays_flat(tmp_path, tied, lively):
    summary = small_run(tied, tmp_path / "run", "algo.lr=0", "algo=tis", steps=10)
    assert summary["self_test"] == {"flat": True, "steps": 10}


def test_kl_to_the_initial_policy_starts_at_zero_and_grows(tmp_path, untied, lively):
    small_run(untied, tmp_path / "run", "algo.kl_coef=0.1", "algo.lr=1e-3", "algo.minibatches=2", steps=3)
    kl = [row["train/ref_k3"] for row in rows_of(tmp_path / "run")]
    assert kl[-1] > 1e-6 and kl[0] < kl[-1]


def test_unusable_input_is_refused_before_an_engine_starts(tmp_path, untied):
    with pytest.raises(ValueError, match="is not a Hugging Face folder"):
        small_run(tmp_path / "nowhere", tmp_path / "a")
    with pytest.raises(ValueError, match="unknown tiny policy 'huge'"):
        small_run("tiny:huge", tmp_path / "b")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        small_run(untied, tmp_path / "c", "task=custom", f"task.name=jsonl:{empty}")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, untied):
    import shutil

    folder = tmp_path / "mixed"
    shutil.copytree(untied, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ValueError, match="token ids up to .* the model only 100 rows"):
        small_run(folder, tmp_path / "run")


def test_prompts_longer_than_the_context_are_named(tmp_path, untied):
    long = tmp_path / "long.jsonl"
    long.write_text("\n".join(json.dumps({"prompt": "x" * 90 + str(i), "answer": "1"}) for i in range(48)))
    with pytest.raises(ValueError, match=r"40 of 40 prompts cannot be used \(room for 58 tokens.*93 tokens: 'x"):
        small_run(untied, tmp_path / "run", "task=custom", f"task.name=jsonl:{long}")


def test_ctrl_c_leaves_a_readable_run_and_no_processes(tmp_path, untied):
    directory = tmp_path / "run"
    overrides = [f"model.path={untied}", f"output_dir={directory}", "steps=5000", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "rlalign.cli", "train", "--config-name", "demo", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell's children ignore it
    )
    metrics = directory / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=600) == 130
    assert json.loads((directory / "run.json").read_text())["status"] == "interrupted"
    assert [row["step"] for row in rows_of(directory)][:3] == [0, 1, 2]
    assert (directory / "report.html").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of its process group is left
