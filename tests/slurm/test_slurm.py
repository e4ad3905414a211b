"""Every file of slurm/ on a real slurmctld: it runs, fails, is cancelled, is requeued at its time limit, and says so.

How jobs end is tried with a stand-in for `rlalign` that takes a second; the last two tests train for real.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/usr/bin/env bash
# rlalign train --config-name demo KEY=VALUE...: writes what it was given, and behaves as `behaviour=` says
for word in "$@"; do case $word in output_dir=*) out=${word#*=};; behaviour=*) how=${word#*=};; esac; done
if [ "$1" = report ]; then echo "$@" > "${@: -1}"; exit 0; fi
mkdir -p "$out"; echo "$@ RANK=$RANK/$WORLD_SIZE $MASTER_ADDR:$MASTER_PORT" >> "$out/calls-$RANK"
case ${how:-finish} in
  fail) echo "rlalign: told to fail" >&2; exit 1;;
  wait) trap 'echo saved >> "$out/saved"; exit 75' USR1
        [ -f "$out/saved" ] || for i in $(seq 600); do sleep 0.1; done;;
esac
echo '{}' > "$out/summary.json"
"""

# the rest (SIGNALING and STAGE_OUT among them) is passed through on the way
LASTING = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.geteuid() != 0,
        reason="needs slurmctld (Debian: apt-get install slurm-wlm munge) and root to start it",
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([ROOT / "scripts/local_slurm.sh", "up", folder, "2", "1"], check=True, capture_output=True)
    yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "RLALIGN_MASTER_ADDR": "127.0.0.1"}
    subprocess.run([ROOT / "scripts/local_slurm.sh", "down", folder], check=True, capture_output=True)


@pytest.fixture
def site(cluster, tmp_path) -> "Site":
    return Site(tmp_path, cluster)


class Site:
    """A folder from which jobs are submitted, with the stand-in for its virtual environment."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        (folder / "slurm").symlink_to(ROOT / "slurm")
        bin_folder = folder / "venv" / "bin"
        bin_folder.mkdir(parents=True)
        (bin_folder / "rlalign").write_text(STAND_IN)
        (bin_folder / "rlalign").chmod(0o755)
        self.environment = environment | {"RLALIGN_VENV": str(folder / "venv")}

    def call(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *words: str) -> str:
        return self.call("sbatch", "--parsable", *words)

    def end(self, job: str, timeout: float = 60) -> str:
        """The job's state once it has one that lasts."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            states = set(self.call("squeue", "-a", "-h", "-t", "all", "-j", job, "-o", "%T").split())
            if states and states <= LASTING:
                return " ".join(sorted(states))
            time.sleep(0.2)
        raise AssertionError(f"job {job} is still {states}:\n{self.output()}")

    def wait_for(self, pattern: str, timeout: float = 30) -> Path:
        until = time.monotonic() + timeout
        while not (found := list(self.folder.glob(pattern))):
            assert time.monotonic() < until, self.output()
            time.sleep(0.1)
        return found[0]

    def output(self) -> str:
        files = [*self.folder.glob("*.out"), *self.folder.glob("logs/*")]
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(files))


def test_a_job_runs_with_its_overrides_and_is_accounted_for(site, cluster):
    job = site.submit("slurm/single_node.sbatch", "--config-name", "demo", "algo.lr=1e-5")
    assert site.end(job) == "COMPLETED"
    call = (site.folder / f"runs/rlalign-{job}/calls-0").read_text()
    assert call.startswith(
        f"train --config-name demo algo.lr=1e-5 output_dir=runs/rlalign-{job} checkpoint.resume=auto"
    )
    accounts = (Path(cluster["SLURM_CONF"]).parent / "log/jobcomp.txt").read_text()
    assert re.search(rf"JobId={job} .*Name=rlalign JobState=COMPLETED", accounts)


def test_ranks_on_two_nodes_meet_at_one_address(site):
    job = site.submit("slurm/multi_node.sbatch", "--config-name", "demo")
    assert site.end(job) == "COMPLETED"
    calls = [(site.folder / f"runs/rlalign-nodes-{job}/calls-{rank}").read_text().split() for rank in (0, 1)]
    assert [words[-2] for words in calls] == ["RANK=0/2", "RANK=1/2"]
    assert calls[0][-1] == calls[1][-1] and re.fullmatch(r"127\.0\.0\.1:\d+", calls[0][-1])


def test_a_failure_is_a_failed_job_whose_output_shows_the_reason(site):
    job = site.submit("slurm/single_node.sbatch", "behaviour=fail")
    assert site.end(job) == "FAILED"
    assert "rlalign: told to fail" in (site.folder / f"rlalign-{job}.out").read_text()


