"""The demo with PPO, really run: it learns, its critic explains something, and a resumed run repeats it bit for bit."""

import json

import pytest

from rlalign.config import compose, load
from rlalign.run.train import train

STEPS = 8
TIMED = ("time/", "seconds", "_per_s", "overhead/")  # in names of what a clock wrote
KL = ["algo.kl_penalty.coef=0.02", "algo.kl_penalty.target=0.1", "algo.kl_penalty.horizon=1000"]


def without_clocks(row: dict) -> dict:
    return {key: value for key, value in row.items() if not any(part in key for part in TIMED)}


def rows_of(directory) -> dict[int, dict]:
    """The last row of every step."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The run, and what its last step logged when it was repeated from the checkpoint before it."""
    folder = tmp_path_factory.mktemp("ppo") / "run"
    faster = ["algo.epochs=2", "algo.critic.warmup_steps=1", "algo.critic.lr=3e-3", *KL]
    options = [f"output_dir={folder}", f"steps={STEPS}", f"checkpoint.every={STEPS - 1}", "tracking=off", *faster]
    train(load(compose("demo_ppo", options)))
    rows = rows_of(folder)
    train(load(compose("demo_ppo", [*options, "checkpoint.resume=must", "overwrite=false"])))
    return rows, rows_of(folder)[STEPS - 1]


def test_it_learns_and_the_critic_explains_what_was_earned(demo):
    rows, _ = demo
    reward = [rows[step]["reward/mean"] for step in range(STEPS)]
    assert sum(reward[-2:]) / 2 - sum(reward[:2]) / 2 > 0.08
    assert rows[STEPS - 1]["eval/accuracy"] > rows[0]["eval/accuracy"] + 0.05
    explained = [rows[step]["critic/explained_variance"] for step in range(STEPS)]
    assert abs(explained[0]) < 1e-6 and sum(explained[-3:]) / 3 > 0.01  # a new critic says 0 everywhere
    assert abs(rows[STEPS - 1]["critic/bias"]) < abs(rows[0]["critic/bias"])
    assert [rows[step].get("publish/version") for step in range(STEPS)] == [None, *range(2, 2 * STEPS, 2)]
    assert all(row["mismatch/lag0/k3"] < 1e-3 for row in rows.values())


def test_a_resumed_run_repeats_it_bit_for_bit(demo):
    rows, again = demo
    before = without_clocks(rows[STEPS - 1])
    assert without_clocks(again) == before
    assert before["ref_kl/coef"] != 0.02 and before["critic/grad_norm"] > 0  # both have a memory that was needed
