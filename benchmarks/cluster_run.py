"""A run on a real Slurm on this machine, killed twice: two trainer ranks, two vLLM servers, four nodes; its phases as a table.

python -m benchmarks.cluster_run [--work FOLDER] [--steps 12] [--out FILE]       needs slurmctld and root (scripts/local_slurm.sh)

1. `sbatch --nodes=4 slurm/multi_node.sbatch` with RLALIGN_SERVER_NODES=2.
2. kill -9 of one server's vLLM while completions are sampled: its requests are asked for at the other; slurm/server.sh starts it
   again, and it joins at a later publish.
3. kill -9 of trainer rank 1: the job is requeued, and goes on from its last checkpoint with new servers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PHASES = ("rollout", "reward", "score", "train", "publish")
LASTING = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def call(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout.strip()


def rows_of(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""  # the last line may be half written
    return [json.loads(line) for line in whole.splitlines()]


def process(*words: str, without: str = "\0") -> int:
    """The newest process whose command line has all these words. Raises RuntimeError where there is none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                variables = (entry / "environ").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # ended, or somebody else's
                continue
            if all(word in line or word in variables for word in words) and without not in line:
                found.append(int(entry.name))
    if not found:
        raise RuntimeError(f"no process with {words}")
    return max(found)


class Cluster:
    """Slurm, the job, and what is written down of both."""

    def __init__(self, work: Path, steps: int) -> None:
        self.work, self.notes, self.steps = work, [], steps
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / "slurm").symlink_to(ROOT / "slurm")
        call("scripts/local_slurm.sh", "up", str(work / "cluster"), "4", "1")
        os.environ |= {
            "SLURM_CONF": str(work / "cluster" / "slurm.conf"), "RLALIGN_MASTER_ADDR": "127.0.0.1",
            "RLALIGN_SERVER_HOST": "127.0.0.1", "RLALIGN_SERVER_NODES": "2", "RLALIGN_VENV": str(Path(sys.executable).parents[1]),
        }  # fmt: skip
        self.began = time.monotonic()
        self.job = call(
            "sbatch", "--parsable", "--nodes=4", "slurm/multi_node.sbatch", "--config-name", "demo", f"steps={steps}",
            "model.dtype=float32", "trainer.zero_stage=2", "checkpoint.every=1", "tracking.wandb=disabled", "task.eval_size=32",
            cwd=work,
        )  # fmt: skip
        self.folder = work / "runs" / f"rlalign-nodes-{self.job}"

    def note(self, what: str) -> None:
        self.notes.append(f"{time.monotonic() - self.began:5.0f} s  {what}")
        print(self.notes[-1], flush=True)

    def reach(self, step: int) -> None:
        """Wait until this step is logged."""
        while not any(row["step"] >= step for row in rows_of(self.folder)):
            self.require_running()
            time.sleep(0.05)

    def state(self) -> str:
        return call("squeue", "-a", "-h", "-t", "all", "-j", self.job, "-o", "%T")

    def require_running(self) -> None:
        if self.state() in LASTING:
            raise RuntimeError(f"the job is {self.state()}:\n{self.output()}")

    def output(self) -> str:
        files = [*self.work.glob("*.out"), *self.work.glob("logs/*")]
        return "\n".join(f"--- {f.name}\n{f.read_text()[-3000:]}" for f in sorted(files))

    def down(self) -> None:
        call("scripts/local_slurm.sh", "down", str(self.work / "cluster"))


def live_through(cluster: Cluster) -> None:
    """The story of the docstring."""
    server = "vllm.entrypoints.openai.api_server"
    cluster.reach(0)
    cluster.note("first step logged: two ranks, two servers")
    cluster.reach(2)
    pid = process(server, f"SLURM_SUBMIT_DIR={cluster.work} ", without="rollout-server")
    os.kill(pid, signal.SIGKILL)
    cluster.note(f"kill -9 of a server (vLLM, pid {pid}) after step {rows_of(cluster.folder)[-1]['step']}")
    half = cluster.steps // 2
    cluster.reach(half)
    pid = process("rlalign train", " RANK=1 ", f"SLURM_SUBMIT_DIR={cluster.work} ")
    os.kill(pid, signal.SIGKILL)
    last = rows_of(cluster.folder)[-1]["step"]
    cluster.note(f"kill -9 of trainer rank 1 (pid {pid}) after step {last}")
    while cluster.state() == "RUNNING":
        time.sleep(0.1)
    cluster.note("the job is requeued")
    cluster.reach(last + 2)
    cluster.note(f"step {last + 2} logged by the second life of the job")
    while cluster.state() not in LASTING:
        time.sleep(0.2)
    cluster.note(f"the job ended: {cluster.state()}")
    if cluster.state() != "COMPLETED":
        raise RuntimeError(cluster.output())


def table(cluster: Cluster) -> str:
    """The phases of every logged step, and the story."""
    rows = {row["step"]: row for row in rows_of(cluster.folder)}
    times = {name: [row[f"time/{name}_s"] for row in rows.values()] for name in (*PHASES, "step")}
    whole = sum(times["step"])
    lines = [
        "| phase | s a step (median) | longest (of step) | share of all steps |",
        "|---|--:|--:|--:|",
        *(
            f"| {name} | {statistics.median(found):.3f} | {max(found):.2f} ({found.index(max(found))}) | {sum(found) / whole:.0%} |"
            for name, found in times.items()
        ),
        "",
        "```",
        *cluster.notes,
        "```",
        "",
    ]
    kept = [rows[step]["mismatch/lag0/k3"] for step in sorted(rows)]
    lines.append(
        f"Steps 0 to {max(rows)} are logged, each with lag-0 k3 of at most {max(kept):.1e} nats a token; reward "
        f"{rows[0]['reward/mean']:.3f} to {rows[max(rows)]['reward/mean']:.3f}."
    )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/rlalign-cluster-run"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("/tmp/rlalign-cluster-run.md"))
    given = parser.parse_args()
    cluster = Cluster(given.work, given.steps)
    try:
        live_through(cluster)
        given.out.write_text(table(cluster))
        print(given.out.read_text())
    finally:
        cluster.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
