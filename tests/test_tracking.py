"""A run directory keeps everything that was logged, however the process ended, and never loses a run that was there."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlalign.tracking import files
from rlalign.tracking.console import Progress, clock
from rlalign.tracking.record import read_metrics, read_run, summarize
from rlalign.tracking.run_directory import Run
from rlalign.tracking.token_files import SCHEMA, read_tokens

CONFIG = {
    "head_dtype": "float32",
    "algo": {"lr": 1e-4, "betas": [0.9, 0.99]},
    "path": Path("models/tiny"),
    "clip": None,
}


def start(directory: Path, **kwargs: bool) -> Run:
    return Run(directory, config=CONFIG, wandb_mode="disabled", project="test", name="demo", **kwargs)


def token_columns(rows: int = 6) -> dict[str, list]:
    numbers = {name: list(range(rows)) for name in ("sequence", "position", "token_id", "policy_version", "kv_version")}
    numbers |= {name: list(range(rows)) for name in ("prompt_id", "group_id", "lag")}
    old = [-0.5 * (i + 1) for i in range(rows)]
    floats = {
        "old_logprob": old,
        "rollout_logprob": [v - 0.25 for v in old],
        "reward": [1.0] * rows,
        "entropy": [0.5] * rows,
    }
    return numbers | floats | {"advantage": [0.5] * rows, "token": ["a"] * rows, "loss_mask": [True] * rows}


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda k: k not in ("step", "seconds", "nonfinite")),
        st.one_of(st.integers(-(2**60), 2**60), st.floats()),
    )
)
def test_a_metric_row_survives_strict_json_with_nan_and_infinities(metrics):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(files.encode_row({"step": 3, **metrics}), parse_constant=refuse)
    back = files.decode_row(line)
    assert back.keys() == {"step", *metrics}
    assert all(back[k] == v or (math.isnan(v) and math.isnan(back[k])) for k, v in metrics.items())


def test_what_is_written_is_what_is_read(tmp_path):
    with start(tmp_path / "run") as run:
        for step in range(3):
            run.log(step, {"reward/mean": 0.1 * step, "publish/version": step, "worst": float("inf")})
        run.event("alert", "k3 rose")
        run.log_head_status([{"rank": 0, "mode": "cached"}])
        run.log_tokens(2, token_columns())
        run.finish({"steps": 3, "engine": {"name": "vllm"}})
    record = read_run(tmp_path / "run")
    assert (record.status, record.name, record.config["path"]) == ("finished", "demo", "models/tiny")
    assert record.series("reward/mean") == ([0, 1, 2], [0.0, 0.1, 0.2])
    assert record.series("worst")[1] == [math.inf] * 3
    assert isinstance(record.metrics.rows[1]["publish/version"], int)
    assert record.events[0]["message"] == "k3 rose" and record.events[0]["step"] == 2
    assert record.head_status == ({"rank": 0, "mode": "cached"},)
    assert record.summary["engine"] == {"name": "vllm"} and record.summary["reward_last"] == pytest.approx(0.2)
    assert record.environment["versions"]["python"] == sys.version.split()[0]
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_the_yaml_beside_the_json_holds_the_same_configuration(tmp_path):
    import yaml

    start(tmp_path / "run")
    text = (tmp_path / "run/config.yaml").read_text()
    assert yaml.safe_load(text) == json.loads((tmp_path / "run/config.json").read_text())


def test_a_torn_last_line_is_reported_and_the_rows_before_it_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = files.encode_row({"step": 0, "a": 1.0}) + "\n" + files.encode_row({"step": 1, "a": 2.0}) + "\n"
    for cut in range(1, 15):
        torn = files.encode_row({"step": 2, "a": 3.0})[:cut]
        path.write_text(whole + torn)
        metrics = read_metrics(path)
        assert [row["step"] for row in metrics.rows] == [0, 1] and metrics.torn == torn


@pytest.mark.parametrize(
    "text", ['{"step": 0}\n{"st\n{"step": 2}\n', '{"step": 0}\n{"st\n', '{"step": 0}\n[1]\n', '{"a": 1}\n']
)
def test_any_other_damage_is_an_error_that_names_the_line(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="line"):
        read_metrics(path)


def test_a_killed_process_leaves_a_readable_run_that_says_killed(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from rlalign.tracking.run_directory import Run\n"
        f"run = Run(Path({str(tmp_path / 'run')!r}), config={{}}, wandb_mode='disabled', project='p', name='n')\n"
        "run.log(0, {'reward/mean': 0.5}); run.log(1, {'reward/mean': 0.75})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL
    record = read_run(tmp_path / "run")
    assert record.status == "killed" and "last logged step: 1" in record.message
    assert record.series("reward/mean") == ([0, 1], [0.5, 0.75])


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")])
def test_an_exception_becomes_the_status_and_is_not_swallowed(tmp_path, error, status):
    with pytest.raises(error), start(tmp_path / "run") as run:
        run.log(0, {"reward/mean": 0.5})
        raise error("rank 3 did not answer")
    record = read_run(tmp_path / "run")
    assert record.status == status and "rank 3 did not answer" in record.message
    assert record.events[-1]["kind"] == status


def test_a_run_that_is_left_without_a_summary_is_not_called_finished(tmp_path):
    with start(tmp_path / "run") as run:
        run.log(0, {"a": 1.0})
    assert read_run(tmp_path / "run").status == "failed"
    with pytest.raises(RuntimeError, match="closed"):
        run.log(1, {"a": 1.0})


def test_a_run_is_never_overwritten_only_moved_aside(tmp_path):
    directory = tmp_path / "run"
    with start(directory) as run:
        run.log(0, {"a": 1.0})
        with pytest.raises(ValueError, match="live"):
            start(directory, overwrite=True)
        run.finish({})
    with pytest.raises(ValueError, match="already holds a run"):
        start(directory)
    for _ in range(2):
        with start(directory, overwrite=True) as run:
            run.finish({})
    assert [row["a"] for row in read_run(tmp_path / "run.1").metrics.rows] == [1.0]
    assert read_run(tmp_path / "run.2").metrics.rows == read_run(directory).metrics.rows == ()


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"thesis\.tex"):
            start(tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_with_only_the_launchers_files_is_fine(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "train.log").write_text("")
    with start(tmp_path) as run:
        run.finish({})
    assert read_run(tmp_path).status == "finished"


def test_resume_continues_after_the_last_whole_line(tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), start(directory) as run:
        run.log(0, {"a": 1.0})
        raise KeyboardInterrupt
    with (directory / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 1, "a"')
    with start(directory, resume=True) as run:
        assert run.last_step == 0
        run.log(1, {"a": 2.0})
        run.finish({})
    record = read_run(directory)
    assert record.series("a") == ([0, 1], [1.0, 2.0]) and record.status == "finished" and record.metrics.torn is None
    assert any(e["kind"] == "resume" and "torn" in e["message"] for e in record.events)


@pytest.mark.parametrize(
    ("metrics", "named"), [({3: 1.0}, "3"), ({"a": "high"}, "a"), ({"b": None}, "b"), ({"nonfinite": 1.0}, "nonfinite")]
)
def test_metrics_that_are_not_numbers_under_names_are_refused(tmp_path, metrics, named):
    run = start(tmp_path / "run")
    with pytest.raises(ValueError, match=named):
        run.log(0, metrics)
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""


def test_steps_only_increase(tmp_path):
    run = start(tmp_path / "run")
    run.log(4, {"a": 1.0})
    with pytest.raises(ValueError, match="step 4"):
        run.log(4, {"a": 1.0})


def test_token_files_hold_every_column_and_the_difference_they_are_named_for(tmp_path):
    run = start(tmp_path / "run")
    columns = token_columns() | {"token": ["a", "\n", "<b>", "\ud800", "\u00e9", ""]}
    path = run.log_tokens(40, columns)
    table = read_tokens(path)
    assert path.name == "step-000040.parquet" and table.column_names == list(SCHEMA)
    assert table["step"].to_pylist() == [40] * 6
    np.testing.assert_allclose(table["log_ratio"].to_numpy(), 0.25, rtol=1e-6)
    assert table["token"].to_pylist() == ["a", "\n", "<b>", "\\ud800", "\u00e9", ""]


def test_token_columns_that_do_not_fit_are_refused(tmp_path):
    run = start(tmp_path / "run")
    short = token_columns() | {"reward": [1.0]}
    missing = {k: v for k, v in token_columns().items() if k != "old_logprob"}
    for columns, named in ((short, "length"), (missing, "old_logprob"), (token_columns() | {"kl": [0.0] * 6}, "kl")):
        with pytest.raises(ValueError, match=named):
            run.log_tokens(0, columns)
    assert not list((tmp_path / "run/tokens").iterdir())


def test_a_configuration_that_cannot_be_written_is_refused_by_the_name_of_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"config\.algo\.loss"):
        Run(tmp_path / "r", config={"algo": {"loss": print}}, wandb_mode="disabled", project="p", name="n")
    assert not (tmp_path / "r").exists()


def test_directories_that_are_no_runs_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such run"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a run directory"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"schema_version": 0}')
    with pytest.raises(ValueError, match="schema 0"):
        read_run(tmp_path)


def test_summary_takes_tenths_medians_and_worst_steps():
    rows = [{"step": i, "reward/mean": i / 100, "rollout/tokens": 10, "time/step_s": 0.5} for i in range(40)]
    for row, k3 in zip(rows, [1e-9] * 38 + [1e-2, float("nan")], strict=True):
        row |= {"mismatch/lag0/k3": k3, "mismatch/lag0/abs_max": 100 * k3, "mismatch/nonfinite": int(math.isnan(k3))}
    rows[0]["eval/accuracy"], rows[30]["eval/accuracy"] = 0.25, 0.5
    s = summarize(rows)
    assert (s["steps"], s["reward_first"], s["reward_last"]) == (40, pytest.approx(0.015), pytest.approx(0.375))
    assert (s["eval_first"], s["eval_last"], s["tokens_per_s"]) == (0.25, 0.5, 20.0)
    lag0 = s["mismatch"]["lag0"]
    assert (lag0["k3"], lag0["k3_max"], lag0["abs_max"], s["mismatch"]["nonfinite"]) == (1e-9, 1e-2, 1.0, 1)


def test_what_was_never_measured_is_none_and_not_zero():
    s = summarize([{"step": 0}])
    lag0 = s["mismatch"]["lag0"]
    assert {s["reward_first"], s["eval_last"], s["tokens"], lag0["k3"], lag0["abs_max"], s["rebuilds"]} == {None}


def test_a_log_file_gets_plain_lines_with_the_numbers(tmp_path):
    path = tmp_path / "log.txt"
    with path.open("w") as out:
        console = Console(file=out, force_terminal=False, width=120)
        with Progress(3, console=console, every=2) as progress:
            progress.stage("starting [vLLM]")
            for step in range(3):
                progress.step(step, {"reward/mean": 0.5, "mismatch/lag0/k3": 1.5e-9, "rollout/tokens_per_s": 1234.0})
        progress.final_table(summarize([{"step": 0}]), Path("runs/demo/report.html"))
    lines = path.read_text().splitlines()
    assert lines[0] == "starting [vLLM] ..."
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["1/3", "2/3", "3/3"]
    assert "reward 0.500  k3 1.5e-09  1,234 tokens/s  ETA 0:0" in lines[1] and "\x1b" not in path.read_text()
    assert lines[-1] == "report: runs/demo/report.html"


def test_a_long_first_step_says_in_a_log_what_it_is_doing(tmp_path):
    with (tmp_path / "log").open("w+") as out:
        with Progress(3, console=Console(file=out, force_terminal=False, width=120), heartbeat=0.05) as progress:
            progress.stage("starting vLLM")
            time.sleep(0.12)
            progress.phase(0, "rollout")
            progress.phase(0, "train")
            time.sleep(0.12)
            progress.step(0, {})
            time.sleep(0.12)
        out.seek(0)
        text = out.read()
    assert "starting vLLM: 0:00 so far" in text and "step 1/3: train: 0:00 so far" in text
    assert "rollout" not in text, "a phase that was short is no line"
    assert text.rstrip().splitlines()[-1].startswith("step 1/3  reward"), "between steps there is nothing to say"


def test_a_step_without_numbers_shows_dashes(tmp_path):
    with (tmp_path / "log").open("w+") as out:
        Progress(1, console=Console(file=out, force_terminal=False)).step(0, {})
        out.seek(0)
        assert "reward -  k3 -  - tokens/s" in out.read()


def test_time_is_read_as_a_clock():
    assert [clock(s) for s in (0, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]
