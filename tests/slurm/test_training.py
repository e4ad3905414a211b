"""A real run on a real Slurm: two trainer ranks on two nodes, a vLLM server on a third, requeued in its middle."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm
SHORT = ("--config-name", "demo", "tracking.wandb=disabled", "task.eval_size=16", "rollout.prompts_per_step=8")


def test_ranks_and_a_server_on_three_nodes_are_requeued_in_the_middle_and_go_on_where_they_were(site):
    """Six steps in two lives of the job; the servers of the second are others, and get the weights of the checkpoint."""
    site.environment |= {"RLALIGN_VENV": str(Path(sys.executable).parents[1])}
    job = site.submit("--nodes=3", "slurm/multi_node.sbatch", *SHORT, "steps=6", "trainer.zero_stage=3")
    folder = site.wait_for("runs/*/tokens/step-000000.parquet", timeout=600).parents[1]
    site.call("scancel", "--batch", "--signal=USR1", job)
    assert site.end(job, timeout=600) == "COMPLETED", site.output()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert max(row["mismatch/lag0/k3"] for row in rows) < 1e-3, "the second server samples with other weights"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["head"]["trainer"]["ranks"] == 2 and summary["policy_version"] == 6
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert "goes on after step" in (folder / "events.jsonl").read_text()
    assert site.output().count("rollout server ready") == 2 and not list(site.folder.glob("runs/*.servers"))
