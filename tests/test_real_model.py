"""benchmarks/real_model.py without an engine: folders it refuses, phases it resumes, failures it writes down."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import real_model, real_model_check, real_model_memory, real_model_table
from benchmarks.from_gguf import convert
from rlalign.tasks import load_task
from rlalign.tracking import environment
from tests.engine.conftest import build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("real") / "model", tied=True)


@pytest.fixture
def about(folder):
    return real_model_check.usable(folder)


def test_a_folder_is_described(about):
    assert about.tied and about.parameters > 1000 and about.layers and about.architecture == "Qwen3"


def spoiled(folder, tmp_path, what):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    what(copy)
    return copy


def changed(**config):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))

    return change


def without(pattern):
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


@pytest.mark.parametrize(
    "what, match",
    [
        (without("config.json"), "is not a Hugging Face folder"),
        (without("tokenizer*"), "has no tokenizer"),
        (without("*.safetensors"), "has no \\*.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(100)), "no whole safetensors file"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (changed(model_type="t5", architectures=["T5ForConditionalGeneration"]), "is no causal language model"),
        (changed(architectures=["Qwen3ForSequenceClassification"]), "holds a Qwen3ForSequenceClassification"),
    ],
)
def test_a_folder_that_cannot_be_measured_is_one_line(folder, tmp_path, capsys, what, match):
    copy = spoiled(folder, tmp_path, what)
    with pytest.raises(ValueError, match=match):
        real_model_check.usable(copy)
    assert real_model.main([str(copy), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_too_little_memory_or_disk_is_said_before_the_start(about, tmp_path, monkeypatch):
    real_model_check.require_room(about, tmp_path / "a" / "b")
    with pytest.raises(ValueError, match=r"1,000,000 M parameters and .* need about 1862.* GiB.*--no-estimate"):
        real_model_check.require_room(replace(about, parameters=10**12), tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**20))
    with pytest.raises(ValueError, match="of disk are needed"):
        real_model_check.require_room(about, tmp_path)


def phase(name, out, code, *, judges=True):
    """A phase that runs this Python instead of rlalign."""

    class Fake(real_model.Phase):
        def command(self):
            return [sys.executable, "-c", code, str(self.result)]

    return Fake(name=name, words=(name,), result=out / f"{name}.json", judges=judges)


WRITES = "import sys, pathlib, time; time.sleep(0.7); pathlib.Path(sys.argv[1]).write_text('[]'); "


def test_finished_phases_are_kept_and_a_refused_one_is_a_row_and_run_again(about, tmp_path, capsys):
    count = tmp_path / "count"
    counted = f"open({str(count)!r}, 'a').write('x'); "
    fails = "import sys; print('rlalign: no such thing'); print('chatter'); sys.exit(2)"
    todo = [phase("doctor", tmp_path, counted + WRITES), phase("train", tmp_path, fails, judges=False)]
    for _ in range(2):
        assert real_model.measure(about, tmp_path, todo) == 1
    rows = json.loads((tmp_path / "real_model.json").read_text())["phases"]
    assert count.read_text() == "x", "the finished phase ran once"
    assert (
        rows["train"]["state"] == "refused"
        and rows["train"]["reason"] == "no such thing"
        and rows["doctor"]["peak_mib"] > 0
    )
    assert (
        "| train | refused |" in (tmp_path / "real_model.md").read_text() and "Traceback" not in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="give this model an --out of its own"):
        real_model.read_before(tmp_path / "real_model.json", replace(about, folder=Path("/other")))
    (tmp_path / "real_model.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of this command"):
        real_model.read_before(tmp_path / "real_model.json", about)


@pytest.mark.parametrize(
    "code, judges, state, reason",
    [
        (WRITES + "sys.exit(1)", True, "finding", ""),
        (WRITES + "sys.exit(1)", False, "failed", ""),
        ("import sys; sys.exit(1)", True, "failed", "exit status 1"),
        ("import os; os.kill(os.getpid(), 9)", True, "failed", "ended by signal 9: out of memory?"),
    ],
)
def test_exit_status_1_is_a_finding_only_where_there_is_a_result(tmp_path, code, judges, state, reason):
    row = real_model.run(phase("doctor", tmp_path, code, judges=judges), tmp_path)
    assert row["state"] == state and row["reason"].startswith(reason)


@pytest.mark.slow
def test_the_commands_of_all_phases_are_configurations_that_exist(about, tmp_path):
    from rlalign.cli import parsed
    from rlalign.config import compose, load

    for model in (replace(about, chat=True), replace(about, chat=False)):
        for each in real_model.phases(model, tmp_path, max_tokens=64):
            found = parsed(list(each.words))
            if each.name == "replay":
                assert found.run_directory == tmp_path / "run" and found.step == real_model.STEPS - 1
                continue
            config = load(compose(found.config_name, found.overrides))
            assert config.model.path == str(about.folder) and config.task.chat_template is model.chat
    assert [p.name for p in real_model.phases(about, tmp_path, max_tokens=64, chosen=["train"])] == ["train"]


def test_the_questions_are_a_task_of_distinct_prompts_with_numbers():
    task = load_task(f"jsonl:{real_model.QUESTIONS}", {"match": "last_number"}, train_size=real_model.PROMPTS,
                     eval_size=real_model.HELD_OUT, seed=0)  # fmt: skip
    assert len(task.train) == real_model.PROMPTS and task.reward(task.train[0], f"It is {task.train[0].answer}.") == 1.0


@pytest.mark.slow
def test_memory_is_that_of_the_whole_family():
    import subprocess

    code = "import subprocess, sys, time; b = bytearray(80 * 2**20); "
    child = "import time; b = bytearray(120 * 2**20); time.sleep(1.0)"
    process = subprocess.Popen([sys.executable, "-c", code + f"subprocess.run([sys.executable, '-c', {child!r}])"])
    with real_model_memory.Peak(process.pid) as peak:
        process.wait()
    assert 200 < peak.mib < 300


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        convert(tmp_path / "x.gguf", tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not a GGUF file"):
        convert(tmp_path / "x.gguf", tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        convert(tmp_path / "x.gguf", tmp_path / "out")


def test_a_replay_and_exact_mode_are_cells_with_their_numbers(about, tmp_path, monkeypatch):
    answers = [{"name": "trainer", "tokens": 9, "equal": 8, "verdict": "within the floor"}]
    (tmp_path / "replay.json").write_text(json.dumps({"step": 2, "answers": answers}))
    rows = [{"mode": "exact", "tokens": 1234, "abs_max": worst} for worst in (0.0, 2.5e-7)]
    (tmp_path / "exact.json").write_text(json.dumps({"rows": rows}))
    row = {"state": "fine", "seconds": 1.0, "peak_mib": 1, "reason": ""}
    result = {"model": about.as_json(), "machine": environment.snapshot(), "phases": {"replay": row, "exact": row}}
    table = real_model_table.markdown(result, tmp_path)
    assert "step 2; trainer: 8 of 9 tokens equal, within the floor |" in table
    assert "1,234 sampled tokens; largest |log_ratio| 2.5e-07 nats" in table.replace("\\|", "|")
