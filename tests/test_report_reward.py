"""The report on reward models: what the monitor logged becomes charts, a table and a problem, and nothing where it logged none."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.calibration.drift import DriftMonitor
from rlalign.report import write_report
from rlalign.report.run_page import drift_problems, watched
from rlalign.tracking.record import read_run
from rlalign.tracking.run_directory import Run
from tests.test_report import read


def make_run(directory: Path, *, name: str = "rm", moved_at: int = 99) -> Path:
    """A run of 12 steps whose only metrics are those of a real monitor; success falls at `moved_at`."""
    random = np.random.default_rng(0)

    def rows(shift: float) -> tuple[np.ndarray, np.ndarray]:
        logits = random.normal(0, 2, 128)
        return logits, (random.random(128) < expit(logits - shift)).astype(float)

    parts = [rows(0.0) for _ in range(20)]
    monitor = DriftMonitor(PlattCalibrator().fit(*map(np.concatenate, zip(*parts, strict=True))), window=600)
    with Run(directory, config={}, wandb_mode="disabled", project="p", name=directory.name) as run:
        for step in range(12):
            monitor.update(*rows(3.0 if step >= moved_at else 0.0), step=step)
            report = monitor.report()
            run.log(step, {f"reward/drift/{name}/{key}": value for key, value in report.metrics().items()})
        (directory / "drift").mkdir()
        (directory / "drift" / f"{name}.json").write_text(json.dumps(report.as_json(), allow_nan=False))
        run.finish({})
    return directory


def test_a_drifted_model_is_a_problem_with_its_steps_and_its_numbers(tmp_path):
    page = read(write_report([make_run(tmp_path / "run", moved_at=6)], tmp_path / "r.html"))
    (problem,) = drift_problems(read_run(tmp_path / "run"))
    assert problem.startswith("The reward model rm drifted from the verifier on") and "last: step 11" in problem
    first = int(problem.split("first: step ")[1].split(",")[0])
    assert 6 <= first <= 8 and problem in page.text
    assert "Reward model rm: drift" in page.text and page.tags.count("svg") == 6
    row = page.row("E[p] - E[y], newest rows")
    assert row[1] == "drift" and float(row[2]) > 0.3 and row[4] == "0.05"


def test_a_calm_model_has_a_section_and_no_problem(tmp_path, undrawn):
    page = read(write_report([make_run(tmp_path / "run")], tmp_path / "r.html"))
    assert drift_problems(read_run(tmp_path / "run")) == [] and watched(read_run(tmp_path / "run")) == ["rm"]
    assert page.row("debiased ECE")[1] == "ok"


def test_runs_side_by_side_and_models_apart(tmp_path, undrawn):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", moved_at=5), make_run(tmp_path / "c", name="judge")]
    page = read(write_report(runs, tmp_path / "abc.html"))
    assert page.text.count("Reward model rm: drift") == page.text.count("Reward model judge: drift") == 1
    assert "B b: The reward model rm drifted" in page.text and "A a: The reward" not in page.text
    assert page.tags.count("svg") == (5 + 2) + (5 + 1)


@pytest.mark.parametrize("left", ["metrics", "file"])
def test_half_of_what_is_needed_is_no_page_that_fails(tmp_path, undrawn, left):
    directory = make_run(tmp_path / "run")
    if left == "metrics":
        (directory / "drift" / "rm.json").unlink()
    else:
        (directory / "metrics.jsonl").write_text(json.dumps({"step": 0, "reward/mean": 0.5}) + "\n")
    page = read(write_report([directory], tmp_path / "r.html"))
    assert ("Reward model rm" in page.text) == (left == "metrics")
