"""A run on a real Slurm on this machine, killed twice: two trainer ranks, two vLLM servers, four nodes; its phases as a table.

python -m benchmarks.cluster_run [--work FOLDER] [--steps 80] [--out benchmarks/results/cluster.md]     needs slurmctld and root

1. `sbatch --nodes=4 slurm/multi_node.sbatch` with RLALIGN_SERVER_NODES=2.
2. kill -9 of one server's vLLM while completions are sampled: its requests are asked for at the other; slurm/server.sh starts it
   again, and it joins at a later publish.
3. Only then, kill -9 of trainer rank 1: the job is requeued, and goes on from its last checkpoint with new servers.
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
from collections.abc import Callable
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


def processes(*words: str, without: str = "\0") -> list[int]:
    """Whose command line or environment has all these words, the newest last."""
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
    return sorted(found)


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

    def first_row(self, wanted: Callable[[dict], bool]) -> dict:
        """Wait until a row like this is logged."""
        while not (found := [row for row in rows_of(self.folder) if wanted(row)]):
            if self.state() in LASTING:
                raise RuntimeError(f"the job is {self.state()}; with more --steps?\n{self.output()}")
            time.sleep(0.05)
        return found[0]

    def kill(self, what: str, *words: str, without: str = "\0") -> int:
        """kill -9 of the newest process like this; returns the last step logged before it."""
        pid = processes(*words, f"SLURM_SUBMIT_DIR={self.work} ", without=without)[-1]
        last = rows_of(self.folder)[-1]["step"]
        os.kill(pid, signal.SIGKILL)
        self.note(f"kill -9 of {what} (pid {pid}) after step {last}")
        return last

    def state(self) -> str:
        return call("squeue", "-a", "-h", "-t", "all", "-j", self.job, "-o", "%T")

    def output(self) -> str:
        files = [*self.work.glob("*.out"), *self.work.glob("logs/*")]
        return "\n".join(f"--- {f.name}\n{f.read_text()[-3000:]}" for f in sorted(files))

    def down(self) -> None:
        call("scripts/local_slurm.sh", "down", str(self.work / "cluster"))


def live_through(cluster: Cluster) -> None:
    """The story of the docstring."""
    cluster.first_row(lambda row: True)
    cluster.note("step 0 logged: two ranks, two servers")
    while not (cluster.folder / "checkpoints" / "step-000002").exists():
        time.sleep(0.01)
    time.sleep(0.1)  # into the rollouts of the next step
    killed = cluster.kill("a server's vLLM", "vllm.entrypoints.openai.api_server", without="rollout-server")
    row = cluster.first_row(lambda row: row["step"] > killed and row["rollout/servers"] == 1)
    cluster.note(
        f"step {row['step']} logged with one server; {row['rollout/reissued']:.0f} requests were asked for again"
    )
    alone = row["step"]
    row = cluster.first_row(lambda row: row["step"] > alone and row["rollout/servers"] == 2)
    cluster.note(
        f"step {row['step']} logged with two servers: the killed one was started again and has the newest weights"
    )
    rejoined = row["step"]
    cluster.first_row(lambda row: row["step"] >= rejoined + 2)
    cluster.kill("trainer rank 1", "rlalign train", " RANK=1 ")
    while cluster.state() == "RUNNING":
        time.sleep(0.1)
    cluster.note("the job is requeued")
    while not (said := goes_on(cluster.folder)):
        time.sleep(0.2)
    cluster.note(f"the second life of the job, with two new servers: {said}")
    while cluster.state() not in LASTING:
        time.sleep(0.2)
    cluster.note(f"the job ended: {cluster.state()}")
    if cluster.state() != "COMPLETED":
        raise RuntimeError(cluster.output())
    time.sleep(2)
    left = processes(f"SLURM_JOB_ID={cluster.job} ")
    cluster.note(f"{len(left)} processes of the job are left")


def goes_on(folder: Path) -> str:
    """What the run's own events say of its way back."""
    said = [json.loads(line)["message"] for line in (folder / "events.jsonl").read_text().splitlines()]
    return next((message for message in said if message.startswith("goes on after step")), "")


def lives(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each part of the story, in order."""
    found: dict[str, list[dict]] = {}
    names = iter(("two servers", "one killed", "it is back", "after the requeue"))
    name, before = next(names), None
    for row in rows:
        if before is not None and (
            row["rollout/servers"] != before["rollout/servers"] or row["seconds"] < before["seconds"]
        ):
            name = next(names)
        found.setdefault(name, []).append(row)
        before = row
    return found


def table(cluster: Cluster) -> str:
    """The phases of every logged step, and the story."""
    from rlalign.tracking.environment import snapshot

    parts, machine = lives(rows_of(cluster.folder)), snapshot()
    commit, cores = call("git", "rev-parse", "--short", "HEAD"), f"{machine['cores']} cores ({machine['cpu']})"
    done = {row["step"]: row for row in rows_of(cluster.folder)}
    whole = sum(row["time/step_s"] for row in done.values())

    def line(phase: str) -> str:
        key = f"time/{phase}_s"
        medians = " | ".join(f"{statistics.median(row[key] for row in rows):.2f}" for rows in parts.values())
        slowest = max(done.values(), key=lambda row: row[key])
        share = sum(row[key] for row in done.values()) / whole
        return f"| {phase} | {medians} | {slowest[key]:.1f} (step {slowest['step']}) | {share:.0%} |"

    heads = [f"{name}: steps {rows[0]['step']}-{rows[-1]['step']}" for name, rows in parts.items()]
    slurm = call("sinfo", "--version")
    kept = max(row["mismatch/lag0/k3"] for row in done.values())
    return "\n".join(
        [
            "# A run on Slurm that was killed twice",
            "",
            f"`python -m benchmarks.cluster_run --steps {cluster.steps}` at {commit}: two trainer ranks (ZeRO 2, float32) and",
            f"two vLLM servers, each on a node of its own of a real {slurm} on this machine, submitted with",
            "`RLALIGN_SERVER_NODES=2 sbatch --nodes=4 slurm/multi_node.sbatch`.",
            f"{cores} for all of it, which other programs used too: the shares say more than the seconds.",
            "Medians of seconds a step:",
            "",
            f"| phase | {' | '.join(heads)} | longest | share of all steps |",
            f"|---|{'--:|' * len(heads)}--:|--:|",
            *(line(phase) for phase in (*PHASES, "step")),
            "",
            "```",
            *cluster.notes,
            "```",
            "",
            f"Steps 0 to {max(done)} are logged, each with lag-0 k3 of at most {kept:.1e} nats a token; reward "
            f"{done[0]['reward/mean']:.3f} to {done[max(done)]['reward/mean']:.3f}.",
            "",
            "The accounting (`sacct --completion`), one line for each life; the first ended by going back into the queue:",
            "",
            "```",
            call(
                "sacct",
                "--completion",
                "-j",
                cluster.job,
                "-o",
                "JobID,JobName%14,State%12,ExitCode,Start,End,NNodes,NodeList",
            ),
            "```",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/rlalign-cluster-run"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cluster.md"))
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
