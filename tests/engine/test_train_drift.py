"""A run against a reward model that promises too much: the monitor says so, a refit takes its say away, a resume keeps that."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from rlalign.calibration.calibrators import Calibrator, PlattCalibrator
from rlalign.config import compose, load
from rlalign.reward.drift_watch import RewardDriftError
from rlalign.run.train import train
from rlalign.scoring.calibrated import identity_of
from rlalign.scoring.hf import HFScorer
from rlalign.tiny_policy import cached_policy

DRIFT = ["reward.drift.min_labels=100", "reward.drift.window=512"]
RUN = ["tracking=off", "rollout.prompts_per_step=16", "task.eval_size=16", "algo.normalize_std=false", *DRIFT]


@pytest.fixture(scope="module")
def flatterer(tmp_path_factory) -> Path:
    """A reward model of random weights whose calibration promises about 0.9 for everything."""
    folder = tmp_path_factory.mktemp("flatterer")
    policy = cached_policy("untied")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForSequenceClassification(config)
    model.score.weight.data.mul_(10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    random = np.random.default_rng(0)
    logits = random.normal(0, 1.5, 1000)
    labels = random.random(1000) < 1 / (1 + np.exp(-logits - 2.2))
    PlattCalibrator().fit(logits, labels).save(
        folder / "calibration.json", model=identity_of(HFScorer(str(folder)).info)
    )
    return folder


def run(directory: Path, model: Path, *overrides: str, steps: int) -> list[dict]:
    given = [f"reward.models.rm.path={model}", f"output_dir={directory}", f"steps={steps}", *RUN, *overrides]
    train(load(compose("demo_reward_model", given)))
    return rows_of(directory)


def rows_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def events(directory: Path, kind: str) -> list[str]:
    lines = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [line["message"] for line in lines if line["kind"] == kind]


def test_drift_is_seen_refitted_logged_and_survives_a_resume(flatterer, tmp_path):
    whole = run(tmp_path / "run", flatterer, "reward.drift.refit_every=2", "checkpoint.every=3", steps=3)
    assert whole[0]["reward/drift/rm/state"] == 2 and whole[0]["reward/drift/rm/gap"] > 0.2
    (said,) = events(tmp_path / "run", "drift/drift")
    assert "E[p] - E[y]" in said
    assert [row["reward/drift/rm/calibration_version"] for row in whole] == [0, 0, 0]
    resumed = run(
        tmp_path / "run",
        flatterer,
        "reward.drift.refit_every=2",
        "checkpoint.every=3",
        "checkpoint.resume=must",
        steps=5,
    )
    assert [row["reward/drift/rm/calibration_version"] for row in resumed] == [0, 0, 0, 1, 1]
    assert (
        abs(resumed[3]["reward/rm/mean"] - resumed[3]["reward/verifier/mean"])
        < 0.2
        < resumed[2]["reward/rm/mean"] - 0.5
    )
    (kept,) = (tmp_path / "run" / "drift").glob("rm-1-*.calib.json")
    latest = json.loads((tmp_path / "run" / "drift" / "rm.json").read_text())
    assert Calibrator.load(kept).calibration_id == latest["calibration_id"]
    assert "drifted from the verifier" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_that_must_not_drift_stops_with_the_step_written_down(flatterer, tmp_path):
    with pytest.raises(RewardDriftError, match=r"(?s)reward model rm.*reward.drift.action=stop"):
        run(tmp_path / "run", flatterer, "reward.drift.action=stop", steps=3)
    (row,) = rows_of(tmp_path / "run")
    assert row["reward/drift/rm/state"] == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
