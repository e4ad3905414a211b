"""A run whose tokens are sampled from truncated distributions, and its resume."""

from __future__ import annotations

import json

from rlalign.config import compose, load
from rlalign.run.train import train
from rlalign.tasks import Task

FLOOR = 1e-9  # k3 of float32 bodies with float32 heads on both sides


def test_a_run_over_top_p_top_k_and_min_p_goes_on_from_its_checkpoint(tmp_path, untied, monkeypatch):
    """Its last step, done again after a resume, has the numbers it had; the page says what they are over."""
    monkeypatch.setattr(Task, "reward", lambda self, prompt, completion: float(len(completion) % 2))
    folder = tmp_path / "run"
    support = ["rollout.top_p=0.9", "rollout.top_k=50", "rollout.min_p=0.01", "rollout.temperature=0.7"]
    small = [
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "task.train_size=32",
        "task.eval_size=4",
        "tracking=off",
    ]
    options = [
        f"model.path={untied}",
        f"output_dir={folder}",
        "steps=3",
        "model.dtype=float32",
        "algo.lr=1e-3",
        *small,
        *support,
    ]

    def run(*more):
        summary = train(load(compose("demo", [*options, *more])))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = list({row["step"]: row for row in lines}.values())  # the last of each step
        timed = ("time/", "seconds", "_per_s")
        return summary, [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]

    summary, rows = run("checkpoint.every=2")
    assert summary["mismatch"]["lag0"]["k3_max"] < FLOOR
    assert all(row["support/captured"] == 1.0 and row["support/log_mass"] < -0.01 for row in rows)
    assert rows[2]["rollout/policy_version"] == 2 and rows[2]["train/grad_norm"] > 0
    assert run("checkpoint.resume=must")[1] == rows
    assert "top_p 0.9, top_k 50, min_p 0.01 of the whole vocabulary" in (folder / "report.html").read_text()