def test_without_an_installation_the_job_says_what_to_set(site):
    site.environment["RLALIGN_VENV"] = str(site.folder / "nowhere")
    job = site.submit("slurm/single_node.sbatch", "x=1")
    assert site.end(job) == "FAILED"
    assert "no rlalign in PATH" in site.output() and "RLALIGN_VENV" in site.output()


def test_a_cancelled_job_ends_and_leaves_no_process(site):
    job = site.submit("slurm/single_node.sbatch", "behaviour=wait")
    site.wait_for(f"runs/rlalign-{job}/calls-0")
    site.call("scancel", job)
    assert site.end(job) == "CANCELLED"
    assert subprocess.run(["pgrep", "-f", f"output_dir=runs/rlalign-{job} "], capture_output=True).returncode == 1


def test_before_its_time_limit_a_job_saves_requeues_itself_and_finishes(site):
    job = site.submit("--time=1", "--signal=B:USR1@55", "slurm/single_node.sbatch", "behaviour=wait")
    assert site.end(job, timeout=120) == "COMPLETED"
    folder = site.folder / f"runs/rlalign-{job}"
    assert (folder / "saved").read_text() == "saved\n" and len((folder / "calls-0").read_text().splitlines()) == 2
    output = site.output()
    assert "requeued, goes on from" in output and "restart 1" in output


def test_a_job_that_only_restarts_is_given_up(site):
    site.environment["RLALIGN_RESTARTS"] = "0"
    job = site.submit("slurm/single_node.sbatch", "behaviour=wait")
    site.wait_for(f"runs/rlalign-{job}/calls-0")
    site.call("scancel", "--batch", "--signal=USR1", job)
    assert site.end(job) == "FAILED"
    assert "restarted 0 times; not again" in site.output()


def test_the_two_runs_of_the_experiment_differ_in_the_head_alone_and_are_compared(site):
    job = site.submit("slurm/ab_fp32_head.sbatch", "--config-name", "demo")
    assert site.end(job) == "COMPLETED"
    calls = [(site.folder / f"runs/rlalign-ab-{job}-{task}/calls-0").read_text().split() for task in (0, 1)]
    differ = [{word for word in words if "output_dir" not in word and ":" not in word} for words in calls]
    assert differ[0] ^ differ[1] == {"head_dtype=model", "name=head-model", "head_dtype=float32", "name=head-float32"}
    assert (
        f"runs/rlalign-ab-{job}-0 runs/rlalign-ab-{job}-1" in (site.folder / f"runs/rlalign-ab-{job}.html").read_text()
    )


def test_a_sweep_gives_each_task_its_line(site):
    (site.folder / "sweep.txt").write_text("algo.lr=1e-5 seed=1\nalgo.lr=1e-6 seed=2\n")
    job = site.submit("--array=1-3", "slurm/sweep.sbatch", "sweep.txt", "--config-name", "demo")
    assert site.end(job) == "COMPLETED FAILED"
    for task, line in ((1, "algo.lr=1e-5 seed=1"), (2, "algo.lr=1e-6 seed=2")):
        assert line in (site.folder / f"runs/rlalign-sweep-{job}-{task}/calls-0").read_text()
    assert "sweep.txt has no line 3" in site.output()


def really(site: Site) -> None:
    site.environment["RLALIGN_VENV"] = str(Path(sys.executable).parents[1])


SHORT = ("--config-name", "demo", "tracking.wandb=disabled", "task.eval_size=16")


def test_real_training_is_requeued_in_its_middle_and_goes_on_where_it_was(site):
    really(site)
    job = site.submit("slurm/single_node.sbatch", *SHORT, "steps=6")
    site.wait_for(f"runs/rlalign-{job}/tokens/step-000000.parquet", timeout=240)
    site.call("scancel", "--batch", "--signal=USR1", job)
    assert site.end(job, timeout=300) == "COMPLETED", site.output()
    folder = site.folder / f"runs/rlalign-{job}"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 5]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert "goes on after step" in (folder / "events.jsonl").read_text()


def test_real_training_on_two_nodes(site):
    really(site)
    job = site.submit("slurm/multi_node.sbatch", *SHORT, "steps=2", "trainer.zero_stage=3")
    assert site.end(job, timeout=400) == "COMPLETED", site.output()
    summary = json.loads((site.folder / f"runs/rlalign-nodes-{job}/summary.json").read_text())
    assert summary["head"]["trainer"]["ranks"] == 2 and summary["policy_version"] == 2
