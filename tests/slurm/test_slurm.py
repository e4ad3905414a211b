"""Every file of slurm/ on a real slurmctld: it runs, fails, is cancelled, is requeued at its time limit, and says so.

How jobs end is tried with a stand-in for `rlalign` that takes a second; test_training.py trains for real.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlalign.ranks import environment_without_launcher
from tests.slurm.site import ROOT, Site

pytestmark = pytest.mark.slurm
SINGLE, MULTI = "slurm/single_node.sbatch", "slurm/multi_node.sbatch"
DEMO = ("--config-name", "demo")
# All are submitted at once: a job mostly waits. Name -> variables of the site, and the words of sbatch.
JOBS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "limited": ({}, ("--time=1", "--signal=B:USR1@57", SINGLE, "behaviour=wait")),
    "die-once": ({}, (MULTI, "behaviour=die-once")),
    "runs": ({}, (SINGLE, *DEMO, "algo.lr=1e-5")),
    "two nodes": ({"RLALIGN_SERVER_NODES": "0", "RLALIGN_RUN": "mine"}, (MULTI, *DEMO)),
    "multi_node": ({}, (MULTI, *DEMO, "behaviour=need-servers")),
    "hetero": ({}, ("slurm/hetero.sbatch", *DEMO, "behaviour=need-servers")),
    "lost": ({"RLALIGN_CRASHES": "0"}, (SINGLE, "behaviour=lost")),
    "no server": ({"RLALIGN_SERVER_RESTARTS": "1", "RLALIGN_CRASHES": "0"}, (MULTI, "behaviour=no-server")),
    "too many": ({"RLALIGN_SERVER_NODES": "2"}, (MULTI, "x=1")),
    "fails": ({}, (SINGLE, "behaviour=fail")),
    "nowhere": ({"RLALIGN_VENV": "/nowhere"}, (SINGLE, "x=1")),
    "cancelled": ({}, (MULTI, "behaviour=wait")),
    "restarts": ({"RLALIGN_RESTARTS": "0"}, (SINGLE, "behaviour=wait")),
    "ab": ({}, ("slurm/ab_fp32_head.sbatch", *DEMO)),
    "sweep": ({}, ("--array=1-3", "slurm/sweep.sbatch", "sweep.txt", *DEMO)),
}


@pytest.fixture(scope="module")
def begun(cluster, tmp_path_factory) -> dict[str, tuple[Site, str]]:
    """Name -> its site and its job."""
    found = {}
    for name, (variables, words) in JOBS.items():
        site = Site(tmp_path_factory.mktemp(name.replace(" ", "-")), cluster)
        site.environment |= variables
        (site.folder / "sweep.txt").write_text("algo.lr=1e-5 seed=1\nalgo.lr=1e-6 seed=2\n")
        found[name] = site, site.submit(*words)
    return found


def test_a_job_runs_with_its_overrides_and_is_accounted_for(begun, cluster):
    site, job = begun["runs"]
    assert site.end(job) == "COMPLETED", site.output()
    call = (site.folder / f"runs/rlalign-{job}/calls-0").read_text()
    assert call.startswith(
        f"train --config-name demo algo.lr=1e-5 output_dir=runs/rlalign-{job} checkpoint.resume=auto RANK=0/1"
    )
    accounts = (Path(cluster["SLURM_CONF"]).parent / "log/jobcomp.txt").read_text()
    assert re.search(rf"JobId={job} .*Name=rlalign JobState=COMPLETED", accounts)


def test_ranks_on_two_nodes_meet_at_one_address_and_a_finished_run_is_not_run_again(begun):
    site, job = begun["two nodes"]
    assert site.end(job) == "COMPLETED", site.output()
    calls = [(site.folder / f"runs/mine/calls-{rank}").read_text().split() for rank in (0, 1)]
    assert [words[-2] for words in calls] == ["RANK=0/2", "RANK=1/2"]
    assert calls[0][-1] == calls[1][-1] and re.fullmatch(r"127\.0\.0\.1:\d+", calls[0][-1])
    assert not any("rollout" in word for word in calls[0])
    again = site.submit(MULTI, *DEMO)
    assert site.end(again) == "COMPLETED" and "runs/mine is finished" in site.output()
    assert len((site.folder / "runs/mine/calls-0").read_text().splitlines()) == 1


@pytest.mark.parametrize("file", ["multi_node", "hetero"])
def test_servers_and_trainers_have_nodes_of_their_own_and_end_together(begun, file):
    """Where the servers are is told by the folder in which they announce themselves; whoever ends last leaves nothing."""
    site, job = begun[file]
    assert site.end(job) == "COMPLETED", site.output()
    (folder,) = site.folder.glob(f"runs/*-{job}")
    rank = (folder / "calls-0").read_text()
    shared = f"runs/{folder.name}"
    assert f"rollout.backend=server rollout.server_folder={shared}.servers rollout.wait_for=1" in rank
    assert f"weights.transport=folder weights.shared={shared}.weights" in rank and "RANK=0/1" in rank
    server = (folder / "server-calls").read_text()
    assert server.startswith("rollout-server --host 127.0.0.1 --config-name demo") and "wait_for=1" in server
    node = {line.split("NODE=")[1].strip() for line in (rank, server)}
    assert len(node) == 2, "the server shares the trainer's node"
    assert (folder / "server-ended").exists()
    assert not list(site.folder.glob("runs/*.servers")) and not list(site.folder.glob("runs/*.weights"))


def test_what_dies_again_and_again_in_one_place_is_given_up(begun):
    site, job = begun["lost"]
    assert site.end(job) == "FAILED", site.output()
    assert "a process died 1 times since the start; not again" in site.output()


def test_when_every_server_has_ended_the_ranks_are_not_left_waiting(begun):
    site, job = begun["no server"]
    assert site.end(job) == "FAILED", site.output()
    output = site.output()
    assert "every rollout server ended" in output and "no such model" in output


def test_more_server_nodes_than_nodes_are_refused(begun):
    site, job = begun["too many"]
    assert site.end(job) == "FAILED", site.output()
    assert "RLALIGN_SERVER_NODES=2 leaves none of the job's 2 node(s) to train on" in site.output()


def test_a_failure_is_a_failed_job_whose_output_shows_the_reason(begun):
    site, job = begun["fails"]
    assert site.end(job) == "FAILED", site.output()
    assert "rlalign: told to fail" in (site.folder / f"rlalign-{job}.out").read_text()


def test_without_an_installation_the_job_says_what_to_set(begun):
    site, job = begun["nowhere"]
    assert site.end(job) == "FAILED", site.output()
    assert "no rlalign in PATH" in site.output() and "RLALIGN_VENV" in site.output()


def test_a_cancelled_job_ends_and_leaves_no_process(begun):
    site, job = begun["cancelled"]
    site.wait_for(f"runs/rlalign-nodes-{job}/calls-0")
    site.wait_for(f"runs/rlalign-nodes-{job}/server-calls")
    site.call("scancel", job)
    assert site.end(job) == "CANCELLED"
    assert subprocess.run(["pgrep", "-f", f"output_dir=runs/rlalign-nodes-{job} "], capture_output=True).returncode == 1


def test_a_job_that_only_restarts_is_given_up(begun):
    site, job = begun["restarts"]
    site.wait_for(f"runs/rlalign-{job}/calls-0")
    site.call("scancel", "--batch", "--signal=USR1", job)
    assert site.end(job) == "FAILED", site.output()
    assert "restarted 0 times; not again" in site.output()


def test_a_chain_goes_on_where_the_job_before_stopped_and_ends_when_the_run_is_finished(site):
    site.environment["RLALIGN_RUN"] = "long"
    jobs = site.call("slurm/chain.sh", "3", "slurm/single_node.sbatch", "behaviour=wait").split()
    site.wait_for("runs/long/calls-0")
    site.call("scancel", "--batch", "--signal=USR1", jobs[0])
    assert [site.end(job) for job in jobs] == ["COMPLETED"] * 3
    assert len((site.folder / "runs/long/calls-0").read_text().splitlines()) == 2
    output = site.output()
    assert "saved; the next job of the chain goes on" in output and "runs/long is finished" in output


def test_the_two_runs_of_the_experiment_differ_in_the_head_alone_and_are_compared(begun):
    site, job = begun["ab"]
    assert site.end(job) == "COMPLETED", site.output()
    calls = [(site.folder / f"runs/rlalign-ab-{job}-{task}/calls-0").read_text().split() for task in (0, 1)]
    differ = [{word for word in words if "output_dir" not in word and ":" not in word} for words in calls]
    assert {w for w in differ[0] ^ differ[1] if "NODE=" not in w} == {
        "head_dtype=model", "name=head-model", "head_dtype=float32", "name=head-float32"
    }  # fmt: skip
    assert (
        f"runs/rlalign-ab-{job}-0 runs/rlalign-ab-{job}-1" in (site.folder / f"runs/rlalign-ab-{job}.html").read_text()
    )


def test_a_sweep_gives_each_task_its_line(begun):
    site, job = begun["sweep"]
    assert site.end(job) == "COMPLETED FAILED"
    for task, line in ((1, "algo.lr=1e-5 seed=1"), (2, "algo.lr=1e-6 seed=2")):
        assert line in (site.folder / f"runs/rlalign-sweep-{job}-{task}/calls-0").read_text()
    assert "sweep.txt has no line 3" in site.output()


def test_hydras_launcher_gives_each_run_of_a_sweep_a_job_and_a_folder(site):
    """Here of runs that cannot start: what the job said comes back as an error, instead of a wait for ever."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", "-m", *DEMO, "hydra/launcher=slurm", "model.path=nowhere", "seed=1,2"],
        cwd=site.folder, env=environment_without_launcher() | site.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "model.path='nowhere' is not a Hugging Face folder" in done.stderr
    for seed in (1, 2):
        folder = site.wait_for(f"runs/sweep/*seed={seed}/run.json").parent
        assert f"seed: {seed}" in (folder / "config.yaml").read_text()
    (script,) = site.folder.glob("runs/sweep/.submitit/*/*_submission.sh")
    assert "--signal=USR2@300" in script.read_text() and "--array=0-1%" in script.read_text()


def test_a_dead_server_is_started_again_and_a_dead_rank_brings_the_job_back(begun):
    """The first time the server dies, the second time the trainer: once inside the job, once by a requeue."""
    site, job = begun["die-once"]
    assert site.end(job, timeout=90) == "COMPLETED", site.output()
    (folder,) = site.folder.glob(f"runs/rlalign-nodes-{job}")
    assert len((folder / "server-calls").read_text().splitlines()) == 3  # died, stayed; after the requeue once more
    output = site.output()
    assert "ended with code 137 at start 1" in output and "restart 1" in output
    assert "died at the start" in (site.folder / f"runs/{folder.name}.crashes").read_text()


def test_before_its_time_limit_a_job_saves_requeues_itself_and_finishes(begun):
    site, job = begun["limited"]
    assert site.end(job, timeout=120) == "COMPLETED", site.output()
    folder = site.folder / f"runs/rlalign-{job}"
    assert (folder / "saved").read_text() == "saved\n" and len((folder / "calls-0").read_text().splitlines()) == 2
    output = site.output()
    assert "requeued, goes on from" in output and "restart 1" in output
